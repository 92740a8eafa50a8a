"""Files are whole or absent, damage is named, a checkpoint knows its owner, and nothing is unpickled."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from dpmix.core import files

TENSORS = {"weights": torch.arange(6.0).reshape(2, 3), "biases": torch.tensor([0.1, 1e-40])}
SPEC = {"clip_norm": 0.5, "recipe": (16, 18)}


def same(found, tensors=TENSORS):
    return found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in tensors)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_digest_depends_on_parts_and_their_boundaries():
    assert files.digest("ab", "c") != files.digest("a", "bc") != files.digest("abc")
    assert files.digest("a") == files.digest(b"a") and len(files.digest()) == 64


def test_json_round_trip(tmp_path):
    content = {"b": [1, 2.5, None, True], "a": {"ε": "ü", "f": 0.1 + 0.2}}
    path = tmp_path / "new" / "folder" / "x.json"
    files.write_json(path, content)
    assert files.read_json(path) == content
    assert json.loads(path.read_text())["content"] == content, "plain JSON, for other programs too"
    assert names(path.parent) == {"x.json"} and path.stat().st_mode & 0o777 == 0o644
    assert files.read_json(tmp_path / "absent.json") is None


@pytest.mark.parametrize("damage", [
    lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw.replace(b"0.5", b"0.6"), lambda raw: b"\x80\x04junk",
    lambda raw: b"[1]", lambda raw: b"3", lambda raw: b"{}", lambda raw: raw.replace(b"sha256", b"sha255"), lambda raw: b"null",
])  # fmt: skip
def test_damaged_json_is_named_and_counts_as_absent(damage, tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"accuracy": 0.5})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"x\.json: it.* is left out and made anew"):
        assert files.read_json(path) is None


def test_tensors_round_trip_with_meta(tmp_path):
    path = tmp_path / "c"
    files.save_tensors(path, TENSORS, SPEC, {"step": 3})
    tensors, meta = files.load_tensors(path, SPEC)
    assert same(tensors) and meta == {"step": 3}
    assert files.load_tensors(tmp_path / "absent", SPEC) is None
    assert names(tmp_path) == {"c"}


def checkpoint(tmp_path) -> Path:
    path = tmp_path / "c"
    files.save_tensors(path, TENSORS, SPEC, {"step": 2}, private=True)
    return path


DAMAGE = {
    "truncated": lambda raw: raw[:-4], "cut in the header": lambda raw: raw[:20], "empty": lambda raw: b"",
    "a bit": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "other meta": lambda raw: raw.replace(b"step", b"stop"),
    "header no object": lambda raw: (4).to_bytes(8, "little") + b"1234", "not at all": lambda raw: os.urandom(100),
    "no metadata": lambda raw: (2).to_bytes(8, "little") + b"{}",
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_left_alone(how, tmp_path):
    path = checkpoint(tmp_path)
    raw = path.read_bytes()
    broken = DAMAGE[how](raw)
    assert broken != raw
    path.write_bytes(broken)
    with pytest.raises(files.Damaged, match=r"checkpoint='.*/c': damaged \(.*\); remove it to start afresh"):
        files.load_tensors(path, SPEC)
    assert path.read_bytes() == broken, "what may be no checkpoint at all is not written over"


@pytest.mark.parametrize("at", ["write", "fsync", "chmod", "replace"])
def test_a_write_that_is_cut_off_anywhere_leaves_the_whole_one_before_it(at, tmp_path, monkeypatch):
    path = checkpoint(tmp_path)

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    where = {"write": (os, "fdopen"), "fsync": (os, "fsync"), "chmod": (Path, "chmod"), "replace": (Path, "replace")}
    monkeypatch.setattr(*where[at], cut)
    with pytest.raises(KeyboardInterrupt):
        files.save_tensors(path, {}, SPEC, {"step": 3}, private=at != "chmod")
    monkeypatch.undo()
    found, meta = files.load_tensors(path, SPEC)
    assert meta == {"step": 2} and same(found) and names(tmp_path) == {"c"}


def test_what_is_private_is_its_owners_alone(tmp_path):
    """Whatever the umask; a folder that is made for it too. Anything else is as open as the umask lets it be."""
    path = tmp_path / "seeds" / "x.json"
    files.write_json(path, {}, private=True)
    files.save_tensors(tmp_path / "c", TENSORS, SPEC, private=True)
    files.write_json(tmp_path / "card.json", {})
    modes = [p.stat().st_mode & 0o777 for p in (path, path.parent, tmp_path / "c", tmp_path / "card.json")]
    assert modes == [0o600, 0o700, 0o600, 0o644]


def test_the_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    path = checkpoint(tmp_path)
    with pytest.raises(ValueError) as caught:
        files.load_tensors(path, {"clip_norm": 0.25, "recipe": (16, 18), "seed": 1})
    assert str(caught.value) == (
        f"checkpoint={str(path)!r}: belongs to another run (clip_norm: 0.5 there, 0.25 here; seed: None there, 1 here); "
        "give another path or remove it"
    )
    assert files.load_tensors(path)[1] == {"step": 2}, "nothing is compared where nothing is asked"


def test_nothing_is_left_beside_a_file(tmp_path):
    path = tmp_path / "model.safetensors"
    for step in range(3):
        files.save_tensors(path, TENSORS, SPEC, {"step": step})
    assert names(tmp_path) == {"model.safetensors"}


@pytest.mark.parametrize("tensor", [torch.tensor(3), torch.zeros(0, 2), torch.ones(2, 3, dtype=torch.bfloat16).T,
                                    torch.tensor([True, False]), torch.arange(4, dtype=torch.int64)])  # fmt: skip
def test_tensors_of_any_kind(tensor, tmp_path):
    files.save_tensors(tmp_path / "c", {"x": tensor}, SPEC)
    found = files.load_tensors(tmp_path / "c", SPEC)[0]["x"]
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize(
    "saved", [lambda x, f: f.write_bytes(pickle.dumps(x)), lambda x, f: torch.save({"weights": x}, f)]
)
def test_a_malicious_pickle_is_never_loaded(saved, tmp_path):
    target, path = tmp_path / "executed", tmp_path / "c"
    saved(Payload(target), path)
    with pytest.raises(ValueError, match="damaged"):
        files.load_tensors(path, SPEC)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert files.read_json(path) is None
    assert not target.exists()
    torch.load(path, weights_only=False) if path.read_bytes()[:2] == b"PK" else pickle.loads(path.read_bytes())
    assert target.exists(), "the payload works where it is let in"


# A disk that is full, a file that may not be larger, a folder that may not be written.


def full_disk(monkeypatch, number=errno.ENOSPC):
    def fail(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)


@pytest.mark.parametrize(("number", "said"), [
    (errno.ENOSPC, "the disk is full; free some space and run again, what is stored is intact"),
    (errno.EDQUOT, "the disk quota is used up"), (errno.EROFS, "the file system is read-only; choose a folder"),
])  # fmt: skip
def test_no_room_leaves_what_was_there_and_says_what_to_do(number, said, tmp_path, monkeypatch):
    path = checkpoint(tmp_path)
    files.write_json(tmp_path / "x.json", {"a": 1})
    full_disk(monkeypatch, number)
    for write in (
        lambda: files.save_tensors(path, TENSORS, SPEC, {"step": 3}),
        lambda: files.write_json(tmp_path / "x.json", {}),
    ):
        with pytest.raises(OSError, match=f"cannot write .*(c|x.json): {said}") as caught:
            write()
        assert caught.value.errno == number and "\n" not in str(caught.value)
    assert names(tmp_path) == {"c", "x.json"}, "no rubbish, and nothing moved"
    assert files.load_tensors(path, SPEC)[1] == {"step": 2}
    assert files.read_json(tmp_path / "x.json") == {"a": 1}


def in_child(action) -> str:
    """What `action` raises in a forked process, which it may restrict; or ""."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action()
            said = ""
        except BaseException as err:
            said = f"{type(err).__name__}: {err}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_a_real_limit_in_the_middle_of_a_write(tmp_path):
    path = checkpoint(tmp_path)

    def action():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        files.save_tensors(path, {"weights": torch.zeros(10_000)}, SPEC, {"step": 3})

    assert "larger than is allowed" in in_child(action)
    assert names(tmp_path) == {"c"} and files.load_tensors(path, SPEC)[1] == {"step": 2}


