"""How bad input is refused. One line that names the argument, its value and the remedy."""

import difflib
import math
from collections.abc import Iterable


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise `ValueError("name=value: allowed")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}={value!r}: {allowed}")


def positive(name: str, value: object, hint: str = "") -> None:
    """Refuse anything but a finite number above zero."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    require(good, name, value, f"must be a positive finite number{hint}")


def floats(instance: object, *names: str) -> None:
    """Make the fields `names` of a frozen dataclass floats, so that 1 and 1.0 mean one thing; None stays.

    Refuses anything but a finite number.
    """
    for name in names:
        value = getattr(instance, name)
        if value is not None:
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            require(good, name, value, "must be a finite number")
            object.__setattr__(instance, name, float(value))


def whole(name: str, value: object, least: int = 0) -> None:
    """Refuse anything but a whole number of at least `least`."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(good, name, value, f"must be a whole number of at least {least}")


def one_of(name: str, value: str, options: Iterable[str]) -> None:
    """Refuse a word that is not among `options`; the message offers the near matches, else all of them."""
    options = list(options)
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=3, cutoff=0.5)
        said = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else f"known are {', '.join(options)}"
        raise ValueError(f"{name}={value!r}: unknown; {said}")
