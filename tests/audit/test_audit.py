"""The sensitivity of every step, audits of its releases, and what a neighbouring data set must not change.

Every check has its wrong algorithm (`mutants`): a check that nothing fails shows nothing.
"""

import inspect
import json
import re
import subprocess
import sys
import time
from dataclasses import fields, replace

import mutants
import numpy as np
import pytest
import torch
from flags import FLAGS, unguarded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import dpmix
from dpmix import audit, models
from dpmix.core import accounting, clipping, heads, microbatch, network, rng, views
from dpmix.images import data
from dpmix.runs import material as materials
from dpmix.runs.material import validation_split
from dpmix.runs.result import NonPrivateDiagnostics, Result
from dpmix.runs.spec import ComputeFlags, RunSpec, mechanism
from dpmix.runs.store import Store

CLASSES, SHAPE = 3, (1, 4, 4)
RECIPE = views.Recipe(k_base=4, transform="crop")
PLAIN = views.Recipe(k_base=4, transform="none")
METHOD = views.Recipe(k_base=3, k_self=2, k_diff=1, transform="crop")


@pytest.fixture(scope="module")
def public():
    draw = rng.generator(0, "public of the audit")
    images = torch.from_numpy(draw.integers(0, 256, (9, *SHAPE)).astype(np.uint8))
    return data.ImageSet(images, torch.arange(9) % CLASSES, ("a", "b", "c"))


def world(name: str, *, seed: int = 0, size: int = 6) -> tuple[audit.Records, audit.Records]:
    found = {n: (records, new.take([0])) for n, records, new in audit.worlds(SHAPE, CLASSES, size, seed=seed)}
    return found[name]


def pixels(gain: float = 4.0) -> models.Encoder:
    return models.Encoder(lambda x: gain * x.flatten(1), SHAPE[1], 16, (1,), "pixels")


def confident() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights under which the views' logits differ."""
    draw = rng.generator(0, "confident weights of the audit")
    return torch.from_numpy(draw.standard_normal((CLASSES, 16))).float(), torch.zeros(CLASSES)


def as_bytes(records: audit.Records) -> audit.Records:
    return replace(records, images=(255 * records.images).round().to(torch.uint8))


mixed = st.fixed_dictionaries({
    "k_base": st.integers(0, 5), "k_self": st.integers(0, 5), "k_diff": st.integers(1, 3),
    "mix": st.sampled_from(["mixup", "cutmix"]), "alpha": st.sampled_from([0.1, 0.2, 1.0]),
    "transform": st.sampled_from(["none", "flip", "crop", "crop-flip"]),
})  # fmt: skip
own = st.fixed_dictionaries({"k_base": st.integers(1, 17), "k_self": st.integers(0, 9)})
recipes = own | mixed  # arguments: beartype draws random numbers, which Hypothesis wants outside its strategies
laws = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Sensitivity


@pytest.mark.parametrize("flag", FLAGS)
@settings(laws, max_examples=2)
@given(recipe=recipes, classes=st.integers(1, 5), size=st.integers(1, 9), clip=st.sampled_from([0.05, 1.0, 7.0]),
       side=st.integers(1, 9), channels=st.sampled_from([1, 3]), seed=st.integers(0, 10**6))  # fmt: skip
def test_one_example_moves_the_sum_of_a_head_by_at_most_c(flag, recipe, classes, size, clip, side, channels, seed):
    shape = (channels, side, side)
    images = torch.from_numpy(rng.generator(seed, "public images").integers(0, 256, (4, *shape)).astype(np.uint8))
    names = tuple(map(str, range(classes)))
    synthetic = data.ImageSet(images, torch.arange(4) % classes, names)
    step = audit.head_step(views.Recipe(**recipe), num_classes=classes, clip_norm=clip, public=synthetic)
    with FLAGS[flag]():
        found = audit.sensitivity(
            step, shape=shape, num_classes=classes, clip_norm=clip, size=size, trials=1, seed=seed
        )
    assert found.holds, found


