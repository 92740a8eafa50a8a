"""How bad input is refused. One line that names the argument, its value and the remedy."""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ValueError("name=value: allowed")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}={value!r}: {allowed}")


def counted(n: int, noun: str) -> str:
    """ "1 image", "2,000 images", "0 classes"."""
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")


def finite(name: str, value: Any, allowed: str = "must be a finite number") -> None:
    """Refuse anything but a finite number (NumPy's are numbers, True is none), with a word where it is one as text."""
    said = "is text; write a number such as 2.0 or 1.0e-6 (to YAML 1e-6 is text)" if isinstance(value, str) else allowed
    good = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    require(good, name, value, said)


def positive(name: str, value: Any, hint: str = "") -> None:
    """Refuse anything but a finite number above zero."""
    allowed = f"must be a positive finite number{hint}"
    finite(name, value, allowed)
    require(value > 0, name, value, allowed)


def single(name: str, value: Any) -> None:
    """Refuse a number that is infinite, or nothing, in single precision."""
    kind = np.finfo(np.float32)
    require(float(kind.tiny) <= abs(float(value)) <= float(kind.max), name, value, "is beyond the numbers of float32")


def clip_norm(value: Any) -> None:
    """Refuse a clip norm near which norms are lost: the squares of what is below 1e-19 are nothing in float32, and a norm of
    many of them would count as zero."""
    positive("clip_norm", value)
    single("clip_norm", value)
    require(value >= 1e-12, "clip_norm", value, "must be at least 1e-12; gradients near it have no norm in float32")


def floats(instance: object, *names: str) -> None:
    """Make the fields `names` of a frozen dataclass floats, so that 1 and 1.0 mean one thing; None stays. Refuses anything
    but a finite number."""
    for name in names:
        value = getattr(instance, name)
        if value is not None:
            finite(name, value)
            object.__setattr__(instance, name, float(value))


def whole(name: str, value: Any, least: int = 0) -> None:
    """Refuse anything but a whole number of at least `least`."""
    allowed = f"must be a whole number of at least {least}"
    finite(name, value, allowed)
    require(isinstance(value, numbers.Integral) and int(value) >= least, name, value, allowed)


def one_of(name: str, value: str, options: Iterable[str]) -> None:
    """Refuse a word that is not among `options`; the message offers the near matches, else all of them."""
    options = list(options)
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=3, cutoff=0.5)
        said = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known are {', '.join(options)}"
        raise ValueError(f"{name}={value!r}: unknown; {said}")
