"""Passes side by side, in processes of their own. `experiments.run_all` starts `python -m dpmix.runs.workers` and feeds it.

Small encoders gain little from a second thread and all from a second process. A worker takes the specs of one pass after
another, each a line of JSON on its standard input, and writes to the store, as any other process would; it answers each
with a line of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpmix.runs.spec import ComputeFlags, RunSpec, code_digest


def count(compute: ComputeFlags, passes: int) -> int:
    """How many passes to run at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = compute.workers or (cores if compute.where().type == "cpu" else 1)
    return max(1, min(most, passes))


def run(groups: Sequence[Sequence[RunSpec]], compute: ComputeFlags, store: Path, workers: int) -> None:
    """Compute every group of specs in one of `workers` processes, and wait for all of them.

    An interrupt is passed on: each worker saves its checkpoint first. What a worker refused or could not do is raised
    here as RuntimeError with its own words; the other groups are finished, by a new worker where one died.
    """
    waiting, errors = iter([[asdict(s) for s in group] for group in groups]), list[str]()
    shared = {"compute": asdict(replace(compute, workers=1, progress=False)), "store": str(store.resolve())}
    threads = max(1, (os.cpu_count() or 1) // workers)
    running: list[subprocess.Popen[str]] = []
    change = threading.Lock()  # of `waiting`, `running` and the bar
    interrupted = threading.Event()

    def lane() -> None:
        worker = None
        while True:
            with change:
                specs = None if interrupted.is_set() else next(waiting, None)
                if specs is None:
                    break
                if worker is None:
                    running.append(worker := _start(threads))
            said = _ask(worker, shared | {"specs": specs, "code": code_digest()})
            with change:
                if said is None:
                    errors.append(f"a worker died (exit status {worker.wait()}); run again, it will go on")
                    worker = None
                elif said:
                    errors.append(said)
                bar.update()
        if worker is not None:
            assert worker.stdin is not None
            worker.stdin.close()

    def guarded() -> None:
        try:
            lane()
        except Exception as error:  # no memory for another process, say: the thread has nobody else to tell
            errors.append(f"{type(error).__name__}: {error}")

    lanes = [threading.Thread(target=guarded, daemon=True) for _ in range(workers)]
    with tqdm(total=len(groups), desc=f"passes, {workers} at a time", disable=not compute.progress) as bar:
        try:
            for thread in lanes:
                thread.start()
            for thread in lanes:
                thread.join()
        except BaseException:
            with change:
                interrupted.set()
            for worker in running:
                worker.send_signal(signal.SIGINT)
            raise
        finally:
            for worker in running:
                worker.wait()
    if errors:
        raise RuntimeError("; ".join(dict.fromkeys(errors)))


def _start(threads: int) -> subprocess.Popen[str]:
    # A process group of its own: Jupyter interrupts whole groups, and a second signal would cut the saving short.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen([sys.executable, "-m", "dpmix.runs.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            process_group=0, text=True, env=environment)  # fmt: skip


def _ask(worker: subprocess.Popen[str], task: dict[str, Any]) -> str | None:
    """Give a task, wait for the answer: what went wrong, "" if nothing did, None if the worker died over it."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(task) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        return json.loads(answer) if answer.endswith("\n") else None
    except BrokenPipeError:
        return None
