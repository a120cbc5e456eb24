"""The curriculum of a script's trainer: that of `cropi run`, with the trainer's own generator, rewards and prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from datasets import Dataset

from cropi.artifacts import remove
from cropi.console import warn
from cropi.curriculum.chooser import GroupGate
from cropi.errors import ConfigError
from cropi.parallel import process_group
from cropi.prompts.encoding import encode_prompts
from cropi.report.reading import way
from cropi.stages.collect import collect
from cropi.stages.online import OnlineRun
from cropi.stages.online_loop import ChooserLoop, OnlineLoop
from cropi.stages.run import Run
from cropi.stages.select import select
from cropi.stages.validation_pass import Due, SampledGroup
from cropi.training.online_sampler import OnlineSampler
from cropi.training.stage_sampler import BatchShape
from cropi.trl.messages import warnings_only
from cropi.trl.selector import PROMPT_ID, shown_prompt

if TYPE_CHECKING:
    from cropi.trl.trainer import CurriculumTrainer

PAIR = 2  # completions of a validation prompt come in pairs, for two halves


@dataclass(frozen=True)
class Answer:
    """A completion that the trainer sampled, as tokens; `mask` is 0 for those that a tool wrote."""

    prompt: Sequence[int]
    completion: Sequence[int]
    mask: Sequence[int]
    reward: float | None
    has_image: bool


class EpochSampler(OnlineSampler):
    """An `OnlineSampler` whose stages are the epochs of a trainer."""

    def set_epoch(self, epoch: int) -> None:
        """Go on with the batches of an epoch: loaders tell it to their sampler."""
        self.start_stage(epoch, self._positions, 0)


class ScriptRun(OnlineRun):
    """The choice of a user's trainer, and what is known of every prompt."""

    _trainer: CurriculumTrainer
    _loop: ChooserLoop

    def __init__(self, run: Run, rows: Dataset, validation: Mapping[str, Dataset], trainer: CurriculumTrainer) -> None:
        self._validation_rows = validation
        listed = [
            {
                "prompt_id": row[PROMPT_ID],
                "prompt": shown_prompt(row),
                "prompt_json": json.dumps(shown_prompt(row)),
                "source": str(row.get("source") or row.get("data_source") or "train"),
            }
            for row in rows
        ]
        super().__init__(run, listed, trainer.reward_log)

    def begin(self, trainer: CurriculumTrainer, checkpoint: Path | None) -> ChooserLoop:
        """The loop of a training that starts anew, or goes on from a checkpoint."""
        run = self._run
        if checkpoint is None:
            process_group().from_main(lambda: _forget(run))
        with warnings_only():
            collect(run)
            select(run, 0)
        return self.loop(trainer, checkpoint)

    # -- what the trainer does in its own way --------------------------------------------------------------------------

    def _sampler(self) -> EpochSampler:
        settings, pool = self._trainer.args, len(self._rows)
        repeats = settings.steps_per_generation * self._trainer.num_iterations
        shape = BatchShape(
            settings.generation_batch_size // settings.num_generations, settings.num_generations, repeats
        )
        self._batches_per_step = settings.gradient_accumulation_steps / repeats
        choose = None if self._only_observes else self._choose
        sampler = EpochSampler(shape, max(1, pool // shape.prompts), settings.seed, choose)
        sampler.start_stage(0, range(pool), 0)
        return sampler

    def _made_loop(self, sampler: OnlineSampler) -> ChooserLoop:
        if isinstance(self._chooser, GroupGate):
            raise ConfigError(
                f"{self._run.config.select.label} leaves out groups that were sampled, which TRL does not",
                where="Selector.strategy",
                fix="choose another strategy, or train with `cropi run`.",
            )
        return super()._made_loop(sampler)

    def _encoded(self) -> dict[str, tuple[int, ...]]:
        return self.prompt_tokens

    @cached_property
    def prompt_tokens(self) -> dict[str, tuple[int, ...]]:
        """Tokens of the pool's prompts by id."""
        encoded = self._run.encode(list(self._run.folder.train_prompts.rows()))
        return dict(zip(self._run.folder.train_prompts, map(tuple, encoded), strict=True))

    def _generated(self, due: Due, step: int) -> dict[str, list[SampledGroup]]:
        seed, ranks = self._validation.seed, process_group()
        found: dict[str, list[SampledGroup]] = {}
        for name in sorted(due):
            pairs = [member for member, count in enumerate(due[name]) for _ in range(count // PAIR)]
            own = list(ranks.share(pairs))
            most = -(-len(pairs) // ranks.size)  # ranks sample together, and so as often
            rows = self._validation_rows[name]
            asked = [rows[m] for m in (own + pairs)[:most] for _ in range(PAIR)]
            answers = self._trainer.answered(asked, seed(name, step, ranks.rank))
            kept = [(m, a) for n, m in enumerate(own) for a in answers[PAIR * n : PAIR * n + PAIR]]
            everything = [each for part in ranks.gather(kept) for each in part]
            found[name] = _groups(everything)
            if any(answer.has_image for _, answer in everything):
                warn("influence is not read of prompts with images: they are chosen by their rewards")
                assert isinstance(self._loop, OnlineLoop)
                self._loop.choose_by_rewards()
                return {}
        return found

    def _keep_beliefs(self, stage: int) -> None:
        if process_group().is_main and self._run.paths.beliefs(stage).exists():
            remove(self._run.paths.beliefs(stage))
        super()._keep_beliefs(stage)

    # -- what a person sees --------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Numbers for a logger."""
        loop, named = self._loop, "curriculum/"
        found = {f"{named}{name.removeprefix(named)}": value for name, value in loop.metrics().items()}
        newest, before = (loop.explained or [[]])[-1], loop.explained[:-1]
        if newest:
            ways = Counter(choice.source for choice in newest)
            sources = Counter(self._rows[choice.place]["source"] for choice in newest)
            known = {choice.place for batch in before for choice in batch}
            found |= {f"{named}chosen_by/{name}": count / len(newest) for name, count in ways.items()}
            found |= {f"{named}source/{name}": count / len(newest) for name, count in sources.items()}
            found[f"{named}new"] = sum(choice.place not in known for choice in newest) / len(newest)
        charged = self._run.ledger.entries()
        found[f"{named}overhead_seconds"] = sum(entry["seconds"] for entry in charged)
        found[f"{named}overhead_tokens"] = float(sum(entry.get("tokens", 0) for entry in charged))
        return found

    def table(self) -> pd.DataFrame:
        """Every prompt: text, source, times trained, expected reward now, influence ± error, and why it was chosen."""
        known = self._chooser.table([row["prompt_id"] for row in self._rows]).to_pandas()
        why = {c.place: way(f"{c.source} {c.validation_set}".strip()) for batch in self._loop.explained for c in batch}
        texts = [row["prompt"] if isinstance(row["prompt"], str) else _last(row["prompt"]) for row in self._rows]
        known.insert(1, "prompt", texts)
        known.insert(2, "source", [row["source"] for row in self._rows])
        return known.assign(why=[why.get(place, "not chosen yet") for place in range(len(self._rows))])

    def closing_line(self, place: Path) -> str:
        """Say what was chosen, and where to look."""
        chosen = {choice.place for batch in self._loop.explained for choice in batch}
        found = self._loop.metrics()
        gain, low, high = (found.get(f"curriculum/gain{end}", 0.0) for end in ("", "_low", "_high"))
        times = f"{gain:.1f} times as much as a random one [{low:.1f}, {high:.1f}]"
        helped = f"; a chosen prompt helped {times}" if low > 0 else ""  # a random one may do harm
        return (
            f"curriculum: trained on {len(chosen):,} of {len(self._rows):,} prompts{helped}. "
            f"`cropi explain {place}` says why, `cropi report {place}` shows it"
        )


def encoded_by(trainer: CurriculumTrainer, sets: Mapping[str, Dataset], rows: Any) -> list[list[int]]:
    """Token ids of rows of the prompt table, as the trainer's template writes them."""
    origins = [json.loads(row["extra"]) for row in rows]
    found = [sets[origin["set"]][origin["row"]] for origin in origins]
    processor = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    as_text = tokenizer is not processor  # a template with images writes what only a pass over them needs
    prompts = [shown_prompt(row) if as_text or not row.get("prompt") else row["prompt"] for row in found]
    settings = {"tools": trainer.tools or None, "chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
    return [encode_prompts(tokenizer, [prompt], **settings)[0] for prompt in prompts]


def _groups(answers: Sequence[tuple[int, Answer]]) -> list[SampledGroup]:
    """The judged completions of each member. What an environment adds to the prompt stands before the completion."""
    groups = []
    for member in sorted({member for member, _ in answers}):
        own = [answer for each, answer in answers if each == member and answer.reward is not None]
        if own:
            beginnings = zip(*(answer.prompt for answer in own), strict=False)
            common = [each[0] for each in takewhile(lambda each: len(set(each)) == 1, beginnings)]
            rests = [list(answer.prompt[len(common) :]) for answer in own]
            groups.append(
                SampledGroup(
                    member,
                    common,
                    [[*rest, *answer.completion] for rest, answer in zip(rests, own, strict=True)],
                    [answer.reward for answer in own if answer.reward is not None],
                    [[0] * len(rest) + list(answer.mask) for rest, answer in zip(rests, own, strict=True)],
                )
            )
    return groups


def _last(prompt: Sequence[Mapping[str, str]]) -> str:
    return prompt[-1]["content"]


def _forget(run: Run) -> None:
    """Delete what an earlier training has left."""
    run.paths.forget_training()
    if run.folder.representations.exists():
        remove(run.folder.representations)
