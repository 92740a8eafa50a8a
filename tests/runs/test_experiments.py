"""Runs: refused before training or computed once, keyed by spec and code, chosen without the test set, and neither too
bad nor too good."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dpmix import ComputeFlags, RunSpec, run, run_all
from dpmix.core import accounting, heads, views
from dpmix.images import data
from dpmix.runs import identity, material, passes, result, spec, workers
from dpmix.runs.identity import Contents, Identity, code_digest
from dpmix.runs.result import Result, choose_learning_rate, frame
from dpmix.runs.store import STORE, Store

TINY = views.Recipe(k_base=2, transform="crop")
SPEC = RunSpec(recipe=TINY, epsilon=8.0, learning_rate=4.0, epochs=2.0, batch_size=256, delta=1e-5)
COMPUTE = ComputeFlags(progress=False, workers=1)


@pytest.fixture(scope="module")
def shared():
    """One store for the tests that only read what two runs of one pass left there."""
    store = Store(Path(STORE) / "shared")
    return store, run_all([SPEC, replace(SPEC, learning_rate=1.0)], compute=COMPUTE, store=store)


@pytest.fixture
def untrained(monkeypatch):
    """Training is an error."""

    def train(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(heads, "train", train)
    monkeypatch.setattr(passes.network, "train", train)


# Bad input.

BAD = [
    (dict(epsilon=0.0), "epsilon=0.0: must be a positive finite number; for example epsilon=2.0"),
    (dict(epsilon=-1.0), "epsilon=-1.0"), (dict(epsilon=math.nan), "epsilon=nan"), (dict(epsilon=math.inf), "epsilon=inf"),
    (dict(epsilon="two"), "epsilon='two'"),
    (dict(delta=0.0), "delta=0.0: must lie strictly between 0 and 1"), (dict(delta=1.0), "delta=1.0"),
    (dict(epochs=0.0), "epochs=0.0: must be a positive finite number"), (dict(epochs=-3.0), "epochs=-3.0"),
    (dict(learning_rate=0.0), "learning_rate=0.0"), (dict(learning_rate=math.nan), "learning_rate=nan"),
    (dict(clip_norm=0.0), "clip_norm=0.0"), (dict(clip_norm=-1.0), "clip_norm=-1.0"),
    (dict(batch_size=0), "batch_size=0: must be a whole number of at least 1"),
    (dict(validation=1.0), "validation=1.0: must be a share"), (dict(validation=-0.1), "validation=-0.1"),
    (dict(population=0), "population=0: must be a whole number of at least 1"), (dict(seed=-1), "seed=-1"),
    (dict(accountant="rpd"), "accountant='rpd': unknown; did you mean 'rdp'"),
    (dict(model="tiny-convnxt"), "model='tiny-convnxt': unknown; did you mean 'tiny-convnext'"),
    (dict(dataset="digit"), "dataset='digit': unknown; did you mean 'digits'"),
    (dict(dataset="cifar-10"), "did you mean 'cifar10'"), (dict(train_on="half"), "did you mean 'half-"),
    (dict(public="synthetics"), "did you mean 'synthetic'"),
    (dict(public="half-2"), "public='half-2': would mix private images in unprotected; it goes with train_on='half-1' only"),
    (dict(recipe="mix-self"), "recipe='mix-self': must be a views.Recipe"), (dict(model="resnet"), "model='resnet': unknown; "),
    (dict(momentum=1.0, model="wrn-16-4"), "momentum=1.0"), (dict(ema_decay=1.0, model="wrn-16-4"), "ema_decay=1.0"),
    (dict(weight_decay=-0.1, model="wrn-16-4"), "weight_decay=-0.1"), (dict(pretrain_epochs=-1.0), "pretrain_epochs=-1.0"),
    (dict(ema_decay=0.9), "ema_decay=0.9: means nothing for a linear head on a frozen encoder, 'tiny-convnext'; leave it out"),
    (dict(redraw=False, model="wrn-10-1"), "redraw=False: means nothing for a network from scratch, 'wrn-10-1'; leave it out"),
    (dict(redraw=1), "redraw=1: must be True or False"),
    (dict(image_size=0), "image_size=0: must be a whole number of at least 1"),
    (dict(feature_scaling="all"), "feature_scaling='all': unknown; known are none, public"),
    (dict(microbatch=2), "microbatch=2: means nothing for a linear head"),
    (dict(pretrain_epochs=1.0, model="wrn-10-1"), "pretrain_epochs=1.0: means nothing for a network from scratch"),
    (dict(model="wrn-11-1"), "model='wrn-11-1': must be wrn-DEPTH-WIDTH with a depth of 6 n + 4"),
    (dict(model="wrn-4-1"), "model='wrn-4-1'"), (dict(model="wrn-10-0"), "model='wrn-10-0'"),
    (dict(microbatch=3, microbatch_mix="add", model="wrn-10-1"), "microbatch=3: must be 2 to mix the pair"),
    (dict(population=100, microbatch=2, model="wrn-10-1"), "population=100: does not go with microbatches, whose fixed"),
    (dict(clip_norm=1e-60), "clip_norm=1e-60: is beyond the numbers of float32"),
    (dict(microbatch=2, train_on="half-1", model="wrn-10-1"), "microbatch=2: the partition is one of the whole training set"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "said"), BAD, ids=["-".join(f"{k}={v}" for k, v in b.items()) for b, _ in BAD])
def test_bad_specs_are_refused_in_one_line_by_name(bad, said):
    made = object.__new__(RunSpec)  # past the type checker, which only tests have
    for f in fields(SPEC):
        object.__setattr__(made, f.name, bad.get(f.name, getattr(SPEC, f.name)))
    with pytest.raises(ValueError) as caught:
        made.__post_init__()
    assert str(caught.value).startswith(next(iter(bad))) and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("bad", "said"), [
    (dict(engine="lop"), "engine='lop': unknown; did you mean 'loop'"),
    (dict(device="gpu0"), "device='gpu0': must be 'auto', 'cpu' or"),
    (dict(checkpoint_seconds=-1.0), "checkpoint_seconds=-1.0: must not be negative"), (dict(dtype="bf16"), "dtype='bf16'"),
    (dict(workers=0), "workers=0"), (dict(physical_batch=0), "physical_batch=0"),
])  # fmt: skip
def test_bad_compute_flags_are_refused_in_one_line_by_name(bad, said):
    with pytest.raises(ValueError) as caught:
        ComputeFlags(**bad)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_named_before_any_training(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda': there is no GPU that PyTorch can use; take 'cpu'"):
        run(SPEC, compute=replace(COMPUTE, device="cuda"), store=store)


@pytest.mark.parametrize("there", [True, False])
def test_a_network_takes_bfloat16_on_a_cpu_that_has_it(store, monkeypatch, there):
    monkeypatch.setattr(spec, "bfloat16_is_fast", lambda device: there)
    taken, real = [], passes.network.train
    monkeypatch.setattr(passes.network, "train", lambda *a, **k: taken.append(k["autocast"]) or real(*a, **k))
    wrn = replace(SPEC, model="wrn-10-1", batch_size=32, epochs=2 / 36, recipe=views.METHODS["dp-sgd"])
    found = run(wrn, compute=COMPUTE, store=store)
    assert taken == [torch.bfloat16 if there else None] and found.timing["dtype"] == str(taken[0] or torch.float32)
    run(replace(wrn, seed=4), compute=replace(COMPUTE, dtype="float32"), store=store)
    assert taken[1] is None


def test_dropped_gradients_are_said_to_their_owner_in_one_line():
    about = dict(validation_accuracy=None, train_examples=9)
    note = result.NonPrivateDiagnostics(dropped_gradients=3, **about).owners_note
    assert note.startswith("gradients not finite and counted as zero: 3;") and "\n" not in note
    assert result.NonPrivateDiagnostics(dropped_gradients=0, **about).owners_note == ""


def test_the_precision_is_bfloat16_where_it_is_fast_unless_named(monkeypatch):
    for fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(spec, "bfloat16_is_fast", lambda device, fast=fast: fast or device.type == "cuda")
        assert ComputeFlags(device="cpu").precision() == wanted
    assert ComputeFlags(device="cpu", dtype="float32").precision() == torch.float32
    assert ComputeFlags(device="cpu", dtype="bfloat16").precision() == torch.bfloat16
    monkeypatch.setattr(spec, "device_of", torch.device)  # a GPU that nobody asks for anything
    assert ComputeFlags(device="cuda").precision() == torch.bfloat16
    assert ComputeFlags(device="cuda", dtype="float32").precision() == torch.float32


RUN_BAD = [
    (dict(batch_size=1151), ValueError, "batch_size=1151: must be at most the 1,150 training examples"),
    (dict(population=200), ValueError, "batch_size=256: must be at most the 200 training examples"),
    (dict(epsilon=0.001, epochs=1e6, batch_size=1150), ValueError, "epsilon=0.001: out of reach of the rdp accountant"),
    (dict(epsilon=60.0), ValueError, "epsilon=60.0: cannot be calibrated: choose an epsilon between"),
    (dict(dataset="cifar10"), FileNotFoundError, "dataset='cifar10': CIFAR-10 is not on disk; get it from"),
    (dict(dataset="folder:nowhere"), FileNotFoundError, "dataset='folder:nowhere'"),
    (dict(model="open_clip:ViT-B-16/laion3b"), ValueError, "did you mean"),
    (dict(model="open_clip:ViT-B-16/laion2b_s34b_b88k"), FileNotFoundError, "weights not on disk; fetch"),
    (dict(weights="nowhere.safetensors"), FileNotFoundError, "weights='nowhere.safetensors': no such file"),
    (dict(recipe=views.METHODS["mix-diff"], dataset="folder:{folder}"), FileNotFoundError, "no synthetic images in"),
    (dict(dataset="folder:{folder}"), ValueError, "model='tiny-convnext': tiny-convnext takes images of 1 channel"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "kind", "said"), RUN_BAD, ids=[str(i) for i in range(len(RUN_BAD))])
def test_what_only_the_data_can_tell_is_refused_before_any_training(bad, kind, said, store, tmp_path, untrained):
    """Also where a good spec comes first: all are checked before the first is trained."""
    for part in ("train", "test"):
        for name, level in (("cat", 30), ("dog", 200)):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(level + i + (part == "test") * 9).integers(
                    0, 256, (12, 12, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(tmp_path / "photos" / part / name / f"{i}.png")
    bad = {k: v.format(folder=tmp_path / "photos") if k == "dataset" else v for k, v in bad.items()}
    if bad.get("recipe") == views.METHODS["mix-diff"]:
        bad |= dict(model="timm:resnet10t", weights="random")
    compute = replace(COMPUTE, root=str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    wrong = replace(SPEC, **bad)
    with pytest.raises(kind, match=said) as caught:
        run_all([SPEC, wrong], compute=compute, store=store)
    assert "\n" not in str(caught.value)
    with pytest.raises(AssertionError, match="training began"):
        run(SPEC, compute=compute, store=store)


def test_a_delta_that_protects_nobody_is_warned_about():
    loose = replace(SPEC, delta=1e-3, batch_size=1150)
    with pytest.warns(UserWarning, match=r"delta=0.001: is not below 1/N = 8.7e-04"):
        spec.mechanism(loose, 1437)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec.mechanism(SPEC, 1437)
        spec.mechanism(replace(loose, epsilon=None), 1437)


def test_no_text_of_a_run_shows_its_seed(shared):
    """`print(run(...))` is the natural thing to do, and what a notebook shows without being asked."""
    seed = 2**100 + 987_654_321
    secret = replace(SPEC, seed=seed)
    result = replace(shared[1][0], spec=secret)
    for shown in (repr(secret), str(secret), f"{result}", repr([result])):
        assert "learning_rate" in shown and str(seed) not in shown and "seed=" not in shown


# The mechanism.


def test_rate_steps_and_noise_follow_from_public_numbers():
    m = spec.mechanism(SPEC, 1437)
    assert m.population == 1150 and m.sample_rate == 256 / 1150 and m.steps == round(2 * 1150 / 256)
    sigma = accounting.noise_multiplier(epsilon=8.0, delta=1e-5, sample_rate=m.sample_rate, steps=m.steps)
    assert m.noise_multiplier == sigma
    m = spec.mechanism(replace(SPEC, epsilon=None, validation=0.0, epochs=7.0), 1437)
    assert m == (1437, 256 / 1437, round(7 * 1437 / 256), 0.0)


def test_one_example_more_or_less_changes_no_public_number():
    """N is public; where it must not be, `population` says what is assumed."""
    fixed = replace(SPEC, population=1150)
    assert spec.mechanism(fixed, 1437) == spec.mechanism(fixed, 1436) == spec.mechanism(SPEC, 1437)
    free = replace(SPEC, epsilon=None)
    assert spec.mechanism(free, 1437) != spec.mechanism(free, 1400)


def test_the_validation_split_is_a_coin_an_example():
    train, held_out = material.validation_split(5000, 0.2, 3)
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(5000))
    assert (
        abs(len(held_out) - 1000) < 5.5 * (5000 * 0.16) ** 0.5
    )  # fails by chance once in 3e7 seeds; the seed is fixed
    less, held_less = material.validation_split(4999, 0.2, 3)
    assert torch.equal(less, train[train < 4999]) and torch.equal(held_less, held_out[held_out < 4999])
    assert len(material.validation_split(50, 0.0, 3)[1]) == 0
    assert not torch.equal(material.validation_split(5000, 0.2, 4)[0], train)


def test_training_validation_and_test_examples_are_disjoint(tmp_path):
    known = Contents(COMPUTE, tmp_path)
    found = material.prepare([known.identity(SPEC)], COMPUTE)
    splits = data.load("digits")
    pool, ids, held_out = found.pool, found.train.rows, found.pool.rows[found.held_out]
    assert len(pool) == len(splits.train) == len(ids) + len(held_out) and len(held_out) > 0
    assert torch.equal(found.train.images[torch.arange(len(ids))], splits.train.images[ids])
    assert torch.equal(found.train.labels, splits.train.labels[ids])
    assert torch.equal(torch.cat([ids, held_out]).sort().values, torch.arange(len(pool)))
    assert torch.equal(found.test.images[torch.arange(len(splits.test))], splits.test.images)
    assert found.public is None and found.digest == splits.digest
    one, two = (material.prepare([known.identity(replace(SPEC, train_on=h))], COMPUTE) for h in ("half-1", "half-2"))
    everyone = torch.cat([one.train.rows, two.train.rows])
    assert len(everyone.unique()) == len(everyone) and len(one.pool) + len(two.pool) == len(pool)
    assert abs(len(one.pool) - len(two.pool)) <= 1


# The store.


def test_a_run_is_computed_once(shared, untrained):
    store, (first, second) = shared
    assert run(SPEC, compute=COMPUTE, store=store) == first
    again = run_all([second.spec, SPEC, second.spec], compute=COMPUTE, store=store)
    assert again == [second, first, second]
    assert run(replace(SPEC, learning_rate=1), compute=COMPUTE, store=store) == second, "1 and 1.0 are one run"
    with pytest.raises(AssertionError, match="training began"):
        run(replace(SPEC, learning_rate=1.5), compute=COMPUTE, store=store)


def test_equal_specs_in_other_words_are_one_run(store):
    """epsilon=8 beside epsilon=8.0 once lost its result."""
    both = run_all([SPEC, replace(SPEC, epsilon=8)], compute=COMPUTE, store=store)
    assert both[0] == both[1] and len(list(store.folder.glob("*.json"))) == 1


def test_a_stored_result_is_the_same_object_again(shared):
    store, results = shared
    for r in results:
        assert store.get(r.key) == r
        assert Result.from_json(json.loads(json.dumps(r.to_json()))) == r
        assert json.loads((store.folder / f"{r.key}.json").read_text())["content"] == r.to_json()
    odd = replace(results[0], test_accuracy=math.inf, epsilon=dict.fromkeys(accounting.ACCOUNTANTS),
                  diagnostics=replace(results[0].diagnostics, validation_accuracy=None))  # fmt: skip
    assert Result.from_json(json.loads(json.dumps(odd.to_json()))) == odd
    newer = {**results[0].to_json(), "added later": 1}
    assert Result.from_json(newer) == results[0]


def test_a_damaged_result_is_named_and_computed_again(shared, tmp_path):
    origin, (first, _) = shared
    store = Store(shutil.copytree(origin.folder, tmp_path / "copy"))
    path = store.folder / f"{first.key}.json"
    text = path.read_text()
    path.write_text(text.replace(f'"test_accuracy": {first.test_accuracy}', '"test_accuracy": 1.0'))
    assert path.read_text() != text
    with pytest.warns(
        UserWarning, match=f"{first.key}.json: its checksum does not match; it is left out and made anew"
    ):
        again = run(SPEC, compute=COMPUTE, store=store)
    assert again.test_accuracy == first.test_accuracy and again.noise_multiplier == first.noise_multiplier
    assert store.get(first.key) == again


def test_weights_that_are_gone_or_of_another_run_are_refused(shared, tmp_path):
    origin, (first, second) = shared
    store = Store(shutil.copytree(origin.folder, tmp_path / "copy"))
    tensors = store.tensors(first)
    assert tensors["weight"].shape[0] == 10 and tensors["bias"].shape == (10,)
    shutil.copy(store.folder / f"{second.key}.safetensors", store.folder / f"{first.key}.safetensors")
    with pytest.raises(ValueError, match="belongs to another run"):
        store.tensors(first)
    (store.folder / f"{first.key}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors: absent; remove the JSON beside it and run again"):
        store.tensors(first)


def test_every_part_of_an_identity_changes_it():
    other = dict(
        recipe=replace(TINY, k_base=3), epsilon=4.0, learning_rate=5.0, dataset="cifar10", model="tiny-vit", train_on="half-1",
        public="synthetic-half", pretrain_epochs=1.0, validation=0.1, delta=1e-6, accountant="prv", population=1000,
        clip_norm=0.5,
        batch_size=128, epochs=3.0, seed=1, weights="random", image_size=32, redraw=False, momentum=0.9,
    )  # fmt: skip
    wrn = replace(SPEC, model="wrn-10-1")
    network = dict(weight_decay=0.1, ema_decay=0.9, microbatch=2)
    pairs = replace(wrn, microbatch=2)
    assert other.keys() | network.keys() | {"microbatch_mix", "feature_scaling"} == {f.name for f in fields(RunSpec)}
    specs = [replace(SPEC, **{name: value}) for name, value in other.items()]
    specs += [replace(wrn, **{name: value}) for name, value in network.items()]
    specs += [SPEC, wrn, replace(pairs, microbatch_mix="add")]
    runs = {Identity(spec=s, private="p", public="", encoder="e", code="c").run for s in specs}
    assert len(runs) == len(specs)
    one = Identity(spec=SPEC, private="p", public="", encoder="e", code="c")
    for part in ("private", "public", "encoder", "code"):
        assert replace(one, **{part: "another"}).run != one.run == replace(one).run


def test_the_identity_changes_with_the_code_and_the_public_files(tmp_path, monkeypatch):
    package = shutil.copytree(Path(spec.__file__).parents[1], tmp_path / "dpmix")
    public = shutil.copytree(data.PUBLIC, tmp_path / "public")
    monkeypatch.setattr(identity, "__file__", str(package / "runs" / "identity.py"))
    monkeypatch.setattr(data, "PUBLIC", public)

    digest = code_digest.__wrapped__  # not the one that the process remembers
    before = digest()
    assert before == digest()
    for name in [
        "core/heads",
        "core/clipping",
        "core/views",
        "core/accounting",
        "core/rng",
        "runs/passes",
        "models/encoders",
        "images/data",
    ]:
        path = package / f"{name}.py"
        text = path.read_text()
        path.write_text(text + "# changed\n")
        assert digest() != before, name
        path.write_text(text)
    (package / "companion" / "report.py").write_text("# how results are shown does not change them\n")
    assert digest() == before
    sidecar = next(public.glob("*.json"))
    sidecar.write_text(sidecar.read_text() + " ")
    assert digest() != before


# Passes.


def test_heads_of_one_pass_are_trained_together_and_equal_those_alone(shared, store, monkeypatch):
    _, together = shared
    calls, real = [], heads.train
    monkeypatch.setattr(heads, "train", lambda *a, **k: calls.append(len(a[1])) or real(*a, **k))
    specs = [SPEC, replace(SPEC, learning_rate=1.0), replace(SPEC, seed=0), replace(SPEC, epsilon=None),
             replace(SPEC, clip_norm=0.1), replace(SPEC, recipe=replace(TINY, k_self=2))]  # fmt: skip
    results = run_all(specs, compute=replace(COMPUTE, physical_batch=17), store=store)
    assert calls == [5]
    assert [r.spec for r in results] == specs
    for alone, found in zip(together, results, strict=False):
        assert found.test_accuracy == alone.test_accuracy and found.noise_multiplier == alone.noise_multiplier
        for name, tensor in store.tensors(found).items():
            torch.testing.assert_close(tensor, shared[0].tensors(alone)[name], rtol=0, atol=1e-4)
    assert results[3].epsilon == dict(rdp=None, prv=None, pld=None) and results[3].noise_multiplier == 0
    assert results[2] == results[0], "the seed was 0 all along"
    assert all(r.timing["heads"] == 5 for r in results)
    assert not list(store.folder.glob("*.checkpoint*")), "a finished pass leaves no checkpoint"


def test_a_pass_cut_off_while_it_stores_goes_on_with_all_its_heads(shared, store, monkeypatch):
    calm, results = shared
    specs = [SPEC, replace(SPEC, learning_rate=1.0)]
    put, trained, train_heads = Store.put, [], heads.train

    def cut(self, result, tensors):
        if list(self.folder.glob("*.json")):
            raise KeyboardInterrupt
        put(self, result, tensors)

    def train(*args, **kwargs):
        trained.append(kwargs["checkpoint"])
        return train_heads(*args, **kwargs)

    monkeypatch.setattr(heads, "train", train)
    monkeypatch.setattr(Store, "put", cut)
    with pytest.raises(KeyboardInterrupt):
        run_all(specs, compute=COMPUTE, store=store)
    assert len(list(store.folder.glob("*.json"))) == 1
    monkeypatch.setattr(Store, "put", put)
    again = run_all(specs, compute=COMPUTE, store=store)
    assert len(trained) == 2 and trained[0] == trained[1], "the same checkpoint, so the same heads"
    for ours, theirs in zip(again, results, strict=True):
        for part, tensor in calm.tensors(theirs).items():
            assert torch.equal(store.tensors(ours)[part], tensor)
    assert not list(store.folder.glob("*.checkpoint"))


def test_a_worker_that_cannot_be_started_is_told(store, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", fail)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        run_all([SPEC, replace(SPEC, seed=1)], compute=replace(COMPUTE, workers=2), store=store)


def test_a_result_says_how_it_came_about(shared):
    _, (r, _) = shared
    m = spec.mechanism(SPEC, 1437)
    assert (r.population, r.sample_rate, r.steps, r.divisor) == (1150, m.sample_rate, m.steps, 256.0)
    about = dict(noise_multiplier=r.noise_multiplier, delta=1e-5, sample_rate=r.sample_rate, steps=r.steps)
    for by, value in r.epsilon.items():
        assert value == accounting.epsilon_spent(accountant=by, **about)
    assert r.epsilon["pld"] < r.epsilon["rdp"] <= 8 and r.epsilon["rdp"] > 7.99
    assert {"device", "date", "splits", "code", "python", "versions", "commit", "dirty"} <= r.provenance.keys()
    assert r.provenance["code"] == code_digest() and r.provenance["splits"] == data.load("digits").digest
    assert r.timing["seconds"] > 0 and r.timing["views"] > 0
    assert r.diagnostics.train_examples == len(material.validation_split(1437, 0.2, 0)[0])


def test_without_a_seed_every_run_is_another(store):
    first, second = run_all([replace(SPEC, seed=None, epochs=0.3, epsilon=None)] * 2, compute=COMPUTE, store=store)
    assert first.spec.seed != second.spec.seed and min(first.spec.seed, second.spec.seed) > 2**64
    assert not torch.equal(store.tensors(first)["weight"], store.tensors(second)["weight"])


def test_the_other_arrangements_of_public_images(store):
    """Table 6 and Table 10: pretraining on synthetic images, and half of the private set in their place."""
    mixed = views.Recipe(k_base=1, k_self=1, k_diff=1, transform="crop")
    short = replace(SPEC, recipe=mixed, epochs=0.5, epsilon=None)
    specs = [short, replace(short, train_on="half-1", public="half-2"), replace(short, pretrain_epochs=0.3),
             replace(short, train_on="synthetic", recipe=TINY)]  # fmt: skip
    results = run_all(specs, compute=COMPUTE, store=store)
    assert [r.population for r in results] == [1150, 575, 1150, round(0.8 * len(data.public_images("digits")))]
    weights = [store.tensors(r)["weight"] for r in results]
    assert all(w.isfinite().all() for w in weights)
    assert results[2].test_accuracy > 0.4, "a head that began with synthetic digits knows digits"


# Accuracy: neither too bad nor too good.


def test_accuracy_of_a_tiny_run_lies_in_a_window(shared):
    """Two epochs at epsilon 8. Below the window it does not learn; above it, in so few steps, is a leak until shown
    otherwise: the same head without noise on all data reaches 0.96."""
    _, (r, low) = shared
    assert 0.80 < r.test_accuracy < 0.95
    assert 0.75 < r.diagnostics.validation_accuracy < 0.95
    assert abs(r.test_accuracy - r.diagnostics.validation_accuracy) < 0.1
    assert 0.6 < low.test_accuracy < 0.93


def test_shuffled_labels_cannot_be_learnt(store, monkeypatch):
    """Test accuracy near 0.1: four standard deviations of 360 coins are 0.063. More would mean that test images leak."""
    splits = data.load("digits")
    turn = torch.from_numpy(np.random.default_rng(0).permutation(len(splits.train)))
    shuffled = replace(splits, train=replace(splits.train, labels=splits.train.labels[turn]), digest="shuffled")
    monkeypatch.setattr(material, "_load", lambda *a: shuffled)
    r = run(replace(SPEC, epsilon=None), compute=COMPUTE, store=store)
    assert 0.02 < r.test_accuracy < 0.2 and 0.02 < r.diagnostics.validation_accuracy < 0.2


# Choosing a learning rate.


def table(validation, test) -> pd.DataFrame:
    """Three rates, two seeds, one method."""
    rows = [(rate, seed) for rate in (0.5, 1.0, 2.0) for seed in (0, 1)]
    frame = pd.DataFrame(rows, columns=["learning_rate", "seed"])
    return frame.assign(method="m", epsilon=1.0, validation_accuracy=validation, accuracy=test)


def test_the_learning_rate_is_chosen_by_the_mean_validation_accuracy():
    runs = table([60, 70, 90, 50, 71, 72], [99, 99, 99, 99, 1, 1])
    chosen = choose_learning_rate(runs, ["method", "epsilon"])
    assert set(chosen["learning_rate"]) == {2.0} and len(chosen) == 2, "not the best seed, not the best test accuracy"
    ties = choose_learning_rate(table([50] * 6, [1, 1, 9, 9, 5, 5]), ["method", "epsilon"])
    assert set(ties["learning_rate"]) == {0.5}
    both = pd.concat([runs, runs.assign(method="n", validation_accuracy=[90, 90, 1, 1, 1, 1])])
    rates = choose_learning_rate(both, ["method", "epsilon"]).groupby("method")["learning_rate"].first()
    assert rates.to_dict() == {"m": 2.0, "n": 0.5}
    without_noise = choose_learning_rate(runs.assign(epsilon=None), ["method", "epsilon"])
    assert len(without_noise) == 2


def test_choosing_never_looks_at_the_test_accuracy():
    draw = np.random.default_rng(0)
    validation = draw.random(6)
    first = choose_learning_rate(table(validation, draw.random(6)), ["method", "epsilon"])
    for _ in range(20):
        other = choose_learning_rate(table(validation, draw.random(6)), ["method", "epsilon"])
        assert other["learning_rate"].tolist() == first["learning_rate"].tolist()
    blind = choose_learning_rate(table(validation, 0).drop(columns="accuracy"), ["method", "epsilon"])
    assert blind["learning_rate"].tolist() == first["learning_rate"].tolist()
    moved = choose_learning_rate(table(validation[::-1], 0), ["method", "epsilon"])
    assert moved["learning_rate"].tolist() != first["learning_rate"].tolist(), "the test must be able to fail"


def test_choosing_without_a_validation_split_is_refused():
    with pytest.raises(ValueError, match=r"validation_accuracy=None: .* give RunSpec a validation share above 0"):
        choose_learning_rate(table([math.nan] * 6, 1), ["method"])


def test_frame_has_a_row_a_run(shared):
    _, results = shared
    table = frame(results)
    assert len(table) == 2
    row = table.iloc[0]
    assert row["accuracy"] == 100 * results[0].test_accuracy and row["k_base"] == 2 and row["epsilon"] == 8
    assert row["sigma"] == results[0].noise_multiplier and row["T"] == results[0].steps and row["N"] == 1150
    assert row["epsilon_prv"] == results[0].epsilon["prv"] and "torch" in row["versions"]
    assert {f.name for f in fields(RunSpec)} <= set(table.columns)


# What runs of one seed must not share.


def test_public_training_does_not_tell_who_joins_a_private_step(monkeypatch, store):
    seen = []
    real = accounting.poisson_batch

    def spy(n, sample_rate, *, seed, step):
        seen.append((n, seed, step, set(real(n, sample_rate, seed=seed, step=step).tolist())))
        return real(n, sample_rate, seed=seed, step=step)

    monkeypatch.setattr(accounting, "poisson_batch", spy)
    run(replace(SPEC, pretrain_epochs=0.5, epochs=0.5), compute=COMPUTE, store=store)
    (_, public, *_), (_, private, *_) = seen[0], seen[-1]
    assert public != private == SPEC.seed
    batches = [{step: ids for _, s, step, ids in seen if s == seed} for seed in (public, private)]
    for step in batches[0].keys() & batches[1].keys():
        assert not {i for i in batches[0][step] if i < 1000} <= batches[1][step]
    # one seed for both would have made the smaller one a part of the larger one
    assert set(real(1000, 0.1, seed=0, step=0).tolist()) <= set(real(1200, 0.1, seed=0, step=0).tolist())


def test_a_run_with_a_fresh_seed_that_was_cut_off_goes_on_with_it(monkeypatch, store):
    spec, real, steps = replace(SPEC, seed=None, epochs=4.0), heads._add_noise, []

    def cut_off(*args):
        steps.append(args[-1])
        if len(steps) == 4:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(heads, "_add_noise", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(spec, compute=COMPUTE, store=store)
    one = run(spec, compute=COMPUTE, store=store)
    assert steps[3:6] == [3, 3, 4], "continued where it was"
    assert not list((store.folder / "seeds").iterdir()) and not list(store.folder.glob("*.checkpoint*"))
    two, three = run_all([spec, spec], compute=COMPUTE, store=store)
    assert len({r.spec.seed for r in (one, two, three)}) == 3 and min(r.spec.seed for r in (one, two)) >= 2**64


JOB = """
import os, sys
from pathlib import Path
from dataclasses import replace
from dpmix import ComputeFlags, Recipe, RunSpec, run_all
from dpmix.runs.store import Store

