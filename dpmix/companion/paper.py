"""What the paper published. Numbers come from `data/paper/`, settings are below, each with its place.

The paper: Bao, Pittaluga, Kumar B G and Bindschaedler, "DP-Mix: Mixup-based Data Augmentation for Differentially Private
Learning", NeurIPS 2023. Nothing here was measured by this project; data/paper/README.md describes the files."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from dpmix.core.checks import one_of, require

FOLDER = Path(__file__).resolve().parents[2] / "data" / "paper"
# What names a row of each table, in order. Units: Tables 7 and 8 are FIDs, 13 minutes, all others per cent.
TABLES: dict[int, str] = {
    1: "dataset model method microbatch_size epsilon",
    2: "dataset model method epsilon",
    3: "dataset model method epsilon",
    4: "dataset model method transform epsilon",
    5: "dataset model method n_augmentations k_base k_self k_diff epsilon",
    6: "dataset model method pretrained_on_synthetic epsilon",
    7: "dataset method transform reference",
    8: "dataset fid_model reference compared",
    9: "dataset model method k_base k_self k_diff epsilon",
    10: "dataset model method variant pool epsilon",
    11: "dataset model method framework epsilon",  # medians
    12: "dataset model method epsilon",
    13: "dataset model method",
}
# How the keys are printed. TRANSFORMS are Table 4's, added to crop and flip.
_DATA = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "eurosat": "EuroSAT", "caltech256": "Caltech-256",
    "sun397": "SUN397", "pets": "Oxford-IIIT Pet", "vit-b-16": "ViT-B-16", "convnext": "ConvNeXt",
    "wrn-16-4": "WRN-16-4", "inceptionv3": "Inception v3",
}  # fmt: skip
_METHODS = {
    "dp-sgd": "DP-SGD", "dp-sgd-mixup": "DP-SGD + mixup", "mixed-ghost": "Mixed Ghost Clipping", "self-aug": "Self-Aug",
    "mix-self": "DP-MixSelf", "mix-diff": "DP-MixDiff", "pure-mix-diff": "Pure-DP-MixDiff",
    "synthetic-pretraining": "SGD on synthetic images, then DP",
}  # fmt: skip
_TRANSFORMS = {
    "crop-flip": "crop and flip", "jitter": "colour jitter", "affine": "affine", "cutout": "cutout",
    "noise": "Gaussian noise", "blur": "Gaussian blur", "sobel": "Sobel", "all": "all of them",
}  # fmt: skip
LABELS: dict[str, str] = _DATA | _METHODS | _TRANSFORMS
METHODS, TRANSFORMS, EPSILONS = tuple(_METHODS), tuple(_TRANSFORMS), (1, 2, 4, 8)


class DatasetFacts(NamedTuple):
    """Sizes of a data set as the paper splits it (Appendix C)."""

    train: int
    test: int


# Caltech-256 and SUN397: the paper gives the total (30,607 and 108,754) and 80 / 20; `train` is 80 % rounded down.
DATASETS: dict[str, DatasetFacts] = {
    "cifar10": DatasetFacts(50_000, 10_000),
    "cifar100": DatasetFacts(50_000, 10_000),
    "eurosat": DatasetFacts(21_600, 5_400),
    "caltech256": DatasetFacts(24_485, 6_122),
    "sun397": DatasetFacts(87_003, 21_751),
    "pets": DatasetFacts(3_680, 3_669),
}
# Section 4 says Open Clip and LAION-2B and no more: which weights of open_clip these are is this project's reading.
ENCODERS: dict[str, str] = {
    "vit-b-16": "open_clip:ViT-B-16/laion2b_s34b_b88k",
    "convnext": "open_clip:convnext_base_w/laion2b_s13b_b82k",
}


class Settings(NamedTuple):
    """Hyperparameters, unless `clip_norm`, `epochs` or `k_diff` says otherwise. `source`: where they are stated."""

    models: tuple[str, ...]
    batch_size: int
    epochs: int
    source: str
    clip_norm: float = 1.0
    delta: float = 1e-5
    alpha: float = 0.2  # λ ~ Beta(alpha, alpha), Section 3
    k_base: int = 16
    k_self: int = 18  # Section 6.5; Table 5's DP-MixSelf has 16 base views and 16 mixtures
    k_diff: int = 2


SETTINGS: dict[str, Settings] = {
    "fine-tuning": Settings(("vit-b-16", "convnext"), 1000, 10, "Section 4; K: Section 6.5; C: Appendix C"),
    "scratch": Settings(("wrn-16-4",), 4096, 200, "Section 4; K_base: Appendix C", k_diff=0),
}


def clip_norm(method: str) -> float:
    """C of a method (Appendix C): 0.05 for Mixed Ghost Clipping, 1 for all others."""
    one_of("method", method, METHODS)
    return 0.05 if method == "mixed-ghost" else 1.0


def epochs(dataset: str) -> int:
    """Epochs of fine-tuning (Section 4): 20 for EuroSAT, 10 for the others."""
    one_of("dataset", dataset, DATASETS)
    return 20 if dataset == "eurosat" else 10


def k_diff(dataset: str) -> int:
    """K_diff of DP-MixDiff (Section 6.5, footnote 3): 24 for Caltech-256 and Oxford-IIIT Pet, 2 for the others."""
    one_of("dataset", dataset, DATASETS)
    return 24 if dataset in ("caltech256", "pets") else 2


def _read(name: str) -> pd.DataFrame:
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the published numbers are in a clone of dpmix (pip install -e .)")
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    return frame.astype({c: "float64" for c in ("mean", "std", "bound") if c in frame})


def table(n: int) -> pd.DataFrame:
    """Table `n` (1 to 13) of the paper: one row a number, columns `TABLES[n]`, `mean` and `std`, both float64. `std` is NaN
    where the paper gives none (Tables 7, 8, 9 and 13). In Table 11, `mean` holds medians. Each call reads the file anew, so
    the frame is the caller's to change."""
    known = isinstance(n, int) and not isinstance(n, bool) and n in TABLES
    require(known, "table", n, f"the paper has tables 1 to {len(TABLES)}")
    return _read(f"table{n}")


def figure2() -> pd.DataFrame:
    """Figure 2 (Appendix B.5): `std` of the per-parameter gradient before clipping and noise, by dataset and method."""
    return _read("figure2")


def claims() -> pd.DataFrame:
    """The empirical claims of the prose, in our words: `claim` (key), `section`, `table`, the methods `first` and `second`,
    `kind` ("published": the sign of the published difference; "no gain": at most `bound`), `where` and `text`."""
    return _read("claims")
