"""Runs survive what happens to computers: kills, Ctrl-C, two at once, a full disk, a folder that may not be written.

After each fault the same call is made again; the store must then hold what an undisturbed run leaves, to the last bit.
The processes that are killed are forked from one that has imported everything and computed nothing.
"""

import errno
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dpmix
from dpmix import ComputeFlags, RunSpec, models, run, run_all
from dpmix.core import accounting, files, heads, network, transforms, views
from dpmix.models.wide_resnet import wide_resnet
from dpmix.runs.result import Result
from dpmix.runs.store import Store

PROGRAM = r"""
import json, os, random, signal, sys, time, traceback, warnings
from dataclasses import replace
from pathlib import Path

import torch

import dpmix
from dpmix.core import files, heads, views
from dpmix.runs import spec
from dpmix.runs.store import Store

RECIPE = views.Recipe(k_base=2, k_self=1, transform="crop")
SPECS = [dpmix.RunSpec(recipe=RECIPE, epsilon=8.0, learning_rate=rate, epochs=4.0, batch_size=128, population=1150)
         for rate in (1.0, 2.0, 4.0, 8.0)]
COMPUTE = dpmix.ComputeFlags(progress=False, workers=1, checkpoint_seconds=0.0, device="cpu", encoder_engine="torch")
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
        real, load = heads.train, heads._load

        def train(*args, **kwargs):
            with (BASE / "log").open("a") as log:
                log.write(f"{folder} trains {len(args[1])}\n")
            return real(*args, **kwargs)

        def went_on(*args):
            state = load(*args)
            with (BASE / "log").open("a") as log:
                log.write(f"{folder} at {state.step}\n")
            return state

        heads.train, heads._load = train, went_on
        dpmix.run_all(specs, compute=compute, store=Store(BASE / folder))
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


def stop_in_time(name, number):
    "The folder of a run that was stopped after its first checkpoint; on a busy machine the signal may come too late."
    for attempt in range(10):
        folder = f"{name}{attempt}"
        status = stop_at(folder, number, None)
        if status:
            return folder, status


spec.epsilons(SPECS[0], spec.mechanism(SPECS[0], 1437))  # accounting is done once, for all children
began = time.monotonic()
assert end(start("calm")) == 0
took = time.monotonic() - began
told = {"took": took}

draw = random.Random(int(sys.argv[2]))
moments = [draw.uniform(0.3, 0.9) * took, draw.uniform(0.3, 1.05) * took]
folder, first = stop_in_time("killed", signal.SIGKILL)
told["kills"] = [first, *(stop_at(folder, signal.SIGKILL, m) for m in moments)]
told["killed"] = end(start(folder)), log(folder), folder

folder, told["interrupts"] = stop_in_time("interrupted", signal.SIGINT)
told["left by the interrupt"] = len(checkpoints(folder))
told["interrupted"] = end(start(folder)), log(folder), folder

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
    """Spec -> what a result must have in common with an undisturbed one (its name is of its store), and its weights."""
    found = {}
    for path in folder.glob("*.json"):
        content = files.read_json(path)
        result = Result.from_json(content)
        assert result.key == path.stem
        about = {k: v for k, v in content.items() if k not in ("key", "timing", "provenance")}
        found[json.dumps(content["spec"], sort_keys=True)] = about, Store(folder).tensors(result)
    return found


def same_as_undisturbed(base: Path, folder: str, exactly: bool = True) -> None:
    calm, other = stored(base / "calm"), stored(base / folder)
    assert calm.keys() == other.keys() and len(calm) == 4
    for name, (about, tensors) in calm.items():
        assert other[name][0] == about
        for part, tensor in tensors.items():
            torch.testing.assert_close(other[name][1][part], tensor, rtol=0, atol=0 if exactly else 1e-5)
    assert not list((base / folder).glob("*.checkpoint*"))


def test_kill_9_and_again(faults):
    told, base = faults
    assert told["kills"][0] == -9, "the first kill fell into the training"
    assert told["killed"][0] == 0
    steps = [int(words[1]) for words in told["killed"][1] if words[0] == "at"]
    assert steps[0] == 0 and max(steps) > 0, "a later call went on from a checkpoint"
    same_as_undisturbed(base, told["killed"][2])


def test_ctrl_c_and_again(faults):
    told, base = faults
    assert told["interrupts"] == 130 and told["left by the interrupt"] == 1
    status, log, folder = told["interrupted"]
    assert status == 0 and [words[0] for words in log] == ["trains", "at", "trains", "at"] and int(log[3][1]) > 0
    same_as_undisturbed(base, folder)


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


# Passes side by side, each in a process of its own.

SIDE_BY_SIDE = (
    PROGRAM.partition("spec.epsilons(")[0]
    + r"""
