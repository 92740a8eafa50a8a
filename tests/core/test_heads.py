"""A bank of heads is so many ordinary DP-SGD runs: each equals a plain loop, with noise of its own, and survives Ctrl-C."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASSES, DIM, image_set
from scipy import stats

from dpmix.core import accounting, heads, sources, views
from dpmix.core.heads import Head, train_heads
from dpmix.models.encoders import Encoder

CROP = views.Recipe(k_base=3, transform="crop-flip")
MIX = views.Recipe(k_base=3, k_self=4, transform="crop-flip")
DIFF = views.Recipe(k_base=2, k_self=3, k_diff=2)
PLAIN = views.METHODS["dp-sgd"]
RUN = dict(num_classes=CLASSES, expected_batch=8, steps=5, seed=3, progress=False)
BANK = [
    Head(recipe=PLAIN, learning_rate=2.0, clip_norm=0.5, noise_multiplier=0.7),
    Head(recipe=CROP, learning_rate=1.0, clip_norm=1.0, noise_multiplier=1.1),
    Head(recipe=MIX, learning_rate=3.0, clip_norm=0.2, noise_multiplier=0.4),
    Head(recipe=DIFF, learning_rate=0.5, clip_norm=0.4, noise_multiplier=0.9),
]


def quiet(head):
    return replace(head, noise_multiplier=0.0)


def recorded_noise(monkeypatch):
    """What `_add_noise` adds at each step: a list of [R, num_classes, D + 1]."""
    real, seen = heads._add_noise, []

    def patched(weights, biases, *rest):
        before = torch.cat([weights, biases[..., None]], dim=-1).clone()
        real(weights, biases, *rest)
        seen.append(torch.cat([weights, biases[..., None]], dim=-1) - before)

    monkeypatch.setattr(heads, "_add_noise", patched)
    return seen


def reference(projection, private, head, noise, public=None, divisor=None, ids=None):
    """Algorithm 1 for one head, written out: float64, one example at a time, autograd, nothing shared with the bank.

    `noise` [steps, num_classes, D + 1] is what the mechanism drew. `divisor(batch)` stands in for B.
    """
    w, b = torch.zeros(CLASSES, DIM, dtype=torch.float64), torch.zeros(CLASSES, dtype=torch.float64)
    moving_w, moving_b, clipped = torch.zeros_like(w), torch.zeros_like(b), 0
    for step in range(RUN["steps"]):
        batch = accounting.poisson_batch(
            len(private), RUN["expected_batch"] / len(private), seed=RUN["seed"], step=step
        )
        total_w, total_b = torch.zeros_like(w), torch.zeros_like(b)
        for i in batch.tolist():
            name = torch.tensor([i if ids is None else int(ids[i])])
            x, y = views.make_views(private.images[i : i + 1].double() / 255, private.labels[i : i + 1], name, head.recipe,
                                    num_classes=CLASSES, seed=RUN["seed"], step=step, public=public)  # fmt: skip
            features, targets = projection.features(x[0]), y[0].double()
            v, c = w.clone().requires_grad_(), b.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(features @ v.T + c, targets)  # the mean over the views
            gw, gb = torch.autograd.grad(loss, (v, c))
            norm = float((gw.square().sum() + gb.square().sum()).sqrt())
            clipped += norm > head.clip_norm
            total_w += gw * min(1.0, head.clip_norm / norm)
            total_b += gb * min(1.0, head.clip_norm / norm)
        total_w, total_b = total_w + noise[step][:, :-1], total_b + noise[step][:, -1]
        moving_w, moving_b = head.momentum * moving_w + total_w, head.momentum * moving_b + total_b
        by = RUN["expected_batch"] if divisor is None else divisor(batch)
        w, b = w - head.learning_rate * moving_w / by, b - head.learning_rate * moving_b / by
    return w, b, clipped


def close(bank, w, b, row=0, atol=3e-5):
    got = torch.cat([bank.weights[row].double(), bank.biases[row].double()[:, None]], dim=1)
    return bool((got - torch.cat([w, b[:, None]], dim=1)).abs().max() < atol)


@pytest.mark.parametrize(
    "head", [*BANK, replace(BANK[1], momentum=0.9)], ids=["plain", "self-aug", "mix-self", "mix-diff", "momentum"]
)
def test_one_head_equals_the_plain_loop(head, projection, private, public, monkeypatch):
    noise = recorded_noise(monkeypatch)
    bank = train_heads(projection, private.images, private.labels, [head], public=public, **RUN)
    noise = [step[0].double() for step in noise]
    assert len(noise) == 5 and all(step.abs().max() > 0 for step in noise)
    w, b, clipped = reference(projection, private, head, noise, public)
    assert clipped > 10, "the test must clip to mean anything"
    assert close(bank, w, b)
    wrong = [
        reference(projection, private, replace(head, clip_norm=head.clip_norm * 1.01), noise, public),
        reference(projection, private, head, [0.99 * step for step in noise], public),
        reference(projection, private, head, noise, public, divisor=lambda batch: max(1, len(batch))),
        reference(projection, private, head, noise, public, ids=torch.arange(len(private)) + 1),
    ]  # another clip norm, less noise, the realised batch as divisor, other draws
    told = [close(bank, w, b) for w, b, _ in wrong]
    assert told == [False, False, False, head.recipe == PLAIN], "without draws, the ids do not matter"
    slower = replace(head, momentum=head.momentum / 2 + 0.1)
    assert not close(bank, *reference(projection, private, slower, noise, public)[:2]), (
        "another momentum is another run"
    )


def test_the_bank_equals_its_heads_alone_in_any_order_and_physical_batch(projection, private, public):
    def run(some, **other):
        return train_heads(projection, private.images, private.labels, some, public=public, **{**RUN, **other})

    bank = run(BANK)
    for r, head in enumerate(BANK):
        assert close(run([head]), bank.weights[r].double(), bank.biases[r].double(), atol=1e-5)
    turned = run(BANK[::-1])
    for physical in (1, 3, 1000):
        other = run(BANK, physical_batch=physical)
        for r in range(4):
            assert close(other, bank.weights[r].double(), bank.biases[r].double(), row=r, atol=1e-5)
            assert close(turned, bank.weights[r].double(), bank.biases[r].double(), row=3 - r, atol=1e-5)
        assert other.views == bank.views
    other = run(BANK, seed=4)
    assert not close(other, bank.weights[0].double(), bank.biases[0].double()), "another seed is another run"


def test_order_of_the_examples_does_not_matter_if_they_keep_their_names(projection, private, public):
    """q = 1, so that the order decides nothing about who joins."""
    about = {**RUN, "sample_rate": 1.0, "public": public}
    turn = torch.from_numpy(np.random.default_rng(0).permutation(len(private)))
    one = train_heads(projection, private.images, private.labels, BANK, **about)
    two = train_heads(projection, private.images[turn], private.labels[turn], BANK, ids=turn, **about)
    torch.testing.assert_close(one.weights, two.weights, rtol=0, atol=1e-5)
    renamed = train_heads(projection, private.images[turn], private.labels[turn], BANK, **about)
    assert (renamed.weights - one.weights)[1:].abs().max() > 1e-3


def test_removing_one_example_moves_one_step_by_at_most_c(projection, private, public):
    about = {**RUN, "sample_rate": 1.0, "public": public, "steps": 1}
    some = [quiet(h) for h in BANK]
    whole = train_heads(projection, private.images, private.labels, some, **about)
    for i in (0, 17, 39):
        kept = torch.tensor([j for j in range(40) if j != i])
        less = train_heads(projection, private.images[kept], private.labels[kept], some, ids=kept, **about)
        for r, head in enumerate(some):
            moved = (whole.weights[r] - less.weights[r]).square().sum() + (
                whole.biases[r] - less.biases[r]
            ).square().sum()
            moved = float(moved) ** 0.5 * RUN["expected_batch"] / head.learning_rate
            assert 0.5 * head.clip_norm < moved < head.clip_norm * (1 + 1e-4)


def test_start_from_given_weights(projection, private):
    initial = torch.full((CLASSES, DIM), 0.5), torch.full((CLASSES,), -0.25)
    never = {**RUN, "sample_rate": 1e-12}
    bank = train_heads(projection, private.images, private.labels, [quiet(BANK[0])], initial=initial, **never)
    assert (bank.weights == 0.5).all() and (bank.biases == -0.25).all(), "nobody joined, nothing was added"
    assert bank.views == 0


# Noise. z scores of sums of squares of some 10^4 normals; |z| < 5.5 fails by chance once in 3e7 seeds; the seed is fixed.


def wide() -> Encoder:
    """Features of dimension 600, all zero: the noise is all that moves the weights."""
    return Encoder(lambda x: torch.zeros(len(x), 600), 4, 600, (1,), "blank")


def spread(noise: torch.Tensor, deviation: float) -> float:
    """z of the hypothesis that the coordinates are N(0, deviation^2)."""
    squares = (noise.double() / deviation).square()
    return float((squares.sum() - squares.numel()) / (2 * squares.numel()) ** 0.5)


@pytest.fixture
def noise(private, monkeypatch):
    """[steps, R, num_classes, D + 1] of a bank with many heads of like settings."""
    base = Head(recipe=PLAIN, learning_rate=1.0, clip_norm=0.5, noise_multiplier=2.0)
    bank = [base, replace(base, learning_rate=1.5), replace(base, clip_norm=0.25, noise_multiplier=4.0),
            replace(base, noise_multiplier=2.0000001), replace(base, recipe=CROP)]  # fmt: skip
    seen = recorded_noise(monkeypatch)
    train_heads(wide(), private.images, private.labels, bank, **RUN)
    return torch.stack(seen)


def test_the_noise_has_the_variance_that_was_accounted_for(noise):
    assert noise.shape == (5, 5, CLASSES, 601)
    for r in range(5):
        for part in (noise[:, r, :, :-1], noise[:, r, :, -1]):  # weights and bias alike: sigma C = 1 for every head
            assert abs(spread(part, 1.0)) < 5.5
        assert spread(noise[:, r], 1.5) < -5.5 and spread(noise[:, r], 2 / 3) > 5.5
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-6
    assert stats.kstest(noise.flatten().sign().numpy() * 0.8, "norm").pvalue < 1e-6


def test_noise_is_independent_between_heads_and_between_steps(noise):
    """Shared noise would cancel in the difference of two heads, or of two steps."""

    def worst(rows):
        return np.abs(np.corrcoef(rows)[np.triu_indices(len(rows), 1)]).max() * rows.shape[1] ** 0.5

    streams = noise.reshape(25, -1).numpy()
    assert worst(streams) < 5.5
    shared = streams.copy()
    shared[3] = shared[3] * 0.9 + shared[17] * 0.2
    assert worst(shared) > 5.5
    assert worst(noise.flatten(0, 2).numpy()) < 6.5, "and between classes"


def test_an_empty_batch_adds_noise_and_counts(private, monkeypatch):
    """Nobody ever joins: what is left is -eta / B times the sum of the noise, over the expected B."""
    seen = recorded_noise(monkeypatch)
    head = Head(recipe=PLAIN, learning_rate=2.0, clip_norm=0.5, noise_multiplier=3.0)
    bank = train_heads(wide(), private.images, private.labels, [head], **{**RUN, "sample_rate": 1e-12})
    assert len(seen) == 5 and bank.views == 0
    both = torch.cat([bank.weights, bank.biases[..., None]], dim=-1)
    torch.testing.assert_close(both, -2.0 / RUN["expected_batch"] * sum(seen))
    assert abs(spread(both, 5**0.5 * 1.5 * 2.0 / 8)) < 5.5
    assert abs(spread(both, 5**0.5 * 1.5 * 2.0 / 7)) > 5.5


def test_the_noise_of_a_run_is_its_own(private, monkeypatch):
    """Another seed, rate, number of steps, batch size, recipe or encoder name: nothing of the noise is shared."""
    seen = recorded_noise(monkeypatch)
    head = Head(recipe=PLAIN, learning_rate=2.0, clip_norm=0.5, noise_multiplier=3.0)
    for other in ({}, dict(seed=4), dict(sample_rate=0.3), dict(steps=6), dict(expected_batch=9)):
        train_heads(wide(), private.images, private.labels, [head], **{**RUN, **other})
    train_heads(wide(), private.images, private.labels, [replace(head, recipe=CROP)], **RUN)
    train_heads(replace(wide(), name="other"), private.images, private.labels, [head], **RUN)
    flat = np.stack([step.flatten().numpy() for step in seen])
    assert np.abs(np.corrcoef(flat)[np.triu_indices(len(flat), 1)]).max() * flat.shape[1] ** 0.5 < 6
    seen.clear()
    train_heads(wide(), private.images, private.labels, [head], **RUN)
    assert torch.equal(seen[0].flatten(), torch.from_numpy(flat[0])), "and the same run has the same noise"


# Interruption.


class Stop:
    """Raises KeyboardInterrupt at the n-th call."""

    def __init__(self, n):
        self.left = n

    def __call__(self, *args):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def same(one, two):
    return torch.equal(one.weights, two.weights) and torch.equal(one.biases, two.biases) and one.views == two.views


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_ctrl_c_in_the_middle_of_a_step_and_going_on(after, projection, private, public, tmp_path):
    about = {**RUN, "public": public, "physical_batch": 3, "checkpoint": tmp_path / "bank"}
    whole = train_heads(projection, private.images, private.labels, BANK, **{**about, "checkpoint": None})
    with pytest.raises(KeyboardInterrupt):
        train_heads(projection, private.images, private.labels, BANK, observe=Stop(after), **about)
    seen = []
    went_on = train_heads(
        projection, private.images, private.labels, BANK, observe=lambda *a: seen.append(a[0]), **about
    )
    assert same(went_on, whole)
    assert (seen[0] > 0) == (after > 3), "it went on, rather than anew"
    lost = train_heads(projection, private.images, private.labels, BANK, **{**about, "checkpoint": tmp_path / "none"})
    assert same(lost, whole)


def test_ctrl_c_at_any_line_of_a_step_never_saves_half_of_it(projection, private, tmp_path):
    """An interrupt before each line of the loop in turn. Once it could fall between the weights and the step number."""
    code = heads.train
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    about = {**RUN, "steps": 2, "checkpoint": tmp_path / "bank"}
    some = BANK[:2]
    whole = train_heads(projection, private.images, private.labels, some, **{**about, "checkpoint": None})

    def interrupted(n):
        stop = Stop(n)

        def trace(frame, event, arg):
            if frame.f_code is not code.__code__:
                return None
            if event == "line":
                stop()
            return trace

        old = sys.gettrace()
        sys.settrace(trace)
        try:
            train_heads(projection, private.images, private.labels, some, **about)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(old)
        return False

    n = went_on = 0
    while interrupted(n):
        went_on += about["checkpoint"].exists()
        assert same(train_heads(projection, private.images, private.labels, some, **about), whole), n
        about["checkpoint"].unlink()
        n += 1
    assert n > 60 and went_on > 30


def test_a_checkpoint_in_the_course_of_training(projection, private, tmp_path):
    path = tmp_path / "bank"
    whole = train_heads(projection, private.images, private.labels, BANK[:2], **RUN)
    seen = []

    def observe(step, *rest):
        seen.append(path.exists())

    first = train_heads(projection, private.images, private.labels, BANK[:2], observe=observe, checkpoint=path,
                       checkpoint_seconds=0.0, **RUN)  # fmt: skip
    assert same(first, whole) and not seen[0] and seen[-1]
    again = train_heads(projection, private.images, private.labels, BANK[:2], checkpoint=path, observe=Stop(0), **RUN)
    assert same(again, whole), "a finished run is read, not trained"


@pytest.mark.parametrize("change", [dict(seed=9), dict(steps=6), dict(expected_batch=7), dict(sample_rate=0.21)])
def test_the_checkpoint_of_another_run_is_refused_by_what_differs(change, projection, private, tmp_path):
    about = {**RUN, "checkpoint": tmp_path / "bank", "checkpoint_seconds": 0.0}
    train_heads(projection, private.images, private.labels, BANK[:2], **about)
    differs = rf"{next(iter(change))}.* there, .* here"
    said = rf"checkpoint='.*bank': belongs to another run \(.*{differs}.*give another path or remove it"
    with pytest.raises(ValueError, match=said):
        train_heads(projection, private.images, private.labels, BANK[:2], **{**about, **change})
    with pytest.raises(ValueError, match=r"belongs to another run \(heads: '2 \(digest"):
        train_heads(projection, private.images, private.labels, BANK[1::-1], **about)


# Faulty and extreme images.


def brittle(projection) -> Encoder:
    """No number for a black image, infinity for a white one, 1e30 for one whose first pixel is white."""

    def features(x):
        found = projection.features(x)
        level = x.flatten(1).mean(1)[:, None]
        found = found + torch.where(x.flatten(1)[:, :1] == 1, 1e30, 0.0)
        return torch.where(level == 0, torch.nan, torch.where(level == 1, torch.inf, found))

    return replace(projection, features=features)


def test_black_white_and_huge_images_never_break_a_run(projection, private):
    images = private.images.clone()
    images[3], images[7], images[11, 0, 0, 0] = 0, 255, 255
    about = {**RUN, "sample_rate": 1.0}
    some = [quiet(BANK[0]), replace(quiet(BANK[0]), clip_norm=1.0)]
    bank = train_heads(brittle(projection), images, private.labels, some, **about)
    assert bank.weights.isfinite().all() and bank.biases.isfinite().all()
    kept = torch.tensor([i for i in range(40) if i not in (3, 7)])
    without = train_heads(brittle(projection), images[kept], private.labels[kept], some, ids=kept, **about)
    torch.testing.assert_close(bank.weights, without.weights)
    assert bank.dropped - without.dropped == 2 * 2 * 5, "two images, two heads, five steps"
    plain = train_heads(projection, images, private.labels, some, **about)
    assert plain.dropped == 0


# Evaluation and input.


def test_accuracy_and_encoding(projection, private):
    features = heads.encode(projection, private.images, batch=7)
    torch.testing.assert_close(features, projection.features(private.images.float() / 255))
    weights = torch.zeros(2, CLASSES, DIM)
    bank = heads.Bank(weights=weights, biases=torch.tensor([[1.0, 0, 0], [0, 0, 1]]), views=0, seconds={}, dropped=0)
    share = [(private.labels == c).double().mean().item() for c in (0, 2)]
    assert heads.accuracy(bank, features, private.labels).tolist() == pytest.approx(share)
    empty = heads.encode(projection, private.images[:0])
    assert empty.shape == (0, DIM) and heads.accuracy(bank, empty, private.labels[:0]).isnan().all()


def test_a_bank_learns(projection):
    """Images of three flat brightnesses: all but noise is learnt without noise, and chance with too much of it."""
    labels = torch.arange(60) % 3
    images = (labels * 100 + 20).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    some = [Head(recipe=PLAIN, learning_rate=20.0, noise_multiplier=s) for s in (0.0, 1000.0)]
    bank = train_heads(projection, images, labels, some, **{**RUN, "steps": 150, "expected_batch": 30})
    right, wrong = heads.accuracy(bank, heads.encode(projection, images), labels)
    assert right > 0.95 and wrong < 0.8


@pytest.mark.parametrize(("change", "said"), [
    (dict(heads=[]), "heads=0: must hold at least one head"), (dict(heads=[BANK[0], BANK[0]]), "heads are given twice"),
    (dict(expected_batch=41), "expected_batch=41: must be at most the 40 training examples"),
    (dict(expected_batch=0), "expected_batch=0"), (dict(steps=0), "steps=0"), (dict(physical_batch=0), "physical_batch=0"),
    (dict(sample_rate=0.0), "sample_rate=0.0"), (dict(num_classes=2), r"labels=2: must lie in 0\.\.1"),
    (dict(labels=torch.full((40,), -1)), "labels=-1: must lie in"),
    (dict(labels=torch.zeros(0, dtype=torch.int64), images=torch.zeros(0, 1, 4, 4, dtype=torch.uint8)), "images=0: must have"),
    (dict(images=torch.zeros(40, 3, 4, 4, dtype=torch.uint8)), r"images.shape\[1\]=3: projection takes images of 1 channels"),
    (dict(heads=[BANK[3]]), "public=None: k_diff > 0 needs synthetic images"),
])  # fmt: skip
def test_bad_input_is_refused_before_any_training(change, said, projection, private):
    about = dict(images=private.images, labels=private.labels, heads=[BANK[0]], **RUN, observe=Stop(0))
    with pytest.raises(ValueError, match=said) as caught:
        train_heads(projection, **{**about, **change})
    assert "\n" not in str(caught.value)


def test_a_batch_as_large_as_the_public_population_may_exceed_the_examples(projection, private):
    """N may be public knowledge from elsewhere: the number that happens to be here decides nothing, not even an error."""
    train_heads(
        projection, private.images, private.labels, [BANK[0]], **{**RUN, "expected_batch": 50, "sample_rate": 1.0}
    )


@pytest.mark.parametrize("bad", [dict(learning_rate=0.0), dict(learning_rate=float("nan")), dict(clip_norm=-1.0),
                                 dict(noise_multiplier=-0.1), dict(noise_multiplier=float("inf"))])  # fmt: skip
def test_bad_heads_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
        Head(**{**dict(recipe=PLAIN, learning_rate=1.0, noise_multiplier=1.0), **bad})


def test_a_whole_number_is_the_same_head():
    assert repr(Head(recipe=PLAIN, learning_rate=1, noise_multiplier=2)) == repr(
        Head(recipe=PLAIN, learning_rate=1.0, noise_multiplier=2.0)
    )


def test_one_example_alone(projection):
    one = image_set(1)
    bank = train_heads(projection, one.images, one.labels, [BANK[0]], **{**RUN, "expected_batch": 1})
    assert bank.weights.isfinite().all() and bank.views == 5


def test_runs_on_views_that_are_keyed_otherwise_share_no_noise():
    """Their difference would be free of it."""
    images = torch.randint(256, (12, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    encoder = Encoder(lambda x: x.flatten(1)[:, :4], 16, 4, (1,), "pixels")
    about = dict(num_classes=2, expected_batch=6, steps=1, seed=5, redraw=False, progress=False)
    head = Head(recipe=views.Recipe(k_base=2, transform="crop"), learning_rate=1e-30, noise_multiplier=1e30)
    trained = [
        train_heads(encoder, images, torch.arange(12) % 2, [head], ids=ids, **about) for ids in (None, torch.arange(12))
    ]
    assert not torch.allclose(trained[0].weights, trained[1].weights)


def test_ids_of_content_are_the_images_own_whatever_holds_them():
    images = torch.randint(256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[5] = images[2]
    ids = sources.content_ids(images)
    assert len(set(ids.tolist())) == 5 and ids[5] == ids[2] and int(ids.min()) >= 0
    order = torch.tensor([4, 2, 0])
    assert torch.equal(sources.content_ids(images[order]), ids[order])
    assert torch.equal(sources.content_ids(images.flip(3).flip(3)), ids), "however they lie in memory"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert len(set(sources.content_ids((images / 255).to(dtype).requires_grad_()).tolist())) == 5
    assert sources.content_ids(images[:0]).shape == (0,)
