"""What a neighbouring data set must not change, what a release must not hold, and that nothing is ever unpickled.

`test_audit` has the same for the digits (`run_without`); here the private images lie in a folder, and the release is
compared to the last byte of its card.
"""

import ast
import json
import re
import struct
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import dpmix
from dpmix.core import files, rng, views
from dpmix.images import image_cache
from dpmix.runs import material
from dpmix.runs.result import NonPrivateDiagnostics, Result
from dpmix.runs.spec import ComputeFlags, RunSpec, mechanism
from dpmix.runs.store import Store

SOURCE = Path(dpmix.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sixty training and twenty test images of two classes, grey, 8x8, no two alike."""
    base = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 30), ("test", 10)):
        for c, name in enumerate(("dark", "light")):
            (base / part / name).mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng([c, i, part == "test"]).integers(0, 120, (8, 8)) + 120 * c
                Image.fromarray(noise.astype(np.uint8)).save(base / part / name / f"{i:03d}.png")
    return base


def spec_of(folder: Path, **changes) -> RunSpec:
    about = dict(
        recipe=views.Recipe(k_base=2, transform="crop"), epsilon=4.0, learning_rate=2.0, dataset=f"folder:{folder}",
        population=40, batch_size=20, epochs=2.0, delta=1e-3, seed=None, validation=0.3,
    )  # fmt: skip
    return RunSpec(**{**about, **changes})


def released(spec: RunSpec, base: Path, capfd, seed: int = 2**70 + 1) -> tuple[Result, Path, list[str]]:
    """A run and its release in folders of their own; and every line and warning on the way. The seed is drawn, by a die
    that always shows the same."""
    for cached in (material._load, material._load_public):
        cached.cache_clear()
    capfd.readouterr()
    store = Store(base / "store")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.MonkeyPatch.context() as die:
            die.setattr(rng, "fresh_seed", lambda: seed)
            result = dpmix.run(spec, compute=ComputeFlags(cache=str(base / "cache"), workers=1), store=store)
        out = dpmix.release(result, base / "release", store=store)
    said = "".join(capfd.readouterr()).replace("\r", "\n").splitlines()
    # How far and how fast a bar has come is a matter of time; what is left is its name and its total.
    lines = {re.sub(r":\s+\d+%\|[^|]*\|(?: *\d+/(\d+))?.*", r": of \1", line) for line in said if line}
    return result, out, [*sorted(lines), *(str(w.message) for w in warned)]


def names(base: Path) -> list[str]:
    """Of all files below, a keyed digest as such: nobody without the key of the store can tell one from another."""
    found = (p.relative_to(base).as_posix() for p in base.rglob("*"))
    return sorted(re.sub(r"^(store/.*)[0-9a-f]{32}", r"\1KEYED", name) for name in found)


def test_removing_an_image_changes_nothing_but_the_weights(folder, tmp_path, capfd, monkeypatch):
    """Numbers, log lines, warnings, names of all files; the card to the last byte, the model but for its tensors."""
    monkeypatch.setattr(image_cache, "tqdm", lambda *a, **k: tqdm(*a, **{**k, "delay": 0}))  # else shown if it is slow
    spec, store_of = spec_of(folder), lambda name: tmp_path / name / "store"
    everyone, out, said = released(spec, tmp_path / "all", capfd)
    for name in (folder / "train" / "dark" / "000.png", folder / "train" / "light" / "029.png"):
        kept = name.read_bytes()
        name.unlink()
        try:
            less, less_out, less_said = released(spec, tmp_path / name.stem, capfd)
        finally:
            name.write_bytes(kept)
        for field in ("spec", "divisor", "sample_rate", "noise_multiplier", "steps", "population", "epsilon"):
            assert getattr(everyone, field) == getattr(less, field), field
        assert everyone.spec.learning_rate == less.spec.learning_rate
        assert said == less_said
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in less_out.iterdir())
        assert (out / "privacy_card.json").read_bytes() == (less_out / "privacy_card.json").read_bytes()
        one, other = (files.load_tensors(o / "model.safetensors") for o in (out, less_out))
        assert names(tmp_path / "all") == names(tmp_path / name.stem), "also in the store and in the cache"
        assert not {p.name for p in store_of("all").glob("*.json")} & {
            p.name for p in store_of(name.stem).glob("*.json")
        }
        shapes = [{k: (t.shape, t.dtype) for k, t in tensors.items()} for tensors, _ in (one, other)]
        assert shapes[0] == shapes[1] and one[1] == other[1]
        assert (out / "model.safetensors").stat().st_size == (less_out / "model.safetensors").stat().st_size
    steps = everyone.steps
    assert f"1 head, 2 views: of {steps}" in said and f"decoding folder:{folder}: of " in said, "lines to compare"
    assert everyone.provenance["splits"] != less.provenance["splits"], "the data did differ"


def test_without_a_public_population_the_card_would_tell(folder):
    """The control, and why `population` is there."""
    spec = spec_of(folder, population=None)
    assert mechanism(spec, 60) == mechanism(spec, 60) != mechanism(spec, 57)


def test_the_card_says_whether_the_population_was_given(folder, tmp_path, capfd):
    for n, spec in enumerate((spec_of(folder), spec_of(folder, population=None))):
        _, out, _ = released(spec, tmp_path / str(n), capfd)
        said = files.read_json(out / "privacy_card.json")["not_accounted_for"]
        assert any("number of training examples" in line for line in said) == (n == 1)


# What a release holds.


def encodings(value: object) -> list[bytes]:
    """How a number may be written down in a file."""
    found = [str(value).encode(), repr(value).encode(), json.dumps(value).encode()]
    if isinstance(value, float):
        found += [struct.pack(f"<{kind}", value) for kind in "ef"[value < 6e4 :] + "d"]
        found += [f"{100 * value:.{digits}f}".encode() for digits in (3, 4, 5)]
    if isinstance(value, int):
        found += [value.to_bytes(8, "little"), hex(value)[2:].encode()] if value < 2**63 else [hex(value)[2:].encode()]
    return found


def content(out: Path) -> bytes:
    return b"".join(str(p.relative_to(out)).encode() + p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file())


def test_diagnostics_never_enter_a_release(folder, tmp_path, capfd):
    """Every field gets a value that nothing else has; no byte of the release folder holds its name or its value."""
    result, _, _ = released(spec_of(folder, seed=None), tmp_path, capfd)
    values = {"validation_accuracy": 0.7182818284, "dropped_gradients": 73_456_789, "train_examples": 71_234_567}
    values["owners_note"] = NonPrivateDiagnostics(**values).owners_note
    assert values.keys() == {f.name for f in fields(NonPrivateDiagnostics)}, "a new field needs a value here"
    marked = replace(
        result, diagnostics=NonPrivateDiagnostics(**values), test_accuracy=0.5772156649,
        timing={"seconds": 0.6931471805, "views": 79_123_456, "views_per_second": 12_345.678912345, "heads": 1},
    )  # fmt: skip
    store = Store(tmp_path / "store")
    store.put(marked, store.tensors(result))  # a card is written for what the store has
    out = dpmix.release(marked, tmp_path / "marked", store=store)
    everything = content(out)
    hidden = {**values, "test_accuracy": marked.test_accuracy, **marked.timing, "seed": result.spec.seed}
    hidden |= {"key": result.key, **{name: result.provenance[name] for name in ("splits", "date")}}
    hidden |= {"private": result.provenance["contents"]["private"]}
    del hidden["heads"]
    for name, value in hidden.items():
        for written in encodings(value):
            assert written not in everything, name
    for name in (*values, "timing", "views_per_second", str(folder), '"seed":', "NonPrivate"):
        assert name.encode() not in everything, name
    assert str(result.noise_multiplier).encode() in everything, "the search can find"
    for name, value in hidden.items():
        if isinstance(value, (int, float)) and name != "seed":
            assert str(value) in json.dumps(marked.to_json()), "the values are where they belong"


def test_a_second_release_leaves_nothing_of_the_first(folder, tmp_path, capfd):
    """Weights are written in place of the old ones. The one before was once kept beside them, a second model to pay for."""
    result, out, _ = released(spec_of(folder), tmp_path / "a", capfd)
    other, second, _ = released(spec_of(folder), tmp_path / "b", capfd, seed=2**70 + 2)
    store = Store(tmp_path / "b" / "store")
    dpmix.release(other, out, store=store)
    # Not byte by byte: safetensors writes its metadata in any order.
    now, then = (files.load_tensors(place / "model.safetensors") for place in (out, second))
    assert now[1] == then[1] and all(torch.equal(now[0][name], t) for name, t in then[0].items())
    assert (out / "privacy_card.json").read_bytes() == (second / "privacy_card.json").read_bytes()
    assert sorted(p.name for p in out.rglob("*")) == ["model.safetensors", "privacy_card.json"]
    first = files.load_tensors(tmp_path / "a" / "store" / f"{result.key}.safetensors")[0]["weight"]
    assert first.numpy().tobytes() not in content(out)


def test_the_card_says_what_was_promised_and_what_was_not(folder, tmp_path, capfd):
    result, out, _ = released(spec_of(folder, seed=None), tmp_path, capfd)
    card = files.read_json(out / "privacy_card.json")
    assert card["guarantee"]["epsilon"] == result.epsilon and result.epsilon.keys() == {"rdp", "prv", "pld"}
    assert card["guarantee"]["delta"] == 1e-3 and card["guarantee"]["calibrated_by"] == "rdp"
    assert "add or remove one example" in card["adjacency"] and card["sampling"].startswith("Poisson")
    for name in ("noise_multiplier", "sample_rate", "steps", "divisor"):
        assert card["mechanism"][name] == getattr(result, name)
    assert card["mechanism"]["clip_norm"] == result.spec.clip_norm
    said = " ".join(card["not_accounted_for"])
    assert "learning rate" in said and "other models" in said
    assert "seed" in card["withheld"] and "seed" not in card["spec"]
    assert card["spec"]["dataset"] == "folder" and card["class_names"] == ["dark", "light"]
    assert asdict(result.spec)["recipe"] == card["spec"]["recipe"]


# Unpickling.


def unpickles(source: str) -> list[str]:
    """Calls that could run code which a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        said = {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = name.rpartition(".")[2]
        if (
            (name.startswith(("pickle.", "joblib.", "dill.", "cloudpickle.", "marshal.", "shelve.")) and "load" in last)
            or (last == "load" and name.startswith("torch") and said.get("weights_only") != "True")
            or (last == "load" and name.startswith(("np", "numpy")) and said.get("allow_pickle") != "False")
            or last in ("read_pickle", "unsafe_load", "Unpickler")
            or name in ("eval", "exec")
        ):
            found.append(f"{name} in line {node.lineno}")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_call_unpickles(path):
    assert unpickles(path.read_text()) == []


@pytest.mark.parametrize("wrong", ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)", "pickle.loads(b)",
                                   "np.load(p, allow_pickle=True)", "pd.read_pickle(p)", "pickle.Unpickler(f)"])  # fmt: skip
def test_a_call_that_unpickles_is_seen(wrong):
    assert unpickles(f"x = {wrong}") and not unpickles("torch.load(p, weights_only=True); json.loads(t)")


def test_a_key_that_leads_out_of_the_store_is_refused(tmp_path):
    store = Store(tmp_path / "store")
    for name in ("../a", "a/b", "..", "", "/a", "a\\b", "a.b"):
        with pytest.raises(ValueError, match=r"key=.*must be letters, digits"):
            store.get(name)
    fake = object.__new__(Result)
    object.__setattr__(fake, "key", "../outside")
    files.save_tensors(tmp_path / "outside.safetensors", {"weight": torch.zeros(1)}, {"result": "../outside"})
    for use in (store.tensors, lambda r: store.put(r, {})):
        with pytest.raises(ValueError, match=r"key='\.\./outside': must be letters"):
            use(fake)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside.safetensors"]
