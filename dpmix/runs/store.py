"""Where results are kept: a folder that only its owner reads, for its records hold seeds."""

import functools
import os
import warnings
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from dpmix.core import checks, files, rng
from dpmix.images import data
from dpmix.runs.identity import Identity
from dpmix.runs.result import Result

STORE = Path(os.environ.get("DPMIX_STORE") or data.PROJECT / "data" / "runs")  # where results are kept


class Store:
    """A folder of results: NAME.json each, written atomically and checksummed, and the trained weights beside it. Names follow
    from identities through a key of the folder's own, so they tell nothing of the images. A result of other images, other
    weights of an encoder or other code has another name: what is found is what was asked for."""

    def __init__(self, folder: Path | str = STORE) -> None:
        self.folder = Path(folder)

    @functools.cached_property
    def _key(self) -> bytes:
        return files.secret(self.folder)

    def name(self, *parts: str) -> str:
        """The name of what these digests identify, under the key of this store."""
        return files.keyed(self._key, *parts)

    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold a name between processes; a second holder waits."""
        return files.lock(self.folder / "locks" / name)

    def checkpoint(self, *names: str) -> Path:
        """Where the checkpoint of these results is kept while they are trained."""
        return self.folder / f"{self.name('checkpoint', *names)}.checkpoint"

    def get(self, name: str) -> Result | None:
        """The stored result, or None; a damaged or misplaced file is named in a warning and counts as absent."""
        path = self._place(name, "json")
        content = files.read_json(path)
        if content is None or content.get("key") == name:
            return None if content is None else Result.from_json(content)
        warnings.warn(f"{path}: holds the result {content.get('key')!r}; it is left out and made anew", stacklevel=2)
        return None

    def all(self) -> list[Result]:
        """Every result that is there and whole."""
        found = (self.get(path.stem) for path in sorted(self.folder.glob("*.json")))
        return [result for result in found if result is not None]

    def put(self, result: Result, tensors: dict[str, Tensor]) -> None:
        """Weights first, so that a result that can be seen is complete."""
        files.save_tensors(self._place(result.key, "safetensors"), tensors, {"result": result.key}, private=True)
        files.write_json(self._place(result.key, "json"), result.to_json(), private=True)

    def tensors(self, result: Result) -> dict[str, Tensor]:
        """The trained weights of a result. FileNotFoundError if they are gone, ValueError if they are damaged."""
        path = self._place(result.key, "safetensors")
        try:
            found = files.load_tensors(path, {"result": result.key}, name="weights")
        except files.Damaged as damage:
            raise ValueError(f"{damage}; then remove the JSON beside it too and run again") from damage
        if found is None:
            raise FileNotFoundError(f"{path}: absent; remove the JSON beside it and run again")
        return found[0]

    def drawn_seed(self, identity: Identity, number: int) -> int:
        """A seed for the `number`-th run without one of this identity. Kept until the results are there, so that a run that
        was cut off goes on with the seed that it had; never for other images, whose identity is another."""
        path = self._seeds(identity)
        with self.lock("seeds"):
            kept = (files.read_json(path) or {"seeds": []})["seeds"]
            if number == len(kept):
                kept.append(rng.fresh_seed())
                files.write_json(path, {"seeds": kept}, private=True)
        return kept[number]

    def forget_seeds(self, identity: Identity) -> None:
        """What `drawn_seed` kept is no longer needed."""
        self._seeds(identity).unlink(missing_ok=True)

    def _seeds(self, identity: Identity) -> Path:
        return self.folder / "seeds" / f"{self.name('seeds', identity.run)}.json"

    def _place(self, name: str, suffix: str) -> Path:
        """The file of a result. A name comes from a file too, so one that leads out of the folder is refused."""
        plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        checks.require(plain, "key", name, "must be letters, digits, - and _")
        return self.folder / f"{name}.{suffix}"
