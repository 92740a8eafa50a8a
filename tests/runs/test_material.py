"""What a pass reads: rows of images where they lie, and nothing of them stays in memory."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpmix.core import heads, network, views
from dpmix.images import data
from dpmix.images.image_cache import forget
from dpmix.models import encoders
from dpmix.models.wide_resnet import wide_resnet
from dpmix.runs.identity import Contents
from dpmix.runs.material import Part, Rows, prepare
from dpmix.runs.spec import ComputeFlags, RunSpec

SPEC = RunSpec(recipe=views.Recipe(k_base=1), epsilon=None, learning_rate=1.0, batch_size=8, validation=0.3)


def resident(cache: Path) -> int:
    """Bytes of the decoded images that are in this process's memory."""
    maps = Path("/proc/self/smaps").read_text()
    found = re.findall(rf"{re.escape(str(cache))}/\w+\.u8\n.*?Rss: +(\d+) kB", maps, re.DOTALL)
    return sum(int(kilobytes) for kilobytes in found) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory in /proc, which Linux alone has")
def test_images_are_read_where_they_lie_and_given_back(photos, tmp_path):
    compute = ComputeFlags(cache=str(tmp_path / "cache"), progress=False)
    spec = replace(SPEC, dataset=f"folder:{photos}")
    material = prepare([Contents(compute, tmp_path).identity(spec)], compute)
    whole = data.load(spec.dataset, image_size=16, cache=compute.cache)
    for part, images in ((material.train, whole.train), (material.test, whole.test)):
        assert isinstance(part, Part) and isinstance(part.images, Rows)
        assert torch.equal(part.images[:], images.images[part.rows])
        assert torch.equal(part.labels, images.labels[part.rows])
        assert part.images[torch.tensor([1, 0])].tolist() == images.images[part.rows[[1, 0]]].tolist()
        assert part.images.shape == (len(part), 1, 16, 16) and part.whole.class_names == ("a", "b")
    for images in (whole.train.images, whole.test.images):
        forget(images)
    assert resident(tmp_path / "cache") == 0
    material.train.images[:]
    assert resident(tmp_path / "cache") == 0, "given back"
    whole.train.images.sum()
    assert resident(tmp_path / "cache") > 0, "the test can tell"
    before = whole.train.images.clone()
    forget(whole.train.images)
    assert torch.equal(whole.train.images, before) and resident(tmp_path / "cache") > 0, "read again"
    forget(before)  # not mapped


def test_training_does_not_know_rows_from_a_tensor(private):
    rows = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    part, copied = Part(private, rows), private.subset(rows)
    pixels = encoders.Encoder(lambda x: x.flatten(1), 4, 16, (1,), "pixels")
    head = heads.Head(recipe=views.Recipe(k_base=2), learning_rate=1.0, noise_multiplier=1.0)
    about = dict(num_classes=3, expected_batch=4, steps=3, seed=0, ids=rows, progress=False)
    one, other = (heads.train_heads(pixels, s.images, s.labels, [head], **about) for s in (part, copied))
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(heads.encode(pixels, part.images, batch=3), heads.encode(pixels, copied.images))
    about |= dict(recipe=head.recipe, clip_norm=1, noise_multiplier=1, learning_rate=1, sample_rate=0.5)
    trained = [network.train(wide_resnet(10, 1, 3, channels=1, seed=0), s.images, s.labels, **about).state
               for s in (part, copied)]  # fmt: skip
    assert all(torch.equal(trained[0][name], t) for name, t in trained[1].items())
    model = wide_resnet(10, 1, 3, channels=1, seed=0)
    assert network.accuracy(model, part.images, part.labels) == network.accuracy(model, copied.images, copied.labels)