import psutil
SPECS = [replace(s, seed=seed, epochs=12.0, epsilon=None) for s in SPECS[:2] for seed in (0, 1)]
COMPUTE = replace(COMPUTE, workers=2)


def begin(folder):
    "run_all in a process group of its own, as a notebook's kernel has, once both workers have saved a checkpoint."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        os.dup2(write, 2)
        os.close(read)
        try:
            dpmix.run_all(SPECS, compute=COMPUTE, store=Store(BASE / folder))
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except RuntimeError as error:
            os.write(2, f"said: {error}".encode())
            os._exit(3)
        finally:
            os._exit(1)
    os.close(write)
    return pid, read


def both_at_work(pid, folder):
    "False where one had finished before the other had begun, as can be on a busy machine."
    while len(checkpoints(folder)) < 2:
        if list((BASE / folder).glob("*.json")) or os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.002)
    return True


def done(pid, read):
    status = end(pid)
    with os.fdopen(read) as pipe:
        return status, pipe.read()


def is_worker(process):
    "And not what keeps book of their semaphores, nor what has just ended and is not yet waited for."
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "loky" in words and "resource_tracker" not in words


# In a child too: a process that has run an engine with threads of its own must not fork any more.
assert end(start("calm", SPECS, replace(COMPUTE, workers=1))) == 0
for attempt in range(10):
    folder = f"pair{attempt}"
    pid, read = begin(folder)
    together = both_at_work(pid, folder)
    os.killpg(pid, signal.SIGINT)
    told = {"interrupted": done(pid, read)[0], "folder": folder}
    if together and len(checkpoints(folder)) == 2:
        break
told["steps"] = [files.load_tensors(path)[1]["step"] for path in checkpoints(folder)]
pid, read = begin(folder)
time.sleep(0.2)
while not (workers := [p for p in psutil.Process(pid).children() if is_worker(p)]):
    assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    time.sleep(0.01)
workers[0].kill()
told["killed"] = done(pid, read)
told["again"] = done(*begin(folder))[0]
print(json.dumps(told))
"""
)


def test_workers_that_are_interrupted_or_killed(tmp_path):
    """Ctrl-C reaches the whole process group, as Jupyter sends it: each worker saves its checkpoint once, whole."""
    command = [sys.executable, "-c", SIDE_BY_SIDE, str(tmp_path), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["interrupted"] == 130 and len(told["steps"]) == 2 and min(told["steps"]) > 0
    status, said = told["killed"]
    assert status == 3 and "said: a worker died (exit status {SIGKILL(-9)}); run again, it will go on" in said
    assert told["again"] == 0
    same_as_undisturbed(tmp_path, told["folder"])


# A disk that is full and one that may not be written: real ones where a mount can be made, else limits of the process.

DISKS = r"""
import ctypes, errno, json, os, resource, sys, warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import dpmix
from dpmix.core import files, views
from dpmix.images import data
from dpmix.runs.store import Store

BASE, disk = Path(sys.argv[1]), Path(sys.argv[1]) / "disk"
disk.mkdir()
libc = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_USER, PRIVATE, READ_ONLY, REMOUNT = 0x20000, 0x10000000, 0x44000, 1, 32


def mount(flags):
    return libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", flags, b"size=512k") == 0


