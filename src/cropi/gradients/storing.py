"""Scores by way of the feature store: features are kept first, and the scores are read off them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cropi.functional.influence import gain
from cropi.gradients.groups import Group
from cropi.gradients.influence import statuses
from cropi.gradients.parts import Row, groups_of, part_rows
from cropi.gradients.ratios import FACTS
from cropi.gradients.scorer import BLOCK, Scored, Scorer
from cropi.gradients.store import FeatureStore, FeatureStoreWriter, StoreIdentity, directions_digest
from cropi.world import World


@dataclass(frozen=True)
class FeatureRequest:
    """Where a stage's features go if they are kept, and the identities of what they are made from."""

    folder: Path
    policy: str
    tokenizer: str
    trajectories: str


def store_features(
    features: FeatureRequest,
    dtype: Literal["bfloat16", "float32"],
    scorer: Scorer,
    table: pa.Table,
    prompt_ids: Sequence[str],
    advance: Callable[[int], None],
    world: World,
) -> tuple[FeatureStore | None, dict[int, int]]:
    """Write the shards that are missing, each process its share of them.

    Returns, to the first process, the finished store, and the tokens computed by shard.
    """
    identity = StoreIdentity(
        projection=scorer.projection.identity,
        directions=directions_digest(scorer.layer_directions),
        policy=features.policy,
        tokenizer=features.tokenizer,
        trajectories=features.trajectories,
        dtype=dtype,
        dim=scorer.projection.dim,
        **asdict(scorer.settings),
    )
    writer: FeatureStoreWriter | None = None
    if world.is_main:
        writer = FeatureStoreWriter(features.folder, identity, prompt_ids, BLOCK, scorer.layer_directions)
    begun = writer
    missing = world.from_main(lambda: begun.missing() if begun is not None else [])
    if missing and writer is None:
        writer = FeatureStoreWriter(features.folder, identity, prompt_ids, BLOCK, begun=True)
    computed: dict[int, int] = {}
    if writer is not None:  # in all processes, or, where nothing is missing, in the first alone
        own = world.share(missing)
        groups = groups_of(table, [i for index in own for i in prompt_ids[writer.shard(index)]])
        with scorer.lockstep() if missing else nullcontext():
            for index in own:
                part = writer.shard(index)
                block = list(islice(groups, part.stop - part.start))
                scored = scorer(block, advance=advance)
                assert scored.features_ND is not None
                writer.write_shard(index, scored.features_ND, _feature_rows(block, scored))
                computed[index] = scored.tokens_computed
    world.barrier()
    everywhere = {index: tokens for part_of in world.gather(computed) for index, tokens in part_of.items()}
    if writer is None or not world.is_main:
        return None, everywhere
    writer.wait_for_records()
    return writer.finish(), everywhere


def rows_of_store(
    store: FeatureStore, scorer: Scorer, table: pa.Table, names: Sequence[str], computed: dict[int, int]
) -> Iterator[list[Row]]:
    """All scores read off a store, so that a resumed run has the same, a block of rows at a time."""
    values_NV = store.influence(scorer.features_VD) if scorer.score == "dot" else store.cosine(scorer.features_VD)
    if scorer.score == "gain":
        variances = [group.variance for group in groups_of(table, store.prompt_ids)]
        values_NV = gain(values_NV, np.array(variances))
    facts = store.rows()
    norms_N = facts.column("norm").to_numpy()
    facts_NR = np.stack([facts.column(name).to_numpy() for name in FACTS], axis=1)
    groups = groups_of(table, store.prompt_ids)
    for start in range(0, len(store.prompt_ids), BLOCK):
        part = slice(start, start + BLOCK)
        block = list(islice(groups, BLOCK))
        tokens = sum(computed.values()) if start == 0 else 0
        scored = Scored(values_NV[part], norms_N[part], facts_NR[part], None, tokens)
        yield part_rows(block, names, values_NV[part], scored)


def _feature_rows(groups: Sequence[Group], scored: Scored) -> list[dict[str, Any]]:
    found = statuses(groups, scored.products_NV)
    return [
        {
            "prompt_id": group.prompt_id,
            "status": found[n],
            "norm": float(scored.norms_N[n]),
            **dict(zip(FACTS, scored.ratio_facts_NR[n].tolist(), strict=True)),
            "tokens": group.completion_tokens,
        }
        for n, group in enumerate(groups)
    ]
