"""One identity of a run: its name, its checkpoint and its noise follow from the spec and from all that the spec only names."""

import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dpmix import ComputeFlags, RunSpec, release, run, run_all
from dpmix.core import files, heads, network, rng, views
from dpmix.images import layouts
from dpmix.models import encoders
from dpmix.runs import identity as identities
from dpmix.runs.identity import Contents, Identity, pass_of
from dpmix.runs.store import Store

TINY = views.Recipe(k_base=1, transform="crop")
SECRET = 2**100 + 987_654_321


def paint(path: Path, *key: int, size: int = 8) -> None:
    pixels = np.random.default_rng(key).integers(0, 256, (size, size), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def compute(tmp_path) -> ComputeFlags:
    return ComputeFlags(progress=False, workers=1, cache=str(tmp_path / "cache"))


def spec_of(photos: Path, **changes) -> RunSpec:
    about = dict(recipe=TINY, epsilon=1.0, learning_rate=4.0, dataset=f"folder:{photos}", batch_size=8, epochs=1.0,
                 delta=1e-3, population=32, seed=SECRET)  # fmt: skip
    return RunSpec(**{**about, **changes})


class Noise(list):
    """The noise of every step of a run on a frozen encoder, as (step, its first numbers)."""

    def __init__(self, monkeypatch) -> None:
        real = rng.generator

        def spied(seed, *key):
            if key[:1] == ("noise",):
                self.append(real(seed, *key).standard_normal(3).tolist())
            return real(seed, *key)

        monkeypatch.setattr(heads.rng, "generator", spied)


def test_one_photo_more_or_less_is_another_run_with_other_noise(photos, compute, store, monkeypatch):
    """The same secret seed, the same spec: what one subtracts from the other must not be free of noise."""
    noise = Noise(monkeypatch)
    spec = spec_of(photos)
    first = run(spec, compute=compute, store=store)
    paint(photos / "train" / "a" / "7.png", 99)
    second = run(spec, compute=compute, store=store)
    assert first.spec == second.spec and first.steps == second.steps and first.key != second.key
    one, other = noise[: first.steps], noise[first.steps :]
    assert len(other) == second.steps and not [n for n in one if n in other]
    a, b = (store.tensors(r)["weight"].double() for r in (first, second))
    scale = first.spec.learning_rate / 8 * first.noise_multiplier * first.steps**0.5
    apart = float((a - b).norm()) / (scale * (2 * a.numel()) ** 0.5)
    assert 0.7 < apart < 1.4, "as far apart as two independent noises"
    # The control: where both runs have one identity they share it, and the difference is nearly free of noise.
    monkeypatch.setattr(Identity, "run", property(lambda self: "the same"))
    again = run(spec, compute=compute, store=Store(store.folder / "coupled"))
    paint(photos / "train" / "a" / "7.png", 7, 0, 0)
    other = run(spec, compute=compute, store=Store(store.folder / "coupled too"))
    a, b = (Store(store.folder / f).tensors(r)["weight"] for f, r in (("coupled", again), ("coupled too", other)))
    assert float((a.double() - b.double()).norm()) / (scale * (2 * a.numel()) ** 0.5) < 0.2


def test_whatever_a_spec_only_names_is_part_of_what_a_run_is(photos, compute, tmp_path):
    """Pixels, a name, a class, the split, the synthetic images of those who use them, the encoder's weights, the code."""
    weights = tmp_path / "w.safetensors"
    tensors = load_file(encoders.public_file("tiny-convnext.safetensors"))
    save_file(tensors, weights)
    for c in "ab":
        paint(photos / "synthetic" / c / "0.png", 700, ord(c))
    plain = spec_of(photos, weights=str(weights))
    mixed = replace(plain, recipe=views.Recipe(k_base=1, k_diff=2))

    def now() -> tuple[Identity, Identity]:
        found = Contents(compute, tmp_path / "store")
        return found.identity(plain), found.identity(mixed)

    seen = [now()]
    assert seen[0] == now() and seen[0][0].run == now()[0].run and pass_of(mixed) == pass_of(plain)

    def changes(what: str, plain_too: bool = True) -> None:
        new = now()
        assert new[1].run not in [m.run for _, m in seen], what
        assert (new[0].run not in [p.run for p, _ in seen]) == plain_too, what
        seen.append(new)

    paint(photos / "train" / "a" / "0.png", 1000)
    changes("pixels")
    (photos / "train" / "a" / "1.png").rename(photos / "train" / "a" / "one.png")
    changes("a name")
    (photos / "train" / "a" / "2.png").rename(photos / "train" / "b" / "two.png")
    changes("a class")
    (photos / "test" / "a" / "0.png").rename(photos / "train" / "a" / "test.png")
    changes("the split")
    before = (photos / "train" / "a" / "3.png").stat()
    paint(photos / "train" / "a" / "3.png", 3, 1, 0)
    os.utime(photos / "train" / "a" / "3.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    changes("pixels, with the time set back")
    save_file({name: t + 1e-6 for name, t in tensors.items()}, weights)
    changes("weights")
    paint(photos / "synthetic" / "a" / "1.png", 701)
    changes("synthetic images", plain_too=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identities, "code_digest", lambda *_: "other")
        changes("code")
    assert now() == seen[-2]


def test_an_identity_is_read_once_for_as_long_as_files_stay(photos, compute, tmp_path, monkeypatch):
    read, real = [], identities.sha256
    monkeypatch.setattr(identities, "sha256", lambda path: read.append(path) or real(path))
    spec = spec_of(photos)
    first = Contents(compute, tmp_path / "store").identity(spec)
    images = sum(1 for _ in photos.rglob("*.png"))
    assert len(read) == images + 1, "each image, and the encoder's weights"
    assert Contents(compute, tmp_path / "store").identity(spec) == first and len(read) == images + 1
    paint(photos / "train" / "a" / "0.png", 1000)
    assert Contents(compute, tmp_path / "store").identity(spec) != first and len(read) == 2 * images + 1
    (record, _) = (tmp_path / "store" / "contents").iterdir()
    assert stat.S_IMODE(record.stat().st_mode) == 0o600 and stat.S_IMODE(record.parent.stat().st_mode) == 0o700


def test_results_of_one_root_are_never_served_for_another(tmp_path, store):
    """The same name, other images; and the same images under another root are the same run."""
    classes = ("Forest", "River", "SeaLake")
    for root, salt in (("one", 0), ("other", 1)):
        for c, name in enumerate(classes):
            for i in range(10):
                paint(tmp_path / root / layouts.KNOWN["eurosat"].folder / name / f"{i}.png", salt, c, i)
    spec = RunSpec(
        recipe=TINY, dataset="eurosat", epsilon=None, learning_rate=1.0, batch_size=8, epochs=1.0, validation=0.0
    )
    flags = {name: ComputeFlags(root=str(tmp_path / name), cache=str(tmp_path / f"cache {name}"), progress=False, workers=1)
             for name in ("one", "other", "copy")}  # fmt: skip
    with pytest.warns(UserWarning, match="30 images where EuroSAT"):
        one, other = (run(spec, compute=flags[name], store=store) for name in ("one", "other"))
        assert one.key != other.key and one.provenance["splits"] != other.provenance["splits"]
        assert not torch.equal(store.tensors(one)["weight"], store.tensors(other)["weight"])
        (tmp_path / "one").rename(tmp_path / "copy")
        assert run(spec, compute=flags["copy"], store=store) == one


def test_images_that_change_while_they_are_trained_on_are_not_stored(photos, compute, store, monkeypatch):
    real = heads.train

    def train(*args, **kwargs):
        paint(photos / "train" / "a" / "0.png", 1000)
        return real(*args, **kwargs)

    monkeypatch.setattr(heads, "train", train)
    with pytest.raises(ValueError, match="its images or its encoder's file changed while it was computed; run again"):
        run(spec_of(photos), compute=compute, store=store)
    assert not list(store.folder.glob("*.json"))
    monkeypatch.undo()
    assert store.get(run(spec_of(photos), compute=compute, store=store).key) is not None


def test_what_changed_is_trained_anew_and_what_was_there_stays(photos, compute, store):
    """In one process too, where the images are kept in memory."""
    spec = spec_of(photos)
    before = run(spec, compute=compute, store=store)
    weights = store.tensors(before)
    paint(photos / "train" / "a" / "new.png", 99)
    after = run(spec, compute=compute, store=store)
    assert before.provenance["splits"] != after.provenance["splits"]
    assert run(spec, compute=compute, store=store) == after
    (photos / "train" / "a" / "new.png").unlink()
    assert run(spec, compute=compute, store=store) == before, "the first images are there again"
    assert torch.equal(store.tensors(before)["weight"], weights["weight"])


def test_other_synthetic_images_are_another_run_for_those_who_use_them(photos, compute, store):
    for c in (0, 1):
        for i in range(3):
            paint(photos / "synthetic" / "ab"[c] / f"{i}.png", 700, i, c)
    plain = spec_of(photos, epsilon=8.0)
    mixed = replace(plain, recipe=views.Recipe(k_base=1, k_diff=2))
    before = run_all([plain, mixed], compute=compute, store=store)
    (photos / "synthetic" / "b" / "2.png").unlink()
    after = run_all([plain, mixed], compute=compute, store=store)
    assert before[0] == after[0] and before[1] != after[1] and before[1].spec == after[1].spec
    first, second = (store.tensors(r)["weight"] for r in (before[1], after[1]))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("change", "used"), [
    ({}, False), ({"recipe": views.Recipe(k_base=1, k_diff=2)}, True), ({"train_on": "synthetic"}, True),
    ({"pretrain_epochs": 1.0}, True),
])  # fmt: skip
def test_synthetic_images_count_for_those_who_use_them(photos, compute, tmp_path, change, used):
    paint(photos / "synthetic" / "a" / "0.png", 700)
    spec = spec_of(photos, **change)
    assert spec.uses_synthetic == used
    assert bool(Contents(compute, tmp_path).identity(spec).public) == used


def test_runs_on_other_parts_of_the_data_do_not_share_their_noise(compute, store):
    about = dict(recipe=TINY, epsilon=0.5, learning_rate=4.0, batch_size=100, epochs=0.5, population=570)
    specs = [RunSpec(train_on=part, **about) for part in ("half-1", "half-2")]
    one, other = (store.tensors(r)["weight"] for r in run_all(specs, compute=compute, store=store))
    assert float((one - other).std() / one.std()) > 1, "independent noise: about 1.4"


def test_heads_of_one_pass_and_networks_take_their_noise_from_their_identity():
    """And by an argument of their own, which no run uses, an audit couples the noise of two calls on purpose."""
    head = heads.Head(recipe=TINY, learning_rate=1.0, noise_multiplier=1.0)
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4) % 2
    pixels = encoders.Encoder(lambda x: x.flatten(1), 8, 64, (1,), "pixels")
    about = dict(num_classes=2, expected_batch=2, steps=1, seed=0, progress=False)

    def trained(some: heads.Head, **more) -> torch.Tensor:
        return heads.train_heads(pixels, images, labels, [some], **about, **more).weights

    assert torch.equal(trained(head), trained(head))
    assert not torch.equal(trained(head), trained(replace(head, identity="another")))
    assert not torch.equal(trained(head), trained(head, identity="another"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
    parameters = dict(model.named_parameters())
    noise = [network.noise_of(parameters, 1.0, seed=0, step=0, identity=name) for name in ("a", "a", "b")]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_a_seed_and_a_checkpoint_of_other_images_are_not_gone_on_with(photos, compute, store, monkeypatch):
    """Between the interruption and the next call an image left: one seed on two neighbours would cancel the noise."""
    spec, real, steps = spec_of(photos, seed=None, epochs=2.0), heads._add_noise, []

    def cut_off(*args):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(heads, "_add_noise", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(spec, compute=compute, store=store)
    (seeds,) = (store.folder / "seeds").iterdir()
    (checkpoint,) = store.folder.glob("*.checkpoint")
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (seeds, seeds.parent, checkpoint, store.folder / "key")]
    assert modes == [0o600, 0o700, 0o600, 0o600]
    first = files.read_json(seeds)["seeds"]
    (photos / "train" / "a" / "0.png").unlink()
    fresh = run(spec, compute=compute, store=store)
    assert fresh.spec.seed not in first and fresh.seed_drawn
    # A seed that was given stays, its checkpoint does not.
    seeded = replace(spec, seed=first[0])
    given = run(seeded, compute=compute, store=store)
    assert not given.seed_drawn and list(store.folder.glob("*.checkpoint")) == [checkpoint]
    calm = Store(store.folder / "calm")
    assert torch.equal(store.tensors(given)["weight"], calm.tensors(run(seeded, compute=compute, store=calm))["weight"])


def test_every_record_is_its_owners_alone(photos, compute, store):
    run(spec_of(photos, seed=None), compute=compute, store=store)
    found = [p for p in store.folder.rglob("*") if p.is_file()]
    assert {p.suffix for p in found} >= {".json", ".safetensors"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in found} == {0o600}


def test_names_that_can_be_seen_follow_the_images_through_a_key(photos, compute, tmp_path):
    """Two stores with the same results have no name in common, so a name cannot be checked against images that one has."""
    spec = spec_of(photos)
    one, other = (Store(tmp_path / name) for name in ("one", "other"))
    keys = [run(spec, compute=compute, store=s).key for s in (one, other)]
    assert keys[0] != keys[1] and all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    assert Store(tmp_path / "one").name("x") == one.name("x") != other.name("x")
    identity = Contents(compute, tmp_path / "one").identity(spec)
    told = identity.run + identity.private + identity.encoder
    for path in (*one.folder.rglob("*"), *Path(compute.cache).rglob("*")):
        assert not [part for part in re.findall("[0-9a-f]{16,}", path.name) if part in told], path
    # The control: without the key, a name is what anybody can compute who has the images.
    assert files.digest(identity.run)[:32] == files.digest(Contents(compute, tmp_path / "x").identity(spec).run)[:32]


@pytest.mark.parametrize("name", [b"caf\xe9.png", "Zürich ✓.png".encode()])
def test_a_file_name_in_any_encoding_can_be_trained_on(photos, compute, store, tmp_path, name):
    os.rename(photos / "train" / "a" / "0.png", os.path.join(os.fsencode(photos / "train" / "a"), name))  # noqa: PTH104, PTH118
    result = run(spec_of(photos, seed=None), compute=compute, store=store)
    assert (release(result, tmp_path / "out", store=store) / "privacy_card.json").is_file()
