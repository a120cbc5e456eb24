"""Explain why prompts were or were not selected, from a run's files. Free of torch."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from cropi.artifacts import GOLD_UNPARSEABLE, NO_SIGNAL, NOT_SAMPLED, OK, PROMPT_TOO_LONG
from cropi.config import Config, Strategy
from cropi.curriculum.strategies import PassRateStrategy
from cropi.errors import ArtifactError, UserError
from cropi.functional.ranking import ranks
from cropi.report.reading import directions, prompt_text, read_beliefs, read_scores, rows_of, selection_table, way
from cropi.report.wording import ABSENT, NOT_MEASURED, count, decimal, on_one_line, percent, with_error
from cropi.run_folder import RunFolder, StagePaths
from cropi.streams import read_jsonl

CLOSE = 3  # suggestions for an unknown id
WHY_NOT = {
    NO_SIGNAL: "no signal: its completions were all rewarded alike, or masked",
    GOLD_UNPARSEABLE: "gold answer unparseable",
    PROMPT_TOO_LONG: "too long for the policy's context: no trajectories",
}

Row = Mapping[str, Any]
Rewards = dict[int, list[list[float | None]]]  # of one prompt: by stage, by generation batch


@dataclass(frozen=True)
class SetInfluence:
    """Influence on one validation set."""

    value: float
    standard_error: float | None  # None: not measured
    rank: int  # among all prompts of the pool; 1 is best


@dataclass(frozen=True)
class Trained:
    """A prompt's use in training."""

    times: int  # generation batches that held it
    completions: int
    mean_reward: float | None


@dataclass(frozen=True)
class StageFacts:
    """One prompt at one stage. What is None was not measured, or is not there yet."""

    stage: int
    status: str  # of the prompt's trajectories as they stand at this stage
    pass_rate: float | None
    selected: bool | None
    outcome: str  # why it was selected, or why not
    rank: int | None  # under the strategy (influence: fused); 1 is best
    ranked: int | None  # how many prompts the strategy could rank
    top_probability: float | None  # of being truly among the best
    influence: Mapping[str, SetInfluence]  # by validation set; empty without signal or scores
    ratio_ess: float | None
    clip_share: float | None
    kl: float | None
    trained: Trained
    drawn: Mapping[str, int] | None = None  # times by reason, where batches are chosen one by one


