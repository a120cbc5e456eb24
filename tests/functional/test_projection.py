import hashlib
import math

import pytest
import torch

from cropi.functional.projection import SparseProjection, fold, hash_counters, principal_directions

WORD = 1 << 64


def splitmix64(key: int, counter: int) -> int:
    """The same hash in plain Python integers: the oracle for torch's wrapping arithmetic."""
    z = (counter * 0x9E3779B97F4A7C15 + key) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def test_hash_equals_plain_integer_arithmetic() -> None:
    key = 0xDEADBEEFCAFEF00D
    counters = [0, 1, 2, 12345, 2**31, 2**32 + 7, 2**33 - 1, 2**33, 2**40 + 3]
    hashed = hash_counters(key, torch.tensor(counters)).tolist()
    assert [value % WORD for value in hashed] == [splitmix64(key, counter) for counter in counters]


def test_splitmix_reference_value() -> None:
    # the first output of SplitMix64 with seed 0 in the published generators is 0xe220a8397b1dcdaf
    assert hash_counters(0, torch.tensor([1])).tolist()[0] % WORD == 0xE220A8397B1DCDAF


def test_bits_of_a_coordinate_in_plain_integer_arithmetic() -> None:
    """Kept where the upper 53 bits are below q 2^53; bucket by the upper 31 bits, sign by the lowest."""
    projection = SparseProjection(dim=1000, keep_fraction=0.3, seed=11)
    counters = [*range(200), *range(2**33 - 100, 2**33 + 100)]
    mask_key, bucket_key = (
        int.from_bytes(hashlib.blake2b(f"2/11/{role}/w".encode(), digest_size=8).digest(), "little")
        for role in ("mask", "bucket")
    )
    kept = [splitmix64(mask_key, c) >> 11 < int(0.3 * 2**53) for c in counters]
    bits = [splitmix64(bucket_key, c) for c in counters]
    assert projection.mask_of("w", torch.tensor(counters)).tolist() == kept
    assert bool(SparseProjection(keep_fraction=1.0).mask_of("w", torch.tensor(counters)).all())
    expected = [(b >> 33) % 1000 + (b & 1) * 1000 for b in bits]
    assert projection.signed_buckets("w", torch.tensor(counters)).tolist() == expected