@pytest.mark.parametrize("flag", FLAGS)
def test_worlds_under_every_flag(flag, public):
    """Heads on views that differ by little, and a network: no switch of PyTorch's lets an example in further."""
    steps = [
        audit.head_step(
            METHOD, num_classes=CLASSES, clip_norm=0.2, public=public, encoder=pixels(), weights=confident()
        )
    ]
    steps += [audit.network_step(small(), METHOD, num_classes=CLASSES, clip_norm=0.2, public=public, engine=engine)
              for engine in ("loop", "grouped")]  # fmt: skip
    with FLAGS[flag]():
        for step in steps:
            found = audit.sensitivity(
                step, shape=SHAPE, num_classes=CLASSES, clip_norm=0.2, size=2, trials=1, relations=("add",)
            )
            assert found.holds and found.largest("add") > 0.9, found


def test_worlds_see_a_clip_that_autocast_rounds(public, monkeypatch):
    """Negative control of the above: without the guard the same worlds find more than C."""
    unguarded(monkeypatch)
    steps = [
        audit.head_step(
            METHOD, num_classes=CLASSES, clip_norm=0.2, public=public, encoder=pixels(), weights=confident()
        )
    ]
    steps += [audit.network_step(small(), METHOD, num_classes=CLASSES, clip_norm=0.2, public=public, engine="grouped")]
    with FLAGS["autocast bfloat16"]():
        for step in steps:
            found = audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, clip_norm=0.2, size=3, trials=1)
            assert found.excess > 1 + 10 * audit.ROUNDING, found


@pytest.mark.parametrize("method", views.METHODS)
def test_the_bound_is_reached_so_it_is_not_vacuous(method, public):
    step = audit.head_step(views.METHODS[method], num_classes=CLASSES, clip_norm=0.5, public=public)
    found = audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, clip_norm=0.5, natural=public)
    assert found.holds, found
    assert found.largest("add") > 0.999
    # Pure-DP-MixDiff averages public images only: which private example is there does not matter, only that one is
    assert found.largest("replace") == 0 if method == "pure-mix-diff" else found.largest("replace") > 1.99


def test_any_weights_and_a_real_encoder():
    digits = data.load("digits").train
    encoder = models.encoder("tiny-convnext")
    draw = rng.generator(3, "weights")
    for scale in (0.0, 1.0, 100.0):
        w = scale * torch.from_numpy(draw.standard_normal((10, encoder.dim))).float(), torch.zeros(10)
        step = audit.head_step(
            views.METHODS["mix-self"].for_data(False), num_classes=10, clip_norm=0.3, encoder=encoder, weights=w
        )
        found = audit.sensitivity(
            step, shape=(1, 8, 8), num_classes=10, clip_norm=0.3, natural=digits, trials=1, size=4
        )
        assert found.holds, (scale, found)


