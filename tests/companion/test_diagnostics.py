"""Gradients before clipping and noise, and the timings of passes."""

from dataclasses import replace

import pytest
import torch

from dpmix import models
from dpmix.companion import diagnostics
from dpmix.core import heads, views
from dpmix.images.data import ImageSet
from dpmix.runs import material as materials
from dpmix.runs.material import Material, Part
from dpmix.runs.spec import ComputeFlags, RunSpec

QUIET = ComputeFlags(progress=False, device="cpu", physical_batch=7)
SPEC = RunSpec(recipe=views.Recipe(k_base=2, k_self=1), epsilon=None, learning_rate=1.0, clip_norm=0.05, batch_size=10,
               epochs=1.0, validation=0.0)  # fmt: skip


@pytest.fixture
def small(monkeypatch, private: ImageSet, public: ImageSet, projection: models.Encoder):
    """The tests' own images and encoder behind every spec: 40 examples, 4 steps."""
    everyone = torch.arange(len(private))
    material = Material(
        pool=Part(private, everyone), kept=everyone, held_out=everyone[:0], train=Part(private, everyone),
        test=Part(private, everyone), public=public, synthetic=public, encoder=projection, digest="digest",
    )  # fmt: skip
    for user in (materials, diagnostics):
        monkeypatch.setattr(user, "prepare", lambda *_: material)
    return material


def replay(material: Material, spec: RunSpec, stages: int) -> torch.Tensor:
    """The slow oracle in float64: autograd on each example, at the weights of the run, no clipping."""
    train, classes = material.train, material.train.whole.num_classes
    seen = []
    bank = [heads.Head(recipe=spec.recipe, learning_rate=1.0, clip_norm=spec.clip_norm, noise_multiplier=0.0)]
    heads.train_heads(
        material.encoder, train.images, train.labels, bank, num_classes=classes, expected_batch=10, steps=4, seed=0,
        progress=False, observe=lambda step, z, y, w, b: seen.append((step, z, y, w[0], b[0])),
    )  # fmt: skip
    sums, counts = torch.zeros(stages, classes * (material.encoder.dim + 1), dtype=torch.float64), torch.zeros(stages)
    for step, z, y, w, b in seen:
        for features, targets in zip(z.double(), y.double(), strict=True):
            w, b = (t.double().detach().requires_grad_() for t in (w, b))
            loss = -(targets * (features @ w.T + b).log_softmax(-1)).sum(-1).mean()
            grads = torch.autograd.grad(loss, (w, b))
            sums[step * stages // 4] += torch.cat([g.flatten() for g in grads])
            counts[step * stages // 4] += 1
    return torch.cat([sums / counts[:, None], (sums.sum(0) / counts.sum())[None]])


def test_gradients_are_the_unclipped_means_of_each_stage(small):
    other = replace(SPEC, recipe=views.Recipe(k_base=3), clip_norm=0.08)
    found = diagnostics.gradients([SPEC, other], stages=2, compute=QUIET)
    for spec, g in zip([SPEC, other], found, strict=True):
        wanted = replay(small, spec, 2)
        torch.testing.assert_close(torch.cat([g.stages, g.overall[None]]).double(), wanted, rtol=1e-4, atol=1e-6)
        assert wanted.norm(dim=1).min() > 2 * spec.clip_norm, "a clipped mean would be shorter: the control"


def test_each_seed_is_a_pass_of_its_own(small):
    one, two = SPEC, replace(SPEC, seed=1)
    together, alone = (
        diagnostics.gradients([two, one], stages=1, compute=QUIET),
        diagnostics.gradients([one], stages=1, compute=QUIET),
    )
    assert torch.equal(together[1].overall, alone[0].overall) and not torch.equal(*(g.overall for g in together))


def test_looking_does_not_change_training(small):
    with_noise = replace(SPEC, epsilon=1.0, delta=1e-3)
    _, bank, m = diagnostics._bank([with_noise], QUIET)
    plain = diagnostics._train(small, bank, m, with_noise, 4, QUIET)
    looked = diagnostics._train(small, bank, m, with_noise, 4, QUIET, observe=lambda *_: None)
    assert torch.equal(plain.weights, looked.weights) and plain.weights.abs().max() > 0


def test_timings_count_views_and_share_out_the_time(small):
    runs = {
        "one": [SPEC],
        "bank": [SPEC, replace(SPEC, learning_rate=2.0), replace(SPEC, recipe=views.Recipe(k_base=4))],
    }
    found = diagnostics.timings(runs, steps=2, repeats=2, compute=QUIET)
    assert found.groupby("method").size().to_dict() == {"bank": 2, "one": 2}
    assert found["heads"].tolist() == [1, 3, 1, 3] and found["views of an example"].tolist() == [3, 5, 3, 5]
    assert found[["views", "encoder", "clipping", "noise"]].sum(axis=1).tolist() == pytest.approx([1.0] * 4)
    expected = 4 * 10 * found["views of an example"] / found["views_per_second"]
    assert found["seconds"].tolist() == pytest.approx(expected.tolist())
    assert (found["floor"] > 0).all()


def test_what_cannot_be_looked_at_is_refused(small):
    with pytest.raises(ValueError, match="specs"):
        diagnostics.timings({"two seeds": [SPEC, replace(SPEC, seed=1)]}, compute=QUIET)
    with pytest.raises(ValueError, match="wrn-16-4"):
        diagnostics.gradients([replace(SPEC, model="wrn-16-4")], compute=QUIET)
    with pytest.raises(ValueError, match="stages=5"):
        diagnostics.gradients([SPEC], stages=5, compute=QUIET)
    with pytest.raises(ValueError, match="specs"):
        diagnostics.timings({"none": []}, compute=QUIET)
