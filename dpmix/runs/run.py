"""`run` and `run_all`: from descriptions of runs to results with provenance.

What is stored is never computed again, unless something behind it changed: the spec, an image, the encoder's weights or
the code. An interrupted pass goes on where it was."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dpmix.core import checks
from dpmix.core.processes import from_first, processes
from dpmix.runs import material, passes, workers
from dpmix.runs.identity import Contents, Identity, pass_of
from dpmix.runs.passes import Task
from dpmix.runs.result import Result
from dpmix.runs.spec import ComputeFlags, RunSpec, epsilons, mechanism
from dpmix.runs.store import Store


class Asked(NamedTuple):
    """A run that was asked for, under its name in the store, and whether its seed was drawn here."""

    identity: Identity
    name: str
    seed_drawn: bool


def run(spec: RunSpec, *, compute: ComputeFlags | None = None, store: Store | None = None) -> Result:
    """One run, from the store if it is there."""
    return run_all([spec], compute=compute, store=store)[0]


def run_all(
    specs: Sequence[RunSpec], *, compute: ComputeFlags | None = None, store: Store | None = None
) -> list[Result]:
    """The result of every spec, in order; what the store lacks is computed, in as few passes as possible.

    All specs are checked against their data first, so that bad input stops before any training. Two processes may share a
    store: each pass is locked, and the second finds the first one's results. Under torchrun all processes of a job train each
    network together, and the first keeps the store."""
    compute, store = compute or ComputeFlags(), store or Store()
    rank, world = processes(compute.where())
    frozen = next((spec.model for spec in specs if world > 1 and not spec.from_scratch), None)
    refused = "heads on a frozen encoder are one process's work; leave out torchrun"
    checks.require(frozen is None, "model", frozen, refused)
    known = ask(specs, compute, store) if rank == 0 else []
    asked, groups = from_first((known, missing(known, store)), world)
    planned = [plan(group, compute) for group in groups]
    many = workers.count(compute, len(planned)) if world == 1 else 1
    if many > 1:
        workers.run(compute_pass, planned, compute, many, store)
    else:
        for group in planned:
            compute_pass(group, compute, store)
    results = from_first([store.get(one.name) for one in asked] if rank == 0 else None, world)
    gone = [one.name for one, result in zip(asked, results, strict=True) if result is None]
    if gone:
        raise RuntimeError(f"result {gone[0]}: it is gone from the store since it was computed; run again")
    for one in asked if rank == 0 else ():
        if one.seed_drawn:
            store.forget_seeds(replace(one.identity, spec=replace(one.identity.spec, seed=None)))
    return results


def look_up(
    specs: Sequence[RunSpec], *, compute: ComputeFlags | None = None, store: Store | None = None
) -> list[Result | None]:
    """What the store has of each spec; None where it has nothing, or where what lies behind the spec is not on disk."""
    compute, store = compute or ComputeFlags(), store or Store()
    contents, found = Contents(compute, store.folder), list[Result | None]()
    for spec in specs:
        try:
            found.append(store.get(store.name(contents.identity(spec).run)))
        except FileNotFoundError:
            found.append(None)
    return found


def ask(specs: Sequence[RunSpec], compute: ComputeFlags, store: Store) -> list[Asked]:
    """What each spec is now, with a fresh seed for each without one."""
    contents, taken, found = Contents(compute, store.folder), Counter[RunSpec](), []
    for spec in specs:
        identity = contents.identity(spec)
        if spec.seed is None:
            identity = replace(identity, spec=replace(spec, seed=store.drawn_seed(identity, taken[spec])))
            taken[spec] += 1
        found.append(Asked(identity, store.name(identity.run), spec.seed is None))
    return found


def missing(asked: Sequence[Asked], store: Store) -> list[list[Asked]]:
    """All runs of each pass that lacks a result, once each."""
    groups: dict[RunSpec, list[Asked]] = {}
    for one in dict.fromkeys(asked):
        groups.setdefault(pass_of(one.identity.spec), []).append(one)
    return [group for group in groups.values() if any(store.get(one.name) is None for one in group)]


def plan(group: Sequence[Asked], compute: ComputeFlags) -> list[Task]:
    """A pass whose every run was checked: its data, its encoder, its mechanism, and what a privacy card will need."""
    n = len(material.prepare([one.identity for one in group], compute).pool)
    passes.environment()
    mechanisms = [mechanism(one.identity.spec, n) for one in group]
    return [Task(*one, m, epsilons(one.identity.spec, m)) for one, m in zip(group, mechanisms, strict=True)]


def compute_pass(group: Sequence[Task], compute: ComputeFlags, store: Store) -> None:
    """Train what the store still lacks of one pass, and store it; not under the name of images that have changed meanwhile."""
    rank, world = processes(compute.where())
    train = passes.compute_network if group[0].spec.from_scratch else passes.compute_heads
    with store.lock(store.name("pass", group[0].identity.shared.run)) if rank == 0 else nullcontext():
        left, checkpoint = from_first(_left(group, store) if rank == 0 else None, world)
        if left:
            shared = material.prepare([task.identity for task in left], compute)
            done = list(train(left, shared, compute, checkpoint))
            if rank == 0:
                contents = Contents(compute, store.folder)
                for task in left:
                    same = contents.identity(task.spec) == task.identity
                    said = "its images or its encoder's file changed while it was computed; run again"
                    checks.require(same, "dataset", task.spec.dataset, said)
                for result, tensors in done:
                    store.put(result, tensors)
                checkpoint.unlink(missing_ok=True)
        from_first(None, world)  # nobody looks for the result before it is stored


def _left(group: Sequence[Task], store: Store) -> tuple[list[Task], Path]:
    """The runs to compute, and their checkpoint: it belongs to the heads that it was made for. What was cut off while it
    stored results goes on with all its heads, because with fewer of them sums are rounded differently."""
    lacks = [task for task in group if store.get(task.name) is None]
    whole, part = (store.checkpoint(*(task.name for task in some)) for some in (group, lacks))
    return (list(group), whole) if lacks and whole.exists() else (lacks, part)
