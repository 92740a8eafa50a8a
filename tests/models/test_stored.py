"""Views that are stored: the same head as from fresh ones, encoded once, resumed, refused; and who may read them."""

import errno
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSES, image_set

from dpmix import models
from dpmix.core import heads, sources, views
from dpmix.models import stored

RECIPES = [views.METHODS[name] for name in ("dp-sgd", "self-aug", "mix-self", "mix-diff")]
SMALL = [
    views.Recipe(k_base=1, transform="none"),
    views.Recipe(k_base=3),
    views.Recipe(k_base=3, k_self=2),
    views.Recipe(k_base=3, k_self=2, k_diff=1),
    views.Recipe(k_base=2, k_self=2, k_diff=1, mix="cutmix"),
]
N = 150  # two chunks and a part of a third


@pytest.fixture(scope="module")
def data():
    return image_set(N), image_set(20, seed=1)


@pytest.fixture
def counted():
    """tiny-convnext, and how many images it was given."""
    encoder = models.encoder("tiny-convnext")
    encoder.features.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    seen: list[int] = []
    return encoder, seen


def store(encoder, data, folder, recipes=SMALL, **other):
    private, public = data
    about = dict(num_classes=CLASSES, folder=folder, public=public, progress=False, seed=5)
    return stored.StoredViews(encoder, private.images, private.labels, recipes, **{**about, **other})


def fresh(encoder, data, recipes=SMALL, **other):
    private, public = data
    about = dict(num_classes=CLASSES, public=public, redraw=False, seed=5)
    return sources.FreshViews(encoder, private.images, private.labels, recipes, **{**about, **other})


