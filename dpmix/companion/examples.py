"""Small steps of the page about one's own images: a folder to practise on, and what is shown of it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython.display import Markdown
from PIL import Image

from dpmix.images import data


def digits_folder(folder: Path) -> Path:
    """The digits as PNG files: train/CLASS, test/CLASS and, from the embedded generator, synthetic/CLASS."""
    splits = data.load("digits")
    for part, images in (("train", splits.train), ("test", splits.test), ("synthetic", data.public_images("digits"))):
        for i, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            place = Path(folder) / part / images.class_names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(place / f"{i:05d}.png")
    return Path(folder)


def folder_table(splits: data.Splits) -> pd.DataFrame:
    """Images of each class in training and test set."""
    counts = {
        name: torch.bincount(part.labels, minlength=part.num_classes).tolist()
        for name, part in (("train", splits.train), ("test", splits.test))
    }
    table = pd.DataFrame(counts, index=splits.train.class_names).T
    return table.assign(all=table.sum(axis=1))


def card_table(card: Mapping[str, Any]) -> Markdown:
    """A privacy card for reading, a row an entry."""
    guarantee, mechanism = card["guarantee"], card["mechanism"]
    rows = {f"ε ({name.upper()})": f"{value:.3f}" for name, value in guarantee["epsilon"].items()}
    rows |= {"δ": f"{guarantee['delta']:g}", "calibrated by": guarantee["calibrated_by"].upper()}
    rows |= {"adjacency": card["adjacency"], "sampling": card["sampling"]}
    rows |= {k.replace("_", " "): f"{v:.6g}" for k, v in mechanism.items()}
    rows |= {k.replace("_", " "): "; ".join(card[k]) for k in ("not_accounted_for", "withheld")}
    lines = ["| privacy card | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return Markdown("\n".join(lines))


def destroy(folder: Path) -> None:
    """Remove a folder of private leftovers and all that is in it."""
    shutil.rmtree(folder)
