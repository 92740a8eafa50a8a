"""What leaves the house: weights and a card that a stranger can trust, of runs that carry a guarantee."""

import json
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpmix import ComputeFlags, RunSpec, release, run, run_all
from dpmix.companion.report import privacy_table
from dpmix.core import accounting, files, heads, microbatch, views
from dpmix.models import encoders
from dpmix.own.report import card_text
from dpmix.runs.passes import LIBRARIES
from dpmix.runs.predict import predict
from dpmix.runs.result import frame
from dpmix.runs.spec import no_meaningful_guarantee
from dpmix.runs.store import Store

TINY = views.Recipe(k_base=2, transform="crop")
SPEC = RunSpec(recipe=TINY, epsilon=8.0, learning_rate=4.0, epochs=0.5, batch_size=256, seed=None)
COMPUTE = ComputeFlags(progress=False, workers=1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run whose seed was drawn, its store and its release."""
    base = tmp_path_factory.mktemp("released")
    store = Store(base / "runs")
    result = run(SPEC, compute=COMPUTE, store=store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return result, store, release(result, base / "out", store=store)


def card_of(folder) -> dict:
    return files.read_json(folder / "privacy_card.json")


def test_a_release_holds_the_weights_and_a_card_and_nothing_else(drawn):
    r, store, folder = drawn
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "privacy_card.json"}
    card = card_of(folder)
    assert card["guarantee"] == {"epsilon": r.epsilon, "delta": 1e-5, "calibrated_by": "rdp"}
    assert card["mechanism"]["noise_multiplier"] == r.noise_multiplier and card["mechanism"]["divisor"] == 256
    assert "twice the sensitivity" in card["adjacency"] and "Poisson" in card["sampling"] and card["not_accounted_for"]
    assert not any("taken as public of all images" in line for line in card["not_accounted_for"]), "digits are known"
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == {"weight", "bias"} and torch.equal(saved["weight"], store.tensors(r)["weight"])
    everything = b"".join(p.read_bytes() for p in folder.iterdir()).decode("latin-1")
    secrets = [r.spec.seed, r.key, r.test_accuracy, *asdict(r.diagnostics).values()]
    for secret in [*secrets, *r.provenance["contents"].values()]:
        assert len(str(secret)) < 7 or str(secret) not in everything or secret == card["encoder"]["sha256"], secret
    assert "seed" not in card["spec"] and "date" not in everything
    assert str(r.noise_multiplier) in everything, "the search must be able to find"


def test_who_releases_is_told_what_it_promises(drawn):
    r, _, folder = drawn
    (meant,) = card_of(folder)["in_plain_words"]
    assert meant.startswith("Whatever is concluded from this model about one training example")
    spent = r.epsilon["rdp"]
    assert f"e^{spent:.3g} ({np.exp(spent):,.1f}) times" in meant and "a chance of 1e-05 (1 in 100,000)" in meant


@pytest.mark.parametrize("seed", [0, 2**64, 20251126 * 10**12, 2**127 + 12345])
def test_no_seed_that_was_given_is_released(seed, store, tmp_path):
    """However long it is: a date is long, too. Nor is it shown."""
    r = run(replace(SPEC, seed=seed), compute=COMPUTE, store=store)
    with pytest.raises(ValueError, match="seed: was given, and whoever knows or guesses it") as caught:
        release(r, tmp_path / "out", store=store)
    assert str(seed) not in str(caught.value).replace("seed=None", "") or seed == 0
    with pytest.raises(ValueError, match="seed: was given"):
        release(replace(r, seed_drawn=True), tmp_path / "out", store=store)
    assert not (tmp_path / "out").exists()


def test_what_else_must_not_be_released(drawn, tmp_path):
    r, store, _ = drawn
    with pytest.raises(ValueError, match="a run without noise carries no guarantee"):
        release(replace(r, noise_multiplier=0.0), tmp_path / "a", store=store)
    half = replace(r.spec, train_on="half-1", public="half-2", recipe=views.METHODS["mix-diff"])
    with pytest.raises(ValueError, match="public='half-2': mixes in the other half of the private images unprotected"):
        release(replace(r, spec=half), tmp_path / "b", store=store)
    # Of n images, n even, one less moves an image from one half to the other as often as not: a replacement, at the price of two.
    with pytest.raises(ValueError, match="train_on='half-1': who is in a half depends on who else is there"):
        release(replace(r, spec=replace(r.spec, train_on="half-1")), tmp_path / "c", store=store)
    fewer = replace(r.spec, public="synthetic-half", recipe=views.METHODS["mix-diff"])
    with pytest.raises(ValueError, match="public='synthetic-half': who is in a half"):
        release(replace(r, spec=fewer), tmp_path / "d", store=store)
    once = replace(r.spec, redraw=False, recipe=views.METHODS["self-aug"])
    for keyed_by in ({}, {"views_keyed_by": "place"}):  # of a run before this was written down, or of rows
        about = {k: v for k, v in r.provenance.items() if k != "views_keyed_by"} | keyed_by
        with pytest.raises(ValueError, match="redraw=False: its stored views were keyed by places under a known seed"):
            release(replace(r, spec=once, provenance=about), tmp_path / "e", store=store)
    assert not any((tmp_path / name).exists() for name in "abcde")


def test_a_card_is_never_written_beside_the_weights_of_another_run(drawn, tmp_path):
    one, origin, _ = drawn
    store = Store(tmp_path / "other")
    other = replace(one, noise_multiplier=3 * one.noise_multiplier)
    store.put(other, {name: t + 1 for name, t in origin.tensors(one).items()})
    for stranger in (one, replace(other, epsilon={"rdp": 0.1})):
        with pytest.raises(ValueError, match="the store has another result under this key now"):
            release(stranger, tmp_path / "no", store=store)
        assert not (tmp_path / "no").exists()
    folder = release(other, tmp_path / "yes", store=store)
    assert card_of(folder)["mechanism"]["noise_multiplier"] == other.noise_multiplier
    assert torch.equal(load_file(folder / "model.safetensors")["weight"], origin.tensors(one)["weight"] + 1)


@pytest.mark.parametrize(("loose", "said"), [
    ({"delta": 0.01}, "delta=0.01: is not below 1/N = 8.7e-04; such a guarantee allows to publish one example outright"),
    ({"epsilon": 50.0}, "is above 10; one example may make a model e^49.4 times as likely"),
])  # fmt: skip
def test_a_guarantee_that_protects_nobody_says_so_on_the_card(loose, said, store, tmp_path):
    with pytest.warns(UserWarning, match="no meaningful"):
        r = run(replace(SPEC, **loose), compute=COMPUTE, store=store)
    hollow, meant = card_of(release(r, tmp_path / "out", store=store))["in_plain_words"]
    assert hollow.startswith("NO MEANINGFUL GUARANTEE. ") and said in hollow
    assert meant.startswith("Whatever is concluded")


def test_what_means_nothing():
    assert no_meaningful_guarantee(8.0, 1e-5, 1150) == []
    assert len(no_meaningful_guarantee(8.0, 1 / 1150, 1150)) == len(no_meaningful_guarantee(10.1, 1e-5, 1150)) == 1
    assert len(no_meaningful_guarantee(11.0, 0.5, 1150)) == 2 and no_meaningful_guarantee(10.0, 1e-5, 1150) == []


# What only the card needs.


def test_an_accountant_that_cannot_say_is_left_out_before_training(store, tmp_path, monkeypatch):
    """PRV refuses a delta of 1e-15. It once did so after training, and at every new start again."""
    asked, real, trained = [], accounting.epsilon_spent, heads.train

    def ask(**about):
        asked.append(about["accountant"])
        return real(**about)

    def train(*args, **kwargs):
        assert set(asked) == {"rdp", "prv", "pld"}, "all were asked before"
        asked.clear()
        return trained(*args, **kwargs)

    monkeypatch.setattr(accounting, "epsilon_spent", ask)
    monkeypatch.setattr(heads, "train", train)
    r = run(replace(SPEC, delta=1e-15), compute=COMPUTE, store=store)
    assert asked == [], "and none after it"
    assert r.epsilon["prv"] is None and 7.9 < r.epsilon["rdp"] <= 8
    assert "prv" not in card_of(release(r, tmp_path / "out", store=store))["guarantee"]["epsilon"]


def test_a_delta_beyond_the_accountant_of_the_spec_is_refused_before_training(store, monkeypatch):
    monkeypatch.setattr(heads, "train", lambda *a, **k: pytest.fail("training began"))
    monkeypatch.setattr(accounting, "noise_multiplier", lambda **about: 1.0)
    with pytest.raises(ValueError, match=r"accountant='prv': has no epsilon at delta=1e-15"):
        run(replace(SPEC, delta=1e-15, accountant="prv"), compute=COMPUTE, store=store)


def test_weights_that_are_not_finite_are_no_release(store, tmp_path, monkeypatch):
    r = run(SPEC, compute=COMPUTE, store=store)
    broken = {name: torch.full_like(t, torch.nan) for name, t in store.tensors(r).items()}
    monkeypatch.setattr(type(store), "tensors", lambda *_: broken)
    with pytest.raises(ValueError, match=r"learning_rate=.*: the weights are not finite; nothing is released"):
        release(r, tmp_path / "out", store=store)
    assert not (tmp_path / "out").exists()


# How the run was chosen.


def test_the_card_says_how_many_runs_it_may_have_been_chosen_from(store, tmp_path):
    alone = run(replace(SPEC, validation=0.0), compute=COMPUTE, store=store)
    assert "has 0 other runs on private images, 0 of them" in card_of(
        release(alone, tmp_path / "alone", store=store)
    )["not_accounted_for"][0]  # fmt: skip
    rates = run_all([replace(SPEC, learning_rate=rate) for rate in (1.0, 2.0, 4.0)], compute=COMPUTE, store=store)
    run(replace(SPEC, train_on="synthetic", epsilon=None), compute=COMPUTE, store=store)  # no private image in it
    best = max(rates, key=lambda r: r.diagnostics.validation_accuracy)
    first, second, *_ = card_of(release(best, tmp_path / "best", store=store))["not_accounted_for"]
    assert "on the validation split" in second
    assert "its store has 3 other runs on private images, 2 of them with an accuracy on private" in first


# What a stranger needs to use the weights, and what tells of their owner.


def test_the_card_names_the_file_of_the_encoder_by_its_content(drawn):
    r, _, folder = drawn
    card = card_of(folder)
    file = encoders.public_file("tiny-convnext.safetensors")
    want = {"name": "tiny-convnext", "image_size": 16, "file": file.name, "package": f"dpmix {card['versions']['dpmix']}",
            "sha256": json.loads(file.with_suffix(".json").read_text())["sha256"]}  # fmt: skip
    assert card["encoder"] == want == r.provenance["encoder"]
    assert set(card["versions"]) == {"dpmix", *LIBRARIES} >= {"timm", "Pillow", "torch", "open_clip_torch"}


def test_the_card_says_when_the_encoder_is_random(store, tmp_path):
    r = run(replace(SPEC, model="timm:test_vit", weights="random", image_size=None), compute=COMPUTE, store=store)
    encoder = card_of(release(r, tmp_path / "out", store=store))["encoder"]
    assert encoder["file"] == "random" and encoder["sha256"] is None and encoder["package"].startswith("timm ")


def test_the_card_holds_no_path(photos, tmp_path, store):
    """Neither in the name of a model, nor that of the data, the weights or the classes' folder."""
    import open_clip

    private = tmp_path / "ward7" / "patients.pt"
    private.parent.mkdir()
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), private)
    spec = replace(SPEC, model=f"open_clip:ViT-S-32-alt/{private}", recipe=views.Recipe(k_base=1, transform="none"),
                   dataset=f"folder:{photos}", delta=1e-3, epochs=0.5, batch_size=4)  # fmt: skip
    r = run(spec, compute=replace(COMPUTE, cache=str(tmp_path / "cache")), store=store)
    folder = release(r, tmp_path / "out", store=store)
    text = (folder / "privacy_card.json").read_text()
    assert "ward7" not in text and str(tmp_path) not in text and "ward7" in json.dumps(r.to_json())
    found = predict(folder, next((photos / "test").rglob("*.png")), weights=private)
    assert found.probabilities.shape == (1, len(found.classes))
    card = card_of(folder)
    assert card["spec"]["model"] == card["encoder"]["name"] == "open_clip:ViT-S-32-alt/patients.pt"
    assert card["encoder"]["file"] == "patients.pt" and card["encoder"]["sha256"] == r.provenance["contents"]["encoder"]