class Small(nn.Module):
    """A convolutional network with group norm, for images of any size and one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
        )
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def small(seed: int = 0) -> Small:
    model, draw = Small(), rng.generator(seed, "small network")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(draw.standard_normal(p.shape)))
    return model


@pytest.mark.parametrize("flag", FLAGS)
@settings(laws, max_examples=2)
@given(recipe=recipes, engine=st.sampled_from(["loop", "grouped", "vmap"]), size=st.integers(1, 3),
       physical=st.sampled_from([None, 1, 2]), seed=st.integers(0, 10**6))  # fmt: skip
def test_one_example_moves_the_sum_of_a_network_by_at_most_c(flag, recipe, engine, size, physical, seed, public):
    step = audit.network_step(
        small(seed), views.Recipe(**recipe), num_classes=CLASSES, clip_norm=0.2, public=public, engine=engine,
        physical_batch=physical,
    )  # fmt: skip
    with FLAGS[flag]():
        found = audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, clip_norm=0.2, size=size, trials=1, seed=seed)
    assert found.holds, found


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
def test_the_bound_of_a_network_is_reached(engine):
    step = audit.network_step(small(), RECIPE, num_classes=CLASSES, clip_norm=0.05, engine=engine)
    found = audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, clip_norm=0.05)
    assert found.holds and found.largest("add") > 0.999 and found.largest("replace") > 1.7, found


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
def test_the_bound_of_a_network_holds_and_is_reached_in_bfloat16(engine, public):
    """What a CPU with instructions for bfloat16 and a GPU compute by default."""
    step = audit.network_step(
        small(), METHOD, num_classes=CLASSES, clip_norm=0.05, engine=engine, autocast=torch.bfloat16, public=public
    )
    found = audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, clip_norm=0.05, size=4, trials=1)
    assert found.holds and found.largest("add") > 0.999, found


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_wrong_algorithms_move_it_further(name):
    step = getattr(mutants.Mutants(RECIPE, num_classes=CLASSES), name)
    found = audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, relations=("add",))
    assert not found.holds and found.largest("add") > mutants.MUTANTS[name], found


def test_the_honest_algorithm_in_the_same_words_passes():
    step = mutants.Mutants(RECIPE, num_classes=CLASSES).correct
    assert audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES).holds


def test_a_refused_sum_and_a_bad_relation_are_not_passed_over():
    found = audit.sensitivity(
        lambda records, seed, number: records.images.sum()[None], shape=SHAPE, num_classes=CLASSES
    )
    assert found.movements["not a number", "add"] == float("inf") and not found.holds
    with pytest.raises(ValueError, match="relations='swap'"):
        audit.sensitivity(mutants.Mutants(RECIPE, num_classes=CLASSES).correct, shape=SHAPE, num_classes=CLASSES,
                          relations=("swap",))  # fmt: skip


def disagreement(step: audit.Step, other: audit.Step, seed: int = 0) -> float:
    """The largest distance of two steps over the worlds of bounded pixels."""
    found = [
        float((step(records, seed, 0).double() - other(records, seed, 0).double()).norm())
        for name, records, _ in audit.worlds(SHAPE, CLASSES, 6, seed=seed) if name in ("random", "black and white", "copies")
    ]  # fmt: skip
    return max(found)


def test_clip_then_average_is_private_and_yet_another_method():
    mutant = mutants.Mutants(RECIPE, num_classes=CLASSES, clip_norm=0.5)
    assert audit.sensitivity(mutant.clip_then_average, shape=SHAPE, num_classes=CLASSES, clip_norm=0.5).holds
    oracle = audit.head_oracle(RECIPE, num_classes=CLASSES, clip_norm=0.5)
    assert disagreement(mutant.clip_then_average, oracle) > 0.02
    assert disagreement(mutant.correct, oracle) < 1e-4
    assert disagreement(audit.head_step(RECIPE, num_classes=CLASSES, clip_norm=0.5), oracle) < 1e-4


def test_microbatches_need_noise_for_two_clip_norms():
    """The honest pairs of `dpmix.core.microbatch` move by up to 2C, which is what their noise is scaled for."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(audit.duel(CLASSES, 16)[1])

    def step(records, seed, number):
        table = torch.arange(8).view(4, 2)  # a fixed partition of eight places
        x = torch.zeros(4, 2, 1, *SHAPE)
        y = torch.zeros(4, 2, 1, CLASSES)
        there = torch.isin(table, records.ids)
        x.view(8, 1, *SHAPE)[records.ids] = records.images[:, None]
        y.view(8, 1, CLASSES)[records.ids] = torch.eye(CLASSES)[records.labels][:, None]
        done = microbatch.microbatch_sum(model, x, y, there, 1.0)
        return torch.cat([g.flatten() for g in done.grads.values()])

    found = audit.sensitivity(step, shape=SHAPE, num_classes=CLASSES, size=6, relations=("add",), trials=6)
    allowed = microbatch.sensitivity(2)
    assert 1.5 < found.largest("add") <= allowed * (1 + audit.ROUNDING), found


def test_the_audited_steps_are_the_ones_that_train(public):
    """`head_step` is one step of `train_heads`, `network_step` one of `network.train`, noise apart."""
    recipe = views.Recipe(k_base=3, k_self=2, k_diff=1, transform="crop")
    records = as_bytes(world("random", size=9)[0])
    step = audit.head_step(recipe, num_classes=CLASSES, clip_norm=0.7, encoder=pixels(), public=public)
    release = audit.bank_release(recipe, num_classes=CLASSES, noise_multiplier=0.0, clip_norm=0.7, encoder=pixels(),
                                 public=public, copies=3)  # fmt: skip
    torch.testing.assert_close(release(records, 5, 0), step(records, 5, 0).double().expand(3, -1), atol=1e-5, rtol=1e-5)

    model = small()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    expected = audit.network_step(model, recipe, num_classes=CLASSES, clip_norm=0.7, public=public)(
        replace(records, ids=torch.arange(9)), 5, 0
    )
    network.train(model, records.images, records.labels, recipe=recipe, num_classes=CLASSES, clip_norm=0.7, noise_multiplier=0,
                  learning_rate=1, expected_batch=1, sample_rate=1, steps=1, seed=5, public=public, progress=False)  # fmt: skip
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(before - after, expected, atol=1e-5, rtol=1e-4)


