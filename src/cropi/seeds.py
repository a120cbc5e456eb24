"""Seeds: every random choice has one of its own, derived from the run's seed and what the choice is for."""

import hashlib
from collections.abc import Iterable, Iterator


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, the same in every process."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def unit_interval(seed: int, *purpose: str | int) -> float:
    """A number in [0, 1) for one purpose."""
    return derived_seed(seed, *purpose) / (1 << 63)


def unit_intervals(names: Iterable[str], seed: int, *purpose: str | int) -> Iterator[float]:
    """`unit_interval(seed, *purpose, name)` of every name, in a third of the time: for pools of millions."""
    head = hashlib.blake2b("".join(f"{part}/" for part in (seed, *purpose)).encode(), digest_size=8)
    for name in names:
        own = head.copy()
        own.update(name.encode())
        yield (int.from_bytes(own.digest(), "little") >> 1) / (1 << 63)
