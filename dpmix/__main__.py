"""`python -m dpmix check | train | predict | card`: one's own images from a command line."""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

from dpmix.core.checks import require


def parser() -> argparse.ArgumentParser:
    """Options of `check` and `train` are the fields of `runs.own.Own`."""
    from dataclasses import fields

    from dpmix.runs.own import Own

    whole = argparse.ArgumentParser(prog="python -m dpmix", description=__doc__)
    kinds = whole.add_subparsers(dest="command", required=True)
    for name, about in (
        ("check", "look at a folder of images before training on it; spends nothing"),
        ("train", "train on a folder of images, once, and write a release, a privacy card and a private report"),
    ):
        one = kinds.add_parser(name, help=about, description=about, epilog=Own.__doc__)
        one.add_argument("folder", help="train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE")
        for f in fields(Own):
            if f.type == "bool" or f.type is bool:
                one.add_argument(f"--no-{f.name}", dest=f.name, action="store_false", default=argparse.SUPPRESS)
            elif f.name != "folder":
                option = f"--{f.name.replace('_', '-')}"
                one.add_argument(option, dest=f.name, default=argparse.SUPPRESS, required=f.name == "epsilon")
    one = kinds.add_parser("predict", help="class and probability of images by a release, as CSV")
    one.add_argument("release")
    one.add_argument("images", nargs="+", help="image files, or one folder")
    one.add_argument("--weights", help="the encoder's file, where it is not found by its name")
    one = kinds.add_parser("card", help="the privacy card of a release, for reading")
    one.add_argument("release")
    return whole


def main(words: list[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that says what is wrong, or 130 after an interrupt."""
    asked = vars(parser().parse_args(words))
    command = asked.pop("command")
    try:
        _COMMANDS[command](**asked)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"dpmix {command}: {error}", file=sys.stderr)
        return 2
    return 0


def _check(**settings: object) -> None:
    from dpmix.runs.check import check

    print(check(**settings))  # type: ignore[arg-type]


def _train(**settings: object) -> None:
    from dpmix.runs.train import train

    print(train(**settings))  # type: ignore[arg-type]


def _predict(release: str, images: list[str], weights: str | None) -> None:
    from dpmix.runs.predict import predict

    require(len(images) == 1 or not any(map(_is_folder, images)), "images", images, "give files, or one folder")
    found = predict(release, images[0] if len(images) == 1 else images, weights=weights)
    out = csv.writer(sys.stdout)
    out.writerow(["image", "class", "probability"])
    for source, name, scores in zip(found.sources, found.class_names, found.probabilities, strict=True):
        out.writerow([source, name, f"{scores.max():.4f}"])


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()


def _card(release: str) -> None:
    from dpmix.runs.predict import read_card
    from dpmix.runs.report import card_text

    print(card_text(read_card(Path(release).expanduser())))


_COMMANDS: dict[str, Callable[..., None]] = {"check": _check, "train": _train, "predict": _predict, "card": _card}

if __name__ == "__main__":
    sys.exit(main())
