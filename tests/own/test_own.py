"""One's own images: check, train, predict, the report, the command line; what people got wrong before."""

import errno
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dpmix
from dpmix.__main__ import main
from dpmix.companion import examples, paper
from dpmix.core import accounting, files, rng, views
from dpmix.images import data, layouts
from dpmix.own import report, settings
from dpmix.own import train as training
from dpmix.runs import predict as predicting

PROJECT = Path(__file__).resolve().parents[2]
QUICK = dict(epochs=30, learning_rate=8, model="tiny-convnext", progress=False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """400 digits for training and 100 for testing as PNG files; no synthetic ones."""
    splits, base = data.load("digits"), tmp_path_factory.mktemp("own") / "photos"
    for part, images in (("train", splits.train.subset(range(400))), ("test", splits.test.subset(range(100)))):
        for i, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            place = base / part / f"digit {label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0].numpy()).save(place / f"{i:03d}.png")
    return base


@pytest.fixture(scope="module")
def trained(photos) -> training.Trained:
    return dpmix.train(photos, 8, out=photos.with_name("release"), delta=1e-4, **QUICK)


# ---------------------------------------------------------------------------------------------------------------- train


def test_a_release_is_whole_and_what_is_private_lies_beside_it(trained, photos):
    assert trained.release == photos.with_name("release")
    names = ["README.md", "class_names.json", "model.safetensors", "privacy_card.json"]
    assert sorted(p.name for p in trained.release.iterdir()) == names
    private = photos.parent / "private"
    assert trained.private == private / "release"
    kept = [".gitignore", "confusion.png", "lock", "log.txt", "report.json", "report.md"]
    assert sorted(p.name for p in trained.private.iterdir()) == kept
    if shutil.which("git"):
        subprocess.run(["git", "init", "-q"], cwd=photos.parent, check=True)
        listed = subprocess.run(
            ["git", "add", "-An"], cwd=photos.parent, capture_output=True, text=True, check=True
        ).stdout
        shutil.rmtree(photos.parent / ".git")
        assert "private/" not in listed and "release/README.md" in listed
    modes = {stat.S_IMODE(p.stat().st_mode) for p in [private, *private.rglob("*")]}
    assert modes == {0o700, 0o600}
    assert sorted(p.name for p in photos.parent.iterdir()) == ["photos", "private", "release"]
    classes = json.loads((trained.release / "class_names.json").read_text())
    assert classes == [f"digit {c}" for c in range(10)]
    card = json.loads((trained.release / "privacy_card.json").read_text())["content"]
    assert card["spec"]["delta"] == 1e-4 and card["images"] == [1, 16, 16] and card["spec"]["redraw"] is False
    assert card["guarantee"]["epsilon"]["pld"] == pytest.approx(8, abs=0.01)
    assert not any("validation split" in line for line in card["not_accounted_for"]), "there was none"
    assert any("the names of the classes, whether any is in colour" in line for line in card["not_accounted_for"])


def test_nothing_private_is_in_the_release(trained, photos):
    (record,) = (photos.parent / "private" / "runs").glob("*.json")
    seed = str(json.loads(record.read_text())["content"]["spec"]["seed"])
    accuracy = trained.report["accuracy"]
    for path in trained.release.iterdir():
        text = path.read_bytes().decode("latin-1")
        for secret in (seed, str(photos), repr(accuracy), "test/digit"):
            assert secret not in text, (path.name, secret)
    assert seed in record.read_text(), "the control: it is in the private record"
    assert seed not in (trained.private / "log.txt").read_text() + repr(trained)


def test_the_report_says_what_the_test_images_say(trained, photos):
    seen = trained.report
    assert seen == json.loads((trained.private / "report.json").read_text())
    assert seen["images"] == 100 and 0.6 < seen["accuracy"] < 0.99  # 10 classes; too good would be a leak
    confusion = np.array(seen["confusion"])
    assert confusion.trace() == round(100 * seen["accuracy"]) and confusion.sum() == 100
    assert len(seen["errors"]) == 100 - confusion.trace()
    error = seen["errors"][0]
    assert (photos / error["image"]).is_file() and error["image"].split("/")[1] == error["true"] != error["predicted"]
    text = (trained.private / "report.md").read_text()
    assert f"{100 * seen['accuracy']:.1f} % of 100 test images" in text and "95 % interval" in text
    assert Image.open(trained.private / "confusion.png").size[0] > 300
    assert f"{100 * seen['accuracy']:.1f} % of 100 test images" in trained._repr_markdown_()


def test_a_second_training_into_a_release_is_refused_before_any_work(trained, photos, monkeypatch):
    monkeypatch.setattr(training, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"out='.*release': is there already; name another folder"):
        dpmix.train(photos, 8, out=trained.release, delta=1e-4, **QUICK)


def test_what_was_cut_off_before_its_release_is_not_trained_again(trained, photos, monkeypatch):
    again = photos.with_name("again")
    monkeypatch.setattr(training, "run", lambda *_, **__: pytest.fail("trained"))
    with monkeypatch.context() as cut:
        cut.setattr(training, "predict", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dpmix.train(photos, 8, out=again, delta=1e-4, **QUICK)
    assert not [p for p in photos.parent.iterdir() if "partial" in p.name], "nothing that looks like a release"
    assert not again.exists() and "stopped: KeyboardInterrupt" in (again.parent / "private/again/log.txt").read_text()
    found = dpmix.train(photos, 8, out=again, delta=1e-4, **QUICK)
    assert "trained before this call in" in (found.private / "log.txt").read_text()
    assert "before this call" not in (trained.private / "log.txt").read_text()
    ours, theirs = (load_file(t.release / "model.safetensors") for t in (found, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in ("weight", "bias")) and found.report == trained.report
    with pytest.raises(pytest.fail.Exception, match="trained"):  # another budget is another run
        dpmix.train(photos, 7, out=photos.with_name("third"), delta=1e-4, **QUICK)
    shutil.rmtree(again)


@pytest.mark.parametrize("out", [".", "/", "\xe9" * 120])
def test_a_release_is_called_anything_or_refused_by_name(photos, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    if len(out) > 1:
        with training._appearing(Path(out)) as partial:
            (partial / "model").touch()
        assert stat.S_IMODE(Path(out).stat().st_mode) & 0o700 == 0o700 and [p.name for p in tmp_path.iterdir()] == [out]
    else:
        with pytest.raises(ValueError, match=r"^out='[./]+': "):
            dpmix.train(photos, 8, out=out, delta=1e-4, **QUICK)


def test_two_trainings_for_one_release_do_not_mix(photos, tmp_path, monkeypatch):
    """The card of one with the words of the other would be worse than none."""
    monkeypatch.setattr(training, "run", lambda *_, **__: pytest.fail("trained"))
    with (
        files.lock(tmp_path / "private" / "release" / "lock"),
        pytest.raises(ValueError, match=r"out='.*release': another training is under way for it; wait for its end"),
    ):
        dpmix.train(photos, 8, out=tmp_path / "release", delta=1e-4, **QUICK)


def test_a_release_appears_where_the_private_folder_is_on_another_disk(trained, photos, monkeypatch):
    again, real = photos.with_name("elsewhere"), Path.rename

    def rename(self, target):
        disks = [{"private"} & set(p.relative_to(photos.parent).parts) for p in (self, Path(target))]
        if disks[0] != disks[1]:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(training, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.warns(UserWarning, match="this very run was trained before"):
        assert dpmix.train(photos, 8, out=again, delta=1e-4, **QUICK).release == again
    assert not [p for p in photos.parent.iterdir() if "partial" in p.name]
    shutil.rmtree(again)


def test_release_photographs_and_what_is_private_lie_apart(photos, tmp_path):
    with pytest.raises(ValueError, match=r"out='.*release': lies inside the folder of images, .*, among its classes"):
        dpmix.train(photos, 8, out=photos / "release", delta=1e-4, **QUICK)
    assert sorted(p.name for p in photos.iterdir()) == ["test", "train"]
    moved = shutil.copytree(photos, tmp_path / "private")
    for folder in (moved, moved / "train"):
        with pytest.raises(ValueError, match=r"folder='.*private.*': lies in .*private, where what is private will go"):
            dpmix.train(folder, 8, out=tmp_path / "release", delta=1e-4, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["private"]
    assert sorted(p.name for p in Path(moved).iterdir()) == ["test", "train"]
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"out='.*link': is there already"):
        dpmix.train(photos, 8, out=tmp_path / "link", delta=1e-4, **QUICK)


def test_a_private_folder_of_somebodys_own_is_left_as_it_is(photos, tmp_path):
    tool, elsewhere = tmp_path / "private" / "tool.sh", tmp_path / "elsewhere.txt"
    tool.parent.mkdir(mode=0o755)
    for path, mode in ((tool, 0o755), (elsewhere, 0o644)):
        path.touch()
        path.chmod(mode)
    (tool.parent / "link").symlink_to(elsewhere)
    (tool.parent / "broken").symlink_to("nowhere")
    found = dpmix.train(photos, 8, out=tmp_path / "release", delta=1e-4, **QUICK | dict(epochs=2))
    assert [stat.S_IMODE(p.stat().st_mode) for p in (tool.parent, tool, elsewhere)] == [0o755, 0o755, 0o644]
    assert stat.S_IMODE(found.private.stat().st_mode) == 0o700
    ours = [p for name in ("cache", "runs", "release") for p in (tool.parent / name).rglob("*")]
    assert {stat.S_IMODE(p.stat().st_mode) for p in ours} == {0o700, 0o600}


KILLED = """
import os, signal, sys
from dpmix.core import heads
import dpmix
noise, steps = heads._add_noise, []
def dies(*args, **more):
    steps.append(1)
    if len(steps) == 20: os.kill(os.getpid(), signal.SIGKILL)
    return noise(*args, **more)
if sys.argv[3] == "kill": heads._add_noise = dies
print(dpmix.train(sys.argv[1], 8, out=sys.argv[2], delta=1e-4, epochs=30, learning_rate=8, progress=False).release)
"""


def test_killed_in_the_middle_and_started_again(photos, tmp_path):
    out = tmp_path / "release"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(photos), str(out)]
    killed = subprocess.run([*command, "kill"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["private"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")} == {0o700, 0o600}, "also in the middle"
    done = subprocess.run([*command, "go"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["private", "release"] and len(list(out.iterdir())) == 4


def test_the_learning_rate_is_searched_on_public_images_where_there_are_some(photos, tmp_path):
    base = Path(shutil.copytree(photos, tmp_path / "photos"))
    public = data.public_images("digits")
    for c in range(10):
        place = base / "synthetic" / f"digit {c}"
        place.mkdir(parents=True)
        for i in torch.nonzero(public.labels == c)[:10, 0].tolist():
            pixels = public.images[i, 0].numpy().repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(place / f"{i}.png")
            pixels[0, 0] ^= 1  # nothing is left of it at the size of the encoder
            Image.fromarray(pixels).save(place / f"{i} again.png")
    asked = {k: v for k, v in QUICK.items() if k != "learning_rate"} | dict(
        epochs=4
    )  # more images in a batch than public ones
    found = dpmix.train(base, 8, out=tmp_path / "out", delta=1e-4, **asked)
    rates = settings.plan(base, 8, delta=1e-4, **asked).rates
    assert len(rates) == 5 and f"the best of {rates} on public images" in (found.private / "log.txt").read_text()
    card = json.loads((found.release / "privacy_card.json").read_text())["content"]
    assert card["spec"]["learning_rate"] in rates and card["spec"]["train_on"] == "all"


# -------------------------------------------------------------------------------------------------------------- predict


def test_files_arrays_pictures_and_a_folder_are_one_thing(trained, photos):
    files = sorted((photos / "test" / "digit 3").iterdir())
    by_folder = dpmix.predict(trained.release, photos / "test" / "digit 3")
    assert by_folder.sources == [str(f) for f in files]
    assert by_folder.probabilities.shape == (len(files), 10) and np.allclose(
        by_folder.probabilities.sum(1), 1, atol=1e-5
    )
    assert by_folder.class_names == [by_folder.classes[c] for c in by_folder.probabilities.argmax(1)]
    pixels = np.stack([np.asarray(Image.open(f)) for f in files])
    for given in (files, [Image.open(f) for f in files], pixels[:, None], torch.tensor(pixels)[..., None]):
        found = dpmix.predict(trained.release, given)
        assert np.abs(found.probabilities - by_folder.probabilities).max() < 1e-6
    one = dpmix.predict(trained.release, str(files[0]))
    assert one.class_names == by_folder.class_names[:1]
    colour = np.repeat(pixels[..., None], 3, axis=3)
    assert np.abs(dpmix.predict(trained.release, colour).probabilities - by_folder.probabilities).max() < 1e-6


def test_a_picture_has_its_true_class_under_it(trained, photos):
    files = sorted((photos / "test" / "digit 3").iterdir())[:2]
    found = dpmix.predict(trained.release, files)
    shown = [axes.texts[0].get_text() for axes in examples.predicted(found, ["digit 3", "digit 9"]).axes]
    assert ["".join(text.split()).partition("true:")[2] for text in shown] == ["digit3", "digit9"]
    assert all(
        "".join(text.split()).startswith(c.replace(" ", "")) for text, c in zip(shown, found.class_names, strict=True)
    )


def test_a_stranger_with_the_folder_alone_classifies_in_one_line(trained, photos, tmp_path):
    folder = shutil.copytree(trained.release, tmp_path / "given")
    image = shutil.copy(next((photos / "test" / "digit 0").iterdir()), tmp_path / "image.png")
    command = [sys.executable, "-W", "ignore", "-m", "dpmix", "predict", str(folder), str(image)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    head, row = done.stdout.splitlines()
    assert done.returncode == 0 and head == "image,class,probability"
    assert row.startswith(f"{image},digit ") and 0.1 < float(row.rpartition(",")[2]) <= 1


def test_another_encoder_another_model_and_damage_are_refused(trained, photos, tmp_path):
    other = data.PUBLIC / "tiny-vit.safetensors"
    with pytest.raises(ValueError, match=r"weights='.*tiny-vit.*is not the encoder of this release, tiny-convnext"):
        dpmix.predict(trained.release, photos / "test", weights=other)
    folder = Path(shutil.copytree(trained.release, tmp_path / "given"))
    path = folder / "privacy_card.json"
    card = path.read_text()
    path.write_text(card.replace("digit 3", "digit 9"))
    with pytest.warns(UserWarning, match="checksum"), pytest.raises(ValueError, match=r"card\.json is damaged"):
        dpmix.predict(folder, photos / "test")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no privacy_card\.json there"):
        dpmix.predict(folder, photos / "test")
    path.write_text(card)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"release='.*model\.safetensors': damaged .* or fetch it again"):
        dpmix.predict(folder, photos / "test")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors there"):
        dpmix.predict(folder, photos / "test")


def test_images_that_cannot_be_are_refused_by_name(trained, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"images='.*x\.png': cannot be decoded \(not an image\)"):
        dpmix.predict(trained.release, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"images='.*absent\.png': no such file or folder"):
        dpmix.predict(trained.release, tmp_path / "absent.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"images='.*empty': holds no images; taken are \.jpg"):
        dpmix.predict(trained.release, tmp_path / "empty")
    with pytest.raises(ValueError, match=r"images='torch\.float32 \[2, 1, 8, 8\]': must be uint8"):
        dpmix.predict(trained.release, torch.zeros(2, 1, 8, 8))


# ---------------------------------------------------------------------------------------------------------------- check


def test_check_counts_names_and_spends_nothing(photos, tmp_path, monkeypatch):
    base = Path(shutil.copytree(photos, tmp_path / "photos"))
    first, second = sorted((base / "train" / "digit 1").iterdir())[:2]
    shutil.copy(first, base / "train" / "digit 1" / "copy.png")
    shutil.copy(second, base / "test" / "digit 2" / "leak.png")
    (base / "train" / "digit 5" / "x.heic").write_bytes(b"")
    monkeypatch.setattr(rng, "standard_noise", lambda *_, **__: pytest.fail("noise was drawn"))
    with pytest.warns(UserWarning, match=r"1 \.heic"):
        found = dpmix.check(base, 2, delta=1e-4, progress=False)
    text = str(found)
    assert (
        "Nothing was spent" in text and "keep it private" in text and "| training / test images | 401 / 101 |" in text
    )
    assert "| left out | 1 .heic |" in text
    assert f"1: train/digit 1/copy.png = train/digit 1/{first.name}" in text
    assert f"1: test/digit 2/leak.png = train/digit 1/{second.name}" in text
    sigma = accounting.noise_multiplier(epsilon=2.0, delta=1e-4, sample_rate=1.0, steps=200, accountant="pld")
    assert f"| noise multiplier, σ | {sigma:.4g} |" in text
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "photos-release").exists()
    assert sorted(p.name for p in (tmp_path / "private").iterdir()) == ["cache", "runs"]


def test_check_and_train_agree(photos):
    spec = settings.plan(photos, 8, delta=1e-4, **QUICK).spec
    assert spec.batch_size == 400 and spec.clip_norm == 1 and spec.redraw is False and spec.validation == 0
    checked = dpmix.check(photos, 8, delta=1e-4, **QUICK)
    assert checked.plan.spec == spec
    assert settings.plan(photos, 8).spec.delta == 1e-5
    assert settings.plan(photos, 8).spec.epochs == 200
    assert settings.plan(photos, 8, batch_size=100).spec.epochs == 50


# ----------------------------------------------------------------------------------------- what came in as text, and worse


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("delta", "1e-6", 1e-6),
        ("epsilon", "5e-1", 0.5),
        ("epsilon", np.float32(0.5), 0.5),
        ("batch_size", "100", 100),
        ("batch_size", np.int64(100), 100),
        ("batch_size", 100.0, 100),
        ("learning_rate", np.float64(2), 2.0),
        ("folder", 2024, "2024"),
        ("out", 2025, "2025"),
    ],
)
def test_text_and_numpy_numbers_are_numbers_and_numbers_are_text(name, given, taken):
    asked = settings.Settings.of(**(dict(folder="photos", epsilon=2.0) | {name: given}))
    assert getattr(asked, name) == taken and type(getattr(asked, name)) is type(taken)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(epsilon="two"), r"epsilon='two': is text; write a number such as 2\.0 or 1\.0e-6"),
        (dict(epsilon=float("nan")), "epsilon=nan: must be a finite number"),
        (dict(epsilon=True), "epsilon=True: must be a finite number"),
        (dict(epsilon=0), "epsilon=0.0: must be a positive finite number"),
        (dict(epsilon=-1), "epsilon=-1.0: must be a positive finite number"),
        (dict(clip_norm=0), "clip_norm=0.0: must be a positive finite number"),
        (dict(out="cache"), "out='cache': is the name of a folder for what is private"),
        (dict(out="private"), "out='private': is the name of a folder for what is private"),
        (dict(batch_size=2.5), "batch_size=2.5: must be a whole number"),
        (dict(batch_size=401), "batch_size=401: must be at most the 400 training images"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(learning_rate=0), r"learning_rate=0\.0: must be a positive finite number"),
        (dict(epochs=1e9), r"epochs=1000000000\.0: these are 1e\+09 steps; at most 1,000,000"),
        (dict(delta=0), r"delta=0\.0: must be a positive finite number"),
        (dict(delta=1), r"delta=1\.0: must lie strictly between 0 and 1"),
        (dict(method="mixself"), "method='mixself': unknown; did you mean 'mix-self'"),
        (dict(epsilom=2), "argument='epsilom': unknown; did you mean 'epsilon'"),
        (dict(model="tiny-convnet"), "unknown; did you mean 'tiny-convnext'"),
        (dict(progress="no"), "progress='no': must be True or False"),
        (dict(model="foo"), "model='foo': unknown; known are"),
        (dict(method="mix-diff"), "method='mix-diff': mixes public images in, and there are none in .*synthetic"),
        (dict(clip_norm=1e-300), "clip_norm=1e-300: is beyond the numbers of float32"),
        (dict(learning_rate=1e308), r"learning_rate=1e\+308: is beyond the numbers of float32"),
        (dict(delta=1e-30), "delta|accountant"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(photos, tmp_path, change, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = dict(folder=photos, epsilon=2.0, out=tmp_path / "out", progress=False) | change
    for call in (dpmix.train, dpmix.check):
        with pytest.raises(ValueError, match=said) as caught:
            call(**asked)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


SPECS = """
import numpy as np
import dpmix
plain = dict(recipe=dpmix.METHODS["dp-sgd"], epsilon=2.0, learning_rate=1.0)
given = dict(batch_size=np.int64(64), delta=np.float32(0.25), epochs=np.float64(2), seed=np.int64(3))
spec = dpmix.RunSpec(**plain | given)
assert spec == dpmix.RunSpec(**plain, batch_size=64, delta=0.25, epochs=2.0, seed=3)
assert {type(getattr(spec, name)) for name in given} == {int, float}
for name in ("delta", "epsilon", "learning_rate", "batch_size", "epochs"):
    try:
        dpmix.RunSpec(**plain | {name: "1e-6"})
    except ValueError as error:
        print(error)
"""


def test_a_spec_takes_numpys_numbers_and_names_text():
    done = subprocess.run([sys.executable, "-c", SPECS], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # in a process of its own: here annotations are enforced
    names = ("delta", "epsilon", "learning_rate", "batch_size", "epochs")
    said = "='1e-6': is text; write a number such as 2.0 or 1.0e-6 (to YAML 1e-6 is text)"
    assert done.stdout.splitlines() == [name + said for name in names]


def test_a_method_is_its_recipe_and_its_clip_norm(photos, monkeypatch, tmp_path):
    monkeypatch.setattr(settings.data, "synthetic_folder", lambda *_: tmp_path)
    for method, recipe in views.METHODS.items():
        spec = settings.plan(photos, 8, method=method).spec
        assert spec.recipe == recipe
        assert spec.clip_norm == (paper.clip_norm(method) if method in paper.METHODS else 1.0)
        still = settings.plan(photos, 8, method=method, mirror=False).spec.recipe
        assert still == recipe.for_data(False)
    assert settings.plan(photos, 8, method="dp-sgd").spec.recipe.transform == "none"
    spec = settings.plan(photos, 8, method="mixed-ghost").spec
    plain = settings.plan(photos, 8).spec
    assert spec.learning_rate * spec.clip_norm == pytest.approx(plain.learning_rate)
    assert plain.learning_rate == pytest.approx(0.9 * (10 * 8) ** 0.5, rel=0.05)


def test_photographs_get_an_imagenet_encoder_and_a_home_is_a_home(photos, tmp_path, monkeypatch):
    for part, c, i in [(p, c, i) for p in ("train", "test") for c in "ab" for i in range(2)]:
        (tmp_path / "colour" / part / c).mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng([i, ord(c), len(part)]).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "colour" / part / c / f"{i}.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    p = settings.plan("~/colour", 2)
    assert p.spec.model == "efficientnet-lite0" and p.out == tmp_path / "colour-release"
    assert settings.plan(photos, 2).spec.model == "tiny-convnext"


def test_a_model_that_names_a_file_is_that_file_as_weights(photos, tmp_path, monkeypatch):
    """As a stranger will give it to `predict`: the release names no path."""

    class Asked(Exception):
        pass

    def encoder(*given, image_size):
        raise Asked(given)

    file = tmp_path / "mine.safetensors"
    file.touch()
    monkeypatch.setattr(settings.encoders, "encoder", encoder)
    with pytest.raises(Asked) as asked:
        settings.plan(photos, 2, model=f"open_clip:ViT-S-32-alt/{file}")
    assert asked.value.args[0] == ("open_clip:ViT-S-32-alt", str(file))


def test_no_one_image_decides_which_encoder_there_is(photos, tmp_path):
    """The release names the encoder: whether one image was there must not show in it."""
    home = shutil.copytree(photos, tmp_path / "home")
    one = next(iter(sorted((home / "train").rglob("*.png"))))
    Image.new("RGB", (400, 300), (200, 30, 10)).save(one)
    assert settings.plan(home, 2).spec.model == settings.plan(photos, 2).spec.model == "tiny-convnext"
    with pytest.raises(
        ValueError, match=r"model='tiny-convnext': .* 1 channel\(s\) and folder:.* has 3; choose another"
    ):
        dpmix.check(home, 2, progress=False)


def test_one_image_more_does_not_change_which_images_are_asked_for_an_encoder(tmp_path, monkeypatch):
    """Every second file is a thumbnail: at a stride, one file less would turn scans into thumbnails."""
    asked: list[str] = []
    monkeypatch.setattr(settings.decoding, "header", lambda path: asked.append(path.name))
    names = [f"{i:03d}{kind}.png" for i in range(200) for kind in ("", "_thumb")]
    looked_at = []
    for some in (names, names[1:]):
        paths = [tmp_path / n for n in some]
        settings._model(layouts.Listing(tmp_path, paths, np.zeros(len(some)), len(some), ("a",), Counter()))
        looked_at.append(set(asked))
        asked.clear()
    assert len(looked_at[0]) == len(looked_at[1]) == 100 and len(looked_at[0] - looked_at[1]) <= 1


# -------------------------------------------------------------------------------------------------- report, command line


def test_intervals_and_calibration_have_the_right_value():
    for hits, interval in ((8, (0.4902, 0.9433)), (0, (0, 0.2775)), (10, (0.7225, 1))):  # Wilson, without correction
        predicted, labels = np.eye(2)[[0, 1] * 5], np.array([0, 1] * 5)
        labels[hits:] = 1 - labels[hits:]
        seen = report.of(predicted, labels, ("a", "b"), list("abcdefghij"))
        assert seen["interval_95"] == pytest.approx(interval, abs=1e-4) and seen["accuracy"] == hits / 10
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.35, 0.65], [0.7, 0.3]])
    seen = report.of(probabilities, np.array([0, 1, 1, 0]), ("a", "b"), list("wxyz"))
    assert seen["accuracy"] == 0.75 and seen["confusion"] == [[2, 0], [1, 1]] and seen["largest_class"] == 0.5
    assert seen["errors"] == [{"image": "x", "true": "b", "predicted": "a", "probability": 0.8}]
    assert seen["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.35 + 0.3) / 4)
    assert report.table(("x", "y"), [("a|b\nc", "d")]) == "| x | y |\n| --- | --- |\n| a\\|b c | d |"


def test_classes_are_called_anything(tmp_path):
    """Two dollar signs begin a formula where pictures take them for one."""
    seen = report.of(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2]), ("$_1", "$_5", "$\\frac"), list("xyz"))
    report.write(seen, tmp_path, tmp_path / "out")
    assert Image.open(tmp_path / "confusion.png").size[0] > 100


def test_a_card_of_a_stranger_says_nothing_to_a_terminal():
    shown = report.table(("card", ""), [("\x1b[31mε|", "a\nb\x9b\u202e")])
    assert shown.splitlines()[-1] == "| \\x1b[31mε\\| | a b\\x9b\\x202e |"


def test_a_class_without_test_images_and_copies_of_training_images_are_told():
    seen = report.of(np.eye(3)[[0, 2]], np.array([0, 0]), ("a", "b", "c"), ["x", "y"], 1)
    assert seen["by_class"]["b"] == {"images": 0, "accuracy": None} and seen["by_class"]["a"]["accuracy"] == 0.5
    json.loads(json.dumps(seen, allow_nan=False))
    text = report.text(seen, Path("out"), Path("private") / "out")
    assert "| b | 0 | – |" in text and "**Too high**: 1 test image equal a training image" in text
    assert "log and errors in `private/out`, the seed in `private/runs`" in text


def test_one_bad_image_costs_no_other_its_prediction(trained, photos, tmp_path, capsys, monkeypatch):
    for i, image in enumerate(sorted((photos / "test" / "digit 0").iterdir())[:3]):
        shutil.copy(image, tmp_path / f"{i}.png")
    (tmp_path / "1x.png").write_bytes(b"no image")
    monkeypatch.setattr(predicting, "AT_A_TIME", 2)
    assert main(["predict", str(trained.release), str(tmp_path)]) == 2
    said = capsys.readouterr()
    rows = [line.split(",")[0].rpartition("/")[2] for line in said.out.splitlines()]
    assert rows == ["image", "0.png", "1.png", "2.png"]
    assert "without a prediction: 1 image: images='" in said.err and "1x.png': cannot be decoded" in said.err
    monkeypatch.setattr(predicting, "_scorer", lambda *_: lambda images: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["predict", str(trained.release), str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_the_command_line(trained, photos, capsys, tmp_path):
    assert main(["card", str(trained.release)]) == 0
    table = capsys.readouterr().out
    assert "| ε (PLD) | 7.9" in table and "sha256" in table and "not accounted for" in table
    assert main(["train", str(photos), "--epsilon", "8", "--out", str(trained.release)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("dpmix train: out=") and said.err.count("\n") == 1 and said.out == ""
    assert main(["check", str(tmp_path / "nowhere"), "--epsilon", "8"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["predict", str(trained.release), str(photos / "test"), str(photos / "train")]) == 2
    assert "give files, or one folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(photos)])
    assert "--epsilon" in capsys.readouterr().err


def test_a_terminal_without_the_letters_costs_nothing(trained, photos, tmp_path, monkeypatch):
    image = Path(shutil.copy(next((photos / "test" / "digit 0").iterdir()), tmp_path / os.fsdecode(b"caf\xe9.png")))
    for words, said in ((["card"], b"\\u03b5 (PLD)"), (["predict", str(image)], rb"caf\xe9.png,digit ")):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
        assert main([words[0], str(trained.release), *words[1:]]) == 0
        sys.stdout.flush()
        assert said in out.getvalue()


def test_a_folder_in_any_encoding_can_be_trained_on(photos, tmp_path):
    base = shutil.copytree(photos, tmp_path / os.fsdecode(b"caf\xe9"))
    found = dpmix.train(base, 8, delta=1e-4, **QUICK | dict(epochs=2))
    assert os.fsencode(found.release.name) == b"caf\xe9-release" and rb"`" in os.fsencode(str(found))
    for name in ("report.md", "log.txt"):
        assert r"caf\xe9-release" in (found.private / name).read_text(), name


def test_a_command_warns_once_and_in_one_line(photos, tmp_path, capsys):
    base = Path(shutil.copytree(photos, tmp_path / "photos"))
    (base / "train" / "digit 5" / "x.heic").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        words = ["--epsilon", "8", "--delta", "1e-4", "--epochs", "2", "--no-progress"]
        assert main(["train", str(base), "--out", str(tmp_path / "out"), *words]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if ".heic" in line]
    assert said == [f"dpmix: dataset='folder:{base}': files left out: 1 .heic; taken are {' '.join(layouts.SUFFIXES)}"]


def test_a_photograph_that_is_too_large_is_not_spoken_of_without_its_name(tmp_path, monkeypatch, recwarn):
    for c, i in [(c, i) for c in "ab" for i in range(5)]:
        (tmp_path / "photos" / c).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "photos" / c / f"{i}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    settings.plan(tmp_path / "photos", 2)
    assert [str(w.message) for w in recwarn.list] == []


def test_the_face():
    assert {"train", "check", "predict"} <= set(dpmix.__all__)
