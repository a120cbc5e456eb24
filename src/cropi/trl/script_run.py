"""The curriculum of a script's trainer: that of `cropi run`, with the trainer's own generator, rewards and prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from datasets import Dataset
from torch.utils import data

from cropi.console import warn
from cropi.parallel import process_group
from cropi.prompt_text import last_turn
from cropi.prompts.encoding import encode_prompts
from cropi.report.reading import way
from cropi.stages.collect import collect
from cropi.stages.online import OnlineRun
from cropi.stages.online_loop import ChooserLoop, OnlineLoop
from cropi.stages.online_trainer import ReadsInfluence
from cropi.stages.run import Run
from cropi.stages.select import select
from cropi.stages.validation_pass import Answer, Due, Member, SampledGroup, grouped
from cropi.training.stage_sampler import OnlineSampler
from cropi.trl.messages import worded
from cropi.trl.selector import PROMPT_ID, row_id, shown_prompt

if TYPE_CHECKING:
    from cropi.trl.trainer import CurriculumTrainer


class ChosenRows(data.Dataset[dict[str, Any]]):
    """The pool in the order of choice: an epoch's rows are chosen as they are first read, a generation batch at once.

    TRL repeats them and divides them among processes as those of any dataset, without shuffling.
    """

    def __init__(self, pool: Dataset, sampler: OnlineSampler, prompts: int) -> None:
        """`prompts`: of a generation batch."""
        self._pool, self._sampler, self._prompts = pool, sampler, prompts
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go on with the rows of an epoch: loaders tell it to their dataset."""
        self._epoch = epoch

    def __len__(self) -> int:
        return max(len(self._pool), self._prompts)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number, row = divmod(place, self._prompts)
        chosen = self._sampler.batch(self._epoch * (len(self) // self._prompts) + number)
        return self._pool[chosen[row]]


class ScriptRun(OnlineRun):
    """The choice of a user's trainer, and what is known of every prompt."""

    _trainer: CurriculumTrainer

    def __init__(self, run: Run, trainer: CurriculumTrainer) -> None:
        """`run` is that of the trainer, which goes on from a checkpoint or is empty."""
        with worded(warnings_only=True):
            collect(run)
            select(run, 0)
        known = {row["prompt_id"]: row | {"prompt_json": row["messages"]} for row in run.folder.train_prompts.rows()}
        super().__init__(run, [known[prompt_id] for prompt_id in trainer.pool[PROMPT_ID]], trainer.reward_log)
        self._sets = trainer.selector.validation_sets
        self._members = {row_id(row): (name, n) for name, rows in self._sets.items() for n, row in enumerate(rows)}
        self._evaluated: tuple[int, list[tuple[Member, Answer]]] = (0, [])  # at a step

    def loop(self, trainer: ReadsInfluence, checkpoint: Path | None) -> ChooserLoop:
        """As in a run; where validation prompts have images, by rewards alone."""
        loop = super().loop(trainer, checkpoint)
        loop.sampler.start_stage(0, range(len(self._rows)), 0)
        if isinstance(loop, OnlineLoop) and any({"image", "images"} & set(s.column_names) for s in self._sets.values()):
            warn("influence is not read of prompts with images: they are chosen by their rewards")
            loop.choose_by_rewards()
        return loop

    # -- validation completions ----------------------------------------------------------------------------------------

    def evaluated(self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Answer], step: int) -> None:
        """Take rows of an evaluation of the user's: validation prompts among them serve for the round of that step."""
        known = self._evaluated[1] if self._evaluated[0] == step else []
        found = [(self._members.get(row_id(row)), answer) for row, answer in zip(rows, answers, strict=True)]
        self._evaluated = (step, known + [(member, answer) for member, answer in found if member is not None])

    def _sample(self, due: Due, step: int) -> dict[str, list[SampledGroup]]:
        at, pairs = self._evaluated
        known = grouped([member for member, _ in pairs], [answer for _, answer in pairs]) if at == step else {}
        members = [(name, member) for name in sorted(due) for member, count in enumerate(due[name]) if count]
        if any(len(known.get(member, ())) < 2 for member in members):
            return super()._sample(due, step)
        groups = {name: list[SampledGroup]() for name in sorted(due)}
        for name, member in members:
            groups[name].append(
                SampledGroup.of(
                    member, known[name, member][: min(due[name][member], len(known[name, member])) // 2 * 2]
                )
            )
        return groups

    def _ask(self, members: Sequence[Member], seed: int) -> list[Answer]:
        everyone = process_group().gather(list(members))  # ranks sample together, and so as often
        found = dict[str, Iterator[Answer]]()
        for place, (name, rows) in enumerate(sorted(self._sets.items())):  # one by one: TRL wants rows of one kind
            by_rank = [[n for other, n in part if other == name] for part in everyone]
            own = [n for other, n in members if other == name]
            asked = [*own, *chain(*by_rank)][: max(map(len, by_rank))]
            answers = self._trainer.answered([rows[n] for n in asked], seed + place) if asked else []
            found[name] = iter(answers[: len(own)])
        return [next(found[name]) for name, _ in members]

    # -- what a person sees --------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        found, named = self._loop.metrics(), "curriculum/"
        if self._loop.explained:
            *before, newest = self._loop.explained
            known = {choice.place for batch in before for choice in batch}
            ways = Counter(choice.source for choice in newest)
            sources = Counter(self._rows[choice.place]["source"] for choice in newest)
            found |= {f"{named}chosen_by/{name}": count / len(newest) for name, count in ways.items()}
            found |= {f"{named}source/{name}": count / len(newest) for name, count in sources.items()}
            found[f"{named}new"] = sum(choice.place not in known for choice in newest) / len(newest)
        for name in ("seconds", "tokens"):
            charged = [entry.get(name, 0) for entry in self._run.ledger.entries()]
            found[f"{named}overhead_{name}"] = float(sum(charged))
        return found

    def table(self) -> pd.DataFrame:
        """Every prompt: text, source, times trained, expected reward now, influence ± error, and why it was chosen.

        Those that were trained on most come first.
        """
        known = self._chooser.table([row["prompt_id"] for row in self._rows]).to_pandas()
        known.insert(1, "prompt", [last_turn(row["messages"]) for row in self._rows])
        known.insert(2, "source", [row["source"] for row in self._rows])
        why = {c.place: way(f"{c.source} {c.validation_set}".strip()) for batch in self._loop.explained for c in batch}
        known = known.assign(why=[why.get(place, "not chosen yet") for place in range(len(self._rows))])
        return known.sort_values("times_drawn", ascending=False, kind="stable", ignore_index=True)

    def closing_line(self, place: Path) -> str:
        """Say what was chosen, and where to look."""
        chosen, found = {c.place for batch in self._loop.explained for c in batch}, self._loop.metrics()
        gain, low, high = (found.get(f"curriculum/gain{end}", 0.0) for end in ("", "_low", "_high"))
        times = f"{gain:.1f} times as much as a random one [{low:.1f}, {high:.1f}]"
        helped = f"; a chosen prompt helped {times}" if low > 0 else ""  # a random one may do harm
        return (
            f"curriculum: trained on {len(chosen):,} of {len(self._rows):,} prompts{helped}. "
            f"`cropi explain {place}` says why, `cropi report {place}` shows it"
        )


def encoded_by(trainer: CurriculumTrainer, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Token ids of rows of the prompt table, as the trainer's template writes them."""
    sets = {"train": trainer.pool}
    sets |= {f"validation/{name}": given for name, given in trainer.selector.validation_sets.items()}
    found = [sets[row["set"]][json.loads(row["extra"])["row"]] for row in rows]
    processor = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is not processor:  # of images their kind alone: the template would write what a pass over them needs
        prompts = [_in_parts(shown_prompt(row)) for row in found]
    else:
        prompts = [row.get("prompt") or shown_prompt(row) for row in found]
    settings = {"tools": trainer.tools or None, "chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
    return [encode_prompts(tokenizer, [prompt], **settings)[0] for prompt in prompts]


def _in_parts(prompt: str | list[dict[str, str]]) -> Any:
    """Messages as a processor's template takes them."""
    if isinstance(prompt, str):
        return prompt
    return [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in prompt]
