"""Keyed randomness. A draw depends on what it is for, never on what was drawn before it.

Every generator is Philox keyed with 128 bits of BLAKE2b over `(seed, purpose, *key)`. Equal keys give equal draws on every
machine, whatever the physical batch size, the order of the examples or the number of processes; different keys give
independent streams. Philox is a statistical generator and not a cryptographic one.

No two uses share a stream: the purpose is a word that occurs at one call of `generator` in all of dpmix (a test lists
them). A seed is a whole number of at least 0, or None, which is fresh entropy from the operating system.

A guarantee of differential privacy supposes that nobody who sees the model knows the noise. A seed that is published,
or that can be guessed, voids it: keep the seed of a release secret, or use `fresh_seed()` and forget it.
"""

import hashlib
import numbers
import secrets
from typing import Any

import numpy as np

from dpmix.core import checks

Seed = Any  # None or a whole number of at least 0, NumPy's included: `as_seed` says so in one line
Key = int | str | float | None | np.integer


def fresh_seed() -> int:
    """128 bits from the operating system: what `seed=None` stands for."""
    return secrets.randbits(128)


def as_seed(seed: Seed) -> int:
    """The seed as an int, NumPy's integers included; a fresh one for None. ValueError for all that is no whole number >= 0.

    What draws more than once calls this at its start, and keeps the answer.
    """
    if seed is None:
        return fresh_seed()
    good = isinstance(seed, numbers.Integral) and not isinstance(seed, bool) and int(seed) >= 0
    checks.require(good, "seed", seed, "must be a whole number of at least 0, or None for a fresh secret one")
    return int(seed)


def generator(seed: Seed, purpose: str, *key: Key) -> np.random.Generator:
    """The NumPy generator of the stream `(seed, purpose, *key)`; about 10 microseconds.

    A stream is consumed in order, so the first k draws do not depend on how many follow. None gives another stream each time.
    ValueError where `seed` is neither None nor a whole number >= 0, or `purpose` is no word.
    """
    checks.require(isinstance(purpose, str) and purpose != "", "purpose", purpose, "must be a word of this use alone")
    parts = (int(k) if isinstance(k, np.integer) else k for k in key)
    digest = hashlib.blake2b(repr((as_seed(seed), purpose, *parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def standard_noise(shape: tuple[int, ...], *identity: Key, seed: Seed, step: int) -> np.ndarray:
    """N(0, 1) on every coordinate, float64: the noise of a step before it is scaled. `identity`: whose it is, run and all."""
    return generator(seed, "noise", step, *identity).standard_normal(shape)
