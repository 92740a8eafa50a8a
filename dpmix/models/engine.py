"""What runs a frozen network: PyTorch (`Frozen`), or OpenVINO on a CPU (`Compiled`).

Both take images in chunks of one fixed shape, the last padded with zeros, so that an image's features do not depend, to
the last bit, on what stands beside it or on how many there are. Images are brought to the network's size inside."""

import os
import sys
import threading
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dpmix.core import rng
from dpmix.core.checks import one_of, require

ENGINES = ("auto", "torch", "openvino")
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.2}  # relative distance to PyTorch above which OpenVINO is not used


class Frozen(nn.Module):
    """A network with its own preprocessing, for inference only: resize (antialiased), clamp, normalise, in chunks.
    `examined`: it was seen not to mix examples, and need not be asked again where training begins."""

    examined = False

    def __init__(
        self,
        network: nn.Module,
        name: str,
        size: int,
        channels: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        mode: str = "bicubic",
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.size, self.channels, self.mode = name, size, tuple(channels), mode
        self.mean, self.std = tuple(mean), tuple(std)
        self.anchor: Tensor
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # knows the device and the dtype

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)  # statistics of a batch would couple private examples

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.anchor.dtype

    @property
    def chunk(self) -> int:
        """Images at a time: what stays in a core's cache on a CPU; a device wants more; memory is bounded on both."""
        pixels, most = (2**17, 256) if self.anchor.device.type == "cpu" else (2**25, 4096)
        return max(4, min(most, pixels // self.size**2))

    def forward(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n D"]:
        return torch.cat([self.one_chunk(part) for part in padded(self, images)])[: len(images)]

    @torch.no_grad()
    def one_chunk(self, images: Tensor) -> Tensor:
        """Features of images, as many as there are."""
        dtype = torch.promote_types(self.anchor.dtype, torch.float32)  # pixels in float32 at least
        images = images.to(self.anchor.device, dtype)
        mean, std = (torch.tensor(v, device=images.device, dtype=dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        images = (images - mean) / std  # a grey image becomes as many channels as the mean has
        if images.shape[-2:] != (self.size, self.size):  # after centring: a narrow type then rounds less
            rows, columns = (_resizing(int(side), self.size, self.mode).to(images) for side in images.shape[-2:])
            images = (rows @ images @ columns.T).clamp(-mean / std, (1 - mean) / std)
        return self.network(images.to(self.anchor.dtype)).to(dtype)


def padded(frozen: Frozen, images: Tensor) -> list[Tensor]:
    """The images in chunks, the last padded; at least one chunk. ValueError for channels that the encoder does not take."""
    takes = " or ".join(map(str, frozen.channels))
    channels = images.shape[1]
    require(channels in frozen.channels, "channels", channels, f"encoder {frozen.name!r} takes {takes}")
    *parts, last = images.split(frozen.chunk)
    return [*parts, F.pad(last, (0, 0) * 3 + (0, frozen.chunk - len(last)))]


@lru_cache(maxsize=64)
def _resizing(before: int, after: int, mode: str) -> Float[Tensor, "after before"]:
    """The antialiased resizing of one side as a matrix: linear in the pixels, so it is a product on any engine."""
    return F.interpolate(torch.eye(before)[None, None], (after, before), mode=mode, antialias=True)[0, 0]


@cache
def _openvino() -> tuple[Any, int]:
    """Its core, and the process that started it: its threads do not come along when a process forks, and in the child it
    would wait for them for ever. To import it with its telemetry would report to its makers and leave files in the home
    folder."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        import openvino
    finally:
        del sys.modules["openvino_telemetry"]
    return openvino.Core(), os.getpid()


def choose(engine: str, device: torch.device) -> str:
    """ "torch" or "openvino": what `engine` stands for on `device`. ValueError where OpenVINO is asked for and cannot run."""
    one_of("encoder_engine", engine, ENGINES)
    if engine == "torch" or (engine == "auto" and device.type != "cpu"):
        return "torch"
    require(device.type == "cpu", "encoder_engine", engine, f"runs on a CPU, not on {device}; take 'auto' or 'torch'")
    try:
        _openvino()
    except ImportError as error:
        said = f"encoder_engine={engine!r}: OpenVINO cannot be imported ({error}); pip install openvino"
        if engine == "openvino":
            raise ValueError(said) from error
        warnings.warn(f"{said}, for now PyTorch runs the encoder", stacklevel=2)
        return "torch"
    return "openvino"


class Compiled:
    """Features by OpenVINO: `Frozen`, compiled for the shape of the images at hand, as many chunks at a time as there are
    threads (`torch.get_num_threads`). Takes and gives what `Frozen` does. A network that does not convert, or gives other
    features when it is converted, is run by PyTorch, and a warning says so once."""

    def __init__(self, frozen: Frozen, dtype: torch.dtype = torch.float32) -> None:
        allowed = "must be float32 or bfloat16 with OpenVINO; take encoder_engine='torch'"
        require(dtype in ALLOWED, "dtype", dtype, allowed)
        self.frozen, self.dtype, self.examined = frozen, dtype, frozen.examined
        self._queues: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()

    def __call__(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n D"]:
        if _openvino()[1] != os.getpid():
            torch.set_num_threads(1)  # PyTorch's own threads do not come along either
            return self.frozen(images)
        parts = padded(self.frozen, images)
        with self._lock:
            shape = tuple(images.shape[1:])
            if shape not in self._queues:
                self._queues[shape] = self._compile(shape)
            queue = self._queues[shape]
            if queue is None:
                return self.frozen(images)
            found: list[Any] = [None] * len(parts)
            for place, part in enumerate(parts):
                pixels = np.ascontiguousarray(part.to(torch.float32).numpy())  # lives as long as it runs
                queue.start_async(pixels, (found, place, pixels), share_inputs=True)
            queue.wait_all()
        return torch.from_numpy(np.concatenate(found))[: len(images)]

    def _compile(self, shape: tuple[int, ...]) -> Any:
        """The queue for images of this shape; None, with a warning, where PyTorch has to do it."""
        example = torch.from_numpy(rng.generator(0, "engine check").random((self.frozen.chunk, *shape), np.float32))
        wanted = self.frozen.one_chunk(example)
        try:
            queue = _queue(self.frozen, example, self.dtype)
            found: list[Any] = [None]
            queue.start_async(example.numpy(), (found, 0, None))
            queue.wait_all()
            off = float((torch.from_numpy(found[0]) - wanted).norm() / wanted.norm())
            if off <= ALLOWED[self.dtype]:
                return queue
            reason = f"its features would be off by {off:.1e}"
        except Exception as error:  # whatever a converter raises: PyTorch is right, and it is said
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        said = f"encoder {self.frozen.name!r}: OpenVINO does not run it ({reason}); PyTorch does, more slowly"
        warnings.warn(said, stacklevel=3)
        return None


def _queue(frozen: Frozen, example: Tensor, dtype: torch.dtype) -> Any:
    """`frozen`, traced at the shape of `example` and compiled; by the front end, since `convert_model` reports too."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = frozen

        def forward(self, images: Tensor) -> Tensor:
            return self.frozen.one_chunk(images)

    with warnings.catch_warnings():
        # The result is compared with PyTorch's, so what these warn of would be seen.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit")
        decoder = TorchScriptPythonDecoder(Traced(), example_input=example, trace_kwargs={"check_trace": False})
        front = FrontEndManager().load_by_framework("pytorch")
        model = front.convert(front.load(decoder))
    model.reshape({model.inputs[0]: list(example.shape)})
    threads = torch.get_num_threads()
    how = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": str(threads), "INFERENCE_NUM_THREADS": str(threads)}
    how["INFERENCE_PRECISION_HINT"] = "bf16" if dtype == torch.bfloat16 else "f32"
    compiled = _openvino()[0].compile_model(model, "CPU", how)
    queue = openvino.AsyncInferQueue(compiled, 2 * threads)

    def keep(request: Any, about: tuple[list[Any], int, Any]) -> None:
        about[0][about[1]] = request.get_output_tensor(0).data.copy()

    queue.set_callback(keep)
    return queue
