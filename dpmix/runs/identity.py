"""One identity of a run: the result's name, the checkpoint's and the noise follow from it.

An identity holds digests of the private images and is private itself. A name that others may see is made of it with the
key of the store (`Store.name`), and tells nothing."""

import contextlib
import functools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from dpmix.core import files, views
from dpmix.images import data, layouts
from dpmix.images.image_cache import sha256
from dpmix.models import encoders
from dpmix.runs.spec import ComputeFlags, RunSpec

ROOMS = ("core", "images", "models", "runs")  # whose code can change a result


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a run is: its description, and digests of all that the description only names. `private` and `public` are those of
    the images and their labels ("" where none are used), `encoder` is that of the file of its weights ("" for a network from
    scratch), `code` that of the sources. Two runs have one identity, and so one noise, only if they are the same run."""

    spec: RunSpec
    private: str
    public: str
    encoder: str
    code: str

    @functools.cached_property
    def run(self) -> str:
        """sha256, in hexadecimal, over all of it."""
        spec = json.dumps(asdict(self.spec), sort_keys=True)
        return files.digest("run", spec, self.private, self.public, self.encoder, self.code)

    @functools.cached_property
    def shared(self) -> "Identity":
        """That of the pass: what may differ between the heads of one pass is left out."""
        return replace(self, spec=pass_of(self.spec), public="")


def pass_of(spec: RunSpec) -> RunSpec:
    """The spec with all that may differ between heads of one pass blanked: equal for runs that can share a pass."""
    if spec.from_scratch:
        return spec
    blank = views.Recipe(k_base=1)
    return replace(spec, recipe=blank, epsilon=None, learning_rate=1.0, clip_norm=1.0, accountant="rdp", delta=1e-5)


@functools.cache
def code_digest() -> str:
    """sha256 over the source of every room that can change a result, and over the public stand-ins."""
    here = Path(__file__).parents[1]
    sources = [p for room in ROOMS for p in sorted((here / room).glob("*.py"))]
    shipped = sorted(data.PUBLIC.glob("*.json"))
    return files.digest(*(p.name + sha256(p) for p in [*sources, *shipped]))


_once = functools.lru_cache(maxsize=64)  # an object's own answers: `self` is part of the question


class Contents:
    """Digests of what the names in a spec stand for, as it is now: look once a call. Files are read once for as long as their
    names, sizes and times stay; `memory`, a private folder, keeps the digests."""

    def __init__(self, compute: ComputeFlags, memory: Path) -> None:
        self.root, self.memory = Path(compute.root).expanduser(), memory

    def identity(self, spec: RunSpec) -> Identity:
        """The one place where an identity is made. Raises as `data.find`, `data.find_public` and `models.encoder` where
        files are absent."""
        private, public = self.private(spec.dataset), self.public(spec.dataset) if spec.uses_synthetic else ""
        encoder = "" if spec.from_scratch else self.encoder(spec.model, spec.weights)
        return Identity(spec=spec, private=private, public=public, encoder=encoder, code=code_digest())

    @_once
    def private(self, dataset: str) -> str:
        """Digest of the images and labels of a data set, and of their split."""
        if dataset == "digits":
            return files.digest("digits", metadata.version("scikit-learn"))
        folder = None if dataset.startswith("folder:") else layouts.where(dataset, self.root)
        if folder is not None and folder.name.startswith("cifar-"):  # the published batches: opening them takes seconds
            return self._digest(dataset, folder, sorted(folder.glob("*")))
        found = data.find(dataset, self.root)
        assert isinstance(found, layouts.Listing)
        facts = json.dumps([found.labels.tolist(), found.train, found.class_names])
        return self._digest(dataset, found.base, found.files, facts)

    @_once
    def public(self, dataset: str) -> str:
        """Digest of the synthetic images that go with it; "" for those that are part of the code."""
        base = data.find_public(dataset, self.root)
        return "" if dataset == "digits" else self._digest("synthetic", base, layouts.scan(base).files)

    @_once
    def encoder(self, model: str, weights: str | None) -> str:
        """sha256 of the file of an encoder's weights, or "random"."""
        path = encoders.weights_of(model, weights)
        if isinstance(path, str):
            return path
        return self._digest(f"weights {path.name}", path.parent, [path], None)

    def _digest(self, what: str, base: Path, found: Sequence[Path], facts: str | None = "") -> str:
        """Over names, contents and `facts`; without facts the sha256 of the only file. It is computed once for as long as the
        files keep their names, sizes and times."""
        names = [os.fsencode(path.relative_to(base)) for path in found]
        states = (repr((s.st_size, s.st_mtime_ns, s.st_ctime_ns)) for s in (path.stat() for path in found))
        state = files.digest(facts or "", *names, *states)
        record = self.memory / "contents" / f"{files.digest(what, os.fsencode(base.resolve()))[:32]}.json"
        known = files.read_json(record) or {}
        if known.get("state") != state:
            with ThreadPoolExecutor() as pool:
                sums = list(pool.map(sha256, found))
            known = {"state": state, "content": sums[0] if facts is None else files.digest(facts, *names, *sums)}
            with contextlib.suppress(OSError):  # a store that cannot be written can still be read
                files.write_json(record, known, private=True)
        return known["content"]
