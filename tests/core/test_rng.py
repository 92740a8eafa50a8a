"""Draws belong to their key: equal keys agree everywhere, other keys know nothing of each other, prefixes stay."""

import ast
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES
from scipy import stats

from dpmix.core import accounting, heads, network, rng, sources, views

ROOT = Path(__file__).parents[2]

KEYS = [
    (1, "a"), (2**100, "a"), (0, "a"), (0, "a", 1), (0, "a", 1.0), (0, "a", "1"), (0, "a1"), (0, "a", None),
    (0, "a", "None"), (0, "a", ""), (0, "ab"), (0, "a", "b"), (0, "a', 'b"), (0, "a", 0, 1), (0, "a", 1, 0),
    (0, "a", 12, 3), (0, "a", 1, 23), (0, "sample", 1), (0, "noise", 1), (0, "views", 1, 2), (0, "views", 2, 1),
]  # fmt: skip


PINNED = [0.7110310924320332, 0.8249000042931498, 0.859995838342995]  # of (0, "sample", 0)


def test_equal_keys_give_equal_draws_whatever_was_drawn_before():
    first = rng.generator(3, "views", 1, 2).random(5)
    rng.generator(3, "noise").standard_normal(1000)
    other = rng.generator(3, "views", 1, 3)
    again = rng.generator(3, "views", 1, 2)
    mixed = np.array([(again.random(), other.random())[0] for _ in range(5)])
    assert (first == mixed).all()


def test_the_streams_are_pinned():
    """Stored results and the reference results belong to these streams: a change of key or cipher must be seen."""
    assert rng.generator(0, "sample", 0).random(3).tolist() == pytest.approx(PINNED, abs=0)


def test_every_part_of_a_key_counts():
    draws = [int(rng.generator(*key).integers(0, 2**63)) for key in KEYS]
    assert len(set(draws)) == len(KEYS)


def correlations(streams: np.ndarray) -> float:
    """Largest |z| of the sample correlations between all pairs of rows."""
    n = streams.shape[1]
    off = np.corrcoef(streams)[np.triu_indices(len(streams), 1)]
    return float(np.abs(off).max() * n**0.5)


def test_different_keys_are_independent():
    """19,900 pairs at |z| < 6.5: a flake rate of 2e-6 over seeds; the seed is fixed. Keys that are added up fail."""
    grid = [(step, i) for step in range(20) for i in range(10)]
    apart = np.stack([rng.generator(7, "views", step, i).standard_normal(2000) for step, i in grid])
    assert correlations(apart) < 6.5
    added = np.stack([rng.generator(7, "views", step + i).standard_normal(2000) for step, i in grid])
    assert correlations(added) > 40


def test_first_draws_over_keys_are_uniform():
    """The quality over keys, which a weak hash would spoil; p < 1e-6 by chance once in a million seeds."""
    first = np.array([rng.generator(1, "sample", step).random() for step in range(5000)])
    assert stats.kstest(first, "uniform").pvalue > 1e-6
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 6 / 5000**0.5
    low_bits = (first * 2**20 % 1 * 16).astype(int)
    assert stats.chisquare(np.bincount(low_bits, minlength=16)).pvalue > 1e-6
    assert stats.kstest(first**1.1, "uniform").pvalue < 1e-6, "the test must be able to fail"


@pytest.mark.parametrize("draw", [
    lambda g, n: g.random(n), lambda g, n: g.random((n, 3)), lambda g, n: g.standard_normal(n),
    lambda g, n: g.beta(0.2, 0.2, n), lambda g, n: g.beta(1.0, 1.0, n), lambda g, n: g.beta(3.0, 3.0, n),
])  # fmt: skip
def test_the_first_draws_do_not_depend_on_how_many_follow(draw):
    for k in (1, 2, 7, 18):
        assert (draw(rng.generator(5, "x"), k) == draw(rng.generator(5, "x"), 40)[:k]).all()