def without_rights():
    if os.geteuid() == 0:  # root may write anywhere: become nobody
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


@pytest.fixture
def shared_folder(tmp_path):
    """A folder that other users can reach, for the time of a test."""
    top = Path(tempfile.gettempdir())
    above = [p for p in (tmp_path, *tmp_path.parents) if p != top and p.is_relative_to(top)]
    modes = [p.stat().st_mode & 0o777 for p in above]
    for p in above:
        p.chmod(0o755)
    yield tmp_path
    for p, mode in zip(above, modes, strict=True):
        p.chmod(mode)


def test_a_folder_that_may_not_be_written(shared_folder):
    folder = shared_folder / "store"
    folder.mkdir()
    folder.chmod(0o555)

    def attempt(write):
        def action():
            without_rights()
            write()

        return in_child(action)

    for write, name in (
        (lambda: files.write_json(folder / "x.json", {}), "x.json"),
        (lambda: files.save_tensors(folder / "c", TENSORS, SPEC), "c"),
        (lambda: files.write_json(folder / "deeper" / "x.json", {}), "deeper/x.json"),
        (lambda: files.lock(folder / "locks" / "a").__enter__(), "locks/a"),
    ):
        said = attempt(write)
        assert (
            f"cannot write {folder / name}: no permission to write there; choose a folder that can be written" in said
        )
        assert "DPMIX_STORE" in said
    folder.chmod(0o777)
    assert attempt(lambda: files.write_json(folder / "x.json", {})) == "", "the test must be able to pass"


