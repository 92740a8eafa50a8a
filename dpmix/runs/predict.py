"""What was released, used by anybody: the folder alone gives class names and probabilities for images."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dpmix.core import checks, files, heads, transforms
from dpmix.core.processes import device_of
from dpmix.images import decoding, layouts
from dpmix.images.image_cache import sha256
from dpmix.models import encoders
from dpmix.models.wide_resnet import wide_resnet
from dpmix.runs.release import card_digest

AT_A_TIME = 256
File = str | Path
Images = File | Image.Image | np.ndarray | Tensor | Sequence[File | Image.Image]


class Prediction(NamedTuple):
    """The likeliest class of each image, its probabilities `[n, classes]` in the order of `classes`, and the images' files
    (their numbers where they are no files)."""

    class_names: list[str]
    probabilities: Float[np.ndarray, "n classes"]
    classes: tuple[str, ...]
    sources: list[str]


def predict(release: File, images: Images, *, weights: File | None = None, device: str = "cpu") -> Prediction:
    """Class names and probabilities by the model in the folder `release`.

    Args:
        images: a file, a folder of images (with all that is in it), a list of files or of Pillow's images, or uint8
            `[n, C, H, W]` or `[n, H, W, C]`. Each is brought to the size and channels of training, as there.
        weights: the encoder's file, where it is not found by its name.

    Raises ValueError for an encoder's file that is not the one of training (by the sha256 on the card), for a model that
    does not belong to its card, and for images that cannot be decoded; FileNotFoundError for what is absent."""
    parts, bad = [], list[str]()
    for part, unread in predictions(release, images, weights=weights, device=device):
        parts.append(part)
        bad += unread
    if bad:
        raise ValueError("; ".join(bad[:5]) + (f"; and {len(bad) - 5:,} more" if len(bad) > 5 else ""))
    chosen, sources = ([x for p in parts for x in getattr(p, name)] for name in ("class_names", "sources"))
    return Prediction(chosen, np.concatenate([p.probabilities for p in parts]), parts[0].classes, sources)


def predictions(
    release: File, images: Images, *, weights: File | None = None, device: str = "cpu"
) -> Iterator[tuple[Prediction, list[str]]]:
    """`predict` as it goes, some images at a time, so that nothing is lost where one cannot be decoded: the prediction for
    those that can, and a line on each of the others. No images give one empty prediction."""
    folder = Path(release).expanduser()
    card, listed = read_card(folder), _listed(images)
    absent = [x for x in listed if isinstance(x, (str, Path)) and not Path(x).expanduser().exists()]
    if absent:
        raise FileNotFoundError(f"images={str(absent[0])!r}: no such file or folder")
    classes, (channels, height, width) = tuple(card["class_names"]), card["images"]
    found = files.load_tensors(folder / "model.safetensors", {"card": card_digest(card)}, name="release")
    if found is None:
        raise FileNotFoundError(f"release={str(folder)!r}: no model.safetensors there; fetch the release again")
    score = _scorer(card, found[0], weights, device_of(device))
    for first in tqdm(range(0, max(1, len(listed)), AT_A_TIME), "predicting", disable=None, delay=2):
        pixels, sources, bad = list[np.ndarray](), list[str](), list[str]()
        for i, x in enumerate(listed[first : first + AT_A_TIME], first):
            try:
                pixels.append(_pixels(x, height, width, channels))
                sources.append(str(x if isinstance(x, (str, Path)) else i))
            except Exception as error:  # Pillow raises many kinds
                bad.append(f"images={str(x)!r}: cannot be decoded ({decoding.reason(error)})")
        scores = score(torch.from_numpy(np.stack(pixels))).softmax(1).cpu() if pixels else torch.zeros(0, len(classes))
        yield Prediction([classes[c] for c in scores.argmax(1)], scores.numpy(), classes, sources), bad


def read_card(folder: Path) -> dict[str, Any]:
    """The privacy card of a release."""
    path = folder / "privacy_card.json"
    if not path.is_file():
        raise FileNotFoundError(f"release={str(folder)!r}: no privacy_card.json there; give a folder of dpmix.release")
    card = files.read_json(path)
    if card is None:
        raise ValueError(f"release={str(folder)!r}: privacy_card.json is damaged; fetch the release again")
    return card


def _scorer(
    card: dict[str, Any], tensors: dict[str, Tensor], weights: File | None, device: torch.device
) -> Callable[[UInt8[Tensor, "b C H W"]], Float[Tensor, "b classes"]]:
    """From images to scores of the classes."""
    about, spec = card["encoder"], card["spec"]
    if about is None:
        depth, width = map(int, spec["model"].split("-")[1:])
        network = wide_resnet(depth, width, len(card["class_names"]), channels=card["images"][0])
        network.load_state_dict(tensors)
        network = network.eval().to(device)
        return lambda images: torch.no_grad()(network)(transforms.as_float(images.to(device)))
    model, file = about["name"], None if weights is None else str(Path(weights).expanduser())
    if file is not None and model.startswith("open_clip:"):
        model = encoders.without_file(model)
    path = encoders.weights_of(model, file)
    found = None if isinstance(path, str) else sha256(path)
    wanted = f"is not the encoder of this release, {about['file']} with sha256 {str(about['sha256'])[:12]}"
    checks.require(found == about["sha256"], "weights", f"{path} (sha256 {str(found)[:12]})", wanted)
    encoder = encoders.encoder(model, file, image_size=spec["image_size"]).to(device, engine="auto")
    weight, bias = tensors["weight"].cpu().float(), tensors["bias"].cpu().float()
    return lambda images: heads.encode(encoder, images, device).cpu().float() @ weight.T + bias


def _listed(images: Images) -> Sequence[File | Image.Image]:
    """Files or pictures; of a folder, its image files, with all that is in it; of arrays a picture each."""
    if isinstance(images, (np.ndarray, Tensor)):
        given = torch.as_tensor(images)
        last = given.shape[-1] in (1, 3) and given.shape[1] not in (1, 3)
        good = given.dtype == torch.uint8 and given.ndim == 4 and (last or given.shape[1] in (1, 3))
        said = "must be uint8 [n, C, H, W] or [n, H, W, C] with 1 or 3 channels"
        checks.require(good, "images", f"{given.dtype} {list(given.shape)}", said)
        arrays = np.ascontiguousarray((given if last else given.permute(0, 2, 3, 1)).cpu().numpy())
        return [Image.fromarray(x[:, :, 0] if x.shape[2] == 1 else x) for x in arrays]
    if not isinstance(images, (str, Path)):
        return [images] if isinstance(images, Image.Image) else images
    path = Path(images).expanduser()
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in layouts.SUFFIXES and p.is_file())
    found = [p for p in found if not any(map(layouts.hidden, p.relative_to(path).parts))]
    checks.require(bool(found), "images", str(path), f"holds no images; taken are {' '.join(layouts.SUFFIXES)}")
    return found


def _pixels(image: Any, height: int, width: int, channels: int) -> np.ndarray:
    if isinstance(image, Image.Image):
        return decoding.of_image(image, height, width, channels)[0]
    with decoding.bombs_refused():
        return decoding.pixels(Path(image).expanduser().read_bytes(), height, width, channels)[0]
