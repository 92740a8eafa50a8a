"""The published tables: complete, unambiguous, plausible, and true to the paper where a reader can look them up."""

import itertools

import pytest

from dpmix.companion import ledger, paper

ROWS = {1: 5, 2: 24, 3: 192, 4: 18, 5: 10, 6: 4, 7: 32, 8: 16, 9: 27, 10: 36, 11: 4, 12: 4, 13: 3}
WITHOUT_STD = (7, 8, 9, 13)


def cell(frame, **condition):
    """(mean, std) of the one row that meets the condition."""
    for key, value in condition.items():
        frame = frame[frame[key] == value]
    assert len(frame) == 1, condition
    return frame["mean"].item(), frame["std"].item()


def repeated(frame, keys):
    """Rows whose condition another row has too."""
    return int(frame.duplicated(list(keys), keep=False).sum())


@pytest.mark.parametrize("n", paper.TABLES)
def test_shape_and_conditions(n):
    frame, keys = paper.table(n), paper.TABLES[n].split()
    assert list(frame.columns) == [*keys, "mean", "std"]
    assert len(frame) == ROWS[n]
    assert frame[[*keys, "mean"]].notna().all().all()
    assert repeated(frame, keys) == 0
    assert frame["std"].isna().all() if n in WITHOUT_STD else frame["std"].notna().all()


def test_a_repeated_condition_would_be_seen():
    """Negative control: without epsilon, the rows of Table 3 are not told apart."""
    assert repeated(paper.table(3), ("dataset", "model", "method")) == 192


@pytest.mark.parametrize("n", paper.TABLES)
def test_ranges(n):
    frame = paper.table(n)
    top = {7: 200, 8: 200, 13: 600}.get(n, 100)
    assert ((frame["mean"] > 0) & (frame["mean"] < top)).all()
    assert frame["std"].dropna().between(0, 0.7).all()  # the largest printed is (.7), Table 1


@pytest.mark.parametrize("n", paper.TABLES)
def test_keys_are_known(n):
    known = {
        "dataset": paper.DATASETS,
        "model": [*paper.ENCODERS, "wrn-16-4"],
        "method": paper.METHODS,
        "transform": paper.TRANSFORMS,
        "epsilon": paper.EPSILONS,
        "fid_model": ("inceptionv3", "vit-b-16"),
    }
    frame = paper.table(n)
    for column in set(known) & set(frame.columns):
        assert set(frame[column]) <= set(known[column])
        if column != "epsilon":
            assert set(frame[column]) <= set(paper.LABELS)


def full(frame, *columns):
    """Whether every combination of the values in `columns` is there once."""
    wanted = set(itertools.product(*(frame[c].unique() for c in columns)))
    return len(frame) == len(wanted) and set(frame[list(columns)].itertuples(index=False, name=None)) == wanted


def test_full_grids():
    three = paper.table(3)
    assert full(three, "dataset", "method", "model", "epsilon")
    assert three[["dataset", "method", "model", "epsilon"]].nunique().tolist() == [6, 4, 2, 4]
    nine = paper.table(9)
    assert full(nine, "k_base", "k_self", "k_diff")
    assert [sorted(nine[c].unique()) for c in ("k_base", "k_self", "k_diff")] == [[8, 16, 24], [8, 16, 24], [0, 2, 4]]
    assert full(paper.table(2), "dataset", "method", "epsilon")
    assert full(paper.table(8), "dataset", "fid_model", "compared")
    assert full(paper.table(10), "dataset", "model", "variant")
    assert not full(paper.table(1), "method", "microbatch_size")  # the cell "N/A"


