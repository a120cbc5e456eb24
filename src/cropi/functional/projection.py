"""Sparse random projection of a gradient: keep a random part of its coordinates, then count-sketch them.

A coordinate is identified by its parameter's name and its flat position. A counter-based hash of (seed, name, position)
decides whether it is kept, its bucket and its sign. So the result does not depend on the device, the order, or on other
parameters.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PROJECTION_VERSION = 2

Mask = Literal["structured", "uniform"]

_WORD = 1 << 64
_DOUBLES = 1 << 27  # numbers copied in float64 at once: 1 GiB


def _signed(value: int) -> int:
    """Convert a 64-bit pattern to the signed integer that torch stores."""
    value %= _WORD
    return value - _WORD if value >= _WORD >> 1 else value


def _shift_right(values_P: Int[Tensor, " P"], bits: int) -> Int[Tensor, " P"]:
    """Shift logically; torch's own shift is arithmetic and copies the sign bit."""
    return (values_P >> bits) & ((1 << (64 - bits)) - 1)


def hash_counters(key: int, counters_P: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
    """Return 64 random bits per counter: the SplitMix64 finaliser of key + counter * golden ratio (Steele et al. 2014).

    Integer arithmetic wraps modulo 2^64 on every device, so CPU and GPU give the same bits.
    """
    z_P = counters_P.to(torch.int64) * _signed(0x9E3779B97F4A7C15) + _signed(key)
    z_P = (z_P ^ _shift_right(z_P, 30)) * _signed(0xBF58476D1CE4E5B9)
    z_P = (z_P ^ _shift_right(z_P, 27)) * _signed(0x94D049BB133111EB)
    return z_P ^ _shift_right(z_P, 31)


@dataclass(frozen=True)
class SparseProjection:
    """Keep a random `keep_fraction` q of the coordinates, scaled by 1/sqrt(q), then count-sketch them to `dim` numbers.

    Row j of the projected vector is the sum of s(i) x_i over kept coordinates i with bucket b(i) = j, where s(i) is +1
    or -1. Then E<Pu, Pv> = <u, v> over seeds. The sketch contributes the variance
    (<u', u'><v', v'> + <u', v'>^2 - 2 sum u'^2 v'^2) / dim on the kept and scaled vectors u', v' (count-sketch:
    Charikar et al. 2002; feature hashing: Weinberger et al. 2009). What is kept:

    `uniform`: each coordinate for itself with probability q (the paper's section on sparse random projection); adds the
    variance (1/q - 1) sum_i u_i^2 v_i^2. The released code of the paper keeps the first coordinates instead; see
    docs/paper.md.

    `structured`: of each linear layer's gradient G (O, I) the product G U with `rank` orthonormal input directions in
    full, and of the rest G - G U U^T a random share q of the columns, so that G itself is never formed. <G, H> =
    <GU, HU> + <G - GUU^T, H - HUU^T>, so only the second term is left to chance: with k of I columns it adds the
    variance I^2/k (1 - k/I) S^2, S^2 being the variance (Bessel) of the columns' inner products. Norms, biases and
    embeddings are kept whole.
    """

    dim: int = 32768
    keep_fraction: float = 0.03
    seed: int = 0
    mask: Mask = "structured"
    rank: int = 8

    @property
    def identity(self) -> str:
        """Identify the map: features are comparable only if this is equal, and the directions U, if any."""
        kept = f"-r{self.rank}" if self.mask == "structured" else ""
        return f"count-sketch-v{PROJECTION_VERSION}-d{self.dim}-{self.mask}-q{self.keep_fraction!r}{kept}-s{self.seed}"

    def _key(self, name: str, role: str) -> int:
        text = f"{PROJECTION_VERSION}/{self.seed}/{role}/{name}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def mask_of(self, name: str, counters_P: Int[Tensor, " P"]) -> Bool[Tensor, " P"]:
        """Whether each coordinate of a parameter is kept by the uniform mask."""
        if self.keep_fraction >= 1.0:
            return torch.ones_like(counters_P, dtype=torch.bool)
        # The upper 53 bits are a uniform integer that a float64 threshold meets exactly.
        return _shift_right(hash_counters(self._key(name, "mask"), counters_P), 11) < int(
            self.keep_fraction * (1 << 53)
        )

    def subset(self, name: str, role: str, size: int, fraction: float) -> Int[Tensor, " k"]:
        """Choose k = round(fraction * size) of `size` indices, at least one, in ascending order."""
        count = max(1, round(fraction * size))
        hashed = _shift_right(hash_counters(self._key(name, role), torch.arange(size)), 1)
        return hashed.argsort(stable=True)[:count].sort().values

    def signed_buckets(self, name: str, counters_P: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
        """Encode bucket and sign in one number: b(i) in [0, dim) if s(i) = +1, dim + b(i) if s(i) = -1."""
        bits_P = hash_counters(self._key(name, "bucket"), counters_P)
        return _shift_right(bits_P, 33) % self.dim + (bits_P & 1) * self.dim


def fold(signed_sums_2D: Float[Tensor, "*N twoD"]) -> Float[Tensor, "*N D"]:
    """Compute the sketch from sums over signed buckets: those with sign +1 minus those with sign -1."""
    plus, minus = signed_sums_2D.chunk(2, dim=-1)
    return plus - minus


def principal_directions(
    matrices_XI: Float[Tensor, "X I"], first_I: Float[Tensor, " I"], rank: int
) -> Float[Tensor, "I r"]:
    """Find `rank` orthonormal columns: the direction of `first_I`, and top right singular directions of the rest.

    Subspace iteration (Halko et al. 2011) from a fixed start, in float64: four rounds and eight spare columns. Any
    orthonormal columns are valid; these leave the least to chance. Fewer columns than `rank` if there are fewer inputs;
    zero columns if the matrices have lower rank.
    """
    size = matrices_XI.shape[1]
    rank = min(rank, size)
    if rank == 0:
        return matrices_XI.new_zeros(size, 0, dtype=torch.float64)
    first_I = first_I.double()
    length = first_I.norm()
    mean_I1 = (first_I / length if length > 0 else torch.zeros_like(first_I))[:, None]

    def rest(columns_IW: Tensor) -> Tensor:
        return columns_IW - mean_I1 @ (mean_I1.T @ columns_IW)

    if matrices_XI.numel() <= _DOUBLES:
        matrices_XI = matrices_XI.double()
    blocks = matrices_XI.split(max(1, _DOUBLES // size))
    width = min(size, rank + 8)
    counters = torch.arange(size * width, device=matrices_XI.device)
    start_IW = (hash_counters(0, counters) & 1).double().reshape(size, width) * 2 - 1
    basis_IW = torch.linalg.qr(rest(start_IW)).Q
    for _ in range(4):
        squares_IW = sum(wide_XI.T @ (wide_XI @ rest(basis_IW)) for wide_XI in map(Tensor.double, blocks))
        basis_IW = torch.linalg.qr(rest(torch.as_tensor(squares_IW))).Q
    found_XW = torch.cat([wide_XI @ rest(basis_IW) for wide_XI in map(Tensor.double, blocks)])
    _, values, right = torch.linalg.svd(torch.linalg.qr(found_XW, mode="r").R, full_matrices=False)
    strongest_IR = basis_IW @ right.T
    usable = values > 1e-9 * values.max().clamp(min=1e-300)
    directions_IR = torch.cat([mean_I1, (strongest_IR * usable)], dim=1)[:, :rank]
    return directions_IR


KEPT = {"structured": 0.03, "uniform": 0.1}  # share of the coordinates that is kept; the paper's mask needs its 0.1


def projection_of(mask: Mask) -> SparseProjection:
    """The projection of scoring, by its mask."""
    return SparseProjection(keep_fraction=KEPT[mask], mask=mask)
