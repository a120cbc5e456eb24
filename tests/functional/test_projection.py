import math

import pytest
import torch

from cropi.functional.projection import Projector, SparseProjection, hash_counters

SHAPES = {"embed": (40, 8), "attention": (8, 8), "up": (8, 24), "norm": (8,)}


def splitmix64(key: int, counter: int) -> int:
    """The same hash in plain Python integers: the oracle for torch's wrapping arithmetic."""
    mask = (1 << 64) - 1
    z = (counter * 0x9E3779B97F4A7C15 + key) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_hash_equals_plain_integer_arithmetic() -> None:
    key = 0xDEADBEEFCAFEF00D
    counters = [0, 1, 2, 12345, 2**31, 2**32 + 7, 2**40 + 3]
    hashed = hash_counters(key, torch.tensor(counters)).tolist()
    assert [value % (1 << 64) for value in hashed] == [splitmix64(key, counter) for counter in counters]


def test_splitmix_reference_value() -> None:
    # the first output of SplitMix64 with seed 0 in the published generators is 0xe220a8397b1dcdaf
    assert hash_counters(0, torch.tensor([1])).tolist()[0] % (1 << 64) == 0xE220A8397B1DCDAF


def gradient(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def projector(projection: SparseProjection, names: tuple[str, ...] = tuple(SHAPES)) -> Projector:
    return Projector(projection, {name: math.prod(SHAPES[name]) for name in names}, torch.device("cpu"))


def dense_matrix(projection: SparseProjection) -> torch.Tensor:
    """The projection written out as a matrix, one coordinate at a time."""
    columns = []
    for name, shape in SHAPES.items():
        for position in range(math.prod(shape)):
            column = torch.zeros(projection.dim, dtype=torch.float64)
            counter = torch.tensor([position])
            if bool(projection.mask(name, counter)):
                bucket = int(projection.buckets(name, counter))
                column[bucket] = float(projection.signs(name, counter)) / projection.keep_fraction**0.5
            columns.append(column)
    return torch.stack(columns, dim=1)


def test_feature_is_the_matrix_product() -> None:
    projection = SparseProjection(dim=16, keep_fraction=0.4, seed=3)
    feature_D = projector(projection)(gradient(0))
    torch.testing.assert_close(feature_D.double(), dense_matrix(projection) @ flat(gradient(0)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_inner_products_are_unbiased_for_every_parameter_shape(name: str) -> None:
    # Over seeds the mean projected inner product must meet the true one within 4 standard errors, and its variance must
    # be the one in the docstring. A wrong scale of one parameter's coordinates (1/sqrt(q) left out, say) fails here.
    u, v = gradient(1)[name].reshape(-1), gradient(2)[name].reshape(-1)
    v = v + 0.5 * u  # so that the inner product is not near 0
    q, dim, seeds = 0.3, 32, 1500
    products = []
    for seed in range(seeds):
        make = projector(SparseProjection(dim, q, seed), (name,))
        products.append(float(make({name: u}).double() @ make({name: v}).double()))
    values = torch.tensor(products, dtype=torch.float64)
    true = float(u @ v)
    mask_variance = (1 / q - 1) * float((u**2 * v**2).sum())
    # expectation over the mask of |u'|^2 |v'|^2 + <u',v'>^2 - 2 sum u'^2 v'^2, for u' = mask u / sqrt(q)
    squares = float((u**2 * v**2).sum())
    norms = float(u @ u) * float(v @ v) - squares + squares / q
    cross = true**2 - squares + squares / q
    variance = mask_variance + (norms + cross - 2 * squares / q) / dim
    assert abs(float(values.mean()) - true) < 4 * (variance / seeds) ** 0.5
    assert float(values.var()) == pytest.approx(variance, rel=0.2)


def test_mask_is_uniform_over_the_whole_range() -> None:
    # The released code keeps the first coordinates only. Ten equal slices must each keep their share.
    count, q = 200_000, 0.1
    kept_P = SparseProjection(keep_fraction=q, seed=5).mask("model.embed_tokens.weight", torch.arange(count))
    shares = kept_P.reshape(10, -1).double().mean(dim=1)
    standard_error = (q * (1 - q) / (count / 10)) ** 0.5
    assert float((shares - q).abs().max()) < 4.5 * standard_error


def test_every_parameter_of_a_model_is_covered() -> None:
    projection = SparseProjection(dim=64, keep_fraction=0.5, seed=0)
    make = projector(projection)
    for name in SHAPES:
        one = {other: torch.zeros(shape) for other, shape in SHAPES.items()} | {name: torch.ones(SHAPES[name])}
        assert float(make(one).abs().sum()) > 0, name


def test_keep_all_keeps_all_and_signs_and_buckets_are_balanced() -> None:
    projection = SparseProjection(dim=8, keep_fraction=1.0, seed=1)
    counters_P = torch.arange(80_000)
    assert bool(projection.mask("w", counters_P).all())
    assert abs(float(projection.signs("w", counters_P).mean())) < 4 / 80_000**0.5
    counts = torch.bincount(projection.buckets("w", counters_P), minlength=8).double()
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_bits_depend_on_name_seed_and_position_alone() -> None:
    projection = SparseProjection(dim=32, keep_fraction=0.5, seed=2)
    backwards_P = torch.arange(999, -1, -1)
    assert torch.equal(projection.mask("w", backwards_P).flip(0), projection.mask("w", torch.arange(1000)))
    assert not torch.equal(projection.mask("w", backwards_P), projection.mask("other", backwards_P))
    assert not torch.equal(
        projection.buckets("w", backwards_P),
        SparseProjection(dim=32, keep_fraction=0.5, seed=3).buckets("w", backwards_P),
    )


def test_positions_beyond_32_bits_are_told_apart() -> None:
    projection = SparseProjection(dim=1 << 20, keep_fraction=1.0, seed=0)
    near, far = torch.arange(64), torch.arange(64) + 2**32
    assert not torch.equal(projection.buckets("w", near), projection.buckets("w", far))


def test_pinned_bits_of_version_1() -> None:
    # A change here changes every stored feature: raise PROJECTION_VERSION with it.
    projection = SparseProjection(dim=32768, keep_fraction=0.1, seed=0)
    counters_P = torch.arange(60)
    assert projection.mask("model.norm.weight", counters_P).nonzero().flatten().tolist() == [0, 33, 39]
    assert projection.buckets("model.norm.weight", counters_P[:4]).tolist() == [4959, 21824, 27335, 12442]


def test_another_set_of_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        projector(SparseProjection(dim=8))({"embed": torch.zeros(40, 8)})
