"""Fréchet distances: closed forms, pytorch-fid's own statistics, batches of any size, few images, absent weights."""

import warnings
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from pytorch_fid import fid_score
from pytorch_fid import inception as network

from dpmix import models
from dpmix.companion import fid, grids, grids_fid
from dpmix.core import views
from dpmix.images import data
from dpmix.runs.spec import ComputeFlags


@pytest.fixture
def pixels() -> models.Encoder:
    """The pixels themselves as features, so that distances have closed forms."""
    return models.Encoder(lambda x: x.flatten(1), 2, 4, (1,), "pixels")


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, 1, 2, 2)))


def between(a: torch.Tensor, b: torch.Tensor, encoder: models.Encoder) -> float:
    return fid.distance(fid.statistics(a, encoder), fid.statistics(b, encoder))


def test_a_set_is_at_no_distance_from_itself_and_the_distance_is_symmetric(pixels):
    a, b = images(200), images(300, seed=1) ** 2
    assert between(a, a, pixels) == pytest.approx(0, abs=1e-9)
    assert between(a, b, pixels) == pytest.approx(between(b, a, pixels), rel=1e-9)
    assert between(a, b, pixels) > 0.01


def test_a_shift_costs_its_square(pixels):
    a = images(200)
    shifts = [0.1, 0.2, 0.4]
    found = [between(a, a + s, pixels) for s in shifts]
    assert found == pytest.approx([4 * s**2 for s in shifts], rel=1e-6)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_gaussians_have_a_closed_form(scale):
    """Diagonal covariances: |m1 - m2|² + sum of (s1 - s2)²."""
    one, two = torch.tensor([1.0, 2.0, 0.5]).double(), scale * torch.tensor([2.0, 2.0, 0.1]).double()
    a = fid.Statistics(10, torch.zeros(3).double(), torch.diag(one**2))
    b = fid.Statistics(10, torch.ones(3).double(), torch.diag(two**2))
    assert fid.distance(a, b) == pytest.approx(3 + float(((one - two) ** 2).sum()), rel=1e-9)


def test_samples_of_two_gaussians_come_near_the_closed_form(pixels):
    draw = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 50_000, 1, 2, 2)))
    found = between(draw[0], 2 * draw[1] + 1, pixels)
    assert found == pytest.approx(4 * 1 + 4 * (2 - 1) ** 2, rel=0.03)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_do_not_matter(pixels, batch_size):
    """Far from zero, where a sum of squares less a squared sum would lose its digits."""
    a = images(50) + 1e6
    want = np.cov(a.flatten(1).numpy(), rowvar=False)
    found = fid.statistics(iter([a[:20], a[20:20], a[20:]]), pixels, batch_size=batch_size)
    assert found.n == 50
    np.testing.assert_allclose(found.mean, a.flatten(1).mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, want, rtol=1e-6)
    naive = ((a.flatten(1).T @ a.flatten(1)) / 50 - torch.outer(found.mean, found.mean)) * 50 / 49
    assert not np.allclose(naive, want, rtol=1e-6)  # the check can tell