def test_fresh_seeds_are_long_and_differ():
    seeds = [rng.fresh_seed() for _ in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= s < 2**128 for s in seeds)
    assert max(seeds) > 2**127, "by chance once in 2^200 runs"


def test_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    before, before_torch = np.random.get_state()[1].copy(), torch.get_rng_state()
    rng.generator(0, "a").random(10)
    rng.fresh_seed()
    assert (np.random.get_state()[1] == before).all()
    assert torch.equal(torch.get_rng_state(), before_torch)


# Seeds. None is fresh, a whole number >= 0 is a key, everything else is refused by the generator itself.


@pytest.mark.parametrize(
    "bad", ["0", 1.5, True, False, -1, -3, 1.0, np.float64(2), np.bool_(True), (1,), b"1", torch.tensor(1)]
)
def test_what_is_no_whole_number_is_no_seed(bad):
    with pytest.raises(ValueError, match=r"^seed=.*: must be a whole number of at least 0, or None") as caught:
        rng.generator(bad, "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_integers_of_numpy_are_numbers(kind):
    assert rng.generator(kind(7), "a", kind(3)).random() == rng.generator(7, "a", 3).random()
    assert type(rng.as_seed(kind(7))) is int
    assert rng.generator(2**200, "a").random() != rng.generator(0, "a").random()


@pytest.mark.parametrize("bad", [1, None, "", ("a",)])
def test_a_purpose_is_a_word(bad):
    """Its type is checked under pytest alone, before the generator sees it."""
    with pytest.raises((ValueError, TypeError), match="purpose"):
        rng.generator(0, bad)


def bank(private, encoder, seed, **other):
    head = heads.Head(recipe=views.METHODS["dp-sgd"], learning_rate=1.0, noise_multiplier=1.0)
    about = dict(num_classes=CLASSES, expected_batch=8, steps=2, progress=False)
    return heads.train_heads(encoder, private.images, private.labels, [head], seed=seed, **about, **other).weights


def weights(private, encoder, seed):
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 16, CLASSES)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    about = dict(clip_norm=1.0, noise_multiplier=1.0, learning_rate=1.0, expected_batch=8, sample_rate=0.2, steps=2)
    model, recipe = torch.nn.Sequential(torch.nn.Flatten(), layer), views.METHODS["dp-sgd"]
    done = network.train(
        model, private.images, private.labels, recipe=recipe, num_classes=CLASSES, seed=seed, progress=False, **about
    )
    return done.state["1.weight"]


def some_views(private, encoder, seed):
    ids = torch.arange(len(private.labels))
    return views.make_views(
        private.images, private.labels, ids, views.Recipe(2), num_classes=CLASSES, seed=seed, step=0
    ).images


def batch(private, encoder, seed):
    return torch.bincount(accounting.poisson_batch(500, 0.5, seed=seed, step=0), minlength=500)


@pytest.mark.parametrize("draw", [bank, weights, some_views, batch])
def test_none_is_fresh_entropy_at_every_level(draw, private, projection):
    """What a stranger could draw again with the same None would be no secret. A given seed is a key."""
    assert not torch.equal(draw(private, projection, None), draw(private, projection, None))
    assert torch.equal(draw(private, projection, 5), draw(private, projection, np.int64(5)))
    for bad in ("0", 1.5, True, -3):
        with pytest.raises(ValueError, match=r"^seed="):
            draw(private, projection, bad)


def test_one_fresh_seed_serves_a_whole_training(private, projection, monkeypatch):
    """Views, coins and noise of a run hang together: were each call fresh, a bank of two would draw two batches."""
    asked = []
    monkeypatch.setattr(rng, "fresh_seed", lambda: asked.append(1) or 9)
    for draw in (bank, weights, some_views):
        asked.clear()
        drawn = draw(private, projection, None)
        assert len(asked) == 1 and torch.equal(drawn, draw(private, projection, 9))


