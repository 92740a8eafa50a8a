"""Passes side by side, each in a process of its own (loky's, which do not run the caller's script again).

Small encoders gain little from a second thread and all from a second process. A worker takes one pass after another and
writes to the store as any other process would."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor
from tqdm import tqdm

from dpmix.core import checks
from dpmix.runs.identity import code_digest
from dpmix.runs.spec import ComputeFlags


def count(compute: ComputeFlags, passes: int) -> int:
    """How many passes to run at a time."""
    most = compute.workers or (cpu_count() if compute.where().type == "cpu" else 1)
    return max(1, min(most, passes))


def run(work: Callable[..., None], passes: Sequence[Any], compute: ComputeFlags, workers: int, *about: Any) -> None:
    """`work(pass, compute, *about)` for every pass, in `workers` processes; waits for all of them. Each has a process group
    of its own: a terminal and Jupyter interrupt whole groups, and a second signal would cut the saving of a checkpoint short.

    An interrupt is passed on: each worker saves its checkpoint first. What a worker refused or could not do is raised
    here as RuntimeError with its own words; the other passes are finished, by a new worker where one died."""
    waiting, errors, busy = iter(passes), list[str](), set[ProcessPoolExecutor]()
    change, interrupted = threading.Lock(), threading.Event()
    quiet = replace(compute, workers=1, progress=False)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    def following() -> Any:
        with change:
            return None if interrupted.is_set() else next(waiting, None)

    def lane() -> None:
        """Pass after pass, in a process of its own, until there are none or all are to stop."""
        pool = None
        while (some := following()) is not None:
            try:
                pool = pool or ProcessPoolExecutor(1, initializer=os.setpgrp, env=environment)
                done = pool.submit(_work, work, code_digest(), some, quiet, *about)
                busy.add(pool)
                done.result()
            except KeyboardInterrupt:
                break
            except BrokenProcessPool as error:
                codes = re.search(r"{.*?}", str(error))
                errors.append(f"a worker died (exit status {codes[0] if codes else '?'}); run again, it will go on")
                pool = None
            except Exception as error:  # what a pass refused, or no memory for another process
                errors.append(f"{type(error).__name__}: {error}")
            finally:
                busy.discard(pool)
            bar.update()
        if pool is not None:
            pool.shutdown(kill_workers=True)

    lanes = [threading.Thread(target=lane, daemon=True) for _ in range(workers)]
    with tqdm(total=len(passes), desc=f"passes, {workers} at a time", disable=not compute.progress) as bar:
        try:
            for thread in lanes:
                thread.start()
            for thread in lanes:
                thread.join()
        except BaseException:
            with change:
                interrupted.set()
            for process in [p for pool in list(busy) for p in list(pool._processes)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGINT)
            for thread in lanes:
                thread.join()
            raise
    if errors:
        raise RuntimeError("; ".join(dict.fromkeys(errors)))


def _work(work: Callable[..., None], code: str, *about: Any) -> None:
    checks.require(code == code_digest(), "dpmix", "its source", "changed while it ran; restart Python and run again")
    work(*about)
