"""Sparse random projection of a gradient: a uniform mask over all coordinates, then a count-sketch.

A coordinate is known by its parameter's name and its flat position there. Whether it is kept, its bucket and its sign
come from a counter-based hash of (seed, name, position), so the same bits come out on any device, in any order, and for
any set of other parameters.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PROJECTION_VERSION = 1

_WORD = 1 << 64


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that torch stores it in."""
    value %= _WORD
    return value - _WORD if value >= _WORD >> 1 else value


def _shift_right(values_P: Int[Tensor, " P"], bits: int) -> Int[Tensor, " P"]:
    """Logical shift; torch's own is arithmetic and would copy the sign bit down."""
    return (values_P >> bits) & ((1 << (64 - bits)) - 1)


def hash_counters(key: int, counters_P: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
    """64 pseudo-random bits per counter: the SplitMix64 finaliser of key + counter * golden ratio (Steele et al. 2014).

    Integer arithmetic wraps modulo 2^64 on every device, so CPU and GPU give the same bits.
    """
    z_P = counters_P.to(torch.int64) * _signed(0x9E3779B97F4A7C15) + _signed(key)
    z_P = (z_P ^ _shift_right(z_P, 30)) * _signed(0xBF58476D1CE4E5B9)
    z_P = (z_P ^ _shift_right(z_P, 27)) * _signed(0x94D049BB133111EB)
    return z_P ^ _shift_right(z_P, 31)


@dataclass(frozen=True)
class SparseProjection:
    """Keep a uniformly random `keep_fraction` of all coordinates, then count-sketch them to `dim` numbers.

    Row j of the projected vector is sum of s(i) g_i / sqrt(keep_fraction) over kept coordinates i with bucket b(i) = j,
    where s(i) is +1 or -1. Then E<Pu, Pv> = <u, v> over seeds. The mask contributes the variance
    (1/q - 1) sum_i u_i^2 v_i^2, q = keep_fraction, and the sketch (<u', u'><v', v'> + <u', v'>^2 - 2 sum u'^2 v'^2) /
    dim
    on the masked vectors u', v' (paper section on sparse random projection; count-sketch: Charikar et al. 2002; feature
    hashing: Weinberger et al. 2009). The released code of the paper keeps the first coordinates instead; see
    docs/paper.md.
    """

    dim: int = 32768
    keep_fraction: float = 0.1
    seed: int = 0

    @property
    def identity(self) -> str:
        """Names the map itself: two features may be compared only if this is equal."""
        return f"count-sketch-v{PROJECTION_VERSION}-d{self.dim}-q{self.keep_fraction!r}-s{self.seed}"

    def _key(self, name: str, role: str) -> int:
        text = f"{PROJECTION_VERSION}/{self.seed}/{role}/{name}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def mask(self, name: str, counters_P: Int[Tensor, " P"]) -> Bool[Tensor, " P"]:
        """Whether each coordinate of a parameter is kept."""
        if self.keep_fraction >= 1.0:
            return torch.ones_like(counters_P, dtype=torch.bool)
        # The upper 53 bits are a uniform integer that a float64 threshold meets exactly.
        return _shift_right(hash_counters(self._key(name, "mask"), counters_P), 11) < int(
            self.keep_fraction * (1 << 53)
        )

    def buckets(self, name: str, counters_P: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
        """b(i) in [0, dim)."""
        return _shift_right(hash_counters(self._key(name, "bucket"), counters_P), 1) % self.dim

    def signs(self, name: str, counters_P: Int[Tensor, " P"]) -> Float[Tensor, " P"]:
        """s(i), +1 or -1, float32."""
        return (hash_counters(self._key(name, "sign"), counters_P) & 1).to(torch.float32) * 2 - 1


class Projector:
    """A projection made ready for the parameters of one model: the kept positions, buckets and signs of each."""

    def __init__(self, projection: SparseProjection, shapes: Mapping[str, int], device: torch.device) -> None:
        """`shapes` gives the number of coordinates of every parameter by name."""
        self.projection = projection
        self._plan = {name: self._prepare(name, count, device) for name, count in shapes.items()}

    def _prepare(self, name: str, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        kept, chunk = [], 1 << 24
        for start in range(0, count, chunk):  # in pieces, for the hash of a large matrix takes 8 bytes a coordinate
            counters_P = torch.arange(start, min(start + chunk, count), device=device)
            kept.append(counters_P[self.projection.mask(name, counters_P)])
        kept_P = torch.cat(kept)
        return kept_P, self.projection.buckets(name, kept_P), self.projection.signs(name, kept_P)

    def __call__(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, " D"]:
        """The feature of a gradient given by parameter name, in float32."""
        if set(gradients) != set(self._plan):
            raise ValueError(f"parameters differ from the projector's: {sorted(set(gradients) ^ set(self._plan))[:3]}")
        device = next(iter(self._plan.values()))[0].device
        feature_D = torch.zeros(self.projection.dim, dtype=torch.float32, device=device)
        for name, gradient in gradients.items():
            kept_P, buckets_P, signs_P = self._plan[name]
            feature_D.index_add_(0, buckets_P, gradient.reshape(-1)[kept_P].float() * signs_P)
        return feature_D / self.projection.keep_fraction**0.5
