"""Grids of runs: every combination once, in the settings of a scale, and refused at once where the data are missing."""

from collections import Counter

import pytest

from dpmix.companion import grids, paper
from dpmix.companion.grids import methods_grid, preset
from dpmix.core import views
from dpmix.runs.identity import pass_of
from dpmix.runs.spec import ComputeFlags

METHODS = ["dp-sgd", "mixed-ghost", "self-aug", "mix-self", "mix-diff"]


def test_every_combination_occurs_once():
    cells = methods_grid("demo", methods=METHODS)
    p = preset("demo")
    assert len(cells) == len(METHODS) * len(p.models) * 4 * len(p.learning_rates) * len(p.seeds)
    assert len({c.spec for c in cells}) == len(cells)
    counts = Counter((c.labels["model"], c.labels["method"], c.spec.epsilon) for c in cells)
    assert set(counts.values()) == {len(p.learning_rates) * len(p.seeds)}
    assert {c.spec.epsilon for c in cells} == {1.0, 2.0, 4.0, 8.0} and {c.spec.dataset for c in cells} == {"digits"}
    assert len({pass_of(c.spec) for c in cells}) == len(p.models) * len(p.seeds), "one pass a model and seed"


def test_parameters_may_be_one_value_or_a_list():
    cells = methods_grid(
        "demo", methods="dp-sgd", models="tiny-vit", eps=[0.5, 3], seeds=7, epochs=1, learning_rates=2, batch_size=64
    )
    assert [(c.spec.epsilon, c.spec.seed, c.spec.epochs, c.spec.learning_rate, c.spec.batch_size) for c in cells] == [
        (0.5, 7, 1.0, 2.0, 64), (3.0, 7, 1.0, 2.0, 64)]  # fmt: skip
    assert grids.many(None, (1, 2)) == [1, 2] and grids.many(5, (1,)) == [5] and grids.many((5, 6), ()) == [5, 6]


def test_learning_rates_are_in_units_of_one_over_c():
    cells = methods_grid("demo", methods=METHODS, learning_rates=4.0, eps=1, seeds=0)
    by_method = {c.labels["method"]: c.spec for c in cells}
    assert by_method["mixed-ghost"].clip_norm == 0.05 and by_method["mix-self"].clip_norm == 1.0
    assert {round(s.learning_rate * s.clip_norm, 9) for s in by_method.values()} == {4.0}
    assert (
        by_method["dp-sgd"].recipe == by_method["mixed-ghost"].recipe
        and by_method["dp-sgd"] != by_method["mixed-ghost"]
    )


def test_the_paper_scale_has_the_papers_settings():
    cells = methods_grid("paper", dataset="caltech256", methods=METHODS)
    assert {c.spec.model for c in cells} == set(paper.ENCODERS.values())
    assert {c.labels["model"] for c in cells} == set(paper.ENCODERS)
    assert {(c.spec.batch_size, c.spec.epochs, c.spec.delta) for c in cells} == {(1000, 10.0, 1e-5)}
    diff = {c.spec.recipe for c in cells if c.labels["method"] == "mix-diff"}
    assert diff == {views.Recipe(k_base=16, k_self=18, k_diff=24)}
    assert {c.spec.epochs for c in methods_grid("paper", dataset="eurosat", methods=["dp-sgd"])} == {20.0}
    assert grids.recipe("mix-diff", "digits").k_diff == grids.recipe("mix-diff", "cifar10").k_diff == 2


def test_transformations_are_added_to_a_method():
    assert grids.recipe("self-aug+jitter", "digits") == views.Recipe(k_base=16, transform="crop-flip+jitter")
    with pytest.raises(ValueError, match=r"transform='crop-flip\+jiter': unknown; did you mean"):
        grids.recipe("self-aug+jiter", "digits")


