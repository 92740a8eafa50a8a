"""Keyed randomness. A draw depends on what it is for, never on what was drawn before it.

Every generator is Philox keyed with 128 bits of BLAKE2b over `(seed, *key)`. Equal keys give equal draws on every
machine, whatever the physical batch size, the order of the examples or the number of processes; different keys give
independent streams. Philox is a statistical generator and not a cryptographic one.

A guarantee of differential privacy supposes that nobody who sees the model knows the noise. A seed that is published,
or that can be guessed, voids it: keep the seed of a release secret, or use `fresh_seed()` and forget it.
"""

import hashlib
import secrets

import numpy as np

Key = int | str | float | None


def fresh_seed() -> int:
    """128 bits from the operating system: what `seed=None` stands for."""
    return secrets.randbits(128)


def generator(seed: int, *key: Key) -> np.random.Generator:
    """The NumPy generator of the stream `(seed, *key)`; about 10 microseconds.

    A stream is consumed in order, so the first k draws do not depend on how many follow.
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
