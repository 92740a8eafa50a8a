"""Encoders: what they take and give, whose pixels a feature depends on, weights files, and what bad input gets."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dpmix import models
from dpmix.models import encoders, weights

ALL = ("tiny-vit", "tiny-convnext", "timm:test_vit", "timm:test_convnext", "open_clip:test-tiny")


class Small(nn.Module):
    """A user's own encoder: two channels of 6x6 to five features, with BatchNorm and dropout to be frozen."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5))

    def forward(self, x):
        return self.body(x).mean((2, 3))


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """An open_clip architecture of a few thousand weights, registered for this module."""
    import json

    import open_clip

    folder = tmp_path_factory.mktemp("arch")
    tower = {"layers": 1, "width": 32}
    vision = {"image_size": 40, "patch_size": 20, "head_width": 16, **tower}
    text = {"context_length": 8, "vocab_size": 50, "heads": 2, **tower}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    (folder / "test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "test-tiny"


@pytest.fixture
def get(small_clip):
    def make(name: str) -> models.Encoder:
        return models.encoder(name, None if name.startswith("tiny") else "random")

    return make


@pytest.mark.parametrize("name", ALL)
def test_the_contract(get, name):
    encoder = get(name)
    assert encoder.name == name and encoder.dim > 1
    for channels in encoder.channels:
        for height, width in ((8, 8), (encoder.image_size, encoder.image_size), (13, 40)):
            features = encoder.features(torch.rand(3, channels, height, width))
            assert features.shape == (3, encoder.dim) and features.dtype == torch.float32
            assert torch.isfinite(features).all() and not features.requires_grad
    assert encoder.features(torch.rand(0, encoder.channels[0], 8, 8)).shape == (0, encoder.dim)


@pytest.mark.parametrize("name", ALL)
def test_a_feature_depends_on_its_own_image_only(get, name):
    encoder = get(name)
    images = torch.rand(70, encoder.channels[-1], 8, 8)  # more than one chunk for the larger encoders
    together = encoder.features(images)
    assert torch.allclose(together[[3, 69]], encoder.features(images[[3, 69]]), atol=1e-5)
    images[:69] = torch.rand(69, *images.shape[1:])
    torch.testing.assert_close(encoder.features(images)[69], together[69])
    assert not torch.allclose(encoder.features(images)[0], together[0], atol=1e-3)


@pytest.mark.parametrize("name", ("tiny-vit", "tiny-convnext"))
def test_tiny_features_have_unit_norm_and_tell_images_apart(name):
    features = models.encoder(name).features(torch.rand(50, 1, 8, 8))
    assert torch.allclose(features.norm(dim=1), torch.ones(50), atol=1e-3)
    assert (features @ features.T).triu(1).max() < 0.9999


@pytest.mark.parametrize("name", ("timm:test_vit", "open_clip:test-tiny"))
def test_grey_is_the_same_grey_in_three_channels(get, name):
    encoder, grey = get(name), torch.rand(4, 1, 20, 20)
    torch.testing.assert_close(encoder.features(grey), encoder.features(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(("name", "channels"), [("tiny-vit", 3), ("timm:test_vit", 2), ("open_clip:test-tiny", 4)])
def test_wrong_channels_are_one_line(get, name, channels):
    with pytest.raises(ValueError, match=rf"channels={channels}: encoder '{name}' takes 1( or 3)?$"):
        get(name).features(torch.rand(2, channels, 8, 8))


def test_open_clip_is_encode_image_after_its_own_preprocessing(get, small_clip):
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    encoder = get("open_clip:test-tiny")
    assert encoder.image_size == 40 and encoder.dim == 12
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _, preprocess = open_clip.create_model_and_transforms(small_clip, load_weights=False)
    model.eval()
    images = (torch.rand(3, 3, 40, 40) * 255).round() / 255
    with torch.no_grad():
        wanted = model.encode_image(torch.stack([preprocess(to_pil_image(i)) for i in images]))
    torch.testing.assert_close(encoder.features(images), wanted, atol=1e-4, rtol=1e-4)
    large = F.interpolate(torch.rand(3, 3, 10, 10), (90, 90), mode="bicubic").clamp(0, 1)  # smooth: Pillow rounds
    with torch.no_grad():
        wanted = model.encode_image(torch.stack([preprocess(to_pil_image(i)) for i in large]))
    found = encoder.features(large)
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert (encoder.features(large.flip(3)) - wanted).norm() > 0.1 * wanted.norm()


def test_the_paper_encoders_have_their_size_and_width():
    vit = models.encoder("open_clip:ViT-B-16/random")
    assert (vit.image_size, vit.dim, vit.channels) == (224, 512, (1, 3))
    assert vit.features(torch.rand(1, 3, 32, 32)).shape == (1, 512)
    assert not any(k.startswith("text") or "token_embedding" in k for k in vit.features.state_dict())


def test_timm_uses_its_own_statistics(get):
    import timm

    encoder = get("timm:test_vit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=0).eval()
    own = timm.data.resolve_model_data_config(model)
    assert encoder.image_size == own["input_size"][-1]
    images = torch.rand(2, 3, encoder.image_size, encoder.image_size)
    mean, std = (torch.tensor(own[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(encoder.features(images), model((images - mean) / std))


def test_random_weights_are_fixed_and_the_global_state_is_left_alone(get):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = get("timm:test_vit"), get("timm:test_vit")
    models.encoder("tiny-vit").to("cpu", torch.float64)
    assert torch.equal(before, torch.get_rng_state())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(first.features(images), second.features(images))


def test_to_gives_a_copy_in_another_dtype():
    encoder, images = models.encoder("tiny-vit"), torch.rand(20, 1, 8, 8)
    before = encoder.features(images)
    exact = encoder.to(dtype=torch.float64)
    assert exact.features(images).dtype == torch.float64
    torch.testing.assert_close(exact.features(images).float(), before, atol=1e-5, rtol=1e-4)
    rough = encoder.to("cpu", torch.bfloat16).features(images)
    assert rough.dtype == torch.float32 and 0 < (rough - before).norm(dim=1).max() < 0.1
    assert torch.equal(encoder.features(images), before), "the original is as it was"
    assert torch.equal(encoder.to().features(images), before)


def test_chunks_bound_memory_and_change_nothing():
    sizes = []

    class Watch(Small):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    encoder = models.encoder(Watch(), image_size=6, channels=2)
    network = encoder.features.network
    images = torch.rand(10_000, 2, 6, 6)
    sizes.clear()
    features = encoder.features(images)
    assert len(sizes) > 1 and set(sizes) == {256} and sum(sizes) == 10_240, "the last chunk is padded"
    torch.testing.assert_close(features, network(images))


def test_a_module_is_frozen_and_the_callers_own_stays_trainable():
    module = Small().train()
    encoder = models.encoder(module, image_size=6, channels=2, mean=0.5, std=0.25)
    images = torch.rand(9, 2, 6, 6)
    assert torch.equal(encoder.features(images), encoder.features(images)), "dropout is off"
    encoder.features.train()
    assert not any(m.training for m in encoder.features.modules()), "it cannot be put back into training"
    assert module.training and all(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        torch.testing.assert_close(encoder.features(images), module.eval()((images - 0.5) / 0.25))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_from_a_file(tmp_path, suffix, wrapped):
    source, images, path = Small().eval(), torch.rand(4, 2, 6, 6), tmp_path / f"w{suffix}"
    with torch.no_grad():
        source.body[0].weight.mul_(3)
    state = source.state_dict()
    if suffix == ".safetensors":
        save_file({f"module.{k}": v for k, v in state.items()} if wrapped else state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    encoder = models.encoder(Small(), path, image_size=6, channels=2)
    assert encoder.name == f"Small/{path.name}" and encoder.dim == 5
    with torch.no_grad():
        torch.testing.assert_close(encoder.features(images), source(images))


def test_weights_of_named_encoders_from_a_file(tmp_path, get):
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "timm.safetensors")  # with the classifier, as they are published
    encoder, images = models.encoder("timm:test_vit", tmp_path / "timm.safetensors"), torch.rand(2, 3, 160, 160)
    assert not torch.allclose(encoder.features(images), get("timm:test_vit").features(images), atol=1e-3)
    tiny = models.encoder("tiny-vit")
    save_file({k: v * 1.1 for k, v in tiny.features.network.state_dict().items()}, tmp_path / "tiny.safetensors")
    other, grey = models.encoder("tiny-vit", tmp_path / "tiny.safetensors"), torch.rand(2, 1, 8, 8)
    assert not torch.allclose(other.features(grey), tiny.features(grey), atol=1e-3)


def test_open_clip_weights_from_data_weights(tmp_path, monkeypatch, small_clip):
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(9)
        model = open_clip.create_model(small_clip, load_weights=False).eval()
    path = tmp_path / "mine.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    images = torch.rand(2, 3, 40, 40)
    by_argument = models.encoder("open_clip:test-tiny/random", path).features(images)
    by_name = models.encoder(f"open_clip:test-tiny/{path}").features(images)
    assert torch.equal(by_argument, by_name)
    assert not torch.allclose(by_name, models.encoder("open_clip:test-tiny", "random").features(images), atol=1e-3)
    # a published tag is found under data/weights/
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda arch: ["good"])
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda arch, tag: {"hf_hub": "a/b/", "url": "", "std": (1, 1, 1)}
    )
    path.rename(tmp_path / "test-tiny-good.safetensors")
    assert not torch.allclose(models.encoder("open_clip:test-tiny/good").features(images), by_name, atol=1e-3), (
        "own std"
    )


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Exploit()}, tmp_path / name)
    with pytest.raises(ValueError, match=r"weights=.*(could run code|not a readable file)") as caught:
        models.encoder(Small(), name, image_size=6, channels=2)
    assert "\n" not in str(caught.value) and not (tmp_path / "exploited").exists()
    control = (tmp_path / name).rename(tmp_path / "control.pt")
    torch.load(control, weights_only=False)  # it does run where it is trusted
    assert (tmp_path / "exploited").exists()


def test_weights_are_compared_with_the_checksum_that_comes_with_them(tmp_path):
    """FILE.sha256 as `sha256sum` writes it, or the name of the blob in the Hugging Face cache; one bit is enough."""
    path = tmp_path / "mine.safetensors"
    save_file(Small().state_dict(), path)
    whole = path.read_bytes()
    digest = hashlib.sha256(whole).hexdigest()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / digest).write_bytes(whole)
    linked = tmp_path / "model.safetensors"
    linked.symlink_to(blobs / digest)
    path.with_name("mine.safetensors.sha256").write_text(f"{digest}  mine.safetensors\n")
    for good in (path, linked):
        models.encoder(Small(), good, image_size=6, channels=2)
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-8], b""):
        path.write_bytes(damaged)
        (blobs / digest).write_bytes(damaged)
        for bad in (path, linked):
            with pytest.raises(
                ValueError, match=r"weights=.*damaged, its sha256 is not the recorded .*again"
            ) as caught:
                models.encoder(Small(), bad, image_size=6, channels=2)
            assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_weights_without_a_checksum_are_refused_too(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(Small().state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 7, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"weights=.*(not a readable file of tensors|refused, damaged)"):
            models.encoder(Small(), path, image_size=6, channels=2)


def test_a_pixel_that_is_no_number_stays_with_its_image():
    encoder = models.encoder("tiny-convnext")
    images = torch.rand(6, 1, 8, 8)
    clean = encoder.features(images)
    images[1, 0, 2, 2], images[3, 0, 0, 0], images[4, 0, 7, 7] = torch.nan, torch.inf, 1e30
    found = encoder.features(images)
    torch.testing.assert_close(found[[0, 2, 5]], clean[[0, 2, 5]])
    assert encoder.features(torch.zeros(2, 1, 8, 8)).isfinite().all()


def test_bad_weights_are_one_line(tmp_path):
    def said(path, error=ValueError):
        with pytest.raises(error) as caught:
            models.encoder(Small(), path, image_size=6, channels=2)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file; give a .safetensors file" in said(tmp_path / "absent.pt", FileNotFoundError)
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes(b"\x80\x02garbage" * 3)
        assert "damaged" in said(tmp_path / name) or "not a readable file" in said(tmp_path / name)
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "not a readable file of tensors" in said(tmp_path / "empty.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "must hold a state_dict" in said(tmp_path / "list.pt")
    state = Small().state_dict()
    state["body.0.weight"] = torch.zeros(4, 4)
    state["more"] = torch.zeros(2)
    save_file(state, tmp_path / "other.safetensors")
    assert "do not fit Small, missing, extra or of another shape: 2 tensors" in said(tmp_path / "other.safetensors")


def test_unknown_names_offer_near_matches():
    for name, near in [
        ("tiny-vitt", "'tiny-vit'"),
        ("tiny", "did you mean|known are"),
        ("open_clip:ViT-B-17/openai", "did you mean 'ViT-B-16"),
        ("open_clip:ViT-B-16/laion2b_s34b_b88", "did you mean 'laion2b_s34b_b88k'"),
        ("timm:resnet10", "did you mean 'resnet10t'"),
        ("open_clip:", "did you mean|known are"),
    ]:
        with pytest.raises(ValueError, match=near) as caught:
            models.encoder(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "place", "page"),
    [
        ("open_clip:ViT-B-16/laion2b_s34b_b88k", "ViT-B-16-laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
        (
            "open_clip:convnext_base_w/laion2b_s13b_b82k",
            "convnext_base_w-laion2b_s13b_b82k",
            "laion/CLIP-convnext_base_w-laion2B-s13B-b82K",
        ),
        ("timm:test_vit", "test_vit", "timm/test_vit"),
    ],
)
def test_absent_weights_say_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path, name, place, page):
    import huggingface_hub

    monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(FileNotFoundError) as caught:
        models.encoder(name)
    text = str(caught.value)
    assert f"huggingface.co/{page}" in text and f"data/weights/{place}.safetensors" in text and "\n" not in text
    # and the Hugging Face cache is looked into
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        models.encoder(name)


def test_bad_arguments():
    for given in (dict(), dict(image_size=6), dict(channels=2)):
        with pytest.raises(ValueError, match="both must be given with a module"):
            models.encoder(Small(), **given)
    with pytest.raises(ValueError, match=r"std=0\.0: must be a positive"):
        models.encoder(Small(), image_size=6, channels=2, std=0.0)
    with pytest.raises(ValueError, match="image_size=32: tiny-vit takes 16 only"):
        models.encoder("tiny-vit", image_size=32)
    with pytest.raises(ValueError, match="channels=3: is for modules only"):
        models.encoder("tiny-vit", channels=3)
    with pytest.raises(ValueError, match=r"image_size=100: timm:test_vit@100 cannot take images of 100 x 100 \(.*\)$"):
        models.encoder("timm:test_vit", "random", image_size=100)
    with pytest.raises(ValueError, match=r"pretrained weights of ViT-B-16=''.*"):
        models.encoder("open_clip:ViT-B-16")
    with pytest.raises(ValueError, match="must give one feature vector an image"):
        models.encoder(nn.Conv2d(1, 2, 3), image_size=6, channels=1)


def test_importing_models_is_light():
    heavy = "open_clip", "timm", "diffusers", "transformers"
    code = f"import sys, dpmix.models; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_tag_stays_beside_a_file_of_weights_since_pixels_are_normalised_by_it():
    """Without its tag this encoder would see pixels as CLIP does, and say nothing."""
    import open_clip

    siglip = "open_clip:ViT-B-16-SigLIP/webli"
    assert open_clip.get_pretrained_cfg("ViT-B-16-SigLIP", "webli")["mean"] == (0.5, 0.5, 0.5)
    assert encoders.without_file(siglip) == siglip
    assert encoders.without_file("open_clip:ViT-S-32-alt/patients.pt") == "open_clip:ViT-S-32-alt"
    assert encoders.without_file("open_clip:ViT-S-32-alt") == "open_clip:ViT-S-32-alt"