SPOTS = [  # one or more cells of every table, with the row and column where the paper prints them
    (1, dict(method="dp-sgd", microbatch_size=1), 72.5, 0.5),  # first row, first column
    (1, dict(method="dp-sgd-mixup"), 50.1, 0.4),  # second row, second column
    (2, dict(dataset="cifar10", method="mix-self", epsilon=4), 70.47, 0.4),  # the value with two decimals
    (2, dict(dataset="eurosat", method="mix-self", epsilon=8), 90.8, 0.2),  # last row, last column
    (3, dict(dataset="cifar10", model="vit-b-16", method="mixed-ghost", epsilon=1), 95.0, 0.1),  # top left
    (3, dict(dataset="eurosat", model="convnext", method="mixed-ghost", epsilon=4), 87.0, 0.6),  # the largest spread
    (3, dict(dataset="caltech256", model="vit-b-16", method="mix-diff", epsilon=1), 89.7, 0.2),  # 4th block, last row
    (3, dict(dataset="sun397", model="vit-b-16", method="mixed-ghost", epsilon=1), 70.7, 0.2),  # 5th block, first row
    (3, dict(dataset="pets", model="vit-b-16", method="mixed-ghost", epsilon=1), 71.2, 0.2),  # 6th block, first row
    (3, dict(dataset="pets", model="convnext", method="mix-diff", epsilon=8), 88.8, 0.2),  # bottom right
    (4, dict(dataset="cifar100", transform="sobel"), 9.5, 0.2),  # second row, "+Sobel"
    (4, dict(dataset="cifar10", transform="blur"), 96.7, 0.2),  # first row, "+Blur"
    (5, dict(model="wrn-16-4", n_augmentations=16), 78.8, 0.5),  # first row
    (5, dict(model="vit-b-16", method="mix-self"), 97.6, 0.3),  # last row
    (6, dict(model="convnext", pretrained_on_synthetic=True), 80.9, 0.1),  # row "Yes"
    (10, dict(dataset="eurosat", model="vit-b-16", variant="B"), 91.4, 0.1),  # third row
    (10, dict(dataset="pets", model="convnext", variant="C"), 68.1, 0.1),  # bottom right
    (11, dict(method="mix-self", epsilon=8), 80.0, 0.2),  # bottom right
    (12, dict(method="pure-mix-diff"), 80.9, 0.2),  # last row
]
SPOTS_WITHOUT_STD = [
    (7, dict(dataset="eurosat", method="mix-diff", reference="test"), 10.9),  # third row, last column
    (7, dict(dataset="caltech256", method="self-aug", transform="jitter", reference="train"), 2.9),  # last row, 2nd
    (8, dict(dataset="eurosat", fid_model="inceptionv3", compared="diffusion"), 164.0),  # third row, second column
    (9, dict(k_base=16, k_self=16, k_diff=2), 83.8),  # end of the upper half
    (9, dict(k_base=16, k_self=16, k_diff=4), 86.3),  # start of the lower half
    (13, dict(method="self-aug"), 2 * 60 + 12),  # 2 h 12 min
    (13, dict(method="mix-diff"), 7 * 60 + 40),  # 7 h 40 min
]


@pytest.mark.parametrize("n, condition, mean, std", SPOTS)
def test_spot_values(n, condition, mean, std):
    assert cell(paper.table(n), **condition) == (mean, std)


@pytest.mark.parametrize("n, condition, mean", SPOTS_WITHOUT_STD)
def test_spot_values_without_spread(n, condition, mean):
    assert cell(paper.table(n), **condition)[0] == mean


def test_every_table_has_a_spot():
    assert {spot[0] for spot in SPOTS + SPOTS_WITHOUT_STD} == set(paper.TABLES)


@pytest.mark.parametrize("n", [4, 6, 12])
def test_cells_that_the_paper_prints_twice(n):
    """Cells of Table 3 come back in Tables 4, 6 and 12, which guards both transcriptions."""
    keys = ["dataset", "model", "method", "epsilon"]
    frame = paper.table(n)
    if n == 4:
        frame = frame[frame["transform"] == "crop-flip"]
    both = frame.merge(paper.table(3), on=keys, suffixes=("", "_again"))
    assert len(both) == {4: 4, 6: 2, 12: 3}[n]
    assert (both["mean"] == both["mean_again"]).all() and (both["std"] == both["std_again"]).all()


def test_figure2():
    frame = paper.figure2()
    assert list(frame.columns) == ["dataset", "model", "method", "epsilon", "std"]
    assert full(frame, "dataset", "method") and len(frame) == 6
    widths = frame.set_index(["dataset", "method"])["std"]
    assert widths["cifar10", "self-aug"] == 2.16e-3 and widths["caltech256", "mix-diff"] == 9.32e-4  # Appendix B.5