def test_a_bank_with_checkpoints_must_be_given_its_seed(private, projection, tmp_path):
    with pytest.raises(ValueError, match="seed=None: a run with checkpoints must be given its seed"):
        bank(private, projection, None, checkpoint=tmp_path / "c")
    assert not list(tmp_path.iterdir())


# Purposes. Each is written out at one call of `generator` and nowhere else.


def purposes(source: str) -> list[str]:
    """The second argument of every call of `generator` or `rng.generator`; "?" where it is not a word written out."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    ours = [c for c in calls if ast.unparse(c.func) in ("generator", "rng.generator")]
    return [c.args[1].value if len(c.args) > 1 and isinstance(c.args[1], ast.Constant) else "?" for c in ours]


def all_texts() -> dict[str, str]:
    found = [p for folder in ("dpmix", "notebooks", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in found}


def repeated(texts) -> list[str]:
    counts = Counter(purpose for text in texts for purpose in purposes(text))
    return [purpose for purpose, count in counts.items() if count > 1 or purpose == "?"]


def test_every_use_of_randomness_has_a_purpose_of_its_own():
    """Synthesis' image i and the Poisson coins of step i once shared ("sample", i)."""
    assert repeated(all_texts().values()) == []
    known = {purpose for text in all_texts().values() for purpose in purposes(text)}
    assert {"sample", "views", "noise", "microbatches", "image", "synthetic digit", "init", "validation"} <= known


@pytest.mark.parametrize(("text", "said"), [
    ('generator(seed, "sample", i)', ["sample"]), ("rng.generator(seed, name, step)", ["?"]), ("rng.generator(*key)", ["?"]),
    ("rng.generator(3)", ["?"]), ('rng.generator(seed, f"views {i}")', ["?"]), ('rng.generator(0, "quite new")', []),
])  # fmt: skip
def test_a_shared_or_a_hidden_purpose_would_be_seen(text, said):
    assert repeated([*all_texts().values(), text]) == said


# What would draw past the keys. `encoders` fills random weights with torch's own generator under a forked state, for a
# network of a library; a store draws a secret key for the names of its records; a text-to-image pipeline takes a torch
# generator, seeded by a keyed draw.
PAST_THE_KEYS = {"default_rng", "RandomState", "Philox", "manual_seed", "randbits", "randn", "rand", "randint", "randperm",
                 "randn_like", "rand_like", "normal_", "uniform_", "bernoulli", "bernoulli_", "multinomial", "seed", "urandom",
                 "shuffle", "getrandbits", "token_bytes"}  # fmt: skip
ALLOWED = {("dpmix/core/rng.py", "Philox"), ("dpmix/core/rng.py", "randbits"),
           ("dpmix/core/files.py", "token_bytes"),
           ("dpmix/models/encoders.py", "manual_seed"), ("dpmix/images/synthesis.py", "manual_seed")}  # fmt: skip


def past(texts: dict[str, str]) -> set[tuple[str, str]]:
    """(file, name) of the calls that draw past the keys."""
    calls = [
        (f, node.func) for f, text in texts.items() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
    ]
    return {(f, c.attr) for f, c in calls if isinstance(c, ast.Attribute) and c.attr in PAST_THE_KEYS}


def test_nothing_draws_past_the_keys():
    ours = {f: text for f, text in all_texts().items() if f.startswith("dpmix/")}
    assert past(ours) == ALLOWED
    assert past({"new.py": "x = torch.randn(3)"}) == {("new.py", "randn")}


def test_views_that_are_not_redrawn_stay_under_a_fresh_seed(private, projection):
    source = sources.FreshViews(
        projection, private.images, private.labels, [views.Recipe(2)], num_classes=CLASSES, seed=None, redraw=False
    )
    places = torch.arange(5)
    assert torch.equal(source.made(places, 0).images, source.made(places, 7).images)
