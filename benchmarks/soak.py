"""A soak: many small runs through `run_all` with two workers, killed without warning at random moments, again and again.

    python benchmarks/soak.py [--runs 500] [--out benchmarks/results/soak.json]

A child process asks `run_all` for all runs, two passes at a time, a process each. This process kills (-9) the child or
one of its workers at random moments and starts the child anew, until a child has come to its end. The same runs are then
computed in one undisturbed process, one pass after another. Reported: whether all results are present and each equals
the undisturbed one, weights included, to the last bit; what was left behind; memory over time.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import psutil
import torch

import dpmix
from dpmix.core import views
from dpmix.core.checks import counted
from dpmix.runs.result import Result
from dpmix.runs.run import ask
from dpmix.runs.spec import ComputeFlags, RunSpec
from dpmix.runs.store import Store

HEADS = 10  # runs that share a pass


def runs(count: int) -> list[RunSpec]:
    """`count` runs of some seven steps: passes of ten heads, a seed each."""
    recipes = [views.Recipe(k_base=2, transform="crop"), views.Recipe(k_base=2, k_self=2, transform="crop")]
    grid = [(r, rate) for r in recipes for rate in (1.0, 2.0, 4.0, 8.0, 16.0)]
    return [
        RunSpec(recipe=grid[i % HEADS][0], learning_rate=grid[i % HEADS][1], epsilon=4.0, seed=i // HEADS, batch_size=64,
                epochs=0.4, population=1150)
        for i in range(count)
    ]  # fmt: skip


def child(store: Path, count: int) -> None:
    """What is killed. Damaged files are warned about; here a warning stops the run, and the soak with it."""
    warnings.filterwarnings("error", message=".*(checksum|cannot be read|damaged).*")
    compute = ComputeFlags(progress=False, workers=2, checkpoint_seconds=0.05)
    dpmix.run_all(runs(count), compute=compute, store=Store(store))


def family(process: psutil.Process) -> list[psutil.Process]:
    """The child and its workers, as far as they still run."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def resident(processes: list[psutil.Process]) -> list[float]:
    """Resident memory of each, in MiB."""
    found = []
    for process in processes:
        try:
            found.append(process.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            continue
    return found


def disturbed(store: Path, count: int, pause: tuple[float, float], draw: random.Random) -> dict:
    """Run the child until it ends by itself; kill somebody of the family whenever a pause is over."""
    kills = {"parent": 0, "worker": 0}
    memory: list[tuple[float, float]] = []  # seconds, MiB of the largest process
    began, starts, errors = time.monotonic(), 0, []
    while True:
        starts += 1
        command = [sys.executable, __file__, "--child", str(store), "--runs", str(count)]
        started = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        process = psutil.Process(started.pid)
        stored = len(list(store.glob("*.json")))
        until = time.monotonic() + draw.uniform(*pause)
        killed = False
        while started.poll() is None:
            members = family(process)
            sizes = resident(members)
            if sizes:
                memory.append((time.monotonic() - began, max(sizes)))
            # An attempt is let be until it has stored something: killed before that for ever, nothing would come of it.
            if time.monotonic() > until and len(list(store.glob("*.json"))) > stored:
                victim = draw.choice(members) if members else process
                kind = "parent" if victim.pid == started.pid else "worker"
                try:
                    victim.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
                kills[kind] += 1
                killed = True
                stored = len(list(store.glob("*.json")))
                until = time.monotonic() + draw.uniform(*pause)
            time.sleep(0.05)
        said = started.stderr.read() if started.stderr else ""
        if started.returncode == 0:
            break
        if not killed:
            errors.append(said[-2000:])
            break
    thirds = np.array_split(np.array([m for _, m in memory]), 3)
    return {
        "seconds": time.monotonic() - began, "starts": starts, "kills": kills, "errors": errors,
        "MiB, largest process, median by third": [round(float(np.median(part)), 1) for part in thirds],
        "MiB, largest process, peak": round(max(m for _, m in memory), 1),
    }  # fmt: skip


def undisturbed(store: Path, count: int) -> dict:
    """The same runs, one process, one pass at a time; its memory after each pass."""
    began, memory, here = time.monotonic(), [], psutil.Process()
    specs = runs(count)
    compute = ComputeFlags(progress=False, workers=1)
    for first in range(0, count, HEADS):
        dpmix.run_all(specs[first : first + HEADS], compute=compute, store=Store(store))
        memory.append(here.memory_info().rss / 2**20)
    settled = memory[len(memory) // 5 :]
    gained = float(np.polyfit(range(len(settled)), settled, 1)[0]) if len(settled) > 2 else float("nan")
    return {
        "seconds": time.monotonic() - began, "MiB after each pass": [round(m, 1) for m in memory],
        "MiB gained a pass, once warm": round(gained, 3),
    }  # fmt: skip


def compare(disturbed_store: Path, calm_store: Path, count: int) -> dict:
    """How many results are present and equal; what lies about besides results, weights and locks."""
    one, other = Store(disturbed_store), Store(calm_store)
    asked = [f.name for f in fields(Result) if f.name not in ("key", "timing", "provenance")]
    pairs = zip(*(ask(runs(count), ComputeFlags(), store) for store in (one, other)), strict=True)
    present = equal = equal_weights = 0
    largest = 0.0
    for ours, theirs in pairs:
        found, expected = one.get(ours.name), other.get(theirs.name)
        assert expected is not None
        if found is None:
            continue
        present += 1
        # how many gradients a pass dropped is of the pass and not of the run
        calm = replace(expected.diagnostics, dropped_gradients=found.diagnostics.dropped_gradients)
        expected = replace(expected, diagnostics=calm)
        equal += all(getattr(found, name) == getattr(expected, name) for name in asked)
        a, b = one.tensors(found), other.tensors(expected)
        equal_weights += all(torch.equal(a[name], b[name]) for name in b)
        largest = max(largest, *(float((a[name] - b[name]).abs().max()) for name in b))
    asked_for = ask(runs(count), ComputeFlags(), one)
    known = {f"{a.name}{end}" for a in asked_for for end in (".json", ".safetensors")}
    rest = [
        p
        for p in disturbed_store.rglob("*")
        if p.is_file() and p.name not in {*known, "key"} and p.parent.name not in ("locks", "contents")
    ]
    temporary = [p for p in rest if p.suffix == ".tmp"]
    checkpoints = [p for p in rest if ".checkpoint" in p.name and p not in temporary]
    return {
        "asked": count, "present": present, "equal": equal, "equal weights, bit for bit": equal_weights,
        "largest difference of a weight": largest, "checkpoints left": len(checkpoints), "temporary files left": len(temporary),
        "other files left": len(rest) - len(temporary) - len(checkpoints),
        "MiB left": round(sum(p.stat().st_size for p in rest) / 2**20, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    parser.add_argument("--pause", type=float, nargs=2, default=(4.0, 20.0), help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.runs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stormy, calm = Path(folder) / "stormy", Path(folder) / "calm"
        stormy.mkdir()
        report = {"disturbed": disturbed(stormy, args.runs, tuple(args.pause), random.Random(args.seed))}
        report["undisturbed"] = undisturbed(calm, args.runs)
        report["results"] = compare(stormy, calm, args.runs)
    report["about"] = {
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(),
    }  # fmt: skip
    for part, content in report.items():
        for name, value in content.items():
            said = (
                f"{counted(len(value), 'value')}, last {value[-1]}"
                if isinstance(value, list) and len(value) > 4
                else value
            )
            print(f"{part:<12} {name:<42} {said}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    done = report["results"]
    if not done["asked"] == done["present"] == done["equal"] or report["disturbed"]["errors"]:
        sys.exit("the soak failed")


if __name__ == "__main__":
    main()
