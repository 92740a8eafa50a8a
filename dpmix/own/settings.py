"""One's own images: from a folder and an epsilon to a run, each setting with the reason for it. Nothing is trained here."""

import contextlib
import math
import numbers
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from dpmix.core import checks, files, views
from dpmix.core.transforms import as_float
from dpmix.images import data, decoding, layouts
from dpmix.models import encoders
from dpmix.runs.spec import ComputeFlags, RunSpec

METHOD = "dp-sgd"
CLIP_NORMS = {"mixed-ghost": 0.05}  # a method is its recipe and its clip norm; 1 for the others
STEPS = 200
# Length of an encoder's features on photographs; of others it is measured on public images.
LENGTHS = {"efficientnet-lite0": 15.0, "efficientnet-lite2": 15.0, "tiny-convnext": 1.0, "tiny-vit": 1.0}
OURS = ("cache", "runs")  # folders of `private`; a third has the name of the release
SEARCHED = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the recommended rate, on public images


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user asks for: the folder (train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE), epsilon, and what the rest
    shall be where it is not what is recommended.

    `out` is the folder of the release, by default NAME-release beside `folder`. `mirror=False` where a mirrored image is
    another one (letters, left and right). Numbers may be text, as YAML and command lines make of 1e-6. `weights`,
    `image_size`, `batch_size`, `epochs`, `learning_rate`, `clip_norm`, `feature_scaling` and `accountant` as in `RunSpec`,
    `physical_batch` and `device` as in `ComputeFlags`. Raises ValueError in one line that names the argument."""

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
    feature_scaling: str = "none"
    accountant: str = "pld"
    physical_batch: int | None = None
    device: str = "auto"
    progress: bool = True

    @classmethod
    def of(cls, **given: Any) -> "Settings":
        """From what people give: text for numbers, a number for a folder that is called 2024."""
        kinds = {f.name: get_args(f.type) or (f.type,) for f in fields(cls)}
        for name, value in given.items():
            checks.one_of("argument", name, kinds)
            if value is not None or len(kinds[name]) == 1:
                given[name] = _as(kinds[name][0], name, value)
        checks.one_of("method", given.get("method", METHOD), views.METHODS)
        return cls(**given)


def _as(kind: type, name: str, value: Any) -> Any:
    """The value as a positive finite float or int, as bool or text."""
    if kind in (float, int):
        with contextlib.suppress(ValueError):
            value = float(value) if isinstance(value, str) else value
        checks.finite(name, value)
        checks.require(kind is float or float(value).is_integer(), name, value, "must be a whole number")
        checks.positive(name, kind(value))
        checks.single(name, value)
        return kind(value)
    truth = isinstance(value, bool)
    if kind is bool:
        checks.require(truth, name, value, "must be True or False")
        return value
    checks.require(isinstance(value, (str, Path, numbers.Integral)) and not truth, name, value, "must be text")
    return str(value)


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

    def make_private(self, *names: str) -> None:
        """Folders of what is private, for their owner alone and never for git; a `private` of others stays as it is."""
        with files.explained(self.private):
            self.private.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in names:
            files.write(self.private / name / ".gitignore", b"*\n", private=True)


def plan(folder: Any, epsilon: Any, **settings: Any) -> Plan:
    """Look at the folder's names and at the encoder, not at a pixel, and fill in what was not said; `settings` as in
    `Settings`. Raises ValueError and FileNotFoundError in one line, before any work."""
    asked = Settings.of(folder=folder, epsilon=epsilon, **settings)
    base = Path(asked.folder).expanduser()
    out = Path(asked.out).expanduser() if asked.out else base.with_name(f"{base.resolve().name}-release")
    private = out.parent / "private"
    # Photographs, release and what is private lie apart: a folder among the classes would be one of them.
    said = f"is the name of a folder for what is private ({', '.join(OURS)}, private); name the release otherwise"
    checks.require(out.name not in (*OURS, "private"), "out", str(out), said)
    said = f"lies inside the folder of images, {base}, among its classes; name a folder beside it"
    checks.require(not out.resolve().is_relative_to(base.resolve()), "out", str(out), said)
    said = f"lies in {private}, where what is private will go; name an out in another folder"
    checks.require(not base.resolve().is_relative_to(private.resolve()), "folder", str(base), said)
    listing = layouts.list_folder(base)
    n, why = listing.train, dict[str, str]()

    def choose(name: str, recommended: Any, reason: str) -> Any:
        given = getattr(asked, name)
        why[name] = reason if given is None else "as you said"
        return recommended if given is None else given

    model = choose("model", *_model(listing))
    weights = None if asked.weights is None else str(Path(asked.weights).expanduser())
    arch, _, tag = model.partition("/")
    if arch.startswith("open_clip:") and weights is None and Path(tag).expanduser().is_file():
        model, weights = arch, str(Path(tag).expanduser())  # what a stranger gives to `predict`
    if not model.startswith(("open_clip:", "timm:")):
        checks.one_of("model", model, (*encoders.ENCODERS, "timm:NAME"))
    encoder = encoders.encoder(model, weights, image_size=asked.image_size)
    clip_norm = choose("clip_norm", CLIP_NORMS.get(asked.method, 1.0), f"that of {asked.method}")
    batch = choose("batch_size", n, "every image at every step: the most signal for the noise")
    checks.require(batch <= n, "batch_size", batch, f"must be at most the {checks.counted(n, 'training image')}")
    epochs = choose("epochs", round(STEPS * batch / n, 9), f"{STEPS} steps")
    delta = choose("delta", min(1e-5, 10.0 ** math.floor(-2 - math.log10(n))), "at most 1 / (100 N)")
    why["method"] = "none was better in our runs without synthetic images" if asked.method == METHOD else "as you said"
    public, recipe = data.synthetic_folder(f"folder:{base}"), views.METHODS[asked.method].for_data(asked.mirror)
    there, scaled = public.is_dir(), asked.feature_scaling == "public"
    checks.require(there or not scaled, "feature_scaling", "public", f"needs public images in {public}")
    said = f"mixes public images in, and there are none in {public}"
    checks.require(there or recipe.k_diff == 0, "method", asked.method, said)
    usual = recommended_rate(encoder, model, len(listing.class_names), asked.epsilon, scaled) / clip_norm
    rates = tuple(f * usual for f in SEARCHED) if there and asked.learning_rate is None else ()
    found = f"the best on {public}" if rates else "as 0.9 √(classes ε) / length of the features, found on public images"
    run: dict[str, Any] = dict(weights=weights, delta=delta, clip_norm=clip_norm, batch_size=batch, epochs=epochs)
    run |= dict(learning_rate=choose("learning_rate", usual, found), validation=0.0, redraw=False, seed=None)
    run |= {name: getattr(asked, name) for name in ("image_size", "epsilon", "accountant", "feature_scaling")}
    spec = RunSpec(dataset=f"folder:{base}", model=model, recipe=recipe, **run)
    flags = {name: getattr(asked, name) for name in ("device", "physical_batch", "progress")}
    compute = ComputeFlags(cache=str(private / "cache"), **flags)
    where: dict[str, Any] = dict(listing=listing, encoder=encoder, out=out, private=private)
    return Plan(spec=spec, compute=compute, rates=rates, reasons=why, **where)


def recommended_rate(encoder: encoders.Encoder, model: str, classes: int, epsilon: float, scaled: bool) -> float:
    """The learning rate for C = 1, without a look at a private image: where 200 steps on every image of Caltech-101 (six
    classes and all), EuroSAT and CIFAR-10 did best at epsilon from 1 to 8, it was within a factor of two of this. Scaled
    features have the length 1."""
    length = 1.0 if scaled else LENGTHS.get(model)
    if length is None:
        images = data.public_images("digits").images[:32]
        images = images.expand(-1, 1 if 1 in encoder.channels else encoder.channels[0], -1, -1)
        length = float(encoder.features(as_float(images)).norm(dim=1).mean())
    return float(f"{0.9 * math.sqrt(classes * min(epsilon, 10.0)) / length:.2g}")


def _model(listing: layouts.Listing) -> tuple[str, str]:
    """The encoder for such images, by the headers of a hundred of them: that of most, so that no one image decides. Which are
    looked at is decided by their names: one image more takes the place of one at most."""
    looked_at = sorted(listing.files, key=lambda f: files.digest(os.fsencode(f.relative_to(listing.base))))[:100]
    with decoding.bombs_refused():
        some = [h for h in map(decoding.header, looked_at) if h]
    if 2 * sum(h.grey and max(h.width, h.height) <= 32 for h in some) > len(some):
        return "tiny-convnext", "small and grey, as what it was made of"
    return "efficientnet-lite0", "ImageNet features that fit a CPU"
