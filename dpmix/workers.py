"""Floor 4: passes side by side, a process each. `experiments.run_all` starts `python -m dpmix.workers` and feeds it.

Small encoders gain little from a second thread and all from a second process. A worker takes specs as JSON on its
standard input and writes to the store, as any other process would; what it has to say besides is one line of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpmix.spec import ComputeFlags, RunSpec, code_digest


def count(compute: ComputeFlags, passes: int) -> int:
    """How many passes to run at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = compute.workers or (cores if compute.where().type == "cpu" else 1)
    return max(1, min(most, passes))


def run(groups: Sequence[Sequence[RunSpec]], compute: ComputeFlags, store: Path, workers: int) -> None:
    """Compute every group of specs in a worker of its own, `workers` at a time, and wait for all of them.

    An interrupt is passed on: each worker saves its checkpoint first. What a worker refused or could not do is raised
    here as RuntimeError with its own words; the others finish.
    """
    cores = os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // workers))}
    alone = asdict(replace(compute, workers=1, progress=False))
    waiting = list(groups)
    running: list[subprocess.Popen[str]] = []
    errors: list[str] = []
    bar = tqdm(total=len(groups), desc=f"passes, {workers} at a time", disable=not compute.progress)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                task: dict[str, Any] = {
                    "specs": [asdict(s) for s in waiting.pop(0)],
                    "compute": alone,
                    "store": str(store.resolve()),
                }
                task["code"] = code_digest()
                # A process group of its own: Jupyter interrupts whole groups, and a second signal would cut the saving short.
                worker = subprocess.Popen([sys.executable, "-m", "dpmix.workers"], stdin=subprocess.PIPE, process_group=0,
                                          stdout=subprocess.PIPE, text=True, env=environment)  # fmt: skip
                running.append(worker)
                assert worker.stdin is not None
                worker.stdin.write(json.dumps(task))
                worker.stdin.close()
            time.sleep(0.1)
            for worker in [w for w in running if w.poll() is not None]:
                running.remove(worker)
                assert worker.stdout is not None
                said = worker.stdout.read().strip()
                if worker.returncode:
                    errors.append(said or f"a worker died (exit status {worker.returncode}); run again, it will go on")
                bar.update()
    except BaseException:
        for worker in running:
            worker.send_signal(signal.SIGINT)
        for worker in running:
            worker.wait()
        raise
    finally:
        bar.close()
    if errors:
        raise RuntimeError("; ".join(dict.fromkeys(errors)))


def main() -> None:
    from dpmix import experiments

    task = json.load(sys.stdin)
    specs = [RunSpec.from_json(s) for s in task["specs"]]
    if task["code"] != code_digest():
        print("dpmix: its source changed while it ran; restart Python and run again")
        sys.exit(1)
    try:
        experiments.run_all(specs, compute=ComputeFlags(**task["compute"]), store=experiments.Store(task["store"]))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