def test_bytes_and_floats_are_the_same_images(pixels):
    raw = torch.randint(0, 256, (30, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert between(raw, raw.float() / 255, pixels) == pytest.approx(0, abs=1e-9)
    assert between(raw, raw.float(), pixels) > 1


def test_small_samples_are_biased_and_said_to_be(pixels):
    with pytest.warns(UserWarning, match="n = 4, D = 4: the covariance is singular and the distance"):
        fid.statistics(images(4), pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid.statistics(images(5), pixels)
    few, many = (
        np.mean([between(images(n, 2 * s), images(n, 2 * s + 1), pixels) for s in range(20)]) for n in (10, 500)
    )
    assert few > 5 * many


def test_what_pytorch_fid_prints_becomes_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(fid_score, "calculate_frechet_distance", lambda *_: print("singular product") or 1.0)
    a = fid.Statistics(10, torch.zeros(2).double(), torch.eye(2).double())
    with pytest.warns(UserWarning, match="pytorch-fid: singular product"):
        assert fid.distance(a, a) == 1.0
    assert capsys.readouterr().out == ""


def test_bad_input_is_named(pixels):
    with pytest.raises(ValueError, match="images=1: a distance needs at least 2 images"):
        fid.statistics(images(1), pixels)
    with pytest.raises(ValueError, match="images=0"):
        fid.statistics(images(0), pixels)
    with pytest.raises(ValueError, match="rows='1 of 3': must be finite"):
        fid.statistics(torch.cat([images(2), images(1) * torch.nan]), pixels)
    other = fid.Statistics(10, torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"dimensions=\(4, 3\)"):
        fid.distance(fid.statistics(images(9), pixels), other)
    with pytest.raises(ValueError, match="did you mean 'tiny-vit'"):
        fid.encoder("tiny-vitt")
    assert fid.encoder("tiny-vit").dim == 64


def test_absent_inception_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        fid.encoder("inceptionv3")
    told = str(caught.value)
    assert network.FID_WEIGHTS_URL in told and f"data/weights/{fid.FILE}" in told and "\n" not in told


def test_a_damaged_or_foreign_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "WEIGHTS", tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / fid.FILE)
    with pytest.raises(ValueError, match="its sha256 is not the recorded 6726825d; fetch"):
        fid.encoder("inceptionv3")
    (tmp_path / "garbage.pth").write_bytes(b"no tensors")
    (tmp_path / fid.FILE).rename(tmp_path / "foreign.pth")
    for name, why in (
        ("foreign.pth", "not the weights of pytorch-fid's Inception-v3"),
        ("garbage.pth", "refused, damaged"),
    ):
        with pytest.raises(ValueError, match=f"weights=.*{name}.*: {why}"):
            fid.encoder("inceptionv3", weights=tmp_path / name)


def test_inception_with_weights_from_a_file_is_pytorch_fids(tmp_path):
    """Random weights: the features are those of pytorch-fid's own network, and importing or loading fetches nothing."""
    blank = {}
    original = network.load_state_dict_from_url

    def build() -> torch.nn.Module:
        """The bare network: its constructor stops where it would fetch weights, and is given random ones."""
        made = []
        load = torch.nn.Module.load_state_dict
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(network, "load_state_dict_from_url", lambda *_, **__: blank)
            patch.setattr(torch.nn.Module, "load_state_dict", lambda module, state: made.append(module))
            whole = network.InceptionV3()
        (bare,) = made
        draw = torch.Generator().manual_seed(0)
        state = {k: torch.rand(v.shape, generator=draw) * 0.1 if v.ndim else v for k, v in bare.state_dict().items()}
        load(bare, state)
        torch.save(state, tmp_path / "weights.pth")
        return whole.eval()

    with torch.no_grad():
        theirs = build()
        found = fid.encoder("inceptionv3", weights=tmp_path / "weights.pth")
        x = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(found.features(x), theirs(x)[0].flatten(1))
        assert found.features(x[:0]).shape == (0, found.dim) == (0, 2048)
        grey = found.features(x[:1, :1])
        torch.testing.assert_close(grey, theirs(x[:1, :1].expand(-1, 3, -1, -1))[0].flatten(1))
    assert network.load_state_dict_from_url is original
    with pytest.raises(ValueError, match="channels=2: encoder 'inceptionv3' takes 1 or 3"):
        found.features(x[:, :2])
    found.features.train()
    assert not found.features.training


def test_the_distances_of_table_7_are_those_of_the_views_and_are_kept(monkeypatch):
    asked = dict(dataset="digits", encoders=["tiny-convnext"], seeds=[3], examples=40)
    compute = ComputeFlags(progress=False)
    found = grids_fid.fid_of_methods(["self-aug", "mix-diff"], **asked, compute=compute)
    train = data.load("digits").train
    ids, encoder = torch.arange(40), models.encoder("tiny-convnext")
    recipe = grids.recipe("mix-diff", "digits").for_data(False)
    some = grids_fid.some_of(train, 40, 3)
    made = views.make_views(some.images, some.labels, ids, recipe, num_classes=10, seed=3, step=0,
                            public=data.public_images("digits"))  # fmt: skip
    want = between(made.images.flatten(0, 1), train.images, encoder)
    row = found[(found["method"] == "mix-diff") & (found["reference"] == "train")].iloc[0]
    assert row["distance"] == pytest.approx(1000 * want, rel=1e-3) and row["n"] == 40 * recipe.views
    assert 1000 * want != pytest.approx(found["distance"].iloc[0], rel=1e-2)  # Self-Aug's is another

    monkeypatch.setattr(fid, "distance", lambda *_: pytest.fail("computed again"))
    assert grids_fid.fid_of_methods(["self-aug", "mix-diff"], **asked, compute=compute).equals(found)
    for patch, changed in (
        (nullcontext(), {"seeds": [4]}),
        (mock.patch.object(grids_fid.Contents, "private", lambda *_: "new"), {}),
    ):
        with patch, pytest.raises(pytest.fail.Exception, match="computed again"):
            grids_fid.fid_of_methods(["self-aug", "mix-diff"], **{**asked, **changed}, compute=compute)


def test_the_samples_of_table_8_are_of_one_size():
    found = grids_fid.fid_of_sets(dataset="digits", encoders=["tiny-convnext"], seeds=[0, 1])
    assert set(found["n"]) == {360} and list(found["method"].unique()) == list(grids_fid.WORDS.values())
    splits = data.load("digits")
    whole = between(splits.train.images, splits.test.images, models.encoder("tiny-convnext"))
    test = found[found["method"] == grids_fid.WORDS["test"]]
    assert test["whole"].tolist() == pytest.approx([1000 * whole] * 2, rel=1e-4)
    assert (
        test["distance"].nunique() == 2 and (test["distance"] > 1000 * whole).all()
    )  # fewer images, a larger distance


def test_some_examples_are_of_every_class_and_drawn_by_the_seed():
    """A data set of folders is sorted by class."""
    images = torch.arange(300, dtype=torch.int32).to(torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4)
    whole = data.ImageSet(images, torch.arange(300) // 100, ("a", "b", "c"))
    found = [grids_fid.some_of(whole, 60, seed) for seed in (0, 0, 1)]
    assert all(len(some) == 60 and some.labels.bincount().min() > 8 for some in found)
    assert torch.equal(found[0].images, found[1].images) and not torch.equal(found[0].images, found[2].images)
    assert len(set(found[0].images[:, 0, 0, 0].tolist())) > 40, (
        "without replacement, but for the 44 that 256 values repeat"
    )
    assert grids_fid.some_of(whole, None, 0) is whole
