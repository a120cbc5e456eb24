"""The cost of a run: seconds and tokens from its ledger and streams, and FLOPs by one formula for all strategies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from cropi.config import Config, ScoreConfig
from cropi.run_folder import StagePaths
from cropi.streams import Ledger, read_jsonl

Entry = Mapping[str, Any]  # a line of the ledger


@dataclass(frozen=True)
class Cost:
    """The cost of a run. None: not charged, or not there yet."""

    collect: float | None = None  # seconds
    score: float | None = None
    select: float | None = None
    train: float | None = None
    evaluate: float | None = None  # shown, but not part of the total
    collect_tokens: int | None = None  # generated tokens
    train_tokens: int | None = None

    @property
    def total(self) -> float | None:
        """Seconds of collect, score, select and train; None before there is any training."""
        if self.train is None:
            return None
        return sum(seconds or 0.0 for seconds in (self.collect, self.score, self.select, self.train))

    @property
    def tokens(self) -> int | None:
        """Generated tokens, stored trajectories and training together; None before there is any training."""
        return None if self.train_tokens is None else self.train_tokens + (self.collect_tokens or 0)

    @property
    def selection_share(self) -> float | None:
        """(score + select) / train."""
        return ((self.score or 0.0) + (self.select or 0.0)) / self.train if self.train else None

    def as_json(self) -> dict[str, Any]:
        """The costs with what follows from them."""
        return asdict(self) | {"total": self.total, "tokens": self.tokens, "selection_share": self.selection_share}


@dataclass(frozen=True)
class Charges:
    """Everything that a run pays for, as it was written down."""

    config: Config
    collected: Sequence[Entry]
    entries: Sequence[Entry]  # all lines of the ledger
    steps: Sequence[Mapping[str, Any]]
    batches: Sequence[Mapping[str, Any]]

    def up_to(self, step: int | None) -> Charges:
        """The charges up to an optimiser step: all of the collection, scoring and selecting of the stages begun before
        it, and the steps themselves.
        """
        if step is None:
            return self
        return Charges(
            self.config,
            [entry for entry in self.collected if self._begun(entry, step)],
            [entry for entry in self.entries if self._begun(entry, step)],
            [row for row in self.steps if row["step"] <= step],
            [row for row in self.batches if row["step"] < step],
        )

    def cost(self) -> Cost:
        """Seconds and generated tokens."""
        return Cost(
            collect=_sum(entry["seconds"] for entry in self.collected),
            score=self._seconds("score"),
            select=self._seconds("select"),
            train=_sum(row["seconds"] for row in self.steps),
            evaluate=self._seconds("evaluate"),
            collect_tokens=_whole(_sum(entry["tokens"] for entry in self.collected if "tokens" in entry)),
            train_tokens=_whole(_sum(row["tokens"] for row in self.batches)),
        )

    def flops(self, parameters: int) -> Flops:
        """Operations, for a policy with so many parameters in matrix products."""
        return flops(self.config, parameters, self.collected, self._phase("score"), self.batches, self.steps)

    def computed_tokens(self) -> int:
        """Tokens that scoring computed, those of the validation prompts and those that were only read included."""
        names = ("computed_tokens", "validation_tokens", "forward_tokens")
        return sum(entry.get(name, 0) for entry in self._phase("score") for name in names)

    def _phase(self, phase: str) -> list[Entry]:
        return [entry for entry in self.entries if entry["phase"] == phase]

    def _seconds(self, phase: str) -> float | None:
        return _sum(entry["seconds"] for entry in self._phase(phase))

    def _begun(self, entry: Entry, step: int) -> bool:
        if "step" in entry:  # work within a stage
            return bool(entry["step"] < step)
        stage = entry.get("stage")
        return stage is None or stage * self.config.train.steps_per_stage < step


def charges(config: Config, paths: StagePaths) -> Charges:
    """The charges of a run. Collection before training counts only if the strategy reads stored trajectories."""
    entries = Ledger(paths.ledger).entries()
    reads = config.select.strategy.collects
    collected = [entry for entry in entries if entry["phase"] == "collect" and (reads or entry["stage"] is not None)]
    return Charges(config, collected, entries, read_jsonl(paths.steps), read_jsonl(paths.rewards))


def _sum(values: Iterable[float]) -> float | None:
    """The sum, None of nothing."""
    listed = list(values)
    return sum(listed) if listed else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


# -- FLOPs ---------------------------------------------------------------------------------------------------------

FORWARD = 2  # operations per parameter and token
GRADIENT = 3  # forward passes of a dense gradient
DIRECTION = 2  # of a sketched one: its backward pass goes through activations only


@dataclass(frozen=True)
class Flops:
    """Operations by phase, by one formula for all strategies.

    The unit is the forward pass of a token: 2 P operations, with P the parameters that take part in matrix products
    (the output head counts, looked-up embeddings do not; attention scores are left out). In forward passes:

    generation   every prompt and completion token once (with a cache nothing is computed twice)
    collection   generation, and once more for the behaviour log-probs where they are taken
    score        m per token of the pool that is computed + 3 per token of the validation prompts (their dense gradient:
                 forward, and a backward pass of twice that; twice over for `learnalign`, which scales them; 2 for
                 `cropi`, which sketches it: forward, and backward through activations).
                 m: 2 for `sketch` (forward, backward through activations), 3 with the uniform mask, which needs the
                 dense gradient; 2 + V for `exact` with V validation sets; 3 for `reference`. Tokens that are only read
                 (representations): 1 each. Sketching a direction: `read_passes`.
    training     generation + 3 per token and pass over a batch (forward and backward; `trainer.num_iterations` passes),
                 + 1 for the reference policy where `trainer.beta` is not 0. Reading influence: `read_passes`, which are
                 r (n_in + n_out) / P a token for every matrix and half of a direction, of rank r. With dynamic
                 sampling, all that is sampled is generated, and the share that one batch is of it by rows is trained
                 on. With a gate: the share that the strategy keeps.

    A pass over padding, and the optimiser's own arithmetic, are not counted. Evaluation is not charged.
    """

    collect: float
    score: float
    train: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.collect + self.score + self.train


def score_multiple(settings: ScoreConfig, validation_sets: int, estimator: str | None = None) -> int:
    """Forward passes per token of the pool; `estimator` is the one that was used, if it is not that of the settings."""
    by_estimator = {
        "sketch": 3 if settings.mask == "uniform" else 2,
        "exact": 2 + validation_sets,
        "reference": GRADIENT,
    }
    return by_estimator[estimator or settings.estimator]


def flops(
    config: Config,
    parameters: int,
    collected: Iterable[Mapping[str, Any]],
    scored: Iterable[Mapping[str, Any]],
    batches: Iterable[Mapping[str, Any]],
    steps: Iterable[Mapping[str, Any]] = (),
) -> Flops:
    """Operations of ledger lines of collection and scoring, and of generation batches and steps of training."""
    forward = FORWARD * parameters
    multiple = partial(score_multiple, config.score, len(config.prompts.validation))
    strategy = config.select.strategy
    validation = DIRECTION if strategy.reads_influence else GRADIENT
    validation *= 2 if strategy.candidates_aimed_at > 0 else 1  # scaled to length 1 first
    passes = GRADIENT * int(config.trainer.get("num_iterations", 1)) + bool(float(config.trainer.get("beta", 0.0)))
    batches, scored = list(batches), list(scored)
    return Flops(
        collect=forward * sum(e.get("passes", 0) * _all_tokens(e) for e in collected),
        score=forward
        * sum(
            multiple(e.get("estimator")) * e.get("computed_tokens", 0)
            + validation * e.get("validation_tokens", 0)
            + e.get("forward_tokens", 0)
            for e in scored
        )
        + forward * _read(scored),
        train=forward * (sum(map(_all_tokens, batches)) + passes * _trained_tokens(config, batches) + _read(steps)),
    )


def _read(lines: Iterable[Mapping[str, Any]]) -> float:
    """Forward passes of a token that low-rank products with the gradient are worth."""
    return sum(line.get("read_passes", 0.0) for line in lines)


def _trained_tokens(config: Config, batches: Sequence[Mapping[str, Any]]) -> float:
    """Prompt and completion tokens of what is trained on, in one pass."""
    if not config.train.dynamic_sampling:
        return sum(_all_tokens(batch) * _trained_share(config, batch) for batch in batches)
    micro_steps = int(config.trainer.get("gradient_accumulation_steps", 1))
    a_step = max(1, micro_steps // int(config.trainer.get("steps_per_generation") or micro_steps))  # generation batches
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for batch in batches:
        by_step.setdefault(batch["step"], []).append(batch)
    total = 0.0
    for own in by_step.values():
        rows = sum(len(batch["prompt_ids"]) for batch in own)
        total += sum(map(_all_tokens, own)) * min(1.0, a_step * len(own[0]["prompt_ids"]) / rows)
    return total


def _trained_share(config: Config, batch: Mapping[str, Any]) -> float:
    """Share of a generation batch's groups that is trained on."""
    groups = max(1, len(batch.get("prompt_ids", ())) // int(config.trainer.get("num_generations", 8)))
    return config.select.strategy.trained_groups(groups) / groups


def _all_tokens(entry: Mapping[str, Any]) -> int:
    """Prompt and completion tokens; none of work that was interrupted before it knew them."""
    return int(entry.get("prompt_tokens", 0)) + int(entry.get("tokens", 0))
