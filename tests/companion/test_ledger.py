"""The ledger gives made-up results of known truth the verdicts that they deserve; what came with the repository is read whole."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpmix.companion import evidence, grids, ledger, paper, plots
from dpmix.core import files

ROOT = Path(__file__).resolve().parents[2]
place = importlib.util.spec_from_file_location("maker", ROOT / "benchmarks" / "evidence.py")
maker = sys.modules["maker"] = importlib.util.module_from_spec(place)
place.loader.exec_module(maker)
DRAW = np.random.default_rng(3)


def made_up(factor: float, spread: float = 0.05) -> dict[str, pd.DataFrame]:
    """Runs of every table in which each published difference is there `factor` times over: 1 the effect, 0 none, -1 the
    opposite. A difference claimed to be no gain is there -|factor| times, plus 2 points where the factor is negative."""
    found = {}
    for table in dict.fromkeys(paper.claims()["table"]):
        said = ledger.published(table)
        value, _ = ledger.RATIOS.get(table, ("accuracy", ()))
        rows = []
        for row in said.to_dict("records"):
            level = np.log(row["mean"]) if table in ledger.RATIOS else row["mean"]
            for seed in range(8):
                x = factor * level + DRAW.normal() * spread * (0.02 if table in ledger.RATIOS else 1)
                rows.append({**row, "seed": seed, value: np.exp(x) if table in ledger.RATIOS else x})
        found[table] = pd.DataFrame(rows).drop(columns=["mean", "std"], errors="ignore")
    return found


@pytest.mark.parametrize(("factor", "word"), [(1.0, "holds"), (0.0, "no effect"), (-1.0, "contradicted")])
def test_known_truth_is_found(factor, word):
    found = ledger.decide(made_up(factor))
    claimed = found[(found["claim"] == "published") & (found["published"].abs() > 0.35)]
    assert len(claimed) > 28 and claimed["verdict"].str.startswith(word).all(), claimed[["key", "verdict"]]
    no_gain = found[(found["claim"] == "no gain") & found["published"].notna()]
    assert (no_gain["verdict"] == "holds").all() or factor < 0
    assert found.set_index("key").loc["pretraining-gain", "verdict"] == ledger.NOT_RUN, "the paper has no such row"


def test_a_claim_of_no_gain_is_contradicted_by_a_gain():
    runs = made_up(1.0)
    runs["table10"].loc[runs["table10"]["method"] == "C", "accuracy"] += 3
    assert ledger.decide(runs).set_index("key").loc["real-pool-few", "verdict"] == "contradicted"


def test_of_forty_claims_without_any_difference_few_ledgers_have_a_false_one():
    """Wide noise, nothing there: at most 5 % of ledgers with a *holds* or *contradicted* (30 ledgers; more than 5: 0.3 %)."""
    wrong = 0
    for _ in range(30):
        found = ledger.decide({"table3": made_up_table3()})
        wrong += found["verdict"].isin(["holds", "contradicted"]).any()
    assert wrong <= 5


def made_up_table3() -> pd.DataFrame:
    said = ledger.published("table3").query("dataset in ('cifar10', 'eurosat') and model == 'vit-b-16'")
    parts = [said.assign(seed=s, accuracy=80 + DRAW.normal(0, 6, len(said))) for s in range(4)]
    return pd.concat(parts, ignore_index=True)


def test_a_claim_is_decided_where_it_is_made():
    runs = made_up(1.0)["table3"]
    digits = runs[runs["dataset"] == "cifar10"].assign(dataset="digits", model="tiny-vit")
    found = ledger.decide({"table3": digits}).set_index("key")
    assert found.loc["mix-self-cifar10", "verdict"] == "holds" and found.loc["mix-self-cifar10", "sets"] == "digits"
    assert (
        found.loc["mix-self-eurosat", "verdict"] == ledger.NOT_RUN
        and found.loc["pairs-cost", "verdict"] == ledger.NOT_RUN
    )
    places = pd.DataFrame({"dataset": list("abca"), "epsilon": [1, 1.0, 1, 8]})
    assert ledger.within(places, "dataset=a,b epsilon=1 model=none").index.tolist() == [0, 1]
    assert ledger.within(places, np.nan) is places and ledger.within(places[:0], "dataset=a").columns.equals(
        places.columns
    )
    text = ledger.table(ledger.decide({"table3": digits})).data
    assert "[Table 3](table3.ipynb)" in text and "**holds**" in text and "**not run**" in text
    assert "not run " in ledger.counts(ledger.decide({"table3": digits}))
    assert plots.effects_plot(ledger.decide({"table3": digits})).axes


def test_published_and_measured_are_of_one_kind_and_a_set_without_both_methods_is_not_named():
    runs = made_up(1.0)
    table3, table12 = runs["table3"].query("epsilon == 1"), runs["table12"].assign(dataset="cifar10")
    half = table3.query("dataset == 'cifar10' or method == 'self-aug'").query("dataset in ('cifar10', 'eurosat')")
    found = ledger.decide({"table3": half, "table12": table12, "table5": runs["table5"].query("model != 'wrn-16-4'")})
    found = found.set_index("key")
    said = ledger.published("table3").query("dataset == 'cifar10' and epsilon == 1").groupby("method")["mean"].mean()
    row = found.loc["mix-self-cifar10"]
    assert row["published"] == pytest.approx(said["mix-self"] - said["self-aug"]), "of the budget that was run"
    assert found.loc["mixtures-not-views", "published"] == pytest.approx(0.6), (
        "of the linear layer, and not of the network"
    )
    assert row["sets"] == "CIFAR-10" and row["elsewhere"] == "" and found.loc["mix-self-eurosat", "sets"] == ""
    assert found.loc["pure-above", "sets"] == "CIFAR-10" and found.loc["pure-above", "elsewhere"] == "CIFAR-100"
    assert "on CIFAR-10 (the paper: CIFAR-100), n = 8" in ledger.table(found.reset_index()).data


def test_a_page_begins_with_the_verdicts_on_its_claims():
    text = ledger.status("table12").data
    assert text.index("- **contradicted**: Pure-DP-MixDiff") < text.index("Real data on this page")
    assert "Fine-tuned" not in text and "- not run: Two or four synthetic images" in ledger.status("table9").data


def test_what_came_with_the_repository_names_its_origin():
    for path in sorted(evidence.FOLDER.glob("*/*.json")):
        about = files.read_json(path)["about"]
        assert path.stem.partition("-")[0] == about["dataset"] and path.parent.name == about["table"], path
        for name in ("commit", "machine", "seeds", "data", "hours", "until", "versions"):
            assert about[name] not in ("", None, []), f"{path}: {name}"
    ledger.decide(ledger.committed())


def test_runs_are_written_and_read_back(tmp_path):
    right = np.array([True, False, True] * 7)
    runs = pd.DataFrame({
        "dataset": "cifar10", "model": "m", "method": ["a", "a", "b", "b"], "epsilon": 1.0, "seed": 0,
        "learning_rate": [1.0, 2.0, 1.0, 2.0], "validation": 0.1, "validation_accuracy": [1.0, 2.0, 4.0, 3.0],
        "accuracy": [50.0, 60.0, 70.0, 80.0], "refit": False, "right": [None, right, ~right, None], "recipe": "object",
    })  # fmt: skip
    about = {"dataset": "cifar10", "test_images": 21, "commit": "abc", "encoder": "E", "seeds": [0], "hours": 0.5,
             "machine": "two cores", "until": "2030-01-02T03", "data": "digest"}  # fmt: skip
    maker.write(tmp_path / "t" / "cifar10.json", runs, about)
    back = evidence.read("t", tmp_path)
    assert back.attrs["about"] == [about] and back["accuracy"].tolist() == runs["accuracy"].tolist()
    assert back["right"][0] is None and (back["right"][1] == right).all() and (back["right"][2] == ~right).all()
    best = evidence.chosen("t", ["method"], tmp_path)
    assert best["accuracy"].tolist() == [60.0, 70.0], "by validation, never by test"
    again = pd.concat([runs, runs[:2].assign(refit=True, accuracy=[55.0, 65.0])], ignore_index=True)
    maker.write(tmp_path / "t" / "cifar10.json", again, about)
    retrained = evidence.chosen("t", ["method"], tmp_path)["accuracy"].tolist()
    assert retrained == [65.0], "those trained again on all images, at the rate that was chosen"
    assert "0.5 hours on two cores" in evidence.status("t", tmp_path).data and "cifar" not in repr(about["machine"])
    assert "not run" in evidence.status("nothing", tmp_path).data and len(evidence.read("nothing", tmp_path)) == 0


def test_which_images_a_stored_run_gets_right_adds_up_to_its_accuracy():
    cells = grids.methods_grid(
        "demo", methods=["dp-sgd"], models="tiny-vit", eps=8, seeds=[0, 1], epochs=0.5, learning_rates=4.0
    )
    scored = evidence.outcomes(grids.run_cells(cells))
    assert [100 * r.mean() for r in scored["right"]] == pytest.approx(scored["accuracy"].tolist())


def test_a_part_has_as_many_images_of_each_class_and_the_whole_test_set(tmp_path):
    there = {"cifar10/train": 5, "cifar10/test": 3, "synthetic/cifar10": 4}
    for folder, n in there.items():
        for kind, i in [(k, i) for k in "ab" for i in range(n)]:
            (tmp_path / folder / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / kind / f"{i}.png").write_text(f"{folder} {kind} {i}")
    part = maker.part_of("cifar10", 4, tmp_path)
    assert maker.part_of("cifar10", 4, tmp_path) == part, "once more"
    for folder, n in {"cifar10/train": 2, "cifar10/test": 3, "synthetic/cifar10": 2}.items():
        found = {p.relative_to(part / folder).as_posix(): p.read_text() for p in (part / folder).glob("*/*")}
        assert found == {f"{k}/{i}.png": f"{folder} {k} {i}" for k in "ab" for i in range(n)}
    with pytest.raises(SystemExit, match="dataset='eurosat': has no folder"):
        maker.part_of("eurosat", 4, tmp_path)
    for wrong in (0, -2, 3, 12):
        with pytest.raises(
            SystemExit, match=f"examples={wrong}: must be a multiple of 2, the classes of cifar10, and at most 10"
        ):
            maker.part_of("cifar10", wrong, tmp_path)


def test_a_part_takes_longer_steps_a_rate_more_and_no_batch_larger_than_itself():
    asked = dict(methods=["dp-sgd"], seeds=[0], learning_rates=[2.0, 4.0], batch_size=45_000)
    cells = grids.methods_grid("laptop", eps=[1, 8], **asked)
    public = grids.changed_cells(cells[:1], "alone", **grids.NO_NOISE)
    assert maker.for_part([*cells, *public], None) == [*cells, *public]
    found = maker.for_part([*cells, *public], 10_000)
    rates = {e: sorted(c.spec.learning_rate for c in found if c.spec.epsilon == e) for e in (1, 8)}
    assert rates[1] == rates[8] == pytest.approx([maker.LONGER * r for r in (1, 2, 4)])
    assert {c.spec.batch_size for c in found} == {9_000}
    half = maker.for_part(grids.halves_grid("laptop", dataset="eurosat", eps=2, seeds=[0], batch_size=19_440), 10_000)
    assert {c.spec.batch_size for c in half} == {4_500}
    assert [c.spec.learning_rate for c in found if c.spec.epsilon is None] == [2.0]
    said = {"dataset": "cifar10", "examples": 10_000}
    assert evidence.images_of(said) == "CIFAR-10 (10,000 of its training images)"
    assert evidence.images_of({"dataset": "cifar10"}) == "CIFAR-10"


def test_every_set_of_runs_names_cells_that_can_be_run():
    """Specs are checked as they are made; a set has passes to share, and its rates can be chosen."""
    for name, wanted in maker.SETS.items():
        cells = wanted.cells([0])
        assert len({(c.spec, *c.labels.values()) for c in cells}) == len(cells) > 0, name
        assert {c.spec.dataset for c in cells} == {name.split("/")[1]} and {c.spec.seed for c in cells} == {0}


def test_a_set_is_made_and_written_with_its_refits(tmp_path, monkeypatch):
    asked = dict(methods=["dp-sgd", "mixed-ghost"], models="tiny-vit", eps=8, epochs=0.3, learning_rates=[2.0, 8.0])
    tiny = maker.Set(lambda seeds: grids.methods_grid("demo", **asked, seeds=list(seeds)), seeds=2, refit=True)
    monkeypatch.setitem(maker.SETS, "tiny/digits", tiny)
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    compute = maker.ComputeFlags(progress=False, workers=1)
    maker.make("tiny/digits", [0, 1], compute, False)
    found = evidence.read("tiny")
    assert len(found) == 2 * 2 * 2 + 2 * 2 and found["refit"].sum() == 4
    best = evidence.chosen("tiny", maker.BY)
    assert len(best) == 4 and (best["validation"] == 0).all() and best["N"].eq(1437).all()
    assert [100 * r.mean() for r in best["right"]] == pytest.approx(best["accuracy"].tolist())
    (about,) = found.attrs["about"]
    assert about["seeds"] == [0, 1] and about["test_images"] == 360 and about["hours"] > 0 and about["machine"]
    # A further seed has a share in the choice; where it changes one, the first seeds are trained again too.
    first = best.drop_duplicates("method").set_index("method")["learning_rate"]
    content = files.read_json(tmp_path / "tiny" / "digits.json")
    at = content["columns"].index
    rows = [json.loads(row) for row in content["rows"]]
    for row in rows:
        turned = row[at("method")] == "dp-sgd" and row[at("learning_rate")] != first["dp-sgd"]
        kept = row[at("method")] != "dp-sgd" and row[at("learning_rate")] == first["mixed-ghost"]
        row[at("validation_accuracy")] = None if row[at("refit")] else 99.0 if turned or kept else 5.0
    files.write_json(tmp_path / "tiny" / "digits.json", content | {"rows": [json.dumps(row) for row in rows]})
    maker.make("tiny/digits", [2], compute, False)
    best = evidence.chosen("tiny", maker.BY).set_index(["method", "seed"])["learning_rate"]
    assert sorted(best.index) == [(m, s) for m in ("dp-sgd", "mixed-ghost") for s in range(3)]
    assert (best["mixed-ghost"] == first["mixed-ghost"]).all() and (best["dp-sgd"] != first["dp-sgd"]).all()
    assert [a["seeds"] for a in evidence.read("tiny").attrs["about"]] == [[0, 1], [0, 1, 2]]
    with pytest.raises(SystemExit, match="examples=100: the seeds beside it are of all"):
        maker.make("tiny/digits", [3], compute, False, 100)
    with pytest.raises(SystemExit, match=r"digits-seeds-2-2\.json has further ones"):
        maker.make("tiny/digits", [0, 1], compute, False)


def test_seeds_are_asked_for_by_number_or_by_name():
    assert maker.seeds_asked(None, 3) == [0, 1, 2] == maker.seeds_asked("3", 5) and maker.seeds_asked("3-4", 5) == [
        3,
        4,
    ]
    for wrong in ("0", "4-3", "x", "3-"):
        with pytest.raises(SystemExit, match=f"seeds='{wrong}'"):
            maker.seeds_asked(wrong, 5)