mounts = (libc.unshare(NEW_MOUNTS) == 0 or libc.unshare(NEW_MOUNTS | NEW_USER) == 0)
mounts = mounts and libc.mount(b"none", b"/", None, PRIVATE, None) == 0 and mount(0)


def fill():
    if not mounts:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        return
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def free():
    if mounts:
        (disk / "filler").unlink()
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def close():
    if mounts:
        assert mount(REMOUNT | READ_ONLY)
    else:
        for folder in (disk, *(p for p in disk.rglob("*") if p.is_dir())):
            folder.chmod(0o555)


def said(action):
    try:
        action()
    except OSError as error:
        return str(error)
    return ""


photos = BASE / "photos"
for part in ("train", "test"):
    for c in ("a", "b"):
        (photos / part / c).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng([ord(c), i, part == "test"]).integers(0, 256, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(photos / part / c / f"{i}.png")

store = Store(disk / "runs")
spec = dpmix.RunSpec(recipe=views.Recipe(k_base=1, transform="none"), epsilon=None, learning_rate=4.0, epochs=0.5,
                           batch_size=256)
compute = dpmix.ComputeFlags(progress=False, workers=1, checkpoint_seconds=0.0, device="cpu", encoder_engine="torch")
run = lambda rate: dpmix.run(replace(spec, learning_rate=rate), compute=compute, store=store)
decode = lambda: data.load(f"folder:{photos}", cache=disk / "cache")

first = run(4.0)
before = {p.name: p.read_bytes() for p in store.folder.iterdir() if p.is_file()}
intact = lambda: before == {p.name: p.read_bytes() for p in store.folder.iterdir() if p.is_file()}
told = {"mounts": mounts}
fill()
told["full"] = said(lambda: run(2.0)), intact(), run(4.0) == first
told["full cache"] = said(decode), sorted(p.name for p in (disk / "cache").glob("*"))
free()
second = run(2.0)
before = {p.name: p.read_bytes() for p in store.folder.iterdir() if p.is_file()}
decode()
close()
told["closed"] = said(lambda: run(1.0)), intact(), [run(4.0), run(2.0)] == [first, second]
told["read"] = said(decode)
(photos / "train" / "a" / "0.png").unlink()
told["closed cache"] = said(decode)
print(json.dumps(told))
"""


def test_a_disk_that_is_full_and_one_that_may_not_be_written(tmp_path):
    command = [sys.executable, "-c", DISKS, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    line, intact, readable = told["full"]
    assert "cannot write" in line and line.endswith("and run again, what is stored is intact"), line
    assert intact and readable
    line, left = told["full cache"]
    assert "cannot be written (" in line and "; free space or name another folder" in line and set(left) <= {".lock"}
    line, intact, readable = told["closed"]
    assert "cannot write" in line and "choose a folder that can be written" in line and "DPMIX_STORE" in line
    assert intact and readable and told["read"] == "", "what is there can be read"
    assert "cannot be written (" in told["closed cache"]
    if told["mounts"]:
        assert "the disk is full" in told["full"][0] and "read-only" in told["closed"][0]


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

    def closed(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.lock_file)

    def train(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(files.filelock.FileLock, "acquire", closed)
    monkeypatch.setattr(heads, "train", train)
    assert run(TINY, compute=COMPUTE, store=store) == first
    with pytest.raises(
        OSError, match=r"cannot write .*: no permission to write there; choose .* DPMIX_STORE"
    ) as caught:
        run(replace(TINY, learning_rate=2.0), compute=COMPUTE, store=store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "a bit", "a pickle", "another result"])
def test_a_damaged_result_is_made_anew(damage, tmp_path):
    store = Store(tmp_path)
    first, other = run_all([TINY, replace(TINY, learning_rate=2.0)], compute=COMPUTE, store=store)
    path = tmp_path / f"{first.key}.json"
    whole = path.read_bytes()
    middle = whole.index(b'"test_accuracy": 0.') + len(b'"test_accuracy": 0.')
    path.write_bytes({
        "truncated": whole[: len(whole) // 2], "a bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "a pickle": pickle.dumps(Trap(tmp_path / "sprung")), "another result": (tmp_path / f"{other.key}.json").read_bytes(),
    }[damage])  # fmt: skip
    with pytest.warns(UserWarning, match=rf"{first.key}\.json: .*; it is left out and made anew"):
        again = run(TINY, compute=COMPUTE, store=store)
    assert not (tmp_path / "sprung").exists()
    assert again.test_accuracy == first.test_accuracy and store.get(first.key) == again
    assert store.get(other.key) == other


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self):
        return (os.mkdir, (str(self.sprung),))


@pytest.mark.parametrize("damage", ["truncated", "a bit", "a pickle"])
def test_damaged_weights_of_a_result_are_refused_and_can_be_made_anew(damage, tmp_path):
    store = Store(tmp_path)
    first = run(TINY, compute=COMPUTE, store=store)
    weights = store.tensors(first)
    path = tmp_path / f"{first.key}.safetensors"
    whole = path.read_bytes()
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    path.write_bytes({"truncated": whole[:-4], "a bit": whole[:-1] + bytes([whole[-1] ^ 1]), "a pickle": trap}[damage])
    with pytest.raises(ValueError, match=r"weights='.*': damaged .* then remove the JSON beside it too and run again"):
        store.tensors(first)
    with pytest.raises(ValueError, match="damaged"):
        dpmix.release(replace(first, noise_multiplier=1.0, seed_drawn=True), tmp_path / "out",
                            store=store)  # fmt: skip
    assert not (tmp_path / "out").exists() and not (tmp_path / "sprung").exists()
    for part in (path, tmp_path / f"{first.key}.json"):
        part.unlink()
    again = store.tensors(run(TINY, compute=COMPUTE, store=store))
    assert all(torch.equal(again[k], t) for k, t in weights.items())


def test_a_checkpoint_that_is_no_checkpoint_is_refused_and_never_unpickled(tmp_path):
    path = tmp_path / "bank"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4)
    head = heads.Head(recipe=views.Recipe(k_base=1, transform="none"), learning_rate=1.0, noise_multiplier=1.0)
    encoder = models.Encoder(lambda x: x.flatten(1), 8, 64, (1,), "pixels")
    about = dict(num_classes=4, expected_batch=2, steps=1, seed=0, progress=False)
    with pytest.raises(ValueError, match=r"checkpoint='.*bank': damaged .*; remove it to start afresh"):
        heads.train_heads(encoder, images, labels, [head], checkpoint=path, **about)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    with pytest.raises(ValueError, match=r"checkpoint='.*bank': damaged .*; remove it to start afresh"):
        network.train(model, images, labels, recipe=head.recipe, clip_norm=1, noise_multiplier=1, learning_rate=1,
                      sample_rate=0.5, checkpoint=path, **about)  # fmt: skip
    assert not (tmp_path / "sprung").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap works"


# Pixels and labels.

FAULTY = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "huge": 1e30, "black": 0.0}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", transforms.TRANSFORMS)
def test_pixels_that_are_no_numbers_stay_with_their_image(name, channels):
    """No transformation stops at them, whichever it is; the views of the other images do not change."""
    images = torch.from_numpy(np.random.default_rng(0).random((len(FAULTY) + 2, channels, 9, 9))).float()
    recipe = views.Recipe(k_base=3, k_self=2, transform=name)
    labels, ids = torch.arange(len(images)) % 3, torch.arange(len(images))
    about = dict(num_classes=3, seed=0, step=0)
    clean = views.make_views(images, labels, ids, recipe, **about)
    faulty = images.clone()
    for i, value in enumerate(FAULTY.values()):
        faulty[i, :, 2:5, 4] = value
    faulty[len(FAULTY) - 1] = 0  # all black
    made = views.make_views(faulty, labels, ids, recipe, **about)
    assert torch.equal(made.images[len(FAULTY) :], clean.images[len(FAULTY) :])
    assert torch.equal(made.targets, clean.targets)
    assert made.images[len(FAULTY) - 1].isfinite().all()


@pytest.mark.parametrize("engine", ["loop", "grouped", "vmap"])
def test_pixels_that_are_no_numbers_leave_a_network_finite(engine):
    """Dropped, where the gradient is no number, and counted; no error, and nobody else's gradient changes."""
    images = torch.from_numpy(np.random.default_rng(0).random((8, 1, 8, 8))).float()
    for i, value in enumerate(FAULTY.values()):
        images[i, 0, 2:5, 4] = value
    images[len(FAULTY) - 1] = 0
    labels = torch.arange(8) % 3
    recipe = views.Recipe(k_base=2, k_self=1, transform="crop")
    about = dict(recipe=recipe, num_classes=3, clip_norm=0.5, noise_multiplier=0.0, learning_rate=0.1, expected_batch=4,
                 sample_rate=1.0, steps=2, seed=0, engine=engine, progress=False)  # fmt: skip
    trained = network.train(wide_resnet(10, 1, 3, channels=1, seed=0), images, labels, **about)
    assert all(t.isfinite().all() for t in trained.state.values())
    assert trained.counters["non_finite"] >= 2 * 3, "three images, two steps"


def test_a_class_that_nobody_has_is_trained_and_tested_all_the_same():
    """Neither training nor evaluation may depend on whether the last example of a class is there."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8))
    labels = torch.arange(12) % 2  # of three classes
    encoder = models.Encoder(lambda x: x.flatten(1), 8, 64, (1,), "pixels")
    head = heads.Head(recipe=views.Recipe(k_base=2, transform="crop"), learning_rate=1.0, noise_multiplier=1.0)
    bank = heads.train_heads(
        encoder, images, labels, [head], num_classes=3, expected_batch=6, steps=3, seed=0, progress=False
    )
    assert bank.weights.shape == (1, 3, 64) and bank.weights.isfinite().all()
    found = heads.accuracy(bank, heads.encode(encoder, images), 2 - labels)  # classes 1 and 2: none of class 0
    assert 0 <= float(found[0]) <= 1
    trained = network.train(wide_resnet(10, 1, 3, channels=1, seed=0), images, labels, recipe=head.recipe, num_classes=3,
                            clip_norm=1, noise_multiplier=1, learning_rate=1, expected_batch=6, sample_rate=0.5, steps=2,
                            seed=0, progress=False)  # fmt: skip
    assert all(t.isfinite().all() for t in trained.state.values())


def test_pixels_of_another_type_are_refused_before_training(monkeypatch):
    monkeypatch.setattr(views, "make_views", lambda *a, **k: pytest.fail("work began"))
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.int32), torch.arange(4) % 3
    with pytest.raises(ValueError, match=r"images\.dtype=torch\.int32: must be uint8"):
        network.train(wide_resnet(10, 1, 3, channels=1, seed=0), images, labels, recipe=views.Recipe(k_base=1),
                      num_classes=3, clip_norm=1, noise_multiplier=1, learning_rate=1, expected_batch=2, sample_rate=0.5,
                      steps=1, seed=0, progress=False)  # fmt: skip


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
        return None if len(seen) == 1 else first_look(self, name)

    monkeypatch.setattr(Store, "get", get)
    results = run_all(specs, compute=COMPUTE, store=store)
    assert [r.spec for r in results] == specs


def test_an_undecided_accountant_does_not_cost_the_run(tmp_path, monkeypatch):
    """A budget so loose that PRV would need more memory than there is: infinity is told, and the result kept."""

    def too_much(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(accounting.PRVAccountant, "get_epsilon", too_much)
    accounting.epsilon_spent.cache_clear()
    spec = replace(TINY, epsilon=20.0, batch_size=1150, epochs=3.0)
    result = run(spec, compute=COMPUTE, store=Store(tmp_path))
    assert result.epsilon["prv"] == float("inf") and result.epsilon["rdp"] <= 20
    assert Store(tmp_path).get(result.key) == result
