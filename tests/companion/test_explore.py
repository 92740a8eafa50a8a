"""What the explorer answers: the numbers of the library, pictures that say what they show, and a line for bad input."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dpmix import audit
from dpmix.companion import budgets, evidence, explore
from dpmix.core import accounting, clipping, microbatch, views
from dpmix.images import data

EXAMPLE = dict(
    dataset="digits", index=25, k_base=3, k_self=4, k_diff=2, alpha=0.2, mix="mixup", transform="crop-flip", seed=0
)
BUDGET = dict(
    n=50_000,
    batch_size=1000,
    epochs=10,
    epsilon=1.0,
    delta=1e-5,
    accountant="rdp",
    clip_norm=1.0,
    parameters=5_130,
    k=16,
)
STEP = dict(method="mix-self", clip_norm=0.5, sigma=1.0, without=8, seed=0)
LINE = re.compile(r'^<p role="alert"[^>]*>([^<\n]+)</p>$')


@pytest.mark.parametrize("mix", views.MIXES)
def test_every_view_is_there_with_parents_share_label_and_weight(mix):
    shown = explore.answer(explore.example_views, **EXAMPLE | {"mix": mix})
    assert shown.count("<figure") == 1 + 9 and shown.count("weight 0.111<") == 9
    assert shown.count("<img") == 1 + 9 + 2 * 4 and 'alt=""' not in shown
    said = re.findall(r"<figcaption[^>]*>(\w+) with (\w+)(?:, λ = (\d\.\d\d))?, label ([^,]+), weight", shown)
    assert len(said) == 4
    names = ["1", "2", "3", "P1", "P2"]
    one, public = data.load("digits").train.subset([25]), data.public_images("digits")
    recipe = views.Recipe(3, 4, 2, mix, 0.2, "crop")
    made = views.make_views(
        one.images, one.labels, torch.tensor([25]), recipe, num_classes=10, seed=0, step=0, public=public
    )
    for m, (a, b, share, label) in enumerate(said):
        assert bool(share) == (mix == "mixup")
        share = share or made.targets[0, 5 + m, made.targets[0, names.index(a)].argmax()]
        mixed = float(share) * made.targets[0, names.index(a)] + (1 - float(share)) * made.targets[0, names.index(b)]
        torch.testing.assert_close(mixed, made.targets[0, 5 + m], rtol=0, atol=6e-3)
        assert explore.label_of(made.targets[0, 5 + m], one.class_names) == label


# On coarser grids, but the same numbers.


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
@pytest.mark.parametrize("q, steps, epsilon", [(0.02, 500, 1.0), (0.089, 45, 8.0), (0.0009, 2_000, 1.0)])
def test_budgets_are_those_of_the_accountants(accountant, q, steps, epsilon):
    sigma = budgets.calibrated(epsilon, 1e-5, q, steps, accountant)
    right = accounting.noise_multiplier(epsilon=epsilon, delta=1e-5, sample_rate=q, steps=steps, accountant=accountant)
    assert sigma == pytest.approx(right, rel=0.01)
    exact = accounting.epsilon_spent(
        noise_multiplier=sigma, delta=1e-5, sample_rate=q, steps=steps, accountant=accountant
    )
    assert budgets.spent(sigma, 1e-5, q, steps, accountant) == pytest.approx(
        exact, rel=1e-12 if accountant == "rdp" else 0.02
    )


@pytest.mark.parametrize("q, steps", [(0.0009, 2_000), (0.02, 500), (0.02, 12_500), (1.0, 1)])
@pytest.mark.parametrize("epsilon, delta", [(0.1, 1e-8), (0.3, 1e-3), (50.0, 1e-5)])
def test_at_the_ends_of_the_knobs_too_a_coarser_grid_costs_no_more_than_three_percent(epsilon, delta, q, steps):
    sigma = budgets.calibrated(epsilon, delta, q, steps, "rdp")
    for accountant, neighbours in (("prv", "join"), ("pld", "join"), ("pld", "change")):
        # By PLD, whose own grid costs up to two percent where epsilon is small and steps are many.
        fine = accounting.epsilon_spent(
            noise_multiplier=sigma, delta=delta, sample_rate=q, steps=steps, accountant="pld", neighbours=neighbours
        )
        assert 0.98 < budgets.spent(sigma, delta, q, steps, accountant, neighbours) / fine < 1.03


@pytest.mark.parametrize("sigma", [0.11, 0.5, 1.8, 40.0, 2_000.0])
def test_the_order_that_bisection_finds_is_the_best_of_all(sigma):
    for q, steps, delta in ((0.01, 1, 1e-3), (0.02, 350, 1e-5), (0.3, 3_000, 1e-8), (1.0, 50, 1e-5)):
        of_all = accounting.epsilon_spent(noise_multiplier=sigma, delta=delta, sample_rate=q, steps=steps)
        assert budgets.spent(sigma, delta, q, steps, "rdp") == pytest.approx(of_all, rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 50.0])
def test_a_noise_multiplier_is_where_the_budget_is_just_spent(epsilon):
    for q, steps in ((1 / 800, 7_812), (0.0009, 40), (0.08, 2_442), (1.0, 200)):
        for delta in (1e-3, 1e-8):
            sigma = budgets.calibrated(epsilon, delta, q, steps, "rdp")
            spent = budgets.spent(sigma, delta, q, steps, "rdp")
            assert spent == pytest.approx(epsilon, rel=2e-3) or (sigma == pytest.approx(0.2) and spent < epsilon)


def said_of(shown: str) -> dict[str, str]:
    rows = re.findall(r"<th [^>]*row_heading[^>]*>([^<]+)</th>\s*<td[^>]*>([^<]+)</td>", shown)
    return {name.strip(): value.strip() for name, value in rows}


def test_a_budget_shows_its_noise_and_what_mistakes_cost():
    shown = explore.answer(budgets.budget, **BUDGET | {"k": 2, "clip_norm": 0.5})
    about = {"delta": 1e-5, "sample_rate": 0.02, "steps": 500}
    sigma = budgets.calibrated(1.0, *about.values(), "rdp")
    assert sigma == pytest.approx(accounting.noise_multiplier(epsilon=1.0, **about), rel=2e-4)
    assert "q = B/N = 0.02, T = 500" in shown and f"σ = {sigma:.3g}" in shown
    assert f"= {sigma * 0.5 * 5_130**0.5 / 1000:.3g}, {sigma * 5_130**0.5 / 1000:.2g} times the C = 0.5" in shown
    values = said_of(shown)
    assert list(values)[:3] == [f"ε of this run by {a}" for a in ("RDP", "PRV", "PLD")] and len(values) == 6
    twice = accounting.epsilon_spent(noise_multiplier=sigma / 2, accountant="pld", **about)
    assert float(values["mistake: each of 2 views clipped by itself (PLD)"]) == pytest.approx(twice, rel=0.02)
    pairs = microbatch.epsilon_spent(2, deviation=sigma, **about)
    assert float(values["mistake: pairs clipped as one, noise for one (PLD)"]) == pytest.approx(pairs, rel=0.02)
    attack = audit.shuffled_epsilon(noise_multiplier=sigma, batches=50, epochs=10, delta=1e-5)
    assert float(values["mistake: shuffled batches, at least (an attack)"]) == pytest.approx(attack, rel=0.02)
    assert all(float(v) > 1.5 for name, v in values.items() if name.startswith("mistake"))
    assert (
        said_of(budgets.budget(**BUDGET | {"k": 36}))["mistake: each of 36 views clipped by itself (PLD)"] == "over 100"
    )


# One step.


def test_the_arrows_are_the_clipped_gradients_of_the_library():
    raw, (encoder, head, plane) = explore._eight("mix-self", 0), explore._public_head()
    torch.testing.assert_close(plane @ plane.T, torch.eye(2), rtol=0, atol=1e-5)
    norms = raw.norm(dim=1)
    assert raw.shape == (8, 650) and (norms > 0.5).any() and (norms < 0.5).any()
    shown = explore.step(**STEP)
    moved = float(re.search(r"Example 8 moves the sum by (\d\.\d+)", shown)[1])
    assert moved == pytest.approx(min(0.5, float(norms[7])), abs=1e-3)
    train, ids = data.load("digits").train, torch.from_numpy(explore.rng.generator(0, "explore").permutation(1437)[:8])
    about = dict(num_classes=10, seed=0, step=0)
    made = views.make_views(
        train.images[ids], train.labels[ids], ids, views.METHODS["mix-self"].for_data(False), **about
    )
    z, k = encoder.features(made.images.flatten(0, 1)).unflatten(0, (8, -1)), made.images.shape[1]
    sums = clipping.clipped_head_sums(
        z, made.targets, head[None, :, :-1], head[None, :, -1], torch.tensor([0.5]), torch.full((1, k), 1 / k)
    )
    ours = (raw * (0.5 / norms).clamp(max=1)[:, None]).sum(0)
    theirs = torch.cat([sums.weights[0], sums.biases[0, :, None]], dim=1).flatten()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_large_clip_norm_clips_nothing_and_no_noise_shows_the_example():
    shown = explore.step(**STEP | {"clip_norm": 2.0, "sigma": 0.0})
    assert "0 of 8 are above C = 2" in shown and "without noise, that shows" in shown
    assert shown.count("<img") == 2 and "1.00 standard deviations" not in shown


@pytest.mark.parametrize("clip_norm, sigma", [(0.5, 1.0), (2.0, 4.0), (0.05, 0.3), (2.0, 0.0)])
def test_nothing_that_is_drawn_is_cut_at_the_edge(clip_norm, sigma, monkeypatch):
    drawn, runs = [], explore.results()
    monkeypatch.setattr(explore, "_embedded", lambda figure, *rest: drawn.append(figure) or "")
    explore.step(**STEP | {"clip_norm": clip_norm, "sigma": sigma})
    explore.curves(dataset=runs["dataset"][0], model=runs["model"][0], methods=tuple(runs["method"]))
    for figure in drawn:
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


# Results.


def test_curves_are_those_of_the_committed_runs_with_intervals_where_there_are_seeds(monkeypatch):
    runs = explore.results()
    about = {"dataset": runs["dataset"][0], "model": runs["model"][0]}
    shown = explore.answer(explore.curves, **about, methods=tuple(runs["method"]))
    assert "that came with the repository" in shown and "<img" in shown
    five = pd.concat([runs[:1].assign(seed=s, accuracy=50.0 + s) for s in range(5)], ignore_index=True)
    drawn = []
    monkeypatch.setattr(explore, "results", lambda: five)
    monkeypatch.setattr(explore, "_embedded", lambda figure, *rest: drawn.append(figure) or "")
    explore.curves(**about, methods=(five["method"][0],))
    (bar,) = drawn[0].axes[0].containers[0][2]
    low, high = bar.get_segments()[0][:, 1]
    half = 2.776445 * math.sqrt(2.5 / 5)  # Student's t with four degrees of freedom
    assert (low, high) == (pytest.approx(52 - half, abs=1e-4), pytest.approx(52 + half, abs=1e-4))
    monkeypatch.setattr(explore, "results", lambda: five[:1])
    explore.curves(**about, methods=(five["method"][0],))
    (bar,) = drawn[1].axes[0].containers[0][2]
    assert np.ptp(bar.get_segments()[0][:, 1]) == 0  # one seed: no interval


def test_the_runs_of_table_3_are_shown(monkeypatch):
    about = dict(dataset="cifar10", model="efficientnet-lite0", validation=0.0, learning_rate=1.0)
    rows = [about | dict(method=m, epsilon=e, seed=s, accuracy=60.0 + e + s)
            for m in ("dp-sgd", "mix-self") for e in (1.0, 8.0) for s in range(3)]  # fmt: skip
    monkeypatch.setattr(evidence, "chosen", lambda table, by: pd.DataFrame(rows if table == "table3" else []))
    explore.results.cache_clear()
    try:
        assert len(explore.results()) == len(rows) and set(explore.results()["method"]) == {"dp-sgd", "mix-self"}
        shown = explore.answer(explore.curves, dataset="cifar10", model="efficientnet-lite0", methods=("mix-self",))
        assert "6 runs that came with the repository" in shown
    finally:
        explore.results.cache_clear()


# Bad input is a line in the place of the picture.

BAD = {
    "K = 0": (explore.example_views, EXAMPLE | {"k_base": 0, "k_diff": 0, "k_self": 0}, "k_base + k_diff=0"),
    "a pool of one": (explore.example_views, EXAMPLE | {"k_base": 1, "k_diff": 0}, "k_base + k_diff=1: a mixture needs"),
    "no such example": (explore.example_views, EXAMPLE | {"index": 1437}, "index=1437: must lie in 0..1436"),
    "no such data": (explore.example_views, EXAMPLE | {"dataset": "cifar"}, "dataset='cifar': unknown; did you mean"),
    "no such folder": (explore.example_views, EXAMPLE | {"dataset": "folder:/nowhere/at all"}, "nowhere"),
    "a delta of 1/N": (budgets.budget, BUDGET | {"delta": 1 / 50_000}, "delta=2e-05: must be below 1/N = 2e-05"),
    "an epsilon above all": (budgets.budget, BUDGET | {"epsilon": 60.0}, "epsilon=60.0: must lie between 0.001 and 50"),
    "out of reach": (budgets.budget, BUDGET | dict(epsilon=0.001, n=9, batch_size=9, epochs=1e6), "out of reach at q=1"),
    "a batch above N": (budgets.budget, BUDGET | {"n": 500}, "batch_size=1000"),
    "no method": (explore.curves, {"dataset": "digits", "model": "nothing", "methods": ()}, "no runs of them"),
    "nobody left out": (explore.step, STEP | {"without": 9}, "without=9: must be one of the examples 1 to 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_in_a_line(name):
    picture, settings, said = BAD[name]
    line = LINE.match(explore.answer(picture, **settings))
    assert line and said in line[1].replace("&#x27;", "'"), explore.answer(picture, **settings)[:300]


def test_what_is_no_refusal_is_no_line():
    assert not LINE.match(explore.answer(budgets.budget, **BUDGET))
    with pytest.raises(TypeError):
        explore.answer(budgets.budget)


# Image files.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for part, many in (("train", 3), ("test", 1), ("synthetic", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(many):
                Image.fromarray(draw.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(
                    tmp_path / part / name / f"{i}.png"
                )
    return tmp_path


def test_a_folder_shows_its_example_and_opens_no_other_file(folder):
    for path in folder.glob("t*/*/*.png"):
        if path != folder / "train" / "dog" / "1.png":
            path.write_text("no image, and nobody looks")
    settings = EXAMPLE | {"dataset": f"folder:{folder}", "index": 4}
    shown = explore.answer(explore.example_views, **settings)
    assert "label dog" in shown and "3 base views: crop-flip" in shown and "data:image/jpeg" in shown
    shutil.rmtree(folder / "synthetic")
    explore._public.cache_clear()
    line = LINE.match(explore.answer(explore.example_views, **settings))
    assert line and "no synthetic images" in line[1]


def test_a_file_that_is_no_image_gets_a_line_with_its_name(folder):
    (folder / "train" / "cat" / "0.png").write_text("<b>no image</b>")
    line = LINE.match(explore.answer(explore.example_views, **EXAMPLE | {"dataset": f"folder:{folder}", "index": 0}))
    assert line and "0.png" in line[1] and "is no image that can be read" in line[1]


def test_a_home_of_nobody_and_a_decompression_bomb_are_lines(tmp_path, monkeypatch):
    shown = explore.answer(explore.example_views, **EXAMPLE | {"dataset": "folder:~nobody-of-that-name", "index": 0})
    assert LINE.match(shown)
    image = tmp_path / "large.png"
    Image.new("RGB", (40, 40)).save(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="is no image that can be read"):
        explore._read([image], [0], ("one",))