# Noise, and releases with a canary


def test_the_noise_of_a_step_is_there_once_whatever_the_physical_batch():
    records = world("random", size=12)[0]
    real = audit.bank_release(
        PLAIN, num_classes=CLASSES, noise_multiplier=1.5, clip_norm=0.4, encoder=pixels(), copies=200
    )
    ratio, low, high = audit.noise_level(real(as_bytes(records), 0, 0), 1.5 * 0.4)
    assert low < ratio < high and high - low < 0.15, (ratio, low, high)
    for wrong in (2 / 3, 1.5):  # the test can tell
        ratio, low, high = audit.noise_level(real(as_bytes(records), 0, 0), 1.5 * 0.4 * wrong)
        assert not low < ratio < high
    releases = real(as_bytes(records), 0, 0)
    releases[:, -1] = releases[:1, -1]  # none on the last bias
    assert audit.noise_level(releases, 1.5 * 0.4)[0] == 0
    releases[:, -1] = real(as_bytes(records), 0, 0)[:, -1] * 1.7
    ratio, low, high = audit.noise_level(releases, 1.5 * 0.4)
    assert ratio > high and ratio == pytest.approx(1.7, rel=0.2)
    step = mutants.Mutants(PLAIN, num_classes=CLASSES).correct
    for chunk, chunks in ((12, 1), (4, 3), (1, 12)):
        ratio, low, high = audit.noise_level(mutants.noise_per_chunk(step, 1.0, chunk, copies=200)(records, 0, 0), 1.0)
        assert (low < ratio < high) == (chunks == 1) and ratio == pytest.approx(chunks**0.5, rel=0.1)


def test_scores_without_a_difference_bound_nothing():
    draw = rng.generator(0, "null scores")
    for _ in range(20):
        gdp, clopper_pearson = audit.lower_bounds(*draw.standard_normal((2, 2000)), delta=1e-5)
        assert gdp < 0.3 and clopper_pearson < 0.3


def real_audit(multiplier: float, claimed: float, name: str, seed: int) -> audit.CanaryAudit:
    """Audit one real step of `train_heads` that uses `multiplier` and claims `claimed`."""
    records, canary = map(as_bytes, world(name, seed=seed))
    step = audit.head_step(RECIPE, num_classes=CLASSES, encoder=pixels())
    release = audit.bank_release(RECIPE, num_classes=CLASSES, noise_multiplier=multiplier, encoder=pixels())
    return audit.step_canary(
        step, records=records, canary=canary, noise_multiplier=claimed, release=release, seed=seed, delta=1e-5
    )


def test_correct_code_is_never_flagged_and_half_the_noise_always_is():
    began = time.process_time()
    for seed in range(20):
        name = ("random", "opponents", "blank, white newcomer")[seed % 3]
        found = real_audit(1.0, 1.0, name, seed)
        assert not found.flagged, (name, seed, found)
        assert len(found.inside) == len(found.outside) == 2000
        if seed == 0:
            assert time.process_time() - began < 30
        assert found.gdp > 0.6 * found.claimed, "an audit that finds nothing would never flag anything"
    for seed in range(3):
        assert real_audit(0.5, 1.0, "opponents", seed).flagged


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_the_canary_of_one_step_finds_each_wrong_algorithm(name):
    """On data where the mistake shows: naive mixup among random images, the others among opponents."""
    records, canary = world("random" if name == "mixup_across_examples" else "opponents")
    made = mutants.Mutants(PLAIN, num_classes=CLASSES)
    found = audit.step_canary(getattr(made, name), records=records, canary=canary, noise_multiplier=1.0)
    assert found.flagged, (name, found.claimed, found.gdp, found.clopper_pearson)
    if name == "views_as_examples":  # K C: even without supposing that anything is Gaussian
        assert found.clopper_pearson > found.claimed
    honest = audit.step_canary(made.correct, records=records, canary=canary, noise_multiplier=1.0)
    assert not honest.flagged