# Two at a time.


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    held, trouble = [], []

    def work():
        for _ in range(20):
            with files.lock(tmp_path / "deep" / "lock"):
                held.append(1)
                if len(held) > 1:
                    trouble.append(1)
                time.sleep(0.0005)
                held.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not trouble


def test_a_lock_is_free_after_its_holder_died(tmp_path):
    ready = tmp_path / "ready"
    pid = os.fork()
    if pid == 0:
        with files.lock(tmp_path / "lock"):
            ready.touch()
            time.sleep(60)
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    with files.lock(tmp_path / "lock"):
        pass


def _write_often(path: Path, number: int) -> None:
    for step in range(60):
        files.save_tensors(
            path, {"weights": torch.full((1000,), number + step / 100)}, SPEC, {"value": number + step / 100}
        )


def test_writers_and_readers_at_once_see_whole_files(tmp_path, recwarn):
    """Two processes write one checkpoint, without a lock; a third reads."""
    path = tmp_path / "c"
    files.save_tensors(path, {"weights": torch.full((1000,), 0.0)}, SPEC, {"value": 0.0})
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, n)) for n in (1, 2)]
    for w in writers:
        w.start()
    reads = 0
    while any(w.is_alive() for w in writers):
        found = files.load_tensors(path, SPEC)
        assert found is not None
        reads += 1
        assert (found[0]["weights"] == torch.tensor(found[1]["value"])).all()
    for w in writers:
        w.join()
        assert w.exitcode == 0
    assert reads > 0 and not [w for w in recwarn if "damaged" in str(w.message)]
    assert names(tmp_path) == {"c"}


def test_records_are_as_closed_as_the_umask_asks(tmp_path):
    closed = "import os, pathlib, sys; os.umask(0o077); from dpmix.core import files;"
    script = f"{closed} files.write_json(pathlib.Path(sys.argv[1]), {{}})"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.json")], check=True)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600
