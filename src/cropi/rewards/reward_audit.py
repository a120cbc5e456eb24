"""Audit rewards: gold answers against themselves, format by source, disagreement of verifiers, cheap answers."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cropi.config import Config, Verifier
from cropi.errors import ConfigError
from cropi.prompt_text import last_turn
from cropi.rewards.pool import judge_of
from cropi.rewards.verifier import (
    CORRECT,
    ERROR,
    TIMEOUT,
    UNPARSEABLE_ANSWER,
    UNPARSEABLE_GOLD,
    WRONG,
    Judge,
    Judgement,
    answered,
)

SHOWN = 20  # examples of each kind, at the most
TEXT = 200  # characters of a text in an example
LITTLE = 0.8  # a format that fewer completions keep to is worth a remark
CONSTANTS = ("", "nan", "inf", "0", "1", "True", "answer", "[]", "{}")  # cheap answers
CHOICES = 10  # gold answers that are given at once, at the most
PER_SOURCE = 100  # rows that each cheap answer is tried on, at the most
UNLIKELY = 0.001  # a cheap answer is reported if chance earns as much less often


@dataclass(frozen=True)
class Audit:
    """Findings of `audit-rewards`."""

    completions: int
    origin: str
    gold: dict[str, int]  # verdicts on gold answers against themselves
    bad_gold: list[dict[str, str]]
    sources: dict[str, dict[str, float]]
    verdicts: dict[str, int]
    disagreement: dict[str, Any] | None
    cheap: list[dict[str, Any]]  # answers that ignore the question and earn more than chance
    fixes: list[str]

    def as_json(self) -> dict[str, Any]:
        return vars(self)

    def as_text(self) -> str:
        lines = ["gold answers against themselves: " + _listed(self.gold)]
        lines += [f"  {row['verdict']:<18} {row['prompt_id']}  {row['answer']!r}" for row in self.bad_gold]
        lines.append(f"{self.completions} completions, {self.origin}: " + _listed(self.verdicts))
        graded = any("reward" in row for row in self.sources.values())
        heading = "source                     completions  in format  right  right if in format"
        lines.append(heading + ("  mean reward" if graded else ""))
        lines += [
            f"{name[:26]:<26} {row['completions']:>11,.0f} {row['in_format']:>10.0%} {row['right']:>6.0%} {_share(row)}"
            + (f"  {row['reward']:>11.3f}" if graded else "")
            for name, row in self.sources.items()
        ]
        if self.disagreement is not None:
            two = self.disagreement
            lines.append(f"{two['first']} and {two['second']} disagree on {two['count']} of {two['of']} completions")
            lines += [
                f"  {row['first']:<18} {row['second']:<18} gold {row['answer']!r}, …{row['completion'][-80:]!r}"
                for row in two["examples"]
            ]
        lines += [
            f"cheap in {row['source']}: {row['answer']} earns {row['earns']:.0%} on {row['rows']} rows (chance "
            f"{row['chance']:.0%})"
            for row in self.cheap
        ]
        lines += [f"fix: {text}" for text in self.fixes] or ["nothing to fix was found"]
        return "\n".join(lines)


def _share(row: Mapping[str, float]) -> str:
    return f"{row['right'] / row['in_format']:>19.0%}" if row["in_format"] else f"{'–':>19}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def audit_of(
    config: Config,
    prompts: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    origin: str,
    other: Verifier | None,
) -> Audit:
    """Judge the gold answers of all prompts by the run's verifier, and completions by it and perhaps another.

    `rows` are the prompts of the completions.
    """
    judge = judge_of(config.verifier, config.verification)
    of_gold = judge([answered(config.verifier.completion_with(row["answer"]), row) for row in prompts])
    asked = [answered(text, row) for text, row in zip(texts, rows, strict=True)]
    judged = judge(asked)
    _require_verdicts([*of_gold, *judged], "verifier")
    gold, verdicts = ([judgement.verdict for judgement in some] for some in (of_gold, judged))
    disagreement = None
    if other is not None:
        by_other = judge_of(other, config.verification)(asked)
        _require_verdicts(by_other, "--against")
        second = [judgement.verdict for judgement in by_other]
        disagreement = {"first": config.verifier.type, "second": other.type} | _differing(rows, texts, verdicts, second)
    sources = _by_source([row["source"] for row in rows], judged, graded=config.verifier.gives_grades)
    bad = [
        {"prompt_id": row["prompt_id"], "answer": row["answer"][:TEXT], "verdict": verdict}
        for row, verdict in zip(prompts, gold, strict=True)
        if verdict != CORRECT
    ]
    cheap = cheap_answers(config.verifier, judge, prompts)
    return Audit(
        completions=len(texts),
        origin=origin,
        gold=dict(Counter(gold)),
        bad_gold=bad[:SHOWN],
        sources=sources,
        verdicts=dict(Counter(verdicts)),
        disagreement=disagreement,
        cheap=cheap,
        fixes=_fixes(of_gold, judged, sources, disagreement, cheap),
    )


def _differing(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> dict[str, Any]:
    """Count the completions that only one of two verifiers calls right, with examples."""
    differing = [n for n, (a, b) in enumerate(zip(first, second, strict=True)) if (a == CORRECT) != (b == CORRECT)]
    return {
        "of": len(texts),
        "count": len(differing),
        "first_only": sum(first[n] == CORRECT for n in differing),
        "examples": [
            {
                "prompt_id": rows[n]["prompt_id"],
                "first": first[n],
                "second": second[n],
                "answer": rows[n]["answer"][:TEXT],
                "completion": texts[n][-TEXT:],
            }
            for n in differing[:SHOWN]
        ],
    }


def _require_verdicts(judged: Sequence[Judgement], where: str) -> None:
    """ConfigError if a verifier failed on every row, which says nothing about the answers."""
    causes = Counter(judgement.note for judgement in judged if judgement.verdict in (TIMEOUT, ERROR))
    if judged and causes.total() == len(judged):
        raise ConfigError(
            f"it fails on all {len(judged)} rows: {causes.most_common(1)[0][0]}",
            where=where,
            fix="correct it (try it with `cropi verify`), or raise verification.seconds if it is slow.",
        )


def _by_source(origins: Sequence[str], judged: Sequence[Judgement], *, graded: bool) -> dict[str, dict[str, float]]:
    """Shares among completions with a readable gold answer, and the mean reward if graded."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    rewards: dict[str, float] = defaultdict(float)
    for origin, judgement in zip(origins, judged, strict=True):
        counts[origin][judgement.verdict] += 1
        rewards[origin] += judgement.reward or 0.0
    found = {}
    for origin, count in sorted(counts.items()):
        readable = count.total() - count[UNPARSEABLE_GOLD]
        found[origin] = {
            "completions": float(count.total()),
            "in_format": 1 - count[UNPARSEABLE_ANSWER] / readable if readable else 0.0,
            "right": count[CORRECT] / readable if readable else 0.0,
        }
        if graded:
            found[origin]["reward"] = rewards[origin] / readable if readable else 0.0
    return found


