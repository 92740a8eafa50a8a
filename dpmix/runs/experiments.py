"""From a description of runs to results with provenance. `run`, `run_all`, the result store, releases.

`run_all` looks each spec up in the store, groups what is missing by the pass that can compute it (frozen encoders: all
heads of one data set, encoder, batch size, seed, ...), computes each pass once, and writes one JSON a run. An
interrupted pass continues where it was. What is stored is never computed again, unless the spec or the code changed.
"""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch

from dpmix.core import checks, files, microbatch, rng
from dpmix.core.processes import from_first, processes
from dpmix.images import data
from dpmix.runs import passes, workers
from dpmix.runs.spec import (
    ComputeFlags,
    Mechanism,
    NonPrivateDiagnostics,
    Result,
    RunSpec,
    code_digest,
    files_of,
    key,
    mechanism,
)

__all__ = [
    "ComputeFlags", "Mechanism", "NonPrivateDiagnostics", "Result", "RunSpec", "Store", "choose_learning_rate",
    "code_digest", "files_of", "frame", "key", "mechanism", "release", "run", "run_all",
]  # fmt: skip

STORE = Path(os.environ.get("DPMIX_STORE") or data.PROJECT / "data" / "runs")  # where results are kept


class Store:
    """A folder of results: KEY.json each, written atomically and checksummed, and the trained weights beside it.

    A key is public: it does not follow image files. Where those of a folder, or the synthetic ones, have changed, the
    result is made anew and the one before is kept as KEY-1 (then KEY-2, ...).
    """

    def __init__(self, folder: Path | str = STORE) -> None:
        self.folder = Path(folder)

    def get(self, name: str, state: str | None = None) -> Result | None:
        """The stored result, or None; a damaged or misplaced file is named in a warning and counts as absent.

        With `state`, of `files_of`, a result that was made from other files counts as absent too.
        """
        path = self._place(name, "json")
        content = files.read_json(path)
        if content is not None and content.get("key") != name:
            warnings.warn(
                f"{path}: holds the result {content.get('key')!r}; it is left out and made anew", stacklevel=2
            )
            return None
        if content is None or state not in (None, content["provenance"].get("files", "")):
            return None
        return Result.from_json(content)

    def put(self, result: Result, tensors: dict[str, torch.Tensor]) -> None:
        """Weights first, so that a result that can be seen is complete."""
        before = self.get(result.key)
        if before is not None and before.provenance.get("files", "") != result.provenance.get("files", ""):
            files.set_aside(*(self._place(result.key, suffix) for suffix in ("safetensors", "json")))
        files.save_tensors(self._place(result.key, "safetensors"), tensors, {"result": result.key})
        files.write_json(self._place(result.key, "json"), result.to_json())

    def tensors(self, result: Result) -> dict[str, torch.Tensor]:
        """The trained weights of a result. FileNotFoundError if they are gone, ValueError if they are damaged."""
        path = self._place(result.key, "safetensors")
        try:
            found = files.load_tensors(path, {"result": result.key}, name="weights")
        except files.Damaged as damage:
            raise ValueError(f"{damage}; then remove the JSON beside it too and run again") from damage
        if found is None:
            raise FileNotFoundError(f"{path}: absent; remove the JSON beside it and run again")
        return found[0]

    def _place(self, name: str, suffix: str) -> Path:
        """The file of a result. A name comes from a file too, so one that leads out of the folder is refused."""
        plain = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        checks.require(plain, "key", name, "must be letters, digits, - and _")
        return self.folder / f"{name}.{suffix}"


def run(spec: RunSpec, *, compute: ComputeFlags | None = None, store: Store | None = None) -> Result:
    """One run, from the store if it is there."""
    return run_all([spec], compute=compute, store=store)[0]