def test_unknown_words_are_refused_with_near_matches():
    for call, said in (
        (lambda: grids.recipe("mix-slef", "digits"), "method='mix-slef': unknown; did you mean 'mix-self'"),
        (lambda: methods_grid("demo", methods=["selfaug"]), "did you mean 'self-aug'"),
        (lambda: preset("dmeo"), "scale='dmeo': unknown; did you mean 'demo'"),
        (lambda: preset("paper", "cifar-10"), "dataset='cifar-10': unknown; did you mean 'cifar10'"),
        (lambda: methods_grid("demo", methods=["dp-sgd"], models="tiny-vti"), "did you mean 'tiny-vit'"),
        (lambda: methods_grid("demo", methods=["dp-sgd"], eps=-1), "epsilon=-1"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_without_the_data_the_paper_scale_stops_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(grids.data, "find", lambda name, download: asked.append((name, download)))
    grids.check_scale("demo")
    assert asked == []
    grids.check_scale("paper", "pets")
    grids.check_scale("laptop", download=True)
    assert asked == [("pets", False), ("cifar10", True)], "what it says of data that are not there is tested below"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (dict(seeds=[]), "seeds=[]: is empty"), (dict(eps=[]), "eps=[]: is empty"), (dict(methods=[]), "methods=[]: is empty"),
        (dict(learning_rates="a"), "learning_rates='a': is text; write a number"),
        (dict(methods=["mixself"]), "method='mixself': unknown; did you mean 'mix-self'"),
    ],
)  # fmt: skip
def test_bad_parameters_of_a_grid_are_refused_in_one_line_by_name(bad, said):
    with pytest.raises(ValueError) as caught:
        methods_grid("demo", **{"methods": ["dp-sgd"], **bad})
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", sorted(paper.DATASETS))
def test_every_data_set_of_the_paper_says_what_to_put_where(dataset, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"dataset='{dataset}': .* is not on disk; get it from .* and unpack it to"
    ):
        grids.data.load(dataset, tmp_path)


def test_cells_become_rows_with_their_labels():
    cells = methods_grid("demo", methods=["dp-sgd", "mixed-ghost"], models="tiny-convnext", eps=8, seeds=0, epochs=0.5,
                         learning_rates=[2.0, 4.0])  # fmt: skip
    runs = grids.run_cells(cells, compute=ComputeFlags(progress=False, workers=1))
    assert list(runs["method"]) == ["dp-sgd", "dp-sgd", "mixed-ghost", "mixed-ghost"]
    assert list(runs["model"]) == ["tiny-convnext"] * 4
    assert list(runs["learning_rate"] * runs["clip_norm"]) == pytest.approx([2, 4, 2, 4])
    assert runs["accuracy"].between(0, 100).all() and runs["key"].nunique() == 4
    assert runs["seconds"].nunique() == 1, "one pass"


def test_tables_6_9_10_and_12_share_their_passes():
    one = dict(models="tiny-convnext", seeds=0, learning_rates=4.0, eps=2)
    private, alone = grids.pretraining_grid("demo", **one)
    assert [c.labels["method"] for c in private] == ["self-aug", "mix-self", "mix-diff", *grids.PRETRAINED.values()]
    assert [c.spec.pretrain_epochs for c in private] == [0, 0, 0, 10, 10] and alone[0].spec.epsilon is None
    assert (alone[0].spec.train_on, alone[0].spec.epochs, alone[0].spec.validation) == ("synthetic", 10, 0.0)
    nine = grids.k_grid("demo", [8, 16], [8], [0, 2], **one)
    assert [(c.spec.recipe.k_base, c.spec.recipe.k_diff) for c in nine] == [(8, 0), (8, 2), (16, 0), (16, 2)]
    ten = grids.halves_grid("demo", **one)
    assert [c.labels["method"] for c in ten] == ["A", "B", "C"] and len({pass_of(c.spec) for c in ten}) == 2
    pure = grids.pure_grid("demo", longer=5, **one)
    assert [c.labels["method"] for c in pure] == [
        *grids.PURE,
        *grids.PUBLIC_ONLY.values(),
        "public only, 5 times as long",
    ]
    assert [c.spec.epsilon for c in pure] == [2.0] * 4 + [None] * 3


def test_without_synthetic_images_the_methods_that_want_them_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(grids.data, "synthetic_folder", lambda name: tmp_path / name)
    assert grids.with_public(METHODS, "digits") == METHODS
    assert grids.with_public(METHODS, "eurosat") == METHODS[:-1]
    (tmp_path / "eurosat").mkdir()
    assert grids.with_public(METHODS, "eurosat") == METHODS


def test_the_laptop_scale_has_the_papers_settings_on_data_that_two_cores_can_do():
    p = preset("laptop", "eurosat")
    assert (p.batch_size, p.epochs, p.redraw, len(p.seeds)) == (1000, 20, False, 5) and p.image_size
    assert preset("laptop", "caltech101").epochs == 10
    with pytest.raises(ValueError, match="dataset='pets': unknown"):
        preset("laptop", "pets")


def test_a_method_with_another_clip_norm():
    assert grids.recipe("mix-self@0.05", "digits") == views.METHODS["mix-self"]
    (cell,) = methods_grid("demo", methods=["self-aug@0.05"], models="tiny-vit", eps=1, seeds=0, learning_rates=4.0)
    assert (cell.spec.clip_norm, cell.spec.learning_rate) == (0.05, 80.0)