def test_the_card_of_microbatches_says_what_their_noise_is(store, tmp_path):
    pairs = RunSpec(recipe=TINY, epsilon=8.0, learning_rate=1.0, model="wrn-10-1", epochs=0.1, batch_size=64, microbatch=2,
                    validation=0.0, seed=None)  # fmt: skip
    r = run(pairs, compute=COMPUTE, store=store)
    assert r.divisor == 32, "microbatches"
    card = card_of(release(r, tmp_path / "out", store=store))
    assert card["mechanism"]["sensitivity"] == 2.0 and card["encoder"] is None
    assert "microbatch of 2" in card["sampling"] and "place" in card["adjacency"]
    assert card["mechanism"]["noise_standard_deviation"] == 2 * r.noise_multiplier
    about = dict(delta=1e-5, sample_rate=r.sample_rate, steps=r.steps)
    true = microbatch.epsilon_spent(2, deviation=2 * r.noise_multiplier, **about)
    spent = card["guarantee"]["epsilon"]
    assert spent["pair"] == true < 0.95 * spent["pld"] < spent["rdp"] <= 8.0, (
        "an example that changes a pair, not one that moves by 2C"
    )
    assert f"| ε (the true pair, PLD) | {true:.3f} |" in card_text(card)
    table = privacy_table(frame([r]))
    assert table.loc["ε (the true pair, PLD)"].tolist() == [f"{true:.3f}"] and table.loc["ε (PLD)"].tolist() == [
        f"{spent['pld']:.3f}"
    ]