def test_bad_audits_are_refused_by_name():
    records, canary = world("random")
    step = mutants.Mutants(PLAIN, num_classes=CLASSES).correct
    for wrong, said in ((dict(canary=records), "canary=6"), (dict(releases=5), "releases=5"),
                        (dict(noise_multiplier=0.0), "noise_multiplier=0.0")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            audit.step_canary(step, **{"records": records, "canary": canary, "noise_multiplier": 1.0, **wrong})
    with pytest.raises(ValueError, match="count=3"):
        audit.one_run(lambda included: torch.zeros(1, 3), 3)
    with pytest.raises(ValueError, match="k_diff=0"):
        head = heads.Head(recipe=views.METHODS["mix-diff"], learning_rate=1.0, noise_multiplier=1.0)
        audit.bank_run(
            data.load("digits").train, pixels(), [head], count=20, expected_batch=5, steps=2, sample_rate=0.1
        )


def test_audits_never_import_jax():
    """jax is made impossible to import; the statistics are those of jax_privacy all the same."""
    code = (
        "import sys; sys.modules['jax'] = sys.modules['jaxlib'] = None\n"
        "import numpy as np; from dpmix import audit\n"
        "assert not any('jax_privacy' in m for m in sys.modules)\n"
        "x = np.arange(500.0); print(audit.auditor(x + 600, x).epsilon_clopper_pearson(0.05) > 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_without_jax_privacy_the_audit_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "dpmix._jax_privacy_auditing", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'dpmix[jax]'")):
        audit.auditor(np.ones(2), np.ones(2))


