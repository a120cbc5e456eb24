"""Explanations of prompts as text for a terminal: whatever the data hold, it stays on its line."""

from __future__ import annotations

from collections.abc import Sequence

from cropi.report.explain import Explanation, StageFacts, Trained
from cropi.report.reading import prompt_text
from cropi.report.wording import (
    ABSENT,
    NOT_MEASURED,
    count,
    decimal,
    on_one_line,
    percent,
    with_error,
)

MAX_PROMPT, MAX_WORD = 300, 80  # characters shown of a prompt, and of an answer, id or name
LEGEND = (
    "±: one standard error; #: rank on that validation set; P(best): probability of being truly among the best; ESS: "
    "effective sample size of the token ratios, as a share; clip: share of them outside the clip range; KL: nats per "
    "token from the policy that sampled; trained: generation batches × mean reward."
)


def as_text(explanations: Sequence[Explanation]) -> str:
    """All of them, one line per stage, and a legend."""
    return "\n\n".join([*(_one(explanation) for explanation in explanations), LEGEND])


def _one(found: Explanation) -> str:
    lines = [
        f"{_word(found.prompt_id)}  source {_word(found.source)}, {_ever(found.trained)}",
        f"  prompt  {on_one_line(prompt_text(found.messages), MAX_PROMPT)}",
        f"  answer  {_word(found.answer)}",
    ]
    return "\n".join([*lines, *_table(found.stages)])


def _word(text: str) -> str:
    return on_one_line(text, MAX_WORD)


def _ever(trained: Trained) -> str:
    if not trained.times:
        return "not trained on so far"
    mean = f", mean reward {decimal(trained.mean_reward)}" if trained.mean_reward is not None else ""
    batches = "1 batch" if trained.times == 1 else f"{trained.times} batches"
    return f"trained on in {batches} ({trained.completions:,} completions{mean})"


def _table(stages: Sequence[StageFacts]) -> list[str]:
    """Aligned columns; those that say nothing at any stage are left out."""
    names = list(dict.fromkeys(name for facts in stages for name in facts.influence))
    header = [
        "stage",
        "status",
        "pass rate",
        "rank",
        "P(best)",
        *names,
        "ESS",
        "clip",
        "KL",
        "trained",
        "outcome",
    ]
    rows = [_cells(facts, names) for facts in stages]
    kept = [place for place in range(len(header)) if any(row[place] != ABSENT for row in rows)]
    shown = [[row[place] for place in kept] for row in [header, *rows]]
    widths = [max(len(row[place]) for row in shown) for place in range(len(kept))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in shown]


def _cells(facts: StageFacts, names: Sequence[str]) -> list[str]:
    return [
        str(facts.stage),
        facts.status,
        decimal(facts.pass_rate),
        f"{count(facts.rank)} of {count(facts.ranked)}" if facts.rank is not None else ABSENT,
        _chance(facts),
        *(_influence(facts, name) for name in names),
        decimal(facts.ratio_ess),
        percent(facts.clip_share),
        decimal(facts.kl, 3),
        f"{facts.trained.times} × {decimal(facts.trained.mean_reward)}" if facts.trained.times else ABSENT,
        facts.outcome,
    ]


def _chance(facts: StageFacts) -> str:
    if not facts.influence:
        return ABSENT
    return NOT_MEASURED if facts.top_probability is None else decimal(facts.top_probability)


def _influence(facts: StageFacts, name: str) -> str:
    found = facts.influence.get(name)
    return ABSENT if found is None else f"{with_error(found.value, found.standard_error)} #{found.rank:,}"