def test_positions_beyond_32_bits() -> None:
    """Around 2^33: not those of the same lower 32 bits, and of the right distribution."""
    projection = SparseProjection(dim=1 << 20, keep_fraction=0.1, seed=5)
    count = 100_000
    far_P = torch.arange(2**33 - count // 2, 2**33 + count // 2)
    near_P = far_P % 2**32
    assert far_P.dtype == torch.int64
    far, near = (projection.signed_buckets("w", counters) for counters in (far_P, near_P))
    assert float((far == near).double().mean()) < 1e-4
    assert float((projection.mask_of("w", far_P) == projection.mask_of("w", near_P)).double().mean()) < 0.84
    assert abs(float(projection.mask_of("w", far_P).double().mean()) - 0.1) < 4 * math.sqrt(0.09 / count)
    assert len(hash_counters(1, far_P).unique()) == count


def test_mask_is_uniform_over_the_whole_range() -> None:
    # The released code keeps the first coordinates only. Ten equal slices must each keep their share.
    count, q = 200_000, 0.1
    kept_P = SparseProjection(keep_fraction=q, seed=5).mask_of("model.embed_tokens.weight", torch.arange(count))
    shares = kept_P.reshape(10, -1).double().mean(dim=1)
    standard_error = (q * (1 - q) / (count / 10)) ** 0.5
    assert float((shares - q).abs().max()) < 4.5 * standard_error


def test_bits_depend_on_name_seed_and_position_alone() -> None:
    projection, other = SparseProjection(32, 0.5, seed=2), SparseProjection(32, 0.5, seed=3)
    forwards_P, backwards_P = torch.arange(1000), torch.arange(999, -1, -1)
    for bits in ("mask_of", "signed_buckets"):
        found = getattr(projection, bits)("w", forwards_P)
        assert torch.equal(getattr(projection, bits)("w", backwards_P).flip(0), found)
        assert torch.equal(getattr(projection, bits)("w", forwards_P[500:]), found[500:])
        assert not torch.equal(getattr(projection, bits)("v", forwards_P), found)
        assert not torch.equal(getattr(other, bits)("w", forwards_P), found)
    assert not torch.equal(projection.subset("w", "rows", 100, 0.3), projection.subset("w", "columns", 100, 0.3))
    assert not torch.equal(projection.subset("w", "rows", 100, 0.3), other.subset("w", "rows", 100, 0.3))
    assert not torch.equal(projection.subset("w", "rows", 100, 0.3), projection.subset("v", "rows", 100, 0.3))


@pytest.mark.parametrize(("size", "fraction", "count"), [(100, 0.1, 10), (7, 0.5, 4), (5, 0.01, 1), (6, 1.0, 6)])
def test_subset_has_the_size_asked_for_in_ascending_order(size: int, fraction: float, count: int) -> None:
    found = SparseProjection(seed=4).subset("w", "rows", size, fraction).tolist()
    assert len(found) == count
    assert found == sorted(set(found))
    assert set(found) <= set(range(size))


def test_subsets_hold_every_index_and_every_pair_equally_often() -> None:
    size, count, seeds = 8, 3, 3000
    together = torch.zeros(size, size)
    for seed in range(seeds):
        chosen = SparseProjection(seed=seed).subset("w", "columns", size, count / size)
        together[chosen[:, None], chosen] += 1
    single, double = count / size, count * (count - 1) / (size * (size - 1))
    for counts, share in ((together.diagonal(), single), (together[~torch.eye(size, dtype=torch.bool)], double)):
        assert float((counts / seeds - share).abs().max()) < 4.5 * math.sqrt(share * (1 - share) / seeds)


def test_fold_takes_the_negative_half_from_the_positive() -> None:
    signed_sums = torch.tensor([[1.0, 2.0, 0.5, 3.0], [0.0, 1.0, 1.0, 1.0]])
    assert fold(signed_sums).tolist() == [[0.5, -1.0], [-1.0, 0.0]]


def test_pinned_bits_of_version_2() -> None:
    # A change here changes every stored feature: raise PROJECTION_VERSION with it.
    projection = SparseProjection(dim=32768, keep_fraction=0.1, seed=0)
    name, counters_P = "model.norm.weight", torch.arange(60)
    assert projection.mask_of(name, counters_P).nonzero().flatten().tolist() == [6, 8, 17, 36, 41, 47, 48, 59]
    assert projection.signed_buckets(name, counters_P[:4]).tolist() == [31760, 39039, 55553, 51636]
    assert projection.signed_buckets(name, counters_P[:4] + 2**33).tolist() == [42767, 64965, 23102, 37621]
    assert projection.subset(name, "columns", 60, 0.1).tolist() == [3, 6, 12, 32, 33, 55]
    assert projection.identity == "count-sketch-v2-d32768-structured-q0.1-r8-s0"


def spectrum(generator: torch.Generator, values: list[float], rows: int, size: int) -> torch.Tensor:
    """A matrix with the given singular values."""
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64, generator=generator)).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def test_principal_directions_are_orthonormal_and_lead_with_the_first() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(40, 12, dtype=torch.float64, generator=generator)
    first = torch.randn(12, dtype=torch.float64, generator=generator)
    for rank in (0, 1, 4, 12, 20):
        found = principal_directions(matrices, first, rank)
        assert found.shape == (12, min(rank, 12))
        torch.testing.assert_close(found.T @ found, torch.eye(min(rank, 12), dtype=torch.float64))
        if rank:
            torch.testing.assert_close(found[:, 0], first / first.norm())


def test_principal_directions_are_the_strongest_of_the_rest() -> None:
    generator = torch.Generator().manual_seed(1)
    matrices = spectrum(generator, [9.0, 5.0, 3.0, 0.1, 0.05, 0.02], 40, 30)
    first = torch.randn(30, dtype=torch.float64, generator=generator)
    found = principal_directions(matrices, first, 4)
    rest = matrices - (matrices @ found[:, :1]) @ found[:, :1].T
    _, values, right = torch.linalg.svd(rest, full_matrices=False)
    left = rest - (rest @ found) @ found.T
    assert float(left.norm()) == pytest.approx(float(values[3:].norm()), rel=1e-3)
    assert float((right[:3] @ found[:, 1:]).svd().S.min()) == pytest.approx(1.0, abs=1e-6)


def test_principal_directions_of_matrices_of_low_rank_end_with_zeros() -> None:
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(10, dtype=torch.float64, generator=generator)
    for matrices in (spectrum(generator, [2.0, 1.0], 20, 10), torch.zeros(20, 10, dtype=torch.float64)):
        found = principal_directions(matrices, first, 6)
        used = found[:, found.norm(dim=0) > 0]
        torch.testing.assert_close(used.T @ used, torch.eye(used.shape[1], dtype=torch.float64))
        assert float((matrices - matrices @ used @ used.T).norm()) < 1e-9
    assert not bool(principal_directions(torch.zeros(3, 5).double(), torch.zeros(5).double(), 2).any())


def test_principal_directions_come_out_the_same_twice() -> None:
    generator = torch.Generator().manual_seed(3)
    matrices, first = torch.randn(9, 7, generator=generator), torch.randn(7, generator=generator)
    before = torch.random.get_rng_state()
    assert torch.equal(principal_directions(matrices, first, 3), principal_directions(matrices, first, 3))
    assert torch.equal(torch.random.get_rng_state(), before)
