"""What the test images say of a model: accuracy with its interval, by class, confusion, calibration, the errors. Private."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64
from scipy.stats import binomtest

from dpmix.core import files
from dpmix.core.checks import counted
from dpmix.images.image_cache import printable

SHOWN = 30  # errors of the text; the JSON has all


def of(
    probabilities: Float[np.ndarray, "n classes"],
    labels: Int64[np.ndarray, " n"],
    classes: Sequence[str],
    names: list[str],
    copies: int = 0,
) -> dict[str, Any]:
    """Numbers for a test set; `names` are the images', `copies` how many of them equal a training image. A class without a
    test image has no accuracy (None). The interval is Wilson's; calibration is over ten bins of confidence,
    its error their absolute difference, weighted by images."""
    n, many = len(labels), len(classes)
    chosen, confidence = probabilities.argmax(1), probabilities.max(1)
    right = chosen == labels
    confusion = np.bincount(labels * many + chosen, minlength=many**2).reshape(many, many)
    counts = confusion.sum(1)
    tenth = np.minimum(confidence * 10 // 1, 9) / 10
    binned = pd.DataFrame({"from": tenth, "confidence": confidence, "accuracy": right}).groupby("from", as_index=False)
    bins = binned.mean().assign(images=binned.size()["size"])
    wrong = sorted(np.flatnonzero(~right), key=lambda i: -confidence[i])
    each = zip(classes, counts.tolist(), confusion.diagonal().tolist(), strict=True)
    called = [(names[i], classes[labels[i]], classes[chosen[i]], float(confidence[i])) for i in wrong]
    return {
        "images": n,
        "copies_of_training_images": copies,
        "accuracy": float(right.mean()),
        "interval_95": [float(x) for x in binomtest(int(right.sum()), n).proportion_ci(method="wilson")],
        "largest_class": float(counts.max() / n),
        "by_class": {c: {"images": m, "accuracy": hits / m if m else None} for c, m, hits in each},
        "confusion": confusion.tolist(),
        "calibration": bins.to_dict("records"),
        "calibration_error": float((bins["images"] / n * (bins["confidence"] - bins["accuracy"]).abs()).sum()),
        "errors": [dict(zip(("image", "true", "predicted", "probability"), error, strict=True)) for error in called],
    }


def text(seen: dict[str, Any], release: Path, private: Path) -> str:
    """For reading, as Markdown."""
    low, high = seen["interval_95"]
    each = ((c, v["images"], v["accuracy"]) for c, v in seen["by_class"].items())
    rows = [(c, f"{n:,}", "–" if right is None else f"{100 * right:.1f}") for c, n, right in each]
    copied = counted(seen["copies_of_training_images"], "test image")
    warned = f"**Too high**: {copied} equal a training image. " if seen["copies_of_training_images"] else ""
    return (
        f"**{100 * seen['accuracy']:.1f} % of {counted(seen['images'], 'test image')}** classified correctly "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}; the largest class alone is {100 * seen['largest_class']:.1f}). "
        f"{warned}Probabilities are off by {100 * seen['calibration_error']:.1f} points on average.\n\n"
        f"Released: `{printable(release)}`. Private: log and errors in `{printable(private)}`, the seed in "
        f"`{printable(private.parent / 'runs')}`.\n\n"
    ) + table(("class", "test images", "right (%)"), rows)


def write(seen: dict[str, Any], private: Path, release: Path) -> None:
    """report.json, report.md and confusion.png (a row a true class, in percent of it), for their owner alone."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    rows = [(e["image"], e["true"], e["predicted"], f"{e['probability']:.2f}") for e in seen["errors"][:SHOWN]]
    errors = table(("the surest errors", "true", "predicted", "probability"), rows)
    whole = f"{text(seen, release, private)}\n\n![confusion](confusion.png)\n\n{errors}\n"
    files.write(private / "report.md", whole.encode(), private=True)
    files.write(private / "report.json", json.dumps(seen, indent=1).encode(), private=True)
    counts, classes = np.array(seen["confusion"]), list(seen["by_class"])
    side, picture = min(12, 2.5 + 0.45 * len(classes)), io.BytesIO()
    figure = Figure(figsize=(side, side), layout="constrained")
    shown = ConfusionMatrixDisplay(100 * counts / np.maximum(counts.sum(1, keepdims=True), 1), display_labels=classes)
    how: dict[str, Any] = dict(include_values=len(classes) <= 20, values_format=".0f", xticks_rotation="vertical")
    with rc_context({"text.parse_math": False}):  # a class may be called "$5 to $9"
        shown.plot(ax=figure.add_subplot(), cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 100}, **how)
        figure.savefig(picture, format="png", dpi=110)
    files.write(private / "confusion.png", picture.getvalue(), private=True)


def card_text(card: dict[str, Any]) -> str:
    """A privacy card for reading, as a Markdown table."""
    guarantee, encoder = card["guarantee"], card["encoder"] or {"name": "a network from scratch"}
    rows, called = {"in plain words": " ".join(card["in_plain_words"])}, {"pair": "the true pair, PLD"}
    rows |= {f"ε ({called.get(name, name.upper())})": f"{v:.3f}" for name, v in guarantee["epsilon"].items()}
    rows |= {"δ": f"{guarantee['delta']:g}", "calibrated by": guarantee["calibrated_by"].upper()}
    rows |= {"adjacency": card["adjacency"], "sampling": card["sampling"]}
    rows |= {k.replace("_", " "): f"{v:.6g}" for k, v in card["mechanism"].items()}
    rows |= {"encoder": ", ".join(f"{k} {v}" for k, v in encoder.items() if v is not None)}
    rows |= {"images": " × ".join(map(str, card["images"])), "classes": ", ".join(card["class_names"])}
    rows |= {k.replace("_", " "): "; ".join(card[k]) for k in ("not_accounted_for", "withheld")}
    return table(("privacy card", ""), rows.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; text stays inside its cell, and nothing in it speaks to a terminal."""
    every = (head, ["---"] * len(head), *rows)
    lines = ([printable(value.replace("\n", " ")).replace("|", "\\|") for value in row] for row in every)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
