"""From a folder of images to a release, a privacy card and a private report: `runs` with recommended settings."""

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpmix.core import checks, files
from dpmix.images import data
from dpmix.images.image_cache import printable
from dpmix.own import report
from dpmix.own.settings import OURS, Plan, plan
from dpmix.runs.identity import Contents, Identity
from dpmix.runs.predict import predict, read_card
from dpmix.runs.release import release
from dpmix.runs.result import Result, choose_learning_rate, frame
from dpmix.runs.run import run, run_all
from dpmix.runs.spec import RunSpec, mechanism
from dpmix.runs.store import Store

README = """# A private image classifier

It tells {classes} apart. It was trained with differential privacy: {words}

`privacy_card.json` says what was promised, how, and with which encoder; `class_names.json` lists the classes.

    python -m dpmix predict THIS_FOLDER image.jpg
    dpmix.predict("THIS_FOLDER", "image.jpg").class_names        # in Python

The encoder is public and not in this folder: {encoder}. dpmix compares its sha256 with the card's.
"""


@dataclass(frozen=True)
class Trained:
    """`release` may leave the house. `private` may not: seeds, log, and `report`, what the test images say of the model."""

    release: Path
    private: Path
    report: dict[str, Any]

    def __str__(self) -> str:
        return report.text(self.report, self.release, self.private)

    __repr__ = _repr_markdown_ = __str__


def train(folder: Any, epsilon: Any, **settings: Any) -> Trained:
    """Train on a folder of images once, with (epsilon, delta)-differential privacy for each image, and release the model.

    `settings` are the fields of `Settings`: `out`, `delta`, `method`, `model`, `learning_rate` and so on; each has a recommended
    value. The release appears in `out` whole or not at all; everything private lies in `private` beside it, for its owner
    alone (0700). What was interrupted goes on when the same call is made again.

    Raises ValueError and FileNotFoundError, in one line and before any work, for what cannot be.
    """
    p = plan(folder, epsilon, **settings)
    _refuse_a_second(p.out)
    mechanism(p.spec, p.listing.train)
    store = Store(p.private / "runs")
    p.make_private(*OURS, p.out.name)
    busy = f"out={str(p.out)!r}: another training is under way for it; wait for its end, or name another folder"
    with files.lock(p.report / "lock", busy), _logged(p) as log:
        _refuse_a_second(p.out)
        log.info(f"training on {checks.counted(p.listing.train, 'image')} of {printable(p.spec.dataset)}")
        spec = _with_rate(p, store, log)
        # A call that was cut off before it could release has left its result.
        wanted = Contents(p.compute, store.folder).identity(spec)
        before = next((found for found in store.all() if found.seed_drawn and _identity(found) == wanted), None)
        if before is not None:
            said = f"out={printable(p.out)!r}: this very run was trained before; that model is released"
            warnings.warn(said, stacklevel=2)
        result = before or run(spec, compute=p.compute, store=store)
        log.info(f"trained {'before this call ' * (before is not None)}in {result.timing['seconds']:.0f} s")
        with _appearing(p.out) as partial:
            card = read_card(release(result, partial, store=store))
            made_by, classes = card["encoder"], card["class_names"]
            encoder = f"{made_by['name']}, file {made_by['file']}, sha256 {made_by['sha256']}, {made_by['package']}"
            readme = README.format(classes=", ".join(classes), words=" ".join(card["in_plain_words"]), encoder=encoder)
            files.write(partial / "README.md", readme.encode())
            files.write(partial / "class_names.json", (json.dumps(classes, indent=1) + "\n").encode())
            seen = _report(partial, p, result)
        log.info(f"released to {printable(p.out)}; test accuracy {seen['accuracy']:.4f}")
    return Trained(p.out, p.report, seen)


def _refuse_a_second(out: Path) -> None:
    remedy = "is there already; name another folder (a second model of the same images is a second release)"
    checks.require(not os.path.lexists(out), "out", str(out), remedy)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that becomes `out`, whole or not at all. It lies beside it, since what is private may be on another disk, from
    where nothing can be renamed; for its owner alone until then."""
    with files.explained(out):
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", suffix=".partial", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~files.UMASK)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _with_rate(p: Plan, store: Store, log: logging.Logger) -> RunSpec:
    """The spec with the best learning rate on held-out public images, where it is to be looked for."""
    if not p.rates:
        return p.spec
    with warnings.catch_warnings(action="ignore"):  # the runs say it all again
        like = data.load(p.spec.dataset, image_size=p.encoder.image_size, cache=p.compute.cache).train
        # As they will see them: images that are the same at this size count once.
        public = len(data.public_images(p.spec.dataset, like=like, cache=p.compute.cache))
    batch = max(1, round(p.spec.batch_size / p.listing.train * round(0.8 * public)))  # the same sampling rate
    there = replace(p.spec, train_on="synthetic", validation=0.2, seed=0, batch_size=batch)
    rehearsal = [replace(there, learning_rate=r) for r in p.rates]
    tried = choose_learning_rate(frame(run_all(rehearsal, compute=p.compute, store=store)), ["dataset"])
    rate = float(tried["learning_rate"].iloc[0])
    log.info(f"learning rate {rate:g}, the best of {p.rates} on public images")
    return replace(p.spec, learning_rate=rate)


def _identity(result: Result) -> Identity:
    """What was asked for, without the seed that was drawn for it."""
    about = result.provenance
    return Identity(spec=replace(result.spec, seed=None), code=about["code"], **about["contents"])


def _report(partial: Path, p: Plan, result: Result) -> dict[str, Any]:
    """What the test images say, asked as a stranger would ask: of the release, with the files."""
    listing = p.listing
    tests, labels = listing.files[listing.train :], listing.labels[listing.train :]
    found = predict(partial, tests, weights=p.spec.weights, device=str(p.compute.where()))
    names = [printable(f.relative_to(listing.base)) for f in tests]
    decoded = data.opened(p.spec.dataset, listing, image_size=p.encoder.image_size, cache=p.compute.cache)
    seen = report.of(found.probabilities, labels, listing.class_names, names, len(decoded.copies.test))
    off = abs(seen["accuracy"] - result.test_accuracy) * len(tests)
    if off >= max(2.5, 0.005 * len(tests)):  # another engine or precision rounds otherwise
        both = f"the release gives {seen['accuracy']:.4f} on the test images, training gave {result.test_accuracy:.4f}"
        raise RuntimeError(f"{both}; nothing was released, please report this")
    report.write(seen, p.report, p.out)
    return seen


@contextmanager
def _logged(p: Plan) -> Iterator[logging.Logger]:
    """A log of the call in the private folder, also of one that is stopped."""
    log, path = logging.getLogger("dpmix.train"), p.report / "log.txt"
    path.touch(0o600)
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield log
    except BaseException as error:
        log.info(f"stopped: {type(error).__name__}: {error}")
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