def test_both_sources_give_the_same_views_and_the_same_head(data, tmp_path, counted):
    encoder, _ = counted
    one, two = fresh(encoder, data), store(encoder, data, tmp_path)
    assert isinstance(one, sources.Source) and isinstance(two, sources.Source) and one.name == two.name
    for places in (torch.tensor([140, 3, 77]), torch.arange(60, 90), torch.arange(0)):
        (x, y), (z, w) = one.batch(places, 0), two.batch(places, 9)
        torch.testing.assert_close(z, x, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(w, y, atol=1e-6, rtol=0)
    bank = [heads.Head(recipe=r, learning_rate=2.0, noise_multiplier=0.5, clip_norm=0.1) for r in SMALL]
    about = dict(expected_batch=20, steps=12, seed=5, progress=False)
    first, second = heads.train(one, bank, **about), heads.train(two, bank, **about)
    assert (first.weights - second.weights).norm() < 2e-3 * first.weights.norm()
    drawn = sources.FreshViews(
        encoder, data[0].images, data[0].labels, SMALL, num_classes=CLASSES, seed=5, public=data[1]
    )
    assert not torch.allclose(drawn.batch(torch.arange(5), 0)[0], drawn.batch(torch.arange(5), 1)[0], atol=1e-3)
    third = heads.train(drawn, bank, **about)
    assert (first.weights - third.weights).norm() > 0.02 * first.weights.norm(), "a control: other views, another head"


def test_only_what_is_missing_is_encoded(data, tmp_path, counted):
    encoder, seen = counted
    per = {}
    for k, recipes in enumerate((SMALL[:1], SMALL[:3], SMALL, SMALL, SMALL[1:2], [views.Recipe(k_base=2)])):
        before = sum(seen)
        store(encoder, data, tmp_path, recipes, public=data[1] if k >= 2 else None)
        per[k] = sum(seen) - before
    assert [per[k] / N for k in range(6)] == [1, 5, 5, 0, 0, 0]
    longer = [views.Recipe(k_base=5)]
    before = sum(seen)
    source = store(encoder, data, tmp_path, longer)
    assert sum(seen) - before == 2 * N, "two more views an example"
    x, _ = fresh(encoder, data, longer).batch(torch.arange(7), 0)
    torch.testing.assert_close(source.batch(torch.arange(7), 0)[0], x, atol=1e-3, rtol=1e-3)


def test_other_runs_read_the_store_and_other_content_does_not(data, tmp_path, counted):
    encoder, seen = counted
    private, public = data
    source = store(encoder, data, tmp_path)
    made = len(seen)
    for rate, batch, steps in ((1.0, 20, 5), (0.1, N, 2)):
        bank = [heads.Head(recipe=r, learning_rate=rate, noise_multiplier=1.0) for r in SMALL]
        heads.train(store(encoder, data, tmp_path), bank, expected_batch=batch, steps=steps, seed=8, progress=False)
    assert len(seen) == made
    pixel = private.images.clone()
    pixel[0, 0, 0, 0] ^= 1
    others = [
        store(encoder, (private.__class__(pixel, private.labels, private.class_names), public), tmp_path),
        store(encoder, data, tmp_path, seed=6),
        store(encoder, data, tmp_path, ids=torch.arange(N) + 1),
        store(models.encoder("tiny-vit"), data, tmp_path),
        store(encoder.to(dtype=torch.bfloat16), data, tmp_path),
    ]
    assert len({o.folder for o in others} | {source.folder}) == 6
    assert others[1].name != source.name, "or runs on other views would share their noise"
    turned = torch.flip(torch.arange(len(public)), (0,))
    before = sum(seen)
    other = store(encoder, (private, public.subset(turned)), tmp_path)
    assert other.folder == source.folder and sum(seen) > before, "what the public images have a part in is encoded anew"


def test_a_part_of_the_store(data, tmp_path, counted):
    source = store(counted[0], data, tmp_path)
    places = torch.tensor([5, 9, 149, 2])
    part = source.subset(places)
    assert part.n == 4 and source.n == N
    assert torch.equal(part.batch(torch.tensor([2, 0]), 0)[0], source.batch(torch.tensor([149, 5]), 0)[0])
    assert torch.equal(
        part.subset(torch.tensor([3])).batch(torch.tensor([0]), 0)[0], source.batch(torch.tensor([2]), 0)[0]
    )


def test_a_damaged_chunk_is_encoded_again_with_a_warning(data, tmp_path, counted):
    encoder, seen = counted
    source = store(encoder, data, tmp_path)
    whole = source.batch(torch.arange(N), 0)[0]
    block = next(b for b in source.blocks if b.count == 3)
    content = bytearray(block.path.read_bytes())
    content[70 * block.row.itemsize + 5] ^= 1
    block.path.write_bytes(content)
    before = sum(seen)
    with pytest.warns(UserWarning, match="damaged, encoded again: 1 chunk of 64, the first 1"):
        again = store(encoder, data, tmp_path)
    assert torch.equal(again.batch(torch.arange(N), 0)[0], whole)
    assert sum(seen) - before == 64 * 3
    block.path.write_bytes(content[:-1])
    store(encoder, data, tmp_path)
    assert block.path.stat().st_size == block.size, "a file that was cut short is made anew"


@pytest.mark.parametrize("more", [b"x abc\n", b"\0\0\0 1", b"\xff\xfe\n", b"3 12\n", b"\xc2\xb2 " + 64 * b"a" + b"\n"])
def test_lines_that_a_crash_left_in_a_journal_are_no_lines(data, tmp_path, counted, more):
    encoder, seen = counted
    source = store(encoder, data, tmp_path)
    for block in source.blocks:
        block.journal.write_bytes(more + b"\n" + block.journal.read_bytes() + more)
        block.path.with_name(f"{block.path.stem.rpartition('-')[0]}-x.views").touch()
    before = sum(seen)
    again = store(encoder, data, tmp_path)
    assert sum(seen) == before and torch.equal(again.batch(torch.arange(N), 0)[0], source.batch(torch.arange(N), 0)[0])


def test_a_store_is_private_and_says_how_large_it_is_and_how_to_remove_it(data, tmp_path, counted, capsys):
    source = store(counted[0], data, tmp_path, progress=True)
    assert source.folder.stat().st_mode & 0o777 == 0o700
    assert all(b.path.stat().st_size == b.size for b in source.blocks)
    assert {p.stat().st_mode & 0o777 for p in source.folder.iterdir()} == {0o600}
    said = "".join(capsys.readouterr())
    assert f"GB in {tmp_path}, for your eyes only; remove with rm -r {tmp_path}" in said
    assert source.folder.name not in said, "a digest of the images: whoever sees a log could compare it"
    assert f"{N} examples x {source.union.views} views of 64 features" in said


@pytest.mark.skipif(sys.platform != "linux", reason="measures resident memory in /proc, which Linux alone has")
def test_what_was_read_does_not_stay_in_memory(data, tmp_path, counted, monkeypatch):
    """Whatever the size of the store, what a batch reads is its own rows and no more."""
    encoder, _ = counted
    store(encoder, data, tmp_path)  # encoded
    source = store(encoder, data, tmp_path)  # checked

    def resident() -> int:
        maps = Path("/proc/self/smaps").read_text()
        found = re.findall(rf"{re.escape(str(tmp_path))}/\S+\.views\n.*?Rss: +(\d+) kB", maps, re.DOTALL)
        assert len(found) >= len(source.blocks)
        return sum(map(int, found))

    assert resident() == 0
    for places in (torch.arange(N), torch.tensor([140, 3, 77])):
        kept = source.batch(places, 0)[0].clone()
        assert resident() == 0
        assert torch.equal(source.batch(places, 1)[0], kept), "read again"
    with monkeypatch.context() as patch:
        patch.setattr(stored.Block, "forget", lambda block: None)
        source.batch(torch.arange(N), 0)
    assert resident() > 0, "the test can tell"


def test_what_cannot_be_stored_is_one_line_before_any_work(data, tmp_path, counted, monkeypatch):
    encoder, seen = counted
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(
            OSError, match=r"cache=.*150 examples x 11 views of 64 features need .* GB more and 1e-06 GB are"
        ) as e:
            store(encoder, data, tmp_path)
        assert "\n" not in str(e.value)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(stored.os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"cannot write .*\.views: the disk is full; free some space and run again"):
            store(encoder, data, tmp_path)
    with pytest.raises(ValueError, match="labels=2: must lie in"):
        store(encoder, data, tmp_path, num_classes=2)
    own = models.Encoder(lambda x: x.flatten(1), 4, 16, (1,), "own")
    with pytest.raises(ValueError, match="encoder='own': has no digest of its content"):
        store(own, data, tmp_path)
    assert not seen
    source = store(encoder, data, tmp_path)
    other = store(encoder, data, tmp_path, seed=6)
    shutil.rmtree(other.folder)
    source.folder.rename(other.folder)
    with pytest.raises(ValueError, match=r"store=.*holds other views \(seed.* there, .* here\); remove them: rm -r"):
        store(encoder, data, tmp_path, seed=6)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_stored as t
from dpmix import models
encoder = models.encoder("tiny-convnext")
slow = encoder.features.register_forward_pre_hook(lambda module, args: time.sleep(0.2))
t.store(encoder, (t.image_set(t.N), t.image_set(20, seed=1)), sys.argv[1])
"""


def test_a_killed_encoding_goes_on_without_what_was_whole(data, tmp_path, counted):
    encoder, seen = counted
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(Path(__file__).parents[1])]!r}\n{KILLED}"]
    process = subprocess.Popen([*command, str(tmp_path), str(Path(__file__).parent)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not any(p.read_text().count("\n") for p in tmp_path.glob("*/*.chunks")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = [p.read_text().splitlines() for p in sorted(tmp_path.glob("*/*.chunks"))]
    whole = min(map(len, lines)) if len(lines) == 6 else 0
    source = store(encoder, data, tmp_path)
    assert whole in (1, 2)
    assert 0 < sum(seen) <= sum([64, 64, 22][whole:]) * source.union.views
    x, _ = fresh(encoder, data).batch(torch.arange(N), 0)
    torch.testing.assert_close(source.batch(torch.arange(N), 0)[0], x, atol=1e-3, rtol=1e-3)
