"""What the faults of the projection in the paper's released code do to a ranking, beside a correct projection.

Real groups of the built-in policy; neighbours and influence by projected gradients against exact ones. The faults are
those of benchmarks/released_faults.py, each alone and together.

    python benchmarks/released_projection.py --seeds 3 --out research/figures/released_projection.json
    python benchmarks/released_projection.py --draw research/figures/released_projection.json

The first writes the JSON, the second draws the figure beside it and prints the tables. Gradients lie in a temporary
folder of up to 11 GB (TMPDIR) while it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import released_faults as faults
import torch
from released_figure import PUBLISHED, draw, print_tables

from cropi.builtin import FAMILIES
from cropi.config import PolicyConfig
from cropi.console import progress
from cropi.functional.projection import SparseProjection
from cropi.functional.ranking import selection_size
from cropi.gradients.groups import Group, SurrogateSettings
from cropi.gradients.influence_scorer import Scorer, ScorerOptions
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.gradients.sketch import GradientMap, StructuredMap, UniformMap, project
from cropi.lab.audit.agreement import spearman, top_overlap
from cropi.lab.bench.machine import describe
from cropi.lab.bench.workload import mixed_groups
from cropi.policy import load_policy

TARGETS = ("sum", "machine", "horner", "shell")  # one validation set each, as in benchmarks/projection.py
SETTINGS = SurrogateSettings("constant", 32)
SHARE = 0.1
KEEP = (1.0, 0.5, 0.3, 0.2, 0.15, 0.1, 0.03, 0.01, 0.001)
DIMS = (512, 2048, 8192, 32768)
CHECKED = (0.3, 2048)  # kept share and dimension at which the law of the dense projection meets a real product


@dataclass(frozen=True)
class Pool:
    """Groups, and the dense gradients of the train groups followed by those of the validation sets."""

    train: list[Group]
    validation: dict[str, list[Group]]
    gradients_RF: np.ndarray
    embedding: int
    """Coordinates of the embedding, which come first."""

    def products(self, gram_RR: np.ndarray) -> np.ndarray:
        """<g_i, mean_v g_v>, (N, V)."""
        edges = np.cumsum([len(self.train), *(len(groups) for groups in self.validation.values())])
        return np.stack([gram_RR[: edges[0], start:stop].mean(axis=1) for start, stop in pairwise(edges)], axis=1)


def make_pool(prompts: int, validation: int, model: torch.nn.Module, folder: Path) -> Pool:
    train = list(mixed_groups(sorted(FAMILIES), "train", prompts, 0))
    sets = {name: list(mixed_groups([name], "validation", validation, 0)) for name in TARGETS}
    groups = [*train, *(group for members in sets.values() for group in members)]
    sizes = {name: parameter.numel() for name, parameter in trainable_parameters(model).items()}
    assert next(iter(sizes)) == "model.embed_tokens.weight"
    gradients_RF = np.memmap(folder / "gradients", np.float32, "w+", shape=(len(groups), sum(sizes.values())))
    with progress("gradients", len(groups), "groups") as bar:
        for row, group in enumerate(groups):
            found = prompt_gradient(model, group, SETTINGS).gradients
            gradients_RF[row] = torch.cat([gradient.reshape(-1) for gradient in found.values()]).numpy()
            bar.advance()
    return Pool(train, sets, gradients_RF, sizes["model.embed_tokens.weight"])


def cosines(similarity_NN: np.ndarray) -> np.ndarray:
    """From inner products; 0 for a vector of length 0."""
    lengths_N = np.sqrt(np.diag(similarity_NN).clip(min=0))
    products_NN = np.outer(lengths_N, lengths_N)
    return np.divide(similarity_NN, products_NN, out=np.zeros_like(products_NN), where=products_NN > 0)


def top_neighbours(similarity_NN: np.ndarray) -> np.ndarray:
    """Whether j is among the tenth of all others that is most similar to i, (N, N)."""
    others_NN = similarity_NN.copy()
    np.fill_diagonal(others_NN, -np.inf)
    count = selection_size(SHARE, len(others_NN) - 1)
    best = np.argpartition(-others_NN, count - 1, axis=1)[:, :count]
    chosen_NN = np.zeros(others_NN.shape, bool)
    np.put_along_axis(chosen_NN, best, True, axis=1)
    return chosen_NN


class Judge:
    """Holds what is exact, and says how much of it an estimate keeps."""

    def __init__(self, similarity_NN: np.ndarray, products_NV: np.ndarray) -> None:
        self._products_NV = products_NV
        self._dot_NN = top_neighbours(similarity_NN)
        self._cosine_NN = top_neighbours(cosines(similarity_NN))

    def __call__(self, similarity_NN: np.ndarray, products_NV: np.ndarray) -> dict[str, float]:
        pairs = list(zip(products_NV.T, self._products_NV.T, strict=True))
        by_cosine_NN, by_dot_NN = top_neighbours(cosines(similarity_NN)), top_neighbours(similarity_NN)
        return {
            "neighbours_cosine": float((by_cosine_NN & self._cosine_NN).sum() / self._cosine_NN.sum()),
            "neighbours_dot": float((by_dot_NN & self._dot_NN).sum() / self._dot_NN.sum()),
            "validation_precision": float(np.mean([top_overlap(one, true, SHARE) for one, true in pairs])),
            "validation_spearman": float(np.mean([spearman(one, true) for one, true in pairs])),
            "zero_share": float((np.diag(similarity_NN) <= 0).mean()),
        }


class Results:
    """Values of each metric by arm, kept share and dimension (None: no projection behind the mask), seed by seed."""

    def __init__(self, judge: Judge, pool: Pool) -> None:
        self._judge, self._pool = judge, pool
        self._found: dict[tuple[str, float, int | None], list[dict[str, float]]] = {}

    def add(self, arms: Sequence[str], keep: float, dim: int | None, gram_RR: np.ndarray) -> None:
        count = len(self._pool.train)
        found = self._judge(gram_RR[:count, :count], self._pool.products(gram_RR))
        for arm in arms:
            self._found.setdefault((arm, keep, dim), []).append(found)

    def add_features(self, arm: str, keep: float, features_RD: torch.Tensor) -> None:
        """A count-sketch of the largest dimension, and what it would be in the smaller ones."""
        for dim in DIMS:
            narrow_RD = narrowed(features_RD, dim).double().numpy()
            self.add([arm], keep, dim, narrow_RD @ narrow_RD.T)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"arm": arm, "keep": keep, "dim": dim} | {name: [_rounded(one[name]) for one in found] for name in found[0]}
            for (arm, keep, dim), found in self._found.items()
        ]


def _rounded(value: float) -> float | None:
    """None where a metric is not defined: the rank correlation of scores that are all equal."""
    return None if math.isnan(value) else round(value, 5)


def narrowed(features_XD: torch.Tensor, dim: int) -> torch.Tensor:
    """The count-sketch of `dim` buckets from that of a multiple: a bucket is a hash modulo their number."""
    return features_XD.reshape(len(features_XD), -1, dim).sum(dim=1)


def rearranged(rows_RF: np.ndarray, order_R: np.ndarray, columns_K: np.ndarray, path: Path) -> np.ndarray:
    """A copy on disk, rows and columns in another order."""
    found = np.memmap(path, np.float32, "w+", shape=(len(order_R), len(columns_K)))
    for place, row in enumerate(order_R):
        np.take(rows_RF[row], columns_K, out=found[place])
    return found


def dense_grams(
    pool: Pool, first: Mapping[int, np.ndarray], seed: int, folder: Path
) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """Inner products of what is kept and read, by arm, for each kept share. Train groups enter batches in random order.

    Equal ones are the same object. A smaller mask of a seed is part of the larger; `first` are correct inner products
    of the first coordinates, all of them included.
    """
    generator = np.random.default_rng(seed)
    rows, features = pool.gradients_RF.shape
    modulus = faults.scaled_modulus(features)
    order_R = np.concatenate([generator.permutation(len(pool.train)), np.arange(len(pool.train), rows)])
    back = np.ix_(np.argsort(order_R), np.argsort(order_R))

    def wrapped(columns_K: np.ndarray) -> np.ndarray:
        kept_RK = rearranged(pool.gradients_RF, order_R, columns_K, folder / "kept")
        return faults.prefix_grams(kept_RK, [len(columns_K)], modulus)[len(columns_K)][back]

    counts = {keep: round(keep * features) for keep in KEEP}
    columns_F = generator.permutation(features)
    mixed_RF = rearranged(pool.gradients_RF, order_R, columns_F, folder / "mixed")
    uniform = faults.prefix_grams(mixed_RF, [count for count in counts.values() if count < features])
    for keep, count in counts.items():
        whole = count == features
        found = {
            "dense": first[features] if whole else uniform[count][back],
            "first": first[count],
            "first_aligned": first[faults.aligned_count(keep, pool.embedding, features)],
        }
        if faults.intact_rows(faults.RELEASED_BATCH, count, modulus) == faults.RELEASED_BATCH:
            found |= {"wrapped": found["dense"], "both": found["first"]}
        elif whole:  # the released code leaves a whole gradient in order; parts of one it shuffles
            found["wrapped"] = found["both"] = wrapped(np.arange(features))
        else:
            found |= {"wrapped": wrapped(columns_F[:count]), "both": wrapped(generator.permutation(count))}
        yield keep, found


def add_dense(results: Results, pool: Pool, first: Mapping[int, np.ndarray], seed: int, folder: Path, bar: Any) -> None:
    """All arms with a dense projection, one seed."""
    wide = faults.scatters(len(pool.gradients_RF), DIMS, np.random.default_rng([seed, 1]))
    scatters = {dim: scatter_RR.astype(np.float32) for dim, scatter_RR in wide.items()}
    for keep, grams in dense_grams(pool, first, seed, folder):
        for gram_RR in {id(gram): gram for gram in grams.values()}.values():
            arms = [arm for arm, gram in grams.items() if gram is gram_RR]
            results.add(arms, keep, None, gram_RR)
            root_RR = faults.root(gram_RR).astype(np.float32)
            for dim, scatter_RR in scatters.items():
                results.add(arms, keep, dim, root_RR @ scatter_RR @ root_RR.T)
        bar.advance()


def add_ours(
    results: Results, pool: Pool, directions: Mapping[str, torch.Tensor], model: torch.nn.Module, seed: int, bar: Any
) -> None:
    """Count-sketches behind both masks, one seed: the product's own maps, applied to the dense gradients."""
    parameters = trainable_parameters(model)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    flat = {name: (parameter.numel(),) for name, parameter in parameters.items()}  # a uniform mask knows no rows
    for keep in KEEP:
        uniform, structured = (
            SparseProjection(dim=max(DIMS), mask=mask, keep_fraction=keep, seed=seed)
            for mask in ("uniform", "structured")
        )
        results.add_features("ours_uniform", keep, sketched(pool, UniformMap(uniform, parameters), flat))
        structured_map = StructuredMap(structured, parameters, directions)
        results.add_features("ours_structured", keep, sketched(pool, structured_map, shapes))
        bar.advance()