def test_one_run_sees_gross_mistakes_and_not_a_factor_of_two():
    """Three heads of one bank on the same data and canaries: right, noise for C/2, noise for C/16."""
    digits = data.load("digits").train.subset(range(300))
    count, batch, steps = 400, 60, 50
    about = dict(delta=1e-5, sample_rate=batch / (len(digits) + count // 2), steps=steps, accountant="prv")
    sigma = accounting.noise_multiplier(epsilon=2.0, **about)
    pixel = models.Encoder(lambda x: x.flatten(1), 8, 64, (1,), "pixels")
    recipe = views.Recipe(k_base=2, k_self=2, transform="crop")
    bank = [heads.Head(recipe=recipe, learning_rate=1.0, noise_multiplier=sigma / f) for f in (1, 2, 16)]
    train = audit.bank_run(
        digits, pixel, bank, count=count, expected_batch=batch, steps=steps, sample_rate=about["sample_rate"]
    )
    right, half, gross = audit.one_run(train, count)
    assert 0 <= right.steinke < 2 and 0 <= right.fdp < 2
    spent = accounting.epsilon_spent(noise_multiplier=sigma / 2, **about)
    assert max(half.steinke, half.fdp) < 2 < spent, "the mistake is real, and one run does not show it"
    assert gross.steinke > 2, gross


def test_one_shuffle_is_not_poisson_sampling():
    """Against a direct simulation of the adversary, and above the epsilon that Poisson sampling would have."""
    sigma, batches, epochs, delta = 2.0, 50, 10, 1e-5
    found = audit.shuffled_epsilon(noise_multiplier=sigma, batches=batches, epochs=epochs, delta=delta)
    poisson = accounting.epsilon_spent(
        noise_multiplier=sigma, delta=delta, sample_rate=1 / batches, steps=batches * epochs, accountant="prv"
    )
    assert found > 2 * poisson
    # one epoch in one batch is the Gaussian mechanism itself; the bound may not exceed its epsilon
    assert audit.shuffled_epsilon(noise_multiplier=1.0, batches=1, epochs=1, delta=delta) <= 4.3772
    draw = rng.generator(0, "shuffle")
    means = draw.standard_normal((200_000, 5)) / 1.0
    hit = np.maximum(means[:, 0] + 2.0, means[:, 1:].max(1)) > 2.5
    false = means.max(1) > 2.5
    bound = audit.shuffled_epsilon(noise_multiplier=1.0, batches=5, epochs=4, delta=0.01)
    assert bound >= np.log((hit.mean() - 0.01) / false.mean()) - 0.05


# What a neighbouring data set must not change


def tiny_spec(**changes) -> RunSpec:
    about = dict(recipe=views.Recipe(k_base=2, k_self=1, transform="crop"), epsilon=4.0, learning_rate=4.0, model="tiny-convnext",
                 population=1000, batch_size=50, epochs=0.25, seed=2**70 + 1, validation=0.3)  # fmt: skip
    return RunSpec(**{**about, **changes})


def run_without(monkeypatch, tmp_path, capfd, place: int | None) -> tuple[Result, list[str], str]:
    """The result of a run on the digits without one of them, the names of its files (keyed digests as such), and what it
    printed."""
    whole = data.load("digits")
    kept = torch.tensor([i for i in range(len(whole.train)) if i != place])
    splits = replace(whole, train=whole.train.subset(kept))
    for cached in (materials._load, materials._load_public):
        cached.cache_clear()
    monkeypatch.setattr(data, "load", lambda *args, **kw: splits)
    folder = tmp_path / str(place)
    capfd.readouterr()
    compute = ComputeFlags(cache=str(tmp_path / "cache"))
    result = dpmix.run(tiny_spec(), compute=compute, store=Store(folder))
    out, err = capfd.readouterr()
    shown = re.sub(r":[^:|]*\|[^|]*\|[^\r\n]*?\]", ":", out + err)  # how far and how fast a bar has come is not asked
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    forms = sorted(re.sub(r"[0-9a-f]{32}", "a keyed digest", name) for name in names)
    return result, forms, "\n".join(sorted(set(re.split(r"[\r\n]", shown))))


def test_removing_an_example_changes_nothing_but_the_weights(monkeypatch, tmp_path, capfd):
    """Divisor, q, sigma, T, rate, epsilon and log lines are functions of the spec; file names are keyed digests."""
    everyone, names, shown = run_without(monkeypatch, tmp_path, capfd, None)
    for place in (0, 700, len(data.load("digits").train) - 1):
        less, less_names, less_shown = run_without(monkeypatch, tmp_path, capfd, place)
        for field in ("spec", "divisor", "sample_rate", "noise_multiplier", "steps", "population", "epsilon"):
            assert getattr(everyone, field) == getattr(less, field), field
        assert names == less_names and shown == less_shown
    assert "1 head, " in shown, "the progress line was looked at"
    # and the control: without a public population, N and all that follows from it would move
    spec = tiny_spec(population=None, validation=0.0)
    assert mechanism(spec, 1437) != mechanism(spec, 1436)


def test_neighbours_agree_on_membership_views_and_held_out_examples():
    """Appending one example changes nobody else's coin, whether for a step or for the validation split, nor its views."""
    for step in range(5):
        a, b = (accounting.poisson_batch(n, 0.3, seed=4, step=step) for n in (100, 101))
        assert a.tolist() == [i for i in b.tolist() if i < 100]
    for seed in range(5):
        (kept, held), (more_kept, more_held) = (validation_split(n, 0.3, seed) for n in (100, 101))
        assert (
            kept.tolist() == more_kept[more_kept < 100].tolist()
            and held.tolist() == more_held[more_held < 100].tolist()
        )
    records, newcomer = world("random")
    both = [views.make_views(r.images, r.labels, r.ids, RECIPE, num_classes=CLASSES, seed=0, step=0).images
            for r in (records, records.insert(2, newcomer))]  # fmt: skip
    assert torch.equal(both[0], torch.cat([both[1][:2], both[1][3:]]))


def test_an_encoder_normalises_by_constants():
    """Features of an image do not depend on the other images: nothing is standardised by what is there."""
    encoder = models.encoder("tiny-vit")
    images = data.load("digits").train.images[:8].float() / 255
    alone, beside = encoder.features(images[:4]), encoder.features(torch.cat([images[:4], 1 - images[4:]]))[:4]
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=1e-5)
    std, mean = torch.std_mean(images)  # the control: with statistics of the set they would
    shifted = encoder.features(((images - mean) / std).clamp(0, 1))[:4]
    assert (shifted - alone).abs().max() > 1e-3


# Releases


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    store = Store(folder / "store")
    with pytest.MonkeyPatch.context() as patch:  # drawn, but the same each time
        patch.setattr(rng, "fresh_seed", lambda: 0x9E3779B97F4A7C15F39CC0605CEDC834)
        compute = ComputeFlags(progress=False, dtype="float32", encoder_engine="torch")  # as the tests evaluate
        result = dpmix.run(tiny_spec(seed=None), compute=compute, store=store)
    dpmix.release(result, folder / "out", store=store)
    return result, folder / "out", store


def test_a_release_holds_the_model_and_what_it_promises(released):
    result, out, store = released
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "privacy_card.json"]
    tensors = load_file(out / "model.safetensors")
    kept = store.tensors(result)
    assert tensors.keys() == kept.keys() and all(torch.equal(tensors[k], kept[k]) for k in kept)
    test = data.load("digits").test
    encoder = models.encoder("tiny-convnext")
    features = heads.encode(encoder, test.images)
    hits = (features @ tensors["weight"].T + tensors["bias"]).argmax(1).eq(test.labels).double().mean()
    assert float(hits) == pytest.approx(result.test_accuracy, abs=1e-9)
    card = json.loads((out / "privacy_card.json").read_text())["content"]
    assert card["guarantee"]["epsilon"] == result.epsilon and card["guarantee"]["delta"] == 1e-5
    assert all(0 < e <= 4.0 * (1 + 1e-6) for name, e in result.epsilon.items() if name == "rdp")
    assert "remove" in card["adjacency"] and "Poisson" in card["sampling"]
    said = " ".join(card["not_accounted_for"])
    assert "learning rate" in said and "budgets add up" in said


