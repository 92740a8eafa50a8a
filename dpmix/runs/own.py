"""One's own images: from a folder and an epsilon to a run, each setting with the reason for it. Nothing is trained here."""

import contextlib
import math
import numbers
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dpmix.core import checks, views
from dpmix.core.transforms import as_float
from dpmix.images import data, decoding, layouts
from dpmix.models import encoders
from dpmix.runs.spec import ComputeFlags, RunSpec

METHOD = "dp-sgd"
CLIP_NORMS = {"mixed-ghost": 0.05}  # a method is its recipe and its clip norm; 1 for the others
STEPS, MOST_STEPS = 200, 100_000
# Length of an encoder's features on photographs; of others it is measured on public images.
LENGTHS = {"efficientnet-lite0": 15.0, "efficientnet-lite2": 15.0, "tiny-convnext": 1.0, "tiny-vit": 1.0}
SEARCHED = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the recommended rate, on public images


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a user says: the folder (train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE), epsilon, and what the rest shall
    be where it is not what is recommended.

    `out` is the folder of the release, by default NAME-release beside `folder`. `mirror=False` where a mirrored image is
    another one (letters, left and right). Numbers may be text, as YAML and command lines make of 1e-6. `weights`,
    `image_size`, `batch_size`, `epochs`, `learning_rate`, `clip_norm` and `accountant` as in `RunSpec`, `physical_batch` and
    `device` as in `ComputeFlags`. Raises ValueError in one line that names the argument.
    """

    folder: str
    epsilon: float
    out: str | None = None
    delta: float | None = None
    method: str = METHOD
    mirror: bool = True
    model: str | None = None
    weights: str | None = None
    image_size: int | None = None
    batch_size: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    clip_norm: float | None = None
    accountant: str = "pld"
    physical_batch: int | None = None
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        checks.one_of("method", self.method, views.METHODS)

    @classmethod
    def of(cls, folder: Any, epsilon: Any, **settings: Any) -> "Own":
        """From what people give: text for numbers, a number for a folder that is called 2024."""
        kinds = {f.name: str(f.type) for f in fields(cls)}
        given = dict(folder=folder, epsilon=epsilon, **settings)
        for name, value in given.items():
            checks.one_of("argument", name, kinds)
            if value is not None or "None" not in kinds[name]:
                given[name] = _taken(name, value, kinds[name])
        return cls(**given)


def _taken(name: str, value: Any, kind: str) -> Any:
    if "float" in kind or "int" in kind:
        return number(name, value, whole="int" in kind)
    if "bool" in kind:
        checks.require(isinstance(value, bool), name, value, "must be True or False")
        return value
    plain = isinstance(value, (str, Path, numbers.Integral)) and not isinstance(value, bool)
    checks.require(plain, name, value, "must be text")
    return str(value)


def number(name: str, value: Any, *, whole: bool = False) -> float:
    """A finite number as float, or int with `whole`; text that says one is taken, as YAML and command lines give 1e-6."""
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    checks.finite(name, value)
    checks.require(not whole or float(value).is_integer(), name, value, "must be a whole number")
    return int(value) if whole else float(value)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a folder of images that can be started: `spec` without a seed, where things go, and why each setting is what
    it is. `private`, beside `out`, holds what must not leave: results with their seeds and decoded images, for all that is
    trained there, and in `report` what the test images say of this one."""

    spec: RunSpec
    compute: ComputeFlags
    listing: layouts.Listing = field(repr=False)
    encoder: encoders.Encoder = field(repr=False)
    out: Path
    private: Path
    rates: tuple[float, ...]
    reasons: dict[str, str]

    @property
    def report(self) -> Path:
        return self.private / self.out.name


def plan(own: Own) -> Plan:
    """Look at the folder's names and at the encoder, not at a pixel, and fill in what was not said. Raises ValueError and
    FileNotFoundError in one line, before any work."""
    base = Path(own.folder).expanduser()
    listing = layouts.list_folder(base)
    n, why = listing.train, {}

    def choose(name: str, recommended: Any, reason: str) -> Any:
        given = getattr(own, name)
        why[name] = reason if given is None else "as you said"
        return recommended if given is None else given

    model = choose("model", *_model(listing.files))
    weights = None if own.weights is None else str(Path(own.weights).expanduser())
    encoder = encoders.encoder(model, weights, image_size=own.image_size)
    c = choose("clip_norm", CLIP_NORMS.get(own.method, 1.0), f"that of {own.method}")
    batch = choose("batch_size", n, "every image at every step: the most signal for the noise")
    checks.require(batch <= n, "batch_size", batch, f"must be at most the {n:,} training images")
    epochs = choose("epochs", round(STEPS * batch / n, 9), f"{STEPS} steps")
    steps = epochs * n / max(batch, 1)
    checks.require(steps <= MOST_STEPS, "epochs", epochs, f"these are {steps:.3g} steps; at most {MOST_STEPS:,}")
    delta = choose("delta", min(1e-5, 10.0 ** math.floor(-2 - math.log10(n))), "at most 1 / (100 N)")
    why["method"] = "no method was found to be better on a frozen encoder" if own.method == METHOD else "as you said"
    public = data.synthetic_folder(f"folder:{base}")
    usual = recommended_rate(encoder, model, len(listing.class_names), own.epsilon) / c
    rates = tuple(f * usual for f in SEARCHED) if public.is_dir() and own.learning_rate is None else ()
    reason = (
        f"the best on {public}" if rates else "as 0.9 √(classes ε) / length of the features, found on public images"
    )
    rate = choose("learning_rate", usual, reason)
    spec = RunSpec(
        dataset=f"folder:{base}", model=model, weights=weights, image_size=own.image_size, epsilon=own.epsilon,
        delta=delta, recipe=views.METHODS[own.method].for_data(own.mirror), accountant=own.accountant, clip_norm=c,
        learning_rate=rate, batch_size=batch, epochs=epochs, validation=0.0, redraw=False, seed=None,
    )  # fmt: skip
    out = Path(own.out).expanduser() if own.out else base.with_name(f"{base.resolve().name}-release")
    private = out.parent / "private"
    compute = ComputeFlags(
        device=own.device, physical_batch=own.physical_batch, cache=str(private / "cache"), progress=own.progress
    )
    return Plan(
        spec=spec, compute=compute, listing=listing, encoder=encoder, out=out, private=private, rates=rates, reasons=why
    )


def recommended_rate(encoder: encoders.Encoder, model: str, classes: int, epsilon: float) -> float:
    """The learning rate for C = 1, without a look at a private image: where 200 steps on every image of Caltech-101 (six
    classes and all), EuroSAT and CIFAR-10 did best at epsilon from 1 to 8, it was within a factor of two of this."""
    length = LENGTHS.get(model)
    if length is None:
        images = data.public_images("digits").images[:32]
        images = images.expand(-1, 1 if 1 in encoder.channels else encoder.channels[0], -1, -1)
        length = float(encoder.features(as_float(images)).norm(dim=1).mean())
    return float(f"{0.9 * math.sqrt(classes * min(epsilon, 10.0)) / length:.2g}")


def _model(files: list[Path]) -> tuple[str, str]:
    """The encoder for such images, by the headers of a few of them."""
    some = [h for h in map(decoding.header, files[:: max(1, len(files) // 100)]) if h]
    small = bool(some) and all(h.grey and max(h.width, h.height) <= 32 for h in some)
    if small:
        return "tiny-convnext", "small and grey, as what it was made of"
    return "efficientnet-lite0", "ImageNet features that fit a CPU"
