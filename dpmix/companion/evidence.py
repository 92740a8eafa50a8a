"""Runs that came with the repository: `data/results/laptop/TABLE/DATASET.json`, written by `benchmarks/evidence.py`.

A file holds a row a run and, once, what all rows share; where, when and from what it was made stands in `about`. Which
test images a chosen run got right is packed, a bit an image, so that intervals hold the error of the images too."""

import base64
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown

from dpmix.companion.grids import LAPTOP
from dpmix.companion.report import label
from dpmix.core import files, views
from dpmix.core.checks import counted
from dpmix.images import data
from dpmix.runs import passes
from dpmix.runs.identity import Contents
from dpmix.runs.material import prepare
from dpmix.runs.result import choose_learning_rate
from dpmix.runs.spec import ComputeFlags, RunSpec
from dpmix.runs.store import Store

FOLDER = data.RESULTS / "laptop"


def choose(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The runs with the learning rate that validation chose for each condition, and whether it is an `edge` of three or more
    that were tried; runs that held nothing out stay as they are, since nothing is chosen there."""
    tried, rate = runs.groupby(list(by), dropna=False)["learning_rate"], runs["learning_rate"]
    edge = (rate == tried.transform("min")) | (rate == tried.transform("max"))
    fixed = runs["validation"] == 0
    runs = runs.assign(edge=edge & ~fixed & (tried.transform("nunique") > 2))
    tuned = choose_learning_rate(runs[~fixed], by) if (~fixed).any() else runs[~fixed]
    return pd.concat([tuned, runs[fixed]], ignore_index=True) if fixed.any() else tuned


def outcomes(runs: pd.DataFrame, *, compute: ComputeFlags | None = None) -> pd.DataFrame:
    """Runs of frozen encoders with the column `right`: which test images the stored weights of each get right, [m] bool;
    None where the store has no weights."""
    compute, store = compute or ComputeFlags(), Store()
    tests: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
    right: list[np.ndarray | None] = []
    for name in runs["key"]:
        result = store.get(name)
        if result is None or result.spec.from_scratch:
            right.append(None)
            continue
        names = ("dataset", "model", "weights", "image_size", "redraw")
        about: dict[str, Any] = {name: getattr(result.spec, name) for name in names}
        source = tuple(about.values())
        if source not in tests:
            plain = RunSpec(recipe=views.Recipe(k_base=1), epsilon=None, learning_rate=1.0, **about)
            material = prepare([Contents(compute, store.folder).identity(plain)], compute)
            rows = torch.arange(len(material.test))
            tests[source] = passes.features_of(plain, material.test, rows, material, compute), material.test.labels
        features, labels = tests[source]
        head = store.tensors(result)
        guess = (features.float().cpu() @ head["weight"].T + head["bias"]).argmax(1)
        right.append((guess == labels).numpy())
    return runs.assign(right=right)


def read(table: str, folder: Path | None = None, name: str = "*.json") -> pd.DataFrame:
    """The runs that came for a table ("table3"), of all its files or of those named so; empty where none came.
    `attrs["about"]` lists what each file says of itself. Further seeds of a data set lie in files of their own."""
    frames, about = [], []
    order = {dataset: place for place, dataset in enumerate(LAPTOP)}
    there = ((folder or FOLDER) / table).glob(name)
    for *_, path in sorted((order.get(p.stem.partition("-")[0], len(order)), p.stem, p) for p in there):
        content = files.read_json(path)
        if content is None:
            continue
        rows = [json.loads(row) for row in content["rows"]]
        frame = pd.DataFrame(rows, columns=content["columns"]).assign(**json.loads(content["shared"]))
        if "right" in frame:
            size = content["about"]["test_images"]
            frame["right"] = [_unpacked(r, size) if isinstance(r, str) else None for r in frame["right"]]
        frames.append(frame)
        about.append(content["about"])
    none = pd.DataFrame(columns=["dataset", "model", "method", "epsilon", "seed"])
    found = pd.concat(frames, ignore_index=True) if frames else none
    found.attrs["about"] = about
    return found


def chosen(table: str, by: Sequence[str], folder: Path | None = None) -> pd.DataFrame:
    """Of the runs that came, those with the learning rate that validation chose: retrained on all training images where
    that was done for the data set, else on what the validation split left."""
    runs = read(table, folder)
    parts = []
    for _, part in runs.groupby("dataset", sort=False):
        again = part["refit"].astype(bool) if "refit" in part else pd.Series(False, index=part.index)
        found = choose(part[~again], by)
        # Further seeds may have changed a choice: what was retrained for an earlier one is no result.
        parts.append(
            part[again].merge(found[[*by, "learning_rate", "edge"]].drop_duplicates()) if again.any() else found
        )
    found = pd.concat(parts, ignore_index=True) if parts else runs
    found.attrs["about"] = runs.attrs["about"]
    return found


def _unpacked(text: str, size: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8), count=size).astype(bool)


def images_of(about: dict[str, Any]) -> str:
    """ "CIFAR-10 (10,000 of its training images)": the data set of a file, and how much of it where that is not all."""
    return label(about["dataset"]) + (f" ({about['examples']:,} of its training images)" if "examples" in about else "")


def status(table: str, folder: Path | None = None, *, demo: bool = True) -> Markdown:
    """The first lines of a page: which real data its verdicts rest on, or that there are none, and (`demo`) what is."""
    about = read(table, folder).attrs["about"]
    if not about:
        rest = "There is nothing to show yet; the last lines of the page say what makes them."
        if demo:
            rest = "Beside the published numbers stands the demo: it shows that the code runs, and decides little."
        none = "No runs on the paper's own kind of data came with the repository for this page."
        return Markdown(f"**Real data: not run.** {none} {rest}")
    lines = [
        f"- {images_of(a)}: {a['encoder']}, {counted(len(a['seeds']), 'seed')}, "
        f"{a['hours']:.1f} hours on {a['machine']}, made until {a['until'][:10]} at commit {a['commit'][:9]}"
        f"{' with changes' if a.get('dirty') else ''}, data {a['data'][:9]}"
        for a in about
    ]
    return Markdown("**Real data on this page** (they came with the repository):\n\n" + "\n".join(lines))
