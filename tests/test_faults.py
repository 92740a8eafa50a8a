"""Runs survive what happens to computers: kills, Ctrl-C, two at once, a full disk, a folder that may not be written.

After each fault the same call is made again; the store must then hold what an undisturbed run leaves, to the last bit.
The processes that are killed are forked from one that has imported everything and computed nothing.
"""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpmix import experiments, files, heads, privacy, views
from dpmix.experiments import ComputeFlags, RunSpec, Store, run, run_all

PROGRAM = r"""
import json, os, random, signal, sys, time, traceback, warnings
from dataclasses import replace
from pathlib import Path

import torch

from dpmix import experiments, heads, passes, spec, views

RECIPE = views.Recipe(k_base=2, k_self=1, transform="crop")
SPECS = [experiments.RunSpec(recipe=RECIPE, epsilon=8.0, learning_rate=rate, epochs=4.0, batch_size=128, population=1150)
         for rate in (1.0, 2.0, 4.0, 8.0)]
COMPUTE = experiments.ComputeFlags(progress=False, workers=1, checkpoint_seconds=0.0, device="cpu")
BASE = Path(sys.argv[1])


def start(folder, specs=SPECS, compute=COMPUTE):
    "A child that calls run_all on a store; it writes down how many heads it trains and whether it went on."
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        warnings.filterwarnings("error", message=".*(checksum|damaged|cannot be read).*")
        real, load = heads.train_bank, heads._load

        def train(*args, **kwargs):
            with (BASE / "log").open("a") as log:
                log.write(f"{folder} trains {len(args[3])}\n")
            return real(*args, **kwargs)

        def went_on(*args):
            state = load(*args)
            with (BASE / "log").open("a") as log:
                log.write(f"{folder} at {state.step}\n")
            return state

        heads.train_bank, heads._load = train, went_on
        experiments.run_all(specs, compute=compute, store=experiments.Store(BASE / folder))
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def log(folder):
    lines = (BASE / "log").read_text().splitlines()
    return [line.split()[1:] for line in lines if line.split()[0] == folder]


def checkpoints(folder):
    return list((BASE / folder).glob("*.checkpoint"))


def stop_at(folder, number, seconds):
    "Start, and send the signal after so many seconds; None: as soon as a checkpoint is there."
    pid, began = start(folder), time.monotonic()
    while (not checkpoints(folder)) if seconds is None else time.monotonic() - began < seconds:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return 0
        time.sleep(0.002)
    os.kill(pid, number)
    return end(pid)


passes._epsilons(spec.mechanism(SPECS[0], 1437), SPECS[0].delta)  # accounting is done once, for all children
began = time.monotonic()
assert end(start("calm")) == 0
took = time.monotonic() - began
told = {"took": took}

draw = random.Random(int(sys.argv[2]))
moments = [None, draw.uniform(0.3, 0.9) * took, draw.uniform(0.3, 1.05) * took]
told["kills"] = [stop_at("killed", signal.SIGKILL, m) for m in moments]
told["killed"] = end(start("killed")), log("killed")

told["interrupts"] = stop_at("interrupted", signal.SIGINT, None)
told["left by the interrupt"] = len(checkpoints("interrupted"))
told["interrupted"] = end(start("interrupted")), log("interrupted")

pair = start("shared", SPECS[:3]), start("shared", SPECS[1:])
told["shared"] = [end(p) for p in pair], log("shared")
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """What the program reports, and the folder of its stores."""
    base = tmp_path_factory.mktemp("faults")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(base), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), base


def stored(folder: Path) -> dict[str, tuple[dict, dict]]:
    """Key -> what a result must have in common with an undisturbed one, and its weights."""
    found = {}
    for path in folder.glob("*.json"):
        content = files.read_json(path)
        result = experiments.Result.from_json(content)
        assert result.key == path.stem
        about = {k: v for k, v in content.items() if k not in ("timing", "provenance")}
        found[result.key] = about, Store(folder).tensors(result)
    return found


def same_as_undisturbed(base: Path, folder: str, exactly: bool = True) -> None:
    calm, other = stored(base / "calm"), stored(base / folder)
    assert calm.keys() == other.keys() and len(calm) == 4
    for name, (about, tensors) in calm.items():
        assert other[name][0] == about
        for part, tensor in tensors.items():
            torch.testing.assert_close(other[name][1][part], tensor, rtol=0, atol=0 if exactly else 1e-5)
    left = {p.name for p in (base / folder).iterdir()} - {"locks"}
    assert not [name for name in left if "checkpoint" in name and not name.startswith(".")]


def test_kill_9_and_again(faults):
    told, base = faults
    assert told["kills"][0] == -9, "the first kill fell into the training"
    assert told["killed"][0] == 0
    steps = [int(words[1]) for words in told["killed"][1] if words[0] == "at"]
    assert steps[0] == 0 and max(steps) > 0, "a later call went on from a checkpoint"
    same_as_undisturbed(base, "killed")


def test_ctrl_c_and_again(faults):
    told, base = faults
    assert told["interrupts"] == 130 and told["left by the interrupt"] == 1
    status, log = told["interrupted"]
    assert status == 0 and [words[0] for words in log] == ["trains", "at", "trains", "at"] and int(log[3][1]) > 0
    same_as_undisturbed(base, "interrupted")


def test_two_processes_on_one_store(faults):
    """They ask for runs of one pass that overlap; each run is trained by one of them, once."""
    told, base = faults
    assert told["shared"][0] == [0, 0]
    trained = [int(words[1]) for words in told["shared"][1] if words[0] == "trains"]
    assert sorted(trained) == [1, 3], "the second found what the first had computed"
    same_as_undisturbed(base, "shared", exactly=False)  # three heads and one, not four: equal to rounding


def test_the_comparison_can_fail(faults, tmp_path):
    _, base = faults
    results = [Store(base / "calm").get(p.stem) for p in (base / "calm").glob("*.json")]
    for r in results:
        tensors = Store(base / "calm").tensors(r)
        Store(tmp_path / "other").put(r, {**tensors, "bias": tensors["bias"] * (1 + 1e-6)})
    (tmp_path / "calm").symlink_to(base / "calm")
    same_as_undisturbed(tmp_path, "other", exactly=False)
    with pytest.raises(AssertionError):
        same_as_undisturbed(tmp_path, "other")


# In one process.

TINY = RunSpec(
    recipe=views.Recipe(k_base=1, transform="none"), epsilon=None, learning_rate=4.0, epochs=0.5, batch_size=256
)
COMPUTE = ComputeFlags(progress=False, workers=1, checkpoint_seconds=0.0)


def test_a_full_disk_stops_with_one_line_and_leaves_the_store_whole(tmp_path, monkeypatch):
    store = Store(tmp_path)
    first = run(TINY, compute=COMPUTE, store=store)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    specs = [TINY, replace(TINY, learning_rate=2.0)]
    real = os.fsync
    for room in (0, 1, 2):  # writes until the disk is full: a checkpoint, a later one, the results
        left = iter(range(room))

        def fsync(handle, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        with monkeypatch.context() as full:
            full.setattr(files.os, "fsync", fsync)
            with pytest.raises(
                OSError, match="the disk is full; free some space and run again, what is stored is intact"
            ):
                run_all(specs, compute=COMPUTE, store=store)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        assert store.get(first.key) == first and not list(tmp_path.glob(".*.tmp"))
    again = run_all(specs, compute=COMPUTE, store=store)
    assert again[0] == first
    undisturbed = run_all(specs, compute=COMPUTE, store=Store(tmp_path / "other"))
    assert again[1].test_accuracy == undisturbed[1].test_accuracy


def test_a_store_that_may_not_be_written_is_refused_before_training_and_can_be_read(tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    first = run(TINY, compute=COMPUTE, store=store)
    real = Path.open

    def closed(self, mode="r", *args, **kwargs):
        if "w" in mode and self.is_relative_to(store.folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return real(self, mode, *args, **kwargs)

    def train(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(Path, "open", closed)
    monkeypatch.setattr(heads, "train_bank", train)
    assert run(TINY, compute=COMPUTE, store=store) == first
    with pytest.raises(
        OSError, match=r"cannot write .*: no permission to write there; choose .* DPMIX_STORE"
    ) as caught:
        run(replace(TINY, learning_rate=2.0), compute=COMPUTE, store=store)
    assert "\n" not in str(caught.value)


def test_a_killed_pass_does_not_block_a_smaller_one(tmp_path, monkeypatch):
    """Killed while it stored its results, with another process waiting: the checkpoint that is left belongs to more heads
    than are missing. It once made the second one stop."""
    store = Store(tmp_path)
    specs = [replace(TINY, learning_rate=rate) for rate in (1.0, 2.0, 4.0)]
    real, puts = Store.put, []

    def put(self, result, tensors):
        if len(puts) == 1:
            raise KeyboardInterrupt
        puts.append(result.key)
        real(self, result, tensors)

    with monkeypatch.context() as killed:
        killed.setattr(Store, "put", put)
        with pytest.raises(KeyboardInterrupt):
            run_all(specs, compute=COMPUTE, store=store)
    assert list(tmp_path.glob("*.checkpoint"))
    first_look, seen = Store.get, []

    def get(self, name):  # as the waiting process saw the store: empty at first
        seen.append(name)
        return None if len(seen) <= 3 else first_look(self, name)

    monkeypatch.setattr(Store, "get", get)
    results = run_all(specs, compute=COMPUTE, store=store)
    assert [r.spec for r in results] == specs


def test_an_undecided_accountant_does_not_cost_the_run(tmp_path, monkeypatch):
    """A budget so loose that PRV would need more memory than there is: infinity is told, and the result kept."""

    def too_much(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(privacy.PRVAccountant, "get_epsilon", too_much)
    privacy.epsilon_spent.cache_clear()
    spec = replace(TINY, epsilon=20.0, batch_size=1150, epochs=3.0)
    result = run(spec, compute=COMPUTE, store=Store(tmp_path))
    assert result.epsilon["prv"] == float("inf") and result.epsilon["rdp"] <= 20
    assert Store(tmp_path).get(result.key) == result
