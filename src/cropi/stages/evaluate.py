"""`evaluate`: one row per test prompt, and accuracy by test set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from cropi.artifacts import EVALUATION, read_table
from cropi.config import SAMPLED_BY, Config, EvaluateConfig
from cropi.console import warn
from cropi.errors import DataError
from cropi.fsdp import in_lockstep
from cropi.parallel import process_group
from cropi.policy import Policy, load_policy
from cropi.prompts.encoding import encode_rows
from cropi.rewards.verifier import Judge, answered, reward
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.run_tables import evaluation_files, keep_evaluation
from cropi.seeds import derived_seed
from cropi.stages.collect import make_prompt_table
from cropi.stages.run import Run

SAMPLING_TEMPERATURE = 1.0  # of the completions beside the greedy one

# (prompts as token ids, temperature or None for greedy, seed) -> completions as text
Generate = Callable[[Sequence[list[int]], float | None, int], list[str]]


@dataclass(frozen=True)
class Question:
    """One test question."""

    set: str
    row: Mapping[str, Any]  # of the prompt table
    prompt_ids: list[int]


def evaluate_base(run: Run) -> None:
    """Measure the accuracy before training, unless that has been done."""
    if not is_evaluated(run, 0):
        evaluate(run, run.base.model, 0)


def evaluate_at(run: Run, checkpoint: Path | None) -> pa.Table:
    """Return the accuracy of the base policy or of a checkpoint. Read it back if it has been measured."""
    make_prompt_table(run)
    run = run.at_checkpoint(0, checkpoint)
    if is_evaluated(run, 0):
        return read_table(evaluation_files(run.paths.evaluations)[0], EVALUATION)
    policy = run.base if checkpoint is None else load_policy(run.config.policy, str(checkpoint))
    return evaluate(run, policy.model, 0)


def is_evaluated(run: Run, step: int) -> bool:
    """Whether the policy has been evaluated after an optimiser step."""
    return process_group().from_main(lambda: step in evaluation_files(run.paths.evaluations))


def evaluate(run: Run, model: nn.Module, step: int) -> pa.Table:
    """Ask a policy the test questions after an optimiser step, and write the table of answers. Step 0: the base policy.

    The same seed draws the same completions from the same policy, so two policies are compared on the same questions
    and random numbers. Questions whose gold answer cannot be read are left out of the table.
    """
    config, policy = run.config, run.asked(model)
    sampler = TransformersGenerator(policy, config.collect.batch_size)

    def generate(prompts: Sequence[list[int]], temperature: float | None, seed: int) -> list[str]:
        sampling = Sampling(config.collect.max_completion_length, temperature)
        completions = sampler(prompts, sampling, seed=seed)
        return policy.tokenizer.batch_decode(completions, skip_special_tokens=True)

    exam = Exam(generate, run.judge, config.evaluate, derived_seed(config.seed, "evaluate"), config.collect.batch_size)
    stage = (step - 1) // config.train.steps_per_stage if step else None
    with run.ledger.charge("evaluate", stage=stage):
        asked = read_questions(run)
        rows = exam.answers(asked, step, in_lockstep(policy.model))
        if process_group().is_main:
            tables = () if step else (*SAMPLED_BY, "evaluate")
            keep_evaluation(run.paths.evaluations, step, rows, run.folder.settings(*tables))
    return pa.Table.from_pylist(rows, schema=EVALUATION)


def read_questions(run: Run) -> list[Question]:
    """The test questions of a run. DataError where one does not fit into the policy's context."""
    return questions(run.config, run.setup.policy, run.folder.held_out("test"))


def questions(config: Config, policy: Policy, rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Test questions from rows of the prompt table. DataError where one does not fit into the policy's context."""
    encoded = encode_rows(policy.tokenizer, config.prompts, rows)
    limit, longest = policy.context_length, max(map(len, encoded), default=0)
    if limit is not None and longest + config.collect.max_completion_length > limit:
        raise DataError(
            f"the longest test prompt has {longest} tokens, which leaves no room for a completion in {limit}",
            where="prompts.test",
            fix="leave such prompts out, or lower collect.max_completion_length.",
        )
    return [Question(row["set"].removeprefix("test/"), row, ids) for row, ids in zip(rows, encoded, strict=True)]


@dataclass(frozen=True)
class Exam:
    """Generate and judge answers to test questions, in blocks."""

    generate: Generate
    judge: Judge
    config: EvaluateConfig
    seed: int
    block: int

    def answers(
        self,
        questions: Sequence[Question],
        step: int,
        lockstep: AbstractContextManager[None] = nullcontext(),  # noqa: B008
    ) -> list[dict[str, Any]]:
        """A row for every question whose gold answer can be read.

        The ranks divide the blocks, which hold the longest questions first. Work of one rank alone runs in `lockstep`.
        """
        order = sorted(range(len(questions)), key=lambda place: -len(questions[place].prompt_ids))
        blocks = [order[start : start + self.block] for start in range(0, len(order), self.block)]
        own: dict[int, dict[str, Any] | None] = {}
        with lockstep:
            for number in process_group().share(range(len(blocks))):
                asked = [questions[place] for place in blocks[number]]
                own |= dict(zip(blocks[number], self._ask(asked, step, derived_seed(self.seed, number)), strict=True))
        found = {place: row for part in process_group().gather(own) for place, row in part.items()}
        rows = [row for place in range(len(questions)) if (row := found[place]) is not None]
        _refuse_empty(questions, rows)
        return rows

    def _ask(self, prompts: Sequence[Question], step: int, seed: int) -> list[dict[str, Any] | None]:
        """A row for every question; None where the gold answer cannot be read."""
        samples = self.config.samples
        texts = self.generate([prompt.prompt_ids for prompt in prompts], None, seed)
        asked = [*prompts, *(prompt for prompt in prompts for _ in range(samples))]
        if samples:
            texts += self.generate([prompt.prompt_ids for prompt in asked[len(prompts) :]], SAMPLING_TEMPERATURE, seed)
        judged = self.judge([answered(text, prompt.row) for text, prompt in zip(texts, asked, strict=True)])
        sampled = [reward(judgement.verdict) or 0.0 for judgement in judged[len(prompts) :]]
        rows: list[dict[str, Any] | None] = []
        for place, (prompt, text, judgement) in enumerate(zip(prompts, texts, judged, strict=False)):
            values = sampled[place * samples : (place + 1) * samples]
            row = {
                "set": prompt.set,
                "prompt_id": prompt.row["prompt_id"],
                "source": prompt.row["source"],
                "step": step,
                "greedy": reward(judgement.verdict),
                "sampled": float(np.mean(values)) if values else None,
                "samples": len(values),
                "completion": text,
                "verdict": judgement.verdict,
            }
            rows.append(None if row["greedy"] is None else row)
        return rows


def _refuse_empty(prompts: Sequence[Question], rows: Sequence[Mapping[str, Any]]) -> None:
    judged = {row["set"] for row in rows}
    for name in dict.fromkeys(prompt.set for prompt in prompts):
        if name not in judged:
            raise unreadable(name)
    if len(rows) < len(prompts):
        warn(f"{len(prompts) - len(rows)} test prompts have answers that the verifier cannot read and are left out")


def unreadable(name: str) -> DataError:
    """The error for a test set without any answer that the verifier can read."""
    return DataError(
        "the verifier can read none of the recorded answers of this test set",
        where=f"prompts.test.{name}",
        fix="choose another verifier, or mend the answers.",
    )