def test_a_release_withholds_the_seed_and_all_diagnostics(released):
    result, out, _ = released
    seed = str(result.spec.seed)
    assert len(seed) > 20
    private = NonPrivateDiagnostics.__dataclass_fields__.keys()
    for path in out.iterdir():
        raw = path.read_bytes()
        assert seed.encode() not in raw and hex(result.spec.seed)[2:].encode() not in raw
        assert result.key.encode() not in raw, "the key is a digest over the seed"
        for name in private:
            assert name.encode() not in raw, name
        text = raw[8 : 8 + int.from_bytes(raw[:8], "little")] if path.suffix == ".safetensors" else raw
        written = re.findall(rb"(?<![\w.])[\d.]+(?![\w.])", text)  # whole numbers, not three digits out of a checksum
        for value in (result.test_accuracy, result.diagnostics.validation_accuracy, result.timing["views"]):
            assert repr(value).encode() not in written
    card = (out / "privacy_card.json").read_text()
    assert seed in json.dumps(result.to_json()) and "train_examples" in json.dumps(result.to_json()), (
        "they are elsewhere"
    )
    assert "withheld" in card and "seed" in card


def test_a_run_without_noise_is_not_released(tmp_path):
    store = Store(tmp_path / "store")
    result = dpmix.run(tiny_spec(epsilon=None, seed=None), compute=ComputeFlags(progress=False), store=store)
    with pytest.raises(ValueError, match="no guarantee"):
        dpmix.release(result, tmp_path / "out", store=store)
    assert not (tmp_path / "out").exists()


def test_a_seed_that_can_be_guessed_gives_the_noise_away(tmp_path):
    """Why a release warns about small seeds: whoever guesses the seed subtracts the noise. One head, one step."""
    digits, encoder = data.load("digits").train.subset(range(64)), models.encoder("tiny-convnext")
    head = heads.Head(recipe=views.Recipe(k_base=1, transform="none"), learning_rate=1.0, noise_multiplier=20.0)
    about = dict(num_classes=10, expected_batch=64, steps=1, progress=False)
    bank = heads.train_heads(encoder, digits.images, digits.labels, [head], seed=7, **about)
    blank = torch.zeros_like(digits.images)  # the attacker has no data, only a guess
    left = [
        float((bank.weights - heads.train_heads(encoder, blank, digits.labels, [head], seed=guess, **about).weights).norm())
        for guess in range(12)
    ]  # fmt: skip
    assert int(np.argmin(left)) == 7 and sorted(left)[1] > 5 * left[7]
    store = Store(tmp_path / "store")
    result = dpmix.run(tiny_spec(seed=7), compute=ComputeFlags(progress=False), store=store)
    with pytest.raises(ValueError, match="seed: was given, and whoever knows or guesses it can subtract the noise"):
        dpmix.release(result, tmp_path / "out", store=store)


def test_the_names_of_the_contract():
    """What outside checks rely on."""
    given = inspect.signature(clipping.clipped_gradient_sum).parameters
    assert (
        list(given)[:5] == ["model", "images", "targets", "clip_norm", "engine"] and given["engine"].default == "auto"
    )
    assert [f.name for f in fields(clipping.ClippedSum)][:2] == ["grads", "norms"]
    heads_given = list(inspect.signature(clipping.clipped_head_sums).parameters)
    assert heads_given[:6] == ["features", "targets", "weights", "biases", "clip_norms", "view_weights"]
    assert all(
        callable(getattr(audit, n)) for n in ["sensitivity", "step_canary", "one_run", "head_step", "network_step"]
    )