@dataclass(frozen=True)
class Explanation:
    """One prompt: what it is, and its stages."""

    prompt_id: str
    source: str
    messages: str  # JSON: a string, or a list of chat messages
    answer: str
    trained: Trained  # over all stages
    stages: Sequence[StageFacts]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; the prompt as it was read."""
        values = asdict(self)
        return {"prompt_id": self.prompt_id, "prompt": json.loads(values.pop("messages"))} | values


@dataclass(frozen=True)
class _Stage:
    """The tables of one stage, whichever are there."""

    number: int
    scores: pa.Table | None  # or beliefs
    selection: pa.Table | None
    drawn: Mapping[str, Counter[str]] | None = None  # by prompt: its places in batches, by reason


def explanations(
    config: Config, run: RunFolder, prompt_ids: Sequence[str], *, stage: int | None = None, top: int | None = None
) -> list[Explanation]:
    """Explain some training prompts, or the `top` best of a stage (by default the last one selected).

    All stages are told if `stage` is None. UserError for an unknown prompt or stage, with the closest that there are.
    """
    stages = _read_stages(config, run.stages, stage)
    if top is not None:
        prompt_ids = _best(stages, top)
    _require_known(run, prompt_ids)
    rewards = _training_rewards(run.stages, config.train.steps_per_stage, prompt_ids)
    facts = [_facts_of_stage(config, part, rewards) for part in stages]
    return [
        _explanation(run.train_prompts[i], rewards[i], [part[i] for part in facts]) for i in dict.fromkeys(prompt_ids)
    ]


# -- what to explain -----------------------------------------------------------------------------------------------


def _read_stages(config: Config, paths: StagePaths, stage: int | None) -> list[_Stage]:
    """The stages asked for that have scores or a selection; an error where there is none."""
    if stage is not None and stage >= config.train.stages:
        raise UserError(f"the run has no stage {stage}", where="--stage", fix=f"give 0 to {config.train.stages - 1}.")
    wanted = range(config.train.stages) if stage is None else [stage]
    strategy = config.select.strategy
    tables = read_beliefs(config, paths) if strategy.reads_influence else read_scores(config, paths)
    drawn = draws(paths) if strategy.chooses_online else None
    found = []
    for number in wanted:
        selection = selection_table(paths, number)
        scores = tables.get(strategy.scored_stage(number))
        if selection is not None:
            found.append(_Stage(number, scores, selection, None if drawn is None else drawn.get(number, {})))
        elif drawn is None and number in tables:
            found.append(_Stage(number, scores, None))
    if not found:
        what = f"stage {stage}" if stage is not None else "the run"
        raise ArtifactError(
            f"{what} has neither scores nor a selection yet", where=str(paths.folder), fix="run `cropi run` first."
        )
    return found


def draws(paths: StagePaths) -> dict[int, dict[str, Counter[str]]]:
    """By stage and prompt: how often it was drawn, by reason; the most often drawn first."""
    found: dict[int, dict[str, Counter[str]]] = {}
    for batch in read_jsonl(paths.choices):
        for prompt_id, why in zip(batch["prompt_ids"], batch["why"], strict=True):
            found.setdefault(batch["stage"], {}).setdefault(prompt_id, Counter())[way(why)] += 1
    return {stage: dict(sorted(own.items(), key=lambda row: (-row[1].total(), row[0]))) for stage, own in found.items()}


def best_first(config: Config, run: RunFolder) -> list[str]:
    """The prompts of the last selection that could be ranked, the best ranked or most often drawn first."""
    stages = _read_stages(config, run.stages, None)
    return _best(stages, max(_cut(stage).ranked for stage in stages) or None)


def _best(stages: Sequence[_Stage], top: int | None = None) -> list[str]:
    """The best ranked of the last selection, or the prompts that were drawn most often in the last stage."""
    drawn = next((part.drawn for part in reversed(stages) if part.drawn), None)
    if drawn:
        return list(drawn)[:top]
    table = next((part.selection for part in reversed(stages) if part.selection is not None), None)
    if table is None:
        raise UserError("nothing has been selected yet", where="--top", fix="run `cropi select`, or name prompts.")
    return table.slice(0, top).column("prompt_id").to_pylist()


def _require_known(run: RunFolder, prompt_ids: Iterable[str]) -> None:
    """UserError for the first id that is not one of a training prompt."""
    for prompt_id in prompt_ids:
        if prompt_id in run.train_prompts:
            continue
        other = next((row["set"] for row in run.prompt_rows if row["prompt_id"] == prompt_id), None)
        if other is not None:
            raise UserError(f"{prompt_id!r} is a prompt of {other}", fix="name training prompts: only they are ranked.")
        if "=" in prompt_id:
            fix = "name the run's folder as CONFIG; settings have no place here."
            raise UserError(f"the run has no training prompt {prompt_id!r}", where=str(run.folder), fix=fix)
        close = difflib.get_close_matches(prompt_id, run.train_prompts, n=CLOSE)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "selection.parquet has the ids."
        raise UserError(f"the run has no training prompt {prompt_id!r}", where=str(run.folder), fix=hint)


# -- what is known -------------------------------------------------------------------------------------------------


def _training_rewards(paths: StagePaths, steps_per_stage: int, prompt_ids: Iterable[str]) -> dict[str, Rewards]:
    """By prompt: the rewards of every generation batch that held it, by stage."""
    found: dict[str, Rewards] = {prompt_id: {} for prompt_id in prompt_ids}
    for batch in read_jsonl(paths.rewards):
        stage = batch["step"] // steps_per_stage
        for prompt_id in found.keys() & set(batch["prompt_ids"]):
            pairs = zip(batch["prompt_ids"], batch["rewards"], strict=True)
            found[prompt_id].setdefault(stage, []).append([value for i, value in pairs if i == prompt_id])
    return found


def _trained(batches: Sequence[Sequence[float | None]]) -> Trained:
    known = [value for batch in batches for value in batch if value is not None]
    return Trained(len(batches), sum(map(len, batches)), sum(known) / len(known) if known else None)


def _facts_of_stage(config: Config, stage: _Stage, rewards: Mapping[str, Rewards]) -> dict[str, StageFacts]:
    names = directions(config)
    scored = rows_of(stage.scores, rewards) if stage.scores is not None else {}
    set_ranks = _set_ranks(stage.scores, names)
    selected = rows_of(stage.selection, rewards) if stage.selection is not None else {}
    cut, online = _cut(stage), stage.drawn is not None
    facts = {}
    for prompt_id, by_stage in rewards.items():
        row, choice = scored.get(prompt_id, {}), selected.get(prompt_id)
        drawn = None if stage.drawn is None else stage.drawn.get(prompt_id, Counter())
        facts[prompt_id] = StageFacts(
            stage=stage.number,
            status=row.get("status") or selected[prompt_id]["status"],
            pass_rate=row.get("pass_rate") if online else (choice or row)["pass_rate"],
            selected=bool(drawn) if online else None if choice is None else choice["selected"],
            outcome=outcome(choice, cut, config.select.strategy, drawn),
            rank=None if choice is None or online else choice["rank"],
            ranked=cut.ranked if stage.selection is not None and not online else None,
            top_probability=row.get("top_probability"),
            influence=_influence(row, set_ranks) if online or row.get("status") == OK else {},
            ratio_ess=row.get("ratio_ess"),
            clip_share=row.get("clip_share"),
            kl=row.get("kl"),
            trained=_trained(by_stage.get(stage.number, [])),
            drawn=None if drawn is None else dict(drawn),
        )
    return facts


def _set_ranks(scores: pa.Table | None, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Rank by validation set and prompt, as `select` takes it."""
    if scores is None:
        return {}
    ids = scores.column("prompt_id").to_pylist()
    columns = {name: scores.column(f"influence/{name}") for name in names}
    return {
        name: dict(zip(ids, ranks(column.to_numpy(), ids).tolist(), strict=True))
        for name, column in columns.items()
        if not column.null_count  # nothing is believed yet
    }


