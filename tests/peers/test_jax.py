"""The JAX engine against the PyTorch one: same clipped sums, same noise multiplier, same training."""

import builtins
from dataclasses import replace

import numpy as np
import pytest
import torch

import dpmix
from dpmix.core import accounting, clipping, views
from dpmix.peers import jax as jax_peer
from dpmix.runs.spec import ComputeFlags, RunSpec
from dpmix.runs.store import Store

QUIET = ComputeFlags(progress=False, device="cpu")
TINY = RunSpec(recipe=views.Recipe(k_base=2, k_self=2), epsilon=8.0, learning_rate=2.0, batch_size=300, epochs=1.0)


def problem(b: int = 6, k: int = 4, dim: int = 5, classes: int = 3, heads: int = 2) -> tuple[torch.Tensor, ...]:
    draw = np.random.default_rng(0)
    normal = lambda *shape: torch.from_numpy(draw.normal(size=shape)).float()  # noqa: E731
    return normal(b, k, dim), normal(b, k, classes).softmax(-1), normal(heads, classes, dim), normal(heads, classes)


def test_both_frameworks_clip_the_averaged_views_to_the_same_sum():
    features, targets, weights, biases = problem()
    norms = torch.tensor([0.3, 0.9])
    mean = torch.full((2, 4), 0.25)
    ours = clipping.clipped_head_sums(features, targets, weights, biases, norms, mean)
    assert (ours.norms > norms).any(dim=0).all(), "the clip must bite"
    theirs = jax_peer.clipped_head_sums(features, targets, weights, biases, norms, mean)
    torch.testing.assert_close(theirs[0], ours.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs[1], ours.biases, rtol=1e-4, atol=1e-5)


def test_each_head_averages_the_views_that_are_its_own():
    features, targets, weights, biases = problem()
    norms, own = torch.tensor([0.3, 0.9]), torch.tensor([[0.5, 0.5, 0, 0], [0, 0.2, 0.5, 0.3]])
    ours = clipping.clipped_head_sums(features, targets, weights, biases, norms, own)
    theirs = jax_peer.clipped_head_sums(features, targets, weights, biases, norms, own)
    torch.testing.assert_close(theirs[0], ours.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs[1], ours.biases, rtol=1e-4, atol=1e-5)


def test_the_comparison_can_tell_views_as_examples():
    """Negative control: clipping each view by itself gives another sum."""
    features, targets, weights, biases = problem()
    norms = torch.tensor([0.3, 0.9])
    ours = clipping.clipped_head_sums(features, targets, weights, biases, norms, torch.full((2, 4), 0.25))
    flat = features.reshape(24, 1, 5), targets.reshape(24, 1, 3)
    each = jax_peer.clipped_head_sums(*flat, weights, biases, norms, torch.ones(2, 1))
    assert (each[0] / 4 - ours.weights).abs().max() > 0.01


def test_the_accountants_of_both_agree_and_theirs_keeps_the_budget():
    about = dict(delta=1e-5, steps=36)
    sigma = jax_peer.noise_multiplier(epsilon=2.0, population=1150, batch_size=128, **about)
    ours = accounting.noise_multiplier(epsilon=2.0, sample_rate=128 / 1150, **about)
    assert sigma == pytest.approx(ours, rel=0.01)
    spent = accounting.epsilon_spent(noise_multiplier=sigma, sample_rate=128 / 1150, accountant="pld", **about)
    assert 1.0 < spent <= 2.0


def test_without_noise_both_train_the_same_head(tmp_path):
    specs = [replace(TINY, epsilon=None), replace(TINY, epsilon=None, recipe=views.Recipe(k_base=2), clip_norm=0.2)]
    stores = Store(tmp_path / "torch"), Store(tmp_path / "jax")
    ours = dpmix.run_all(specs, compute=QUIET, store=stores[0])
    theirs = jax_peer.run_all(specs, compute=QUIET, store=stores[1])
    for a, b in zip(ours, theirs, strict=True):
        wanted, got = stores[0].tensors(a)["weight"], stores[1].tensors(b)["weight"]
        assert wanted.abs().max() > 0.02
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
        assert a.test_accuracy == pytest.approx(b.test_accuracy, abs=0.02)


def test_the_noise_has_the_deviation_of_sigma_and_differs_between_heads(tmp_path):
    """One step from zero: noisy minus noiseless weights over eta / B are N(0, (sigma C)^2). Flake rate below 1e-6."""
    once = replace(TINY, batch_size=1150, clip_norm=0.5)
    specs = [replace(once, epsilon=e, learning_rate=lr) for e, lr in ((None, 2.0), (8.0, 2.0), (1.0, 2.0), (1.0, 4.0))]
    store = Store(tmp_path)
    found = jax_peer.run_all(specs, compute=QUIET, store=store)
    assert {r.steps for r in found} == {1}
    plain = store.tensors(found[0])["weight"] / 2.0
    noise = [(store.tensors(r)["weight"] / r.spec.learning_rate - plain) * 1150 for r in found[1:]]
    for r, drawn in zip(found[1:], noise, strict=True):
        measured = drawn.std().item() / (r.noise_multiplier * 0.5)
        assert abs(measured - 1) < 5 / (2 * drawn.numel()) ** 0.5
        assert not abs(1.5 * measured - 1) < 5 / (2 * drawn.numel()) ** 0.5  # the control: 3 sigma / 2 is rejected
    assert abs(np.corrcoef(noise[1].flatten(), noise[2].flatten())[0, 1]) < 5 / noise[1].numel() ** 0.5


def test_results_are_found_again_with_their_versions(tmp_path, monkeypatch):
    store = Store(tmp_path)
    first = jax_peer.run_all([TINY, TINY], compute=QUIET, store=store)
    assert first[0] == first[1] and {"jax", "jax-privacy"} <= set(first[0].provenance["versions"])
    monkeypatch.setattr(jax_peer, "_compute", lambda *_: pytest.fail("computed again"))
    assert jax_peer.run_all([TINY], compute=QUIET, store=store) == first[:1]


def test_without_jax_one_line_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.split(".")[0] == "jax":
            raise ModuleNotFoundError("No module named 'jax'", name="jax")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"^jax is not installed: run `pip install 'dpmix\[jax\]'`, or `make env`$"):
        jax_peer.run_all([TINY], compute=QUIET)


@pytest.mark.parametrize("wrong", [{"seed": None}, {"model": "wrn-16-4"}, {"momentum": 0.9}, {"redraw": False}])
def test_runs_that_it_cannot_do_are_refused(wrong):
    with pytest.raises(ValueError, match="specs"):
        jax_peer.run_all([replace(TINY, **wrong)], compute=QUIET)