def sketched(pool: Pool, gradient_map: GradientMap, shapes: Mapping[str, Sequence[int]]) -> torch.Tensor:
    """The features of all rows."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    found = []
    for row_F in pool.gradients_RF:
        parts = torch.from_numpy(np.asarray(row_F)).split(sizes)
        gradients = {name: part.view(*shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        found.append(project(gradient_map, gradients))
    return torch.stack(found)


def checked_products(pool: Pool, judge: Judge, folder: Path) -> list[dict[str, Any]]:
    """Dense projections by real products, at one kept share, for the arms `dense` and `wrapped`."""
    (keep, dim), generator = CHECKED, np.random.default_rng(1 << 20)
    rows, features = pool.gradients_RF.shape
    order_R = np.concatenate([generator.permutation(len(pool.train)), np.arange(len(pool.train), rows)])
    kept_K = generator.permutation(features)[: round(keep * features)]
    kept_RK = rearranged(pool.gradients_RF, order_R, kept_K, folder / "kept")
    results = Results(judge, pool)
    for arm, modulus in (("dense", None), ("wrapped", faults.scaled_modulus(features))):
        projected_RD = faults.dense_projection(kept_RK, dim, generator, modulus=modulus)[np.argsort(order_R)]
        for width in (dim // 4, dim):
            features_RD = projected_RD[:, :width].astype(np.float64) * math.sqrt(dim / width)
            results.add([arm], keep, width, features_RD @ features_RD.T)
    return results.rows()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = load_policy(PolicyConfig(path="builtin")).model
    pool = make_pool(options.prompts, options.validation, model, folder)
    features, count = pool.gradients_RF.shape[1], len(pool.train)
    lengths = {round(keep * features) for keep in KEEP}
    lengths |= {faults.aligned_count(keep, pool.embedding, features) for keep in KEEP}
    first = faults.prefix_grams(pool.gradients_RF, sorted(lengths))
    exact_RR = first[features]
    judge = Judge(exact_RR[:count, :count], pool.products(exact_RR))
    results = Results(judge, pool)
    scorer = Scorer(model, SETTINGS, ScorerOptions(projection=SparseProjection(mask="structured")))
    scorer.aim(pool.validation)
    with progress("projections", 2 * options.seeds * len(KEEP), "kept shares") as bar:
        for seed in range(options.seeds):
            add_dense(results, pool, first, seed, folder, bar)
            add_ours(results, pool, scorer.layer_directions, model, seed, bar)
    return {
        "environment": describe("cpu", 1),
        "options": {"prompts": options.prompts, "validation": options.validation, "seeds": options.seeds},
        "features": features,
        "embedding": pool.embedding,
        "modulus": faults.scaled_modulus(features),
        "published_percent": {size: {f"{keep:g}": p for keep, p in curve.items()} for size, curve in PUBLISHED.items()},
        "real_products": checked_products(pool, judge, folder),
        "rows": results.rows(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=960)
    parser.add_argument("--validation", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, help="draw and print what this file holds")
    options = parser.parse_args()
    if options.draw:
        result = json.loads(options.draw.read_text(encoding="utf-8"))
        options.draw.with_suffix(".svg").write_text(draw(result), encoding="utf-8")
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(options, Path(folder))
        if options.out:
            options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print_tables(result)


if __name__ == "__main__":
    main()