def _influence(row: Row, set_ranks: Mapping[str, Mapping[str, int]]) -> dict[str, SetInfluence]:
    return {
        name: SetInfluence(row[f"influence/{name}"], row[f"standard_error/{name}"], by_prompt[row["prompt_id"]])
        for name, by_prompt in set_ranks.items()
        if row
    }


@dataclass(frozen=True)
class Cut:
    """The end of a stage's selection."""

    rank: int  # the last one that the strategy took; 0 if none
    ranked: int  # prompts that it could rank


def _cut(stage: _Stage) -> Cut:
    if stage.selection is None:
        return Cut(0, 0)
    columns = (stage.selection.column(name).to_pylist() for name in ("rank", "selected"))
    rows = list(zip(*columns, strict=True))
    taken = [rank for rank, selected in rows if selected]
    ranked = sum(rank is not None for rank, _ in rows)
    return Cut(max(taken, default=0), ranked)


def outcome(row: Row | None, cut: Cut, strategy: Strategy, drawn: Mapping[str, int] | None = None) -> str:
    """Why a prompt was selected or drawn, or why not, from its row of the selection table."""
    if row is None:
        return "scored, nothing selected yet"
    if drawn:
        return f"drawn {sum(drawn.values())} × ({', '.join(f'{times} {why}' for why, times in drawn.items())})"
    if drawn is not None and row["rank"] is not None:  # no rank: it cannot be trained on
        return "not drawn"
    if row["selected"]:
        return f"selected ({row['reason']})"
    if row["rank"] is None:
        return _unranked(row, strategy)
    return f"ranked {row['rank']:,}, cut at {cut.rank:,}"


def _unranked(row: Row, strategy: Strategy) -> str:
    if isinstance(strategy, PassRateStrategy) and row["pass_rate"] is not None:
        return f"pass rate {row['pass_rate']:.2f} outside {strategy.low:g} to {strategy.high:g}"
    # A mixed group that `learnability` cannot rank: its newest training rewards are equal.
    return WHY_NOT.get(row["status"], "its newest training rewards are all alike")


def _explanation(prompt: Row, rewards: Rewards, stages: Sequence[StageFacts]) -> Explanation:
    return Explanation(
        prompt_id=prompt["prompt_id"],
        source=prompt["source"],
        messages=prompt["messages"],
        answer=prompt["answer"],
        trained=_trained([batch for batches in rewards.values() for batch in batches]),
        stages=stages,
    )