def run_all(
    specs: Sequence[RunSpec], *, compute: ComputeFlags | None = None, store: Store | None = None
) -> list[Result]:
    """The result of every spec, in order; what the store lacks is computed, in as few passes as possible.

    All specs are checked against their data first, so that bad input stops before any training. Two processes may share
    a store: each pass is locked, and the second finds the first one's results. Under torchrun all processes of a job
    train each network together, and the first keeps the store.
    """
    compute, store = compute or ComputeFlags(), store or Store()
    rank, world = processes(compute.where())
    frozen = next((s.model for s in specs if world > 1 and not s.from_scratch), None)
    checks.require(
        frozen is None, "model", frozen, "heads on a frozen encoder are one process's work; leave out torchrun"
    )
    sources = {(s.dataset, s.uses_synthetic) for s in specs} if rank == 0 else set()
    states = from_first({(d, synthetic): files_of(d, compute.root, synthetic) for d, synthetic in sources}, world)
    asked, specs = specs, from_first(_with_seeds(specs, store, states) if rank == 0 else None, world)
    name_of = {spec: key(spec) for spec in dict.fromkeys(specs)}

    def stored(spec: RunSpec) -> Result | None:
        return store.get(name_of[spec], states[spec.dataset, spec.uses_synthetic])

    found = from_first({spec: r for spec in name_of if (r := stored(spec)) is not None}, world)
    wanted: dict[RunSpec, list[RunSpec]] = {}
    for spec in name_of:
        wanted.setdefault(passes.pass_of(spec), []).append(spec)
    wanted = {shared: group for shared, group in wanted.items() if any(s not in found for s in group)}

    def left(shared: RunSpec) -> tuple[list[RunSpec], Path]:
        """The runs to compute, and their checkpoint: it belongs to the heads that it was made for. What was cut off while
        it stored results goes on with all its heads, because with fewer of them sums are rounded differently."""
        lacks = [s for s in wanted[shared] if stored(s) is None]
        places = [store.folder / f"{files.digest(key(shared), *map(name_of.__getitem__, group))[:32]}.checkpoint"
                  for group in (wanted[shared], lacks)]  # fmt: skip
        return (wanted[shared], places[0]) if lacks and places[0].exists() else (lacks, places[1])

    material = {shared: passes.prepare(shared, left(shared)[0], compute) for shared in wanted}
    for shared, group in wanted.items():
        for spec in group:
            mechanism(spec, material[shared].n)
    many = workers.count(compute, len(wanted)) if world == 1 else 1
    if many > 1:
        workers.run(list(wanted.values()), compute, store.folder, many)
        wanted = {}
    for shared in wanted:
        with files.lock(store.folder / "locks" / key(shared)) if rank == 0 else nullcontext():
            group, checkpoint = from_first(left(shared) if rank == 0 else None, world)
            if rank == 0:
                files.set_aside_checkpoint(checkpoint, **material[shared].origin(group))
            from_first(None, world)  # nobody looks for a checkpoint before that
            compute_pass = passes.compute_network if shared.from_scratch else passes.compute_heads
            for result, tensors in compute_pass(group, material[shared], compute, checkpoint) if group else ():
                if rank == 0:
                    store.put(result, tensors)
            if rank == 0:
                files.remove_checkpoint(checkpoint)
            from_first(None, world)  # nobody looks for the result before it is stored
    results = [found.get(spec) or _must(stored(spec), name_of[spec]) for spec in specs]
    for path in {_seeds_of(spec, store) for spec in asked if spec.seed is None} if rank == 0 else ():
        path.unlink(missing_ok=True)
    return results


def _seeds_of(spec: RunSpec, store: Store) -> Path:
    return store.folder / "seeds" / f"{key(spec)}.json"


def _with_seeds(specs: Sequence[RunSpec], store: Store, states: dict[tuple[str, bool], str]) -> list[RunSpec]:
    """A fresh seed for each spec without one; kept beside the results until they are there, so that a run that was cut
    off goes on with the seed that it had."""
    found, taken = [], dict[RunSpec, int]()
    for spec in specs:
        if spec.seed is None:
            path, number = _seeds_of(spec, store), taken.get(spec, 0)
            state = states[spec.dataset, spec.uses_synthetic]
            kept = files.read_json(path) or {}
            # Not for files that have changed since: the noise of one seed on two versions of a data set cancels.
            seeds = kept["seeds"] if kept.get("files") == state else []
            if number == len(seeds):
                seeds.append(rng.fresh_seed())
                files.write_json(path, {"seeds": seeds, "files": state})
            taken[spec] = number + 1
            spec = replace(spec, seed=seeds[number])
        found.append(spec)
    return found


def _must(result: Result | None, name: str) -> Result:
    if result is None:
        raise RuntimeError(f"result {name}: it, or an image of its folder, changed while it was computed; run again")
    return result


def frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row a run: every field of the spec and of the recipe, accuracies in percent, q, T, sigma, epsilons, timing."""
    rows = []
    for r in results:
        row = asdict(r.spec)
        recipe = row.pop("recipe")
        row |= {"recipe": r.spec.recipe, **recipe, "key": r.key, "accuracy": 100 * r.test_accuracy}
        held_out = r.diagnostics.validation_accuracy
        row |= {"validation_accuracy": float("nan") if held_out is None else 100 * held_out}
        row |= {"sigma": r.noise_multiplier, "q": r.sample_rate, "T": r.steps, "N": r.population}
        row |= {f"epsilon_{name}": value for name, value in r.epsilon.items()}
        row |= {"seconds": r.timing["seconds"], "views_per_second": r.timing["views_per_second"]}
        about, v = r.provenance, r.provenance["versions"]
        commit = f" at {about['commit'][:9]}{' with changes' if about['dirty'] else ''}" if about["commit"] else ""
        row |= {"date": about["date"], "device": about["device"]}
        row |= {"versions": f"dpmix {v['dpmix']}{commit}, torch {v['torch']}, opacus {v['opacus']}"}
        rows.append(row)
    return pd.DataFrame(rows)


def choose_learning_rate(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The rows of the learning rate with the best mean validation accuracy over the seeds, for each condition `by`.

    Never looks at the test accuracy. Ties go to the smaller rate. The choice itself is not private and not accounted for.
    """
    by = list(by)
    scored = runs["validation_accuracy"].notna().all()
    said = "is missing for some runs, so there is nothing to choose by; give RunSpec a validation share above 0"
    checks.require(bool(scored), "validation_accuracy", None, said)
    # Not by merging: an epsilon that is None in every row has another dtype before than after.
    means = runs.groupby([*by, "learning_rate"], dropna=False)["validation_accuracy"].transform("mean")
    keys = [runs[name] for name in by]
    best = runs[means == means.groupby(keys, dropna=False).transform("max")]
    least = best.groupby(by, dropna=False)["learning_rate"].transform("min")
    return best[best["learning_rate"] == least].reset_index(drop=True)


def release(result: Result, path: Path | str, *, store: Store | None = None) -> Path:
    """Write what may leave the house: the weights of one run and its privacy card. Nothing of `NonPrivateDiagnostics`.

    The seed is withheld. Raises ValueError for a run that carries no guarantee: without noise, with a seed that can be
    guessed, or with private images in the place of public ones.
    """
    if result.noise_multiplier == 0:
        raise ValueError("result.noise_multiplier=0: a run without noise carries no guarantee and is not released")
    spec = result.spec
    said = "can be guessed, and whoever has it can subtract the noise; train what is to be published with seed=None"
    checks.require(spec.seed is None or spec.seed >= 2**64, "seed", spec.seed, said)
    said = "mixes in the other half of the private images unprotected: an experiment (Table 10), not to be released"
    checks.require(spec.public != "half-2" or spec.recipe.k_diff == 0, "public", spec.public, said)
    path, store = Path(path), store or Store()
    tensors = store.tensors(result)
    kept = store.get(result.key)
    same = kept is not None and not files.differences(*(json.loads(json.dumps(r.to_json())) for r in (kept, result)))
    said = "the store has another result under this key now, with other weights; give the store that it came from, or run again"
    checks.require(same, "result", result.key, said)
    counted = ["the number of training examples, from which the sampling rate and the number of steps follow"]
    about = {k: v for k, v in asdict(spec).items() if k not in ("seed", "weights")}
    about["dataset"] = spec.dataset.partition(":")[0]  # not where the images lie
    unit = "example" if spec.microbatch == 1 else f"microbatch of {spec.microbatch} in a fixed partition of public size"
    sensitivity = microbatch.sensitivity(spec.microbatch)
    card = {
        "guarantee": {"epsilon": result.epsilon, "delta": spec.delta, "calibrated_by": spec.accountant},
        "adjacency": "add or remove one example (replacing one example: twice the sensitivity)"
        if spec.microbatch == 1 else "one place of the partition is vacated or filled",
        "sampling": f"Poisson, every {unit} joins a step with probability {result.sample_rate:.6g}",
        "mechanism": {"noise_multiplier": result.noise_multiplier, "clip_norm": spec.clip_norm,
                      "sensitivity": sensitivity * spec.clip_norm,
                      "noise_standard_deviation": result.noise_multiplier * sensitivity * spec.clip_norm,
                      "sample_rate": result.sample_rate, "steps": result.steps, "divisor": result.divisor,
                      "public_population": result.population},
        "not_accounted_for": ["the choice of the learning rate and of other settings on the validation split",
                              "other models released from the same data: their budgets add up if their seeds differ; models of "
                              "one seed share the sampling and may cost more than the sum",
                              "floating-point noise", *(counted if spec.population is None else [])],
        "withheld": ["seed", "validation accuracy and every other diagnostic computed without noise", "test accuracy"],
        "spec": about,
        "class_names": result.provenance.get("classes"),
        "versions": result.provenance["versions"],
    }  # fmt: skip
    # Not result.key: it is a digest over the seed too, and seeds that people choose can be guessed.
    files.save_tensors(path / "model.safetensors", tensors, {"card": files.digest(json.dumps(card, sort_keys=True))})
    files.write_json(path / "privacy_card.json", card)
    return path
