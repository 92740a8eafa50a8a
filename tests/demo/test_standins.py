"""The public stand-ins: what is shipped is what its record says; a shrunken rebuild learns; no private image is read."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import sklearn.datasets
import torch
from safetensors.torch import load_file

from dpmix import models
from dpmix.demo import generator as demo_generator
from dpmix.demo import glyphs, pretraining, standins
from dpmix.images import data, overlap
from dpmix.models import tiny as tiny_encoders


def naming(encoder: models.Encoder) -> float:
    """Accuracy of the nearest mean feature in naming rendered characters that no training has seen."""
    known, asked = glyphs.corpus(1800, 77), glyphs.corpus(900, 78)
    z, w = (encoder.features(c.images.float() / 255) for c in (known, asked))
    means = torch.stack([z[known.labels == c].mean(0) for c in range(36)])
    return (torch.cdist(w, means).argmin(1) == asked.labels).double().mean().item()


def with_weights(name: str, state: dict, folder) -> models.Encoder:
    from safetensors.torch import save_file

    save_file(state, folder / "weights.safetensors")
    return models.encoder(name, folder / "weights.safetensors")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> dict[str, models.Encoder]:
    folder = tmp_path_factory.mktemp("untrained")
    made = {}
    for name in standins.TINY:
        state, _ = pretraining.pretrain(name, *corpus_of(36), seed=0, steps=1, progress=False)
        made[name] = with_weights(name, state, folder)
    return made


def corpus_of(n: int, seed: int = 0, characters: str = glyphs.CHARACTERS) -> tuple[torch.Tensor, torch.Tensor]:
    made = glyphs.corpus(n, seed, characters)
    return made.images, made.labels


# The corpus


def test_the_corpus_is_keyed_balanced_and_made_like_digits():
    one, longer = glyphs.corpus(90, 3), glyphs.corpus(600, 3)
    assert torch.equal(one.images, longer.images[:90]) and torch.equal(one.labels, longer.labels[:90])
    assert not torch.equal(one.images, glyphs.corpus(90, 4).images)
    assert one.class_names == tuple(glyphs.CHARACTERS) and one.labels[:36].tolist() == list(range(36))
    pixels = longer.images.numpy()
    assert set(np.unique(pixels)) <= {round(k * 255 / 16) for k in range(17)}, "counts of 4x4 dots"
    assert ((pixels > 0).any((1, 3))[:, [0, -1]]).all(1).mean() > 0.99, "the character fills the height"
    assert 0.1 < (pixels / 255).mean() < 0.5 and (pixels.reshape(600, -1).max(1) > 60).all(), "none is blank"
    assert len({p.tobytes() for p in pixels}) == 600
    digits = glyphs.corpus(20, 3, glyphs.DIGITS)
    assert digits.class_names == tuple("0123456789") and digits.labels.tolist() == [*range(10)] * 2


def test_bad_corpora_are_refused():
    for given, said in [((0, 1), "n=0"), ((5, 1, "aA"), "characters='aA'"), ((5, 1, ""), "characters=''")]:
        with pytest.raises(ValueError, match=said):
            glyphs.corpus(*given)


def test_the_fonts_leave_out_the_strange_ones():
    assert len(glyphs.FONTS) == len(set(glyphs.FONTS)) == 21
    assert not any(bad in font for font in glyphs.FONTS for bad in ("LastResort", "cmex", "cmsy", "cmmi", "Siz"))


# What is shipped


@pytest.mark.parametrize("name", standins.NAMES)
def test_a_shipped_file_is_what_its_record_says(name):
    record = standins.record(name)
    content = (data.PUBLIC / name).read_bytes()
    assert record["sha256"] == hashlib.sha256(content).hexdigest() and record["bytes"] == len(content)
    assert record["file"] == name and record["seed"] == standins.SEED and "no private image" in record["corpus"]
    assert {"torch", "numpy", "diffusers", "matplotlib", "dpmix"} <= set(record["versions"])
    if name.endswith(".safetensors"):
        losses = [loss for _, loss in record["loss"]]
        assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
        wanted = standins.GENERATOR_STEPS if name.startswith("generator") else standins.ENCODER_STEPS
        assert record["steps"] == wanted and 50 <= len(losses) <= 200


def test_all_of_it_is_small():
    assert sum(p.stat().st_size for p in data.PUBLIC.iterdir()) < 4e6


@pytest.mark.parametrize("name", standins.NAMES)
def test_a_damaged_or_missing_file_is_one_line(tmp_path, name):
    for file in (name, f"{name.rpartition('.')[0]}.json"):
        shutil.copy(data.PUBLIC / file, tmp_path)
    assert data.public_file(name, tmp_path) == tmp_path / name
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"sha256 is not the recorded.*git checkout data/public.*public_standins$"):
        data.public_file(name, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: missing from .*public_standins$"):
        data.public_file(name, tmp_path)


@pytest.mark.parametrize("name", standins.TINY)
def test_the_probe_reaches_what_is_promised_and_an_untrained_encoder_does_not(name, untrained):
    digits = data.load("digits")
    found = standins.probe(models.encoder(name), digits)
    assert 0.93 <= found["test"] < 0.995 and found["cross_validated"] >= 0.92 and 0.88 <= found["nearest_mean"] < 0.98
    for key, value in standins.record(f"{name}.safetensors")["probe"].items():
        assert found[key] == pytest.approx(value, abs=0.006)
    without = standins.probe(untrained[name], digits)
    assert without["test"] < 0.93 and without["nearest_mean"] < 0.8


@pytest.mark.parametrize("name", standins.TINY)
def test_the_encoders_name_unseen_characters(name, untrained):
    assert naming(models.encoder(name)) > 0.9 > 0.4 > naming(untrained[name])


@pytest.mark.parametrize(("name", "least", "most"), [("tiny-vit", 60_000, 80_000), ("tiny-convnext", 40_000, 60_000)])
def test_the_encoders_are_tiny(name, least, most):
    assert least < sum(p.numel() for p in tiny_encoders.build(name).parameters()) < most


def test_the_synthetic_digits_are_many_new_and_of_their_class():
    public, digits = data.public_images("digits"), data.load("digits")
    assert len(public) >= len(digits.train) and len(set(public.labels.bincount().tolist())) == 1
    assert len({image.numpy().tobytes() for image in public.images}) == len(public)
    for private in (digits.train, digits.test):
        assert [len(pairs) for pairs in overlap.overlap(private, public)] == [0, 0]
    assert 0.2 < (public.images / 255).mean() < 0.5 and 0.3 < (public.images / 255).std() < 0.5
    encoder, printed = models.encoder("tiny-convnext"), glyphs.corpus(2000, 5, glyphs.DIGITS)
    z = encoder.features(printed.images.float() / 255)
    means = torch.stack([z[printed.labels == c].mean(0) for c in range(10)])

    def agreement(images):
        return (torch.cdist(encoder.features(images.float() / 255), means).argmin(1) == public.labels).double().mean()

    assert agreement(public.images) > 0.9
    assert agreement(torch.randint(0, 256, public.images.shape, dtype=torch.uint8)) < 0.3


def test_the_shipped_digits_come_from_the_shipped_generator():
    images, labels = standins.load_digits()
    state = load_file(data.public_file("generator.safetensors"))
    again = demo_generator.sample_generator(state, labels[:20], seed=standins.SEED, progress=False)
    assert (again.int() - images[:20].int()).abs().max() <= 2
    other = demo_generator.sample_generator(state, labels[:20], seed=9, progress=False)
    assert (other.int() - images[:20].int()).abs().max() > 50
    assert (
        standins.record("synthetic_digits.npz")["generator_sha256"]
        == standins.record("generator.safetensors")["sha256"]
    )


# A shrunken rebuild


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """Everything from nothing in a minute; reading a private digit on the way is an error."""
    folder = tmp_path_factory.mktemp("rebuilt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", lambda *_: pytest.fail("the rebuild read private digits"))
        patch.setattr(data, "load", lambda *_: pytest.fail("the rebuild read private data"))
        before = torch.get_rng_state()
        made = standins.rebuild(
            folder, seed=4, encoder_steps=200, generator_steps=50, characters=3600, per_digit=2, progress=False
        )
        assert torch.equal(before, torch.get_rng_state()), "no draw from torch's global generator"
    return folder, made


def test_a_shrunken_rebuild_writes_everything(rebuilt):
    folder, made = rebuilt
    assert sorted(made) == sorted(standins.NAMES)
    files = {*standins.NAMES, *(f"{n.rpartition('.')[0]}.json" for n in standins.NAMES)}
    assert {p.name for p in folder.iterdir()} == files
    for name in standins.NAMES:
        assert standins.record(name, folder) == json.loads(json.dumps(made[name])) and made[name]["seed"] == 4
    images, labels = standins.load_digits(folder)
    assert images.shape == (20, 1, 8, 8) and images.dtype == torch.uint8 and labels.bincount().tolist() == [2] * 10


@pytest.mark.parametrize(("name", "least"), [("tiny-vit", 0.2), ("tiny-convnext", 0.4)])
def test_a_shrunken_rebuild_learns(rebuilt, untrained, name, least):
    folder, made = rebuilt
    losses = [loss for _, loss in made[f"{name}.safetensors"]["loss"]]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    trained = naming(models.encoder(name, folder / f"{name}.safetensors"))
    assert trained > least > naming(untrained[name]), "one class in 36 is chance"


def test_a_shrunken_generator_learns(rebuilt):
    losses = [loss for _, loss in rebuilt[1]["generator.safetensors"]["loss"]]
    assert losses[0] > 0.9 and np.mean(losses[-10:]) < 0.7
    _, fresh = demo_generator.train_generator(*corpus_of(200, 1, glyphs.DIGITS), seed=4, steps=1, progress=False)
    assert not np.mean(fresh) < 0.7


def test_training_is_keyed_by_the_seed():
    def train(seed):
        return pretraining.pretrain("tiny-vit", *corpus_of(72), seed=seed, steps=3, batch_size=16, progress=False)[0]

    def draw(seed):
        return demo_generator.train_generator(*corpus_of(20), seed=seed, steps=2, batch_size=4, progress=False)[0]

    for make in (train, draw):
        first, again, other = make(1), make(1), make(2)
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert any(not torch.equal(first[k], other[k]) for k in first)


def test_a_sample_depends_on_its_label_and_number_only():
    state, labels = load_file(data.public_file("generator.safetensors")), torch.tensor([3, 3, 8, 1, 1])
    draw = dict(seed=2, steps=4, progress=False)
    together = demo_generator.sample_generator(state, labels, **draw)
    assert (
        together.int() - demo_generator.sample_generator(state, labels, batch_size=2, **draw).int()
    ).abs().max() <= 1
    assert not torch.equal(together[0], together[1])
    assert demo_generator.sample_generator(state, labels[:0], **draw).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match=r"labels=\[10\]: must lie in 0\.\.9"):
        demo_generator.sample_generator(state, torch.tensor([10]), **draw)


def test_bad_arguments_are_refused_before_any_training(tmp_path):
    images, labels = corpus_of(36)
    with pytest.raises(ValueError, match="did you mean 'tiny-vit'"):
        pretraining.pretrain("tiny-vitt", images, labels, seed=0)
    for change in (dict(steps=0), dict(batch_size=1), dict(learning_rate=0.0)):
        with pytest.raises(ValueError, match=next(iter(change))):
            pretraining.pretrain("tiny-vit", images, labels, seed=0, **change)
    for change in (dict(characters=0), dict(per_digit=0), dict(encoder_steps=0), dict(generator_steps=0)):
        with pytest.raises(ValueError, match=next(iter(change))):
            standins.rebuild(tmp_path, **change)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="name='tiny'"):
        standins.record("tiny")