def test_claims_name_tables_and_methods_and_hold_in_the_published_numbers():
    claims = paper.claims()
    assert claims["claim"].is_unique and claims[["section", "table", "first", "second", "text"]].notna().all().all()
    assert set(claims["table"]) == {*(f"table{n}" for n in paper.TABLES), "figure2"}, "no table without a claim"
    assert set(claims["kind"]) == {"published", "no gain"} and claims["bound"].notna().equals(
        claims["kind"] == "no gain"
    )
    found = ledger.decide({}).set_index("key")
    assert (found["verdict"] == ledger.NOT_RUN).all()
    up = claims["kind"].eq("published") & ~claims["claim"].str.startswith("gradients")
    assert (found.loc[claims["claim"][up], "published"] > 0).all(), "the first is the one that is said to be above"
    no_gain = found.loc[claims["claim"][claims["kind"] == "no gain"]].drop(
        "pretraining-gain"
    )  # not in the table itself
    assert (no_gain["published"] <= no_gain["bound"]).all()
    three = paper.table(3).set_index(["dataset", "model", "epsilon", "method"])["mean"].unstack()
    ahead = three["mix-self"] - three["self-aug"]  # ahead in 47 of 48 cells, one tie: data/paper/README.md
    assert (ahead > 0.01).sum() == 47 and ahead["sun397", "vit-b-16", 8] == 0
    gain = three["mix-diff"] - three["mix-self"]
    assert gain["caltech256", "vit-b-16", 1] == pytest.approx(8.5)  # Section 5.2
    assert found.loc["mix-diff-low-budget", "published"] == pytest.approx(
        gain["cifar100"].unstack()[[1, 2]].mean().mean()
    )


def test_settings():
    tuned, scratch = paper.SETTINGS["fine-tuning"], paper.SETTINGS["scratch"]
    assert (tuned.batch_size, tuned.k_base, tuned.k_self, tuned.k_diff) == (1000, 16, 18, 2)  # Sections 4 and 6.5
    assert (scratch.batch_size, scratch.epochs, scratch.k_base, scratch.clip_norm) == (4096, 200, 16, 1)  # Section 4
    assert tuned.delta == scratch.delta == 1e-5 and tuned.alpha == 0.2
    assert {d: paper.epochs(d) for d in paper.DATASETS if paper.epochs(d) != 10} == {"eurosat": 20}  # Section 4
    assert {d: paper.k_diff(d) for d in paper.DATASETS if paper.k_diff(d) != 2} == {"caltech256": 24, "pets": 24}
    assert {m: paper.clip_norm(m) for m in paper.METHODS if paper.clip_norm(m) != 1} == {"mixed-ghost": 0.05}
    totals = {name: facts.train + facts.test for name, facts in paper.DATASETS.items()}
    assert totals["caltech256"] == 30_607 and totals["sun397"] == 108_754 and totals["eurosat"] == 27_000  # Appendix C
    assert {m for s in paper.SETTINGS.values() for m in s.models} == {*paper.ENCODERS, "wrn-16-4"}
    assert set(paper.LABELS) >= {*paper.DATASETS, *paper.METHODS, *paper.TRANSFORMS, *paper.ENCODERS}


def test_a_frame_is_the_callers():
    frame = paper.table(12)
    frame["mean"] = 0.0
    assert (paper.table(12)["mean"] > 0).all()


@pytest.mark.parametrize("n", [0, 14, -1, True])
def test_unknown_table(n):
    with pytest.raises(ValueError, match=rf"^table={n}: the paper has tables 1 to 13$"):
        paper.table(n)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paper.clip_norm("mixed-gost"), r"^method='mixed-gost': unknown; did you mean 'mixed-ghost'"),
        (lambda: paper.epochs("eurosatt"), r"^dataset='eurosatt': unknown; did you mean 'eurosat'\?$"),
        (lambda: paper.k_diff("digits"), r"^dataset='digits': unknown; known are cifar10, [^\n]*$"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"table3\.csv is missing: [^\n]*clone of dpmix[^\n]*$"):
        paper.table(3)