spec = RunSpec(recipe=Recipe(k_base=1), epsilon=8.0, learning_rate=1.0, model="wrn-10-1", epochs=0.03, batch_size=16)
compute = ComputeFlags(progress=False, device="cpu", workers=1)
drawn, given = run_all([replace(spec, seed=None), spec], compute=compute, store=Store(sys.argv[1]))
Path(sys.argv[1] + os.environ["RANK"]).write_text(f"{drawn.seed_drawn} {given.seed_drawn} {drawn.key} {given.key}")
"""


def test_the_processes_of_a_job_train_one_run_together(tmp_path):
    """Under torchrun all have the first one's seed, names and results; the store has each run once."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    root = str(Path(spec.__file__).parents[2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "runs")], capture_output=True, text=True, timeout=600, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [Path(f"{tmp_path / 'runs'}{rank}").read_text().split() for rank in (0, 1)]  # one pipe may mix two lines
    assert seen[0] == seen[1] and seen[0][:2] == ["True", "False"]
    store = Store(tmp_path / "runs")
    assert {r.key for r in store.all()} == set(seen[0][2:]) and not list((store.folder / "seeds").iterdir())
    calm = Store(tmp_path / "calm")
    alone = run(store.get(seen[0][3]).spec, compute=COMPUTE, store=calm)
    for name, tensor in store.tensors(store.get(seen[0][3])).items():
        torch.testing.assert_close(tensor, calm.tensors(alone)[name], rtol=0, atol=1e-3)
