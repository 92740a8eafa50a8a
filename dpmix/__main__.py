"""`python -m dpmix check | train | predict | card`: one's own images from a command line."""

import argparse
import functools
import io
import sys
import warnings
from pathlib import Path

import dpmix
from dpmix.core.checks import counted, require

COMMANDS = {
    "check": "look at a folder of images before training on it; spends nothing",
    "train": "train on a folder of images, once, and write a release, a privacy card and a private report",
    "predict": "class and probability of images by a release, as CSV",
    "card": "the privacy card of a release, for reading",
}


def parser() -> argparse.ArgumentParser:
    """Options of `check` and `train` are the fields of `own.settings.Settings`."""
    from dataclasses import fields

    from dpmix.own.settings import Settings

    whole = argparse.ArgumentParser(prog="python -m dpmix", description=__doc__)
    kinds = whole.add_subparsers(dest="command", required=True)
    of = {name: kinds.add_parser(name, help=about, description=about) for name, about in COMMANDS.items()}
    for one in (of["check"], of["train"]):
        one.epilog = Settings.__doc__
        one.add_argument("folder", help="train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE")
        for f in fields(Settings)[1:]:
            off = f.type is bool
            how = {"action": "store_false"} if off else {"required": f.name == "epsilon"}
            option = f"--no-{f.name}" if off else f"--{f.name.replace('_', '-')}"
            one.add_argument(option, dest=f.name, default=argparse.SUPPRESS, **how)
    for one in (of["predict"], of["card"]):
        one.add_argument("release")
    of["predict"].add_argument("images", nargs="+", help="image files, or one folder")
    of["predict"].add_argument("--weights", help="the encoder's file, where it is not found by its name")
    return whole


def main(words: list[str] | None = None) -> int:
    """The exit status: 0, or 2 after one line that says what is wrong, or 130 after an interrupt."""
    warnings.showwarning = lambda message, *_, **__: _warn(str(message))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without the letter ε must not cost what was computed.
        sys.stdout.reconfigure(errors="backslashreplace")
    asked = vars(parser().parse_args(words))
    command = asked.pop("command")
    try:
        if command in ("check", "train"):
            print(getattr(dpmix, command)(**asked))
        elif command == "predict":
            _predict(**asked)
        else:
            from dpmix.own.report import card_text
            from dpmix.runs.predict import read_card

            print(card_text(read_card(Path(asked["release"]).expanduser())))
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where it stopped" if command in ("check", "train") else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"dpmix {command}: {error}", file=sys.stderr)
        return 2
    return 0


@functools.cache
def _warn(message: str) -> None:
    """A warning as one line, and once: a folder is looked at several times."""
    print(f"dpmix: {message}", file=sys.stderr)


def _predict(release: str, images: list[str], weights: str | None) -> None:
    import pandas as pd

    from dpmix.images.image_cache import printable
    from dpmix.runs.predict import predictions

    folders = [name for name in images if Path(name).expanduser().is_dir()]
    require(len(images) == 1 or not folders, "images", images, "give files, or one folder")
    head, bad = True, list[str]()
    for found, unread in predictions(release, images[0] if len(images) == 1 else images, weights=weights):
        names, surest = map(printable, found.sources), found.probabilities.max(1, initial=0)
        columns = {"image": list(names), "class": list(map(printable, found.class_names)), "probability": surest}
        pd.DataFrame(columns).to_csv(sys.stdout, index=False, header=head, float_format="%.4f")
        sys.stdout.flush()
        head, bad = False, bad + unread
    if bad:
        some = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
        raise ValueError(f"without a prediction: {counted(len(bad), 'image')}: {some}")


if __name__ == "__main__":
    sys.exit(main())
