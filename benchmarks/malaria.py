"""Malaria cells as one's own images: `python benchmarks/malaria.py [DATA]` makes data/results/malaria anew.

27,558 grey images of red blood cells of 50 x 50 pixels (NIH; Rajaraman et al. 2018), parasitised or not, in
DATA/{train,test}/CLASS (by default data/datasets/malaria). Their own split has the same patients on both sides. Here every
fifth patient, by a keyed order of the patients, is a test patient: the test asks about people whom the model has never seen.
"""

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

import dpmix
from dpmix.core import files
from dpmix.core.rng import generator
from dpmix.images import data
from dpmix.runs.passes import provenance
from dpmix.runs.spec import ComputeFlags

EPSILONS = (2.0, 8.0, 0.5)
OUT = data.RESULTS / "malaria"


def patient(path: Path) -> str | None:
    """Of C100P61ThinF_IMG_..., and of ParasitizedC100P61ThinF_IMG_...; None where the name does not tell."""
    found = re.search(r"C\d+P\d+", path.name)
    return found[0] if found else None


def by_patient(source: Path, target: Path) -> tuple[dict[str, Counter[str]], int]:
    """The images below `source` as hard links, split by patient: how many images each patient has, by part, and how many
    images are left out because their names do not tell whose they are."""
    found = sorted(source.glob("*/*/*.png"))
    known = {path: whose for path in found if (whose := patient(path))}
    patients = sorted(set(known.values()))
    order = generator(0, "malaria patients").permutation(len(patients))
    tests = {patients[i] for i in order[: len(patients) // 5]}
    counts: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    shutil.rmtree(target, ignore_errors=True)
    for path, whose in known.items():
        part = "test" if whose in tests else "train"
        counts[part][whose] += 1
        place = target / part / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        os.link(path.resolve(), place / path.name)
    return counts, len(found) - len(known)


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else data.ROOT / "malaria")
    base = data.PROJECT / "data" / "own"
    counts, unknown = by_patient(source.resolve(), base / "malaria")
    spread = {
        part: {"patients": len(of), "images": sum(of.values()), "images_of_a_patient": np.percentile(
            list(of.values()), [0, 50, 100]).tolist()} for part, of in counts.items()
    }  # fmt: skip
    runs, about = [], provenance(ComputeFlags().where(), "")
    for epsilon in EPSILONS:
        out, start = base / f"malaria-{epsilon:g}", time.perf_counter()
        shutil.rmtree(out, ignore_errors=True)
        trained = dpmix.train(base / "malaria", epsilon, out=out, image_size=128)
        seen = {k: v for k, v in trained.report.items() if k != "errors"}
        card = files.read_json(out / "privacy_card.json")
        runs.append({"epsilon": epsilon, "report": seen, "card": card, "seconds": time.perf_counter() - start})
        files.write(OUT / f"confusion-{epsilon:g}.png", (trained.private / "confusion.png").read_bytes())
        files.write_json(OUT / "runs.json", {"data": spread, "left_out": unknown, "runs": runs, "provenance": about})
    print(json.dumps([(r["epsilon"], r["report"]["accuracy"]) for r in runs]))


if __name__ == "__main__":
    main()