def _fixes(
    of_gold: Sequence[Judgement],
    judged: Sequence[Judgement],
    sources: Mapping[str, Mapping[str, float]],
    disagreement: Mapping[str, Any] | None,
    cheap: Sequence[Mapping[str, Any]],
) -> list[str]:
    found = []
    gold = [judgement.verdict for judgement in of_gold]
    unread, wrong = gold.count(UNPARSEABLE_GOLD), gold.count(WRONG) + gold.count(UNPARSEABLE_ANSWER)
    if unread:
        found.append(
            f"{unread} gold answers cannot be read or are excluded by the verifier: their prompts are not used. "
            "Correct them, or choose a verifier that reads them."
        )
    if wrong:
        found.append(
            f"{wrong} gold answers are not right against themselves: a right completion would get no reward. Correct "
            "them, or choose another verifier."
        )
    loose = [name for name, row in sources.items() if row["in_format"] < LITTLE]
    if loose:
        found.append(
            f"few completions of {', '.join(loose)} hold an answer in the verifier's form. Say in the prompt what form "
            "it must have, raise collect.max_completion_length if they are cut short, or warm the policy up."
        )
    hopeless = [
        name for name, row in sources.items() if row["in_format"] >= LITTLE and not row.get("reward", row["right"])
    ]
    if hopeless:
        found.append(f"no completion of {', '.join(hopeless)} is rewarded: too hard, or the gold answers are wrong.")
    for verdict, remedy in ((TIMEOUT, "raise verification.seconds"), (ERROR, "correct the verifier")):
        if notes := [judgement.note for judgement in (*of_gold, *judged) if judgement.verdict == verdict]:
            found.append(f"{len(notes)} gold answers or completions ended as {verdict} ({notes[0]}): {remedy}.")
    if disagreement is not None and disagreement["count"]:
        found.append("read the completions on which the two verifiers disagree: one of them is wrong.")
    if cheap:
        names = ", ".join(sorted({row["source"] for row in cheap}))
        found.append(
            f"answers that ignore the question earn more than chance in {names}: a policy would learn to give them. "
            "Make the verifier stricter, or remove these prompts."
        )
    return found


def cheap_answers(verifier: Verifier, judge: Judge, prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers that earn more than chance, by source: the answer, its mean reward, that of chance, and the rows.

    Chance is the share of the commonest gold answer, the best that ignores the question. An answer is reported if a
    binomial variable of that mean reaches its sum of rewards, rounded down, less often than `UNLIKELY`.
    """
    by_source: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in prompts:
        by_source[row["source"]].append(row)
    found = []
    for source, every in sorted(by_source.items()):
        rows = every[:: -(-len(every) // PER_SOURCE)]
        tried = _completions(verifier, rows)
        asked = [answered(text, row) for texts in tried.values() for text, row in zip(texts, rows, strict=True)]
        rewards = [judgement.reward for judgement in judge(asked)]
        chance = Counter(row["answer"].strip() for row in rows).most_common(1)[0][1] / len(rows)
        for number, name in enumerate(tried):
            own = [one for one in rewards[number * len(rows) : (number + 1) * len(rows)] if one is not None]
            if own and at_least(math.floor(sum(own) + 1e-9), len(own), chance) < UNLIKELY:
                mean = sum(own) / len(own)
                found.append({"source": source, "answer": name, "earns": mean, "chance": chance, "rows": len(own)})
    return found


def _completions(verifier: Verifier, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Name of a cheap answer -> a completion with it for each row, in the verifier's format."""
    golds = [gold for gold, _ in Counter(row["answer"].strip() for row in rows).most_common(CHOICES)]
    asked = [last_turn(row["messages"]) for row in rows]
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", text)[-1:] for text in asked]
    constants = {repr(text): [text] * len(rows) for text in CONSTANTS}
    constants["the commonest gold answer"] = golds[:1] * len(rows)
    constants["gold answers of others, all at once"] = [", ".join(golds)] * len(rows)
    constants["the prompt's last number"] = [number[0] if number else "0" for number in numbers]
    return {
        **{name: [verifier.completion_with(text) for text in texts] for name, texts in constants.items()},
        "no text at all": [""] * len(rows),
        "the prompt": asked,
    }


def at_least(count: int, of: int, chance: float) -> float:
    """The probability that a binomial variable is at least `count`."""
    return sum(math.comb(of, n) * chance**n * (1 - chance) ** (of - n) for n in range(count, of + 1))
