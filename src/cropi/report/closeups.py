"""A few prompts close up: test questions with their answers before and after training, and training prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cropi.artifacts import EVALUATION, OK, is_finished, read_table
from cropi.config import Config
from cropi.report.blocks import Block, Card, Table, Text
from cropi.report.explanations import Explanation, best_first, explanations, legend, stage_rows, training_of
from cropi.report.reading import prompt_text, read_completions
from cropi.report.wording import count
from cropi.rewards.verifier import CORRECT
from cropi.run_folder import RunFolder
from cropi.run_tables import evaluation_files
from cropi.seeds import unit_interval

EACH = 3  # prompts from the top, from the bottom and at random; completions of a prompt; questions of a kind
MAX_CHARACTERS = 2000  # of a prompt or completion

Row = Mapping[str, Any]  # of an evaluation: set, prompt_id, greedy, completion, verdict
KINDS = ("learned", "lost", "right before and after", "wrong before and after")


# -- test questions ----------------------------------------------------------------------------------------------------


def before_and_after(config: Config, run: RunFolder) -> list[Block]:
    """Greedy answers of the base policy and of the last evaluated one, question by question."""
    files = evaluation_files(run.stages.evaluations, all_there=True)
    if len(files) < 2 or 0 not in files or not is_finished(run.prompts):
        return []
    tables = (read_table(files[step], EVALUATION).to_pylist() for step in (0, max(files)))
    first, last = ({(row["set"], row["prompt_id"]): row for row in rows} for rows in tables)
    by_kind: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for key in sorted(first.keys() & last.keys()):
        by_kind[_kind(first[key]["greedy"], last[key]["greedy"])].append(key)
    names = list(dict.fromkeys(name for name, _ in first))
    rows = [[name, *(count(sum(key[0] == name for key in by_kind[kind])) for kind in KINDS)] for name in names]
    asked = {(row["set"].removeprefix("test/"), row["prompt_id"]): row for row in run.held_out("test")}
    cards = [
        _question(kind, asked[key], first[key], last[key], max(files))
        for kind, keys in by_kind.items()
        for key in _some([key for key in keys if key in asked], config.seed)
    ]
    header = ["test set", *KINDS]
    return [
        Table(f"Test questions by their greedy answers, before training and at step {max(files)}.", header, rows),
        *cards,
    ]


def _kind(before: float, after: float) -> str:
    if after != before:
        return KINDS[0] if after > before else KINDS[1]
    return KINDS[2] if after >= 1 else KINDS[3]


def _some(keys: Sequence[tuple[str, str]], seed: int) -> list[tuple[str, str]]:
    return sorted(keys, key=lambda key: (unit_interval(seed, "answers", *key), key))[:EACH]


def _question(kind: str, asked: Row, before: Row, after: Row, step: int) -> Card:
    facts = [("test set", before["set"]), ("prompt id", before["prompt_id"])]
    texts = [("question", shortened(prompt_text(asked["messages"]))), ("gold answer", shortened(asked["answer"]))]
    for when, row in (("before", before), (f"step {step}", after)):
        texts.append((f"{when}: {row['verdict']}", shortened(row["completion"])))
    return Card(kind, facts, texts)


# -- training prompts --------------------------------------------------------------------------------------------------


def closeups(config: Config, run: RunFolder) -> list[Block]:
    """The prompts that were ranked or drawn first and last, and others at random, and why; there is a selection."""
    chosen = pick(best_first(config, run), list(run.train_prompts), config.seed)
    ids = [prompt_id for part in chosen.values() for prompt_id in part]
    completions = read_completions(run, ids)
    told = {found.prompt_id: found for found in explanations(config, run, ids)}
    cards = [_prompt(kind, told[i], completions.get(i, [])) for kind, part in chosen.items() for i in part]
    return [Text(legend(list(told.values()))), *cards]


def pick(best_first: Sequence[str], everything: Sequence[str], seed: int) -> dict[str, list[str]]:
    """The first, the last and random ones, none twice. What could not be ranked may be drawn at random."""
    top, bottom = best_first[:EACH], best_first[EACH:][-EACH:]
    rest = sorted(set(everything) - {*top, *bottom}, key=lambda one: (unit_interval(seed, "report", one), one))
    return {"chosen first": list(top), "chosen last": list(bottom), "at random": rest[:EACH]}


def _prompt(kind: str, told: Explanation, completions: Sequence[Row]) -> Card:
    facts = [("prompt id", told.prompt_id), ("source", told.source), ("training", training_of(told.trained))]
    texts = [("prompt", shortened(prompt_text(told.messages))), ("gold answer", shortened(told.answer))]
    texts += [(_label(shown), shortened(shown["completion"])) for shown in telling(completions)]
    header, *rows = stage_rows(told.stages)
    return Card(kind, facts, texts, Table("", header, rows, left=len(header)))


def telling(completions: Sequence[Row]) -> list[Row]:
    """Up to EACH completions: the first right one and the first wrong one, then the others as they were sampled."""
    right = [row for row in completions if row["verdict"] == CORRECT][:1]
    wrong = [row for row in completions if row["verdict"] != CORRECT][:1]
    others = [row for row in completions if row not in (*right, *wrong)]
    return [*right, *wrong, *others][:EACH]


def _label(completion: Row) -> str:
    label = f"sample {completion['sample']}: {completion['verdict']}"
    return label if completion["status"] == OK else f"{label}, {completion['status']}"


def shortened(text: str) -> str:
    """The text, or its beginning and how much is left out."""
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]}… ({left_out:,} more characters)"
