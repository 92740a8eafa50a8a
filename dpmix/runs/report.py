"""What the test images say of a model: accuracy with its interval, by class, confusion, calibration, the errors. Private."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from dpmix.core import files

SHOWN = 30


def of(
    probabilities: Float[np.ndarray, "n classes"],
    labels: Int64[np.ndarray, " n"],
    classes: tuple[str, ...],
    names: list[str],
) -> dict[str, Any]:
    """Numbers for a test set; `names` are the images'."""
    said, n = probabilities.argmax(1), len(labels)
    right, sure = said == labels, probabilities.max(1)
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (labels, said), 1)
    counts = confusion.sum(1)
    bins = np.minimum((sure * 10).astype(int), 9)
    calibration = [
        {"from": b / 10, "images": int((bins == b).sum()), "confidence": float(sure[bins == b].mean()),
         "accuracy": float(right[bins == b].mean())}
        for b in range(10) if (bins == b).any()
    ]  # fmt: skip
    wrong = sorted(np.flatnonzero(~right), key=lambda i: -sure[i])
    return {
        "images": n,
        "accuracy": float(right.mean()),
        "interval_95": list(interval(int(right.sum()), n)),
        "largest_class": float(counts.max() / n),
        "by_class": {c: {"images": int(m), "accuracy": float(k / m)} for c, m, k in
                     zip(classes, counts, confusion.diagonal(), strict=True)},
        "confusion": confusion.tolist(),
        "calibration": calibration,
        "calibration_error": sum(c["images"] / n * abs(c["confidence"] - c["accuracy"]) for c in calibration),
        "errors": [{"image": names[i], "true": classes[labels[i]], "said": classes[said[i]],
                    "probability": float(sure[i])} for i in wrong],
    }  # fmt: skip


def interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def text(seen: dict[str, Any], release: Path, private: Path) -> str:
    """For reading, as Markdown."""
    low, high = seen["interval_95"]
    head = [
        f"**{100 * seen['accuracy']:.1f} % of {seen['images']:,} test images** are classified correctly "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}; the largest class alone is {100 * seen['largest_class']:.1f}). "
        f"Probabilities are off by {100 * seen['calibration_error']:.1f} points on average.",
        f"Released: `{release}`. Private, with seed, log and errors: `{private}`.",
    ]
    rows = [f"| {cell(c)} | {v['images']:,} | {100 * v['accuracy']:.1f} |" for c, v in seen["by_class"].items()]
    return "\n\n".join([*head, "\n".join(["| class | test images | right (%) |", "|---|---|---|", *rows])])


def write(seen: dict[str, Any], private: Path, release: Path) -> None:
    """report.json, report.md and confusion.png, for their owner alone."""
    rows = [
        f"| {cell(e['image'])} | {cell(e['true'])} | {cell(e['said'])} | {e['probability']:.2f} |"
        for e in seen["errors"][:SHOWN]
    ]
    errors = ["| the surest errors | true | said | probability |", "|---|---|---|---|", *rows]
    whole = f"{text(seen, release, private)}\n\n![confusion](confusion.png)\n\n" + "\n".join(errors) + "\n"
    files.write(private / "report.md", whole.encode(), private=True)
    files.write(private / "report.json", json.dumps(seen, indent=1).encode(), private=True)
    files.write(private / "confusion.png", picture(seen), private=True)


def picture(seen: dict[str, Any]) -> bytes:
    """The confusion matrix, a row a true class, in percent of it."""
    from matplotlib.figure import Figure

    classes = list(seen["by_class"])
    counts = np.array(seen["confusion"])
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12, 2.5 + 0.45 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("said")
    axes.set_ylabel("true")
    if len(classes) <= 20:
        for (i, j), share in np.ndenumerate(shares):
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", color="white" if share > 50 else "black")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def card_text(card: dict[str, Any]) -> str:
    """A privacy card for reading, as a Markdown table."""
    guarantee, encoder = card["guarantee"], card["encoder"] or {"name": "a network from scratch"}
    rows = {"in plain words": " ".join(card["in_plain_words"])}
    rows |= {f"ε ({name.upper()})": f"{value:.3f}" for name, value in guarantee["epsilon"].items()}
    rows |= {"δ": f"{guarantee['delta']:g}", "calibrated by": guarantee["calibrated_by"].upper()}
    rows |= {"adjacency": card["adjacency"], "sampling": card["sampling"]}
    rows |= {k.replace("_", " "): f"{v:.6g}" for k, v in card["mechanism"].items()}
    rows |= {"encoder": ", ".join(f"{k} {v}" for k, v in encoder.items() if v is not None)}
    rows |= {"images": " × ".join(map(str, card["images"])), "classes": ", ".join(card["class_names"])}
    rows |= {k.replace("_", " "): "; ".join(card[k]) for k in ("not_accounted_for", "withheld")}
    return "\n".join(["| privacy card | |", "|---|---|", *(f"| {k} | {cell(v)} |" for k, v in rows.items())])


def cell(value: str) -> str:
    """Text that stays inside a cell of a Markdown table."""
    return value.replace("|", "\\|").replace("\n", " ")