# -- text --------------------------------------------------------------------------------------------------------------

MAX_PROMPT, MAX_WORD = 300, 80  # characters shown of a prompt, and of an answer, id or name
LEGEND = {
    "P(best)": "P(best): probability of being truly among the best.",
    "ESS": "ESS: effective sample size of the token ratios, as a share.",
    "clip": "Clip: share of them outside the clip range.",
    "KL": "KL: nats per token from the policy that sampled.",
    "mean reward": "Mean reward: as training's own rewards predict it.",
    "trained": "Trained: generation batches × mean reward.",
}


def legend(explanations: Sequence[Explanation]) -> str:
    """The signs and columns that are shown."""
    columns = {name for found in explanations for name in stage_rows(found.stages)[0]}
    drawn = any(facts.drawn for found in explanations for facts in found.stages)
    shown = [text for name, text in LEGEND.items() if name in columns]
    shown += ["Drawn: places in the stage's batches, and why."] if drawn else []
    return " ".join(["±: one standard error. #: rank on that validation set.", *shown])


def as_text(explanations: Sequence[Explanation]) -> str:
    """All of them, one line per stage, and a legend."""
    return "\n\n".join([*(_one(explanation) for explanation in explanations), legend(explanations)])


def _one(found: Explanation) -> str:
    lines = [
        f"{_word(found.prompt_id)}  source {_word(found.source)}, {training_of(found.trained)}",
        f"  prompt  {on_one_line(prompt_text(found.messages), MAX_PROMPT)}",
        f"  answer  {_word(found.answer)}",
    ]
    return "\n".join([*lines, *_table(found.stages)])


def _word(text: str) -> str:
    return on_one_line(text, MAX_WORD)


def training_of(trained: Trained) -> str:
    """Count how often a prompt was trained on, over all stages."""
    if not trained.times:
        return "not trained on so far"
    mean = f", mean reward {decimal(trained.mean_reward)}" if trained.mean_reward is not None else ""
    batches = "1 batch" if trained.times == 1 else f"{trained.times} batches"
    return f"trained on in {batches} ({trained.completions:,} completions{mean})"


def stage_rows(stages: Sequence[StageFacts]) -> list[list[str]]:
    """A header, and a row for every stage; columns that say nothing at any stage are left out."""
    names = list(dict.fromkeys(name for facts in stages for name in facts.influence))
    chosen_online = any(facts.drawn is not None for facts in stages)
    reward = "mean reward" if chosen_online else "pass rate"
    header = ["stage", "status", reward, "rank", "P(best)", *names, "ESS", "clip", "KL", "trained", "outcome"]
    rows = [_cells(facts, names) for facts in stages]
    kept = [place for place in range(len(header)) if any(row[place] != ABSENT for row in rows)]
    return [[row[place] for place in kept] for row in [header, *rows]]


def _table(stages: Sequence[StageFacts]) -> list[str]:
    """Aligned columns."""
    shown = stage_rows(stages)
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in shown]


def _cells(facts: StageFacts, names: Sequence[str]) -> list[str]:
    return [
        str(facts.stage),
        ABSENT if facts.status == NOT_SAMPLED else facts.status,
        decimal(facts.pass_rate),
        f"{count(facts.rank)} of {count(facts.ranked)}" if facts.rank is not None else ABSENT,
        _chance(facts),
        *(_influence_text(facts, name) for name in names),
        decimal(facts.ratio_ess),
        percent(facts.clip_share),
        decimal(facts.kl, 3),
        f"{facts.trained.times} × {decimal(facts.trained.mean_reward)}" if facts.trained.times else ABSENT,
        facts.outcome,
    ]


def _chance(facts: StageFacts) -> str:
    if not facts.influence or facts.drawn is not None:
        return ABSENT
    return NOT_MEASURED if facts.top_probability is None else decimal(facts.top_probability)


def _influence_text(facts: StageFacts, name: str) -> str:
    found = facts.influence.get(name)
    return ABSENT if found is None else f"{with_error(found.value, found.standard_error)} #{found.rank:,}"
