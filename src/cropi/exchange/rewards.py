"""A verifier as the reward function of TRL, verl, slime, OpenRLHF, and of verifiers' tasks (prime-rl)."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from cropi.config.loading import verification_of, verifier_of
from cropi.errors import DataError
from cropi.rewards.pool import judge_of
from cropi.rewards.verifier import CORRECT, Answered

FACTS = "facts"  # the key of an exported row that holds the result of `facts_of`


def facts_of(prompt: str, source: str, extra: str) -> str:
    """A verifier's input besides completion and answer, as JSON for a row of a data file."""
    return json.dumps({"prompt": prompt, "source": source, "extra": extra})


class Rewards:
    """Rewards of 1 and 0, or grades, by a verifier in processes that can be killed; one method for each trainer's form.

        rewards = Rewards({"type": "math"})
        compute_score = rewards.verl

    Requests for one completion, from many threads, are judged in batches. An unreadable gold answer gives None if the
    trainer supports that (TRL), else 0. `ends` are special tokens that some trainers leave at the end of a completion.
    ConfigError for an unknown verifier or setting.
    """

    def __init__(
        self,
        verifier: Mapping[str, Any],
        verification: Mapping[str, Any] | None = None,
        *,
        ends: Sequence[str] = (),
        where: str = "Rewards",
    ) -> None:
        self._judge = judge_of(verifier_of(verifier, where), verification_of(verification or {}, where))
        self._ends = tuple(end for end in ends if end)
        self._waiting: queue.SimpleQueue[tuple[Answered, Future[float | None]]] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._dispatcher: threading.Thread | None = None

    def __call__(self, rows: Sequence[Answered]) -> list[float | None]:
        """The rewards of many rows."""
        return [judgement.reward for judgement in self._judge(rows)]

    def trl(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """TRL's `reward_funcs`. The gold answers are the column `answer`, else `solution`.

        `facts` (of an export), or `prompts`, `source` and `extra_info` or `metadata`, are passed on to the verifier.
        DataError for rows without an answer.
        """
        golds = columns.get("answer", columns.get("solution"))
        if golds is None:
            raise DataError(
                "the rows have no recorded answers", where="train_dataset", fix="add a column `answer` or `solution`."
            )
        lists = {k: v for k, v in columns.items() if isinstance(v, list | tuple) and len(v) == len(golds)}
        known = [n for n, gold in enumerate(golds) if gold is not None]
        facts = (_facts({name: values[n] for name, values in lists.items()}) for n in known)
        judged = iter(self([_row(_text(completions[n]), golds[n], own) for n, own in zip(known, facts, strict=True)]))
        return [None if gold is None else next(judged) for gold in golds]

    def verl(self, data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> float:
        """verl's `compute_score`, for `reward.custom_reward_function`."""
        facts = _facts({"source": data_source, "extra_info": extra_info} | (extra_info or {}))
        return self._one(_row(solution_str, ground_truth, facts)).result() or 0.0

    async def slime(self, args: Any, sample: Any, **_: Any) -> float:
        """slime's `--custom-rm-path`: one sample with `response`, `label` and `metadata`."""
        metadata = sample.metadata or {}
        facts = _facts({"extra_info": metadata} | metadata)
        return await self._later(_row(self._without_ends(sample.response), sample.label, facts))

    def openrlhf(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any) -> Any:
        """OpenRLHF's `reward_func`, for `--reward.remote_url`.

        A query is the prompt with its completion; a label is JSON of the answer and the facts, as exported.
        """
        import torch

        rows = []
        for query, prompt, label in zip(queries, prompts, labels, strict=True):
            if not query.startswith(prompt):
                raise DataError("a query does not begin with its prompt", where="reward_func", fix="use one tokenizer.")
            known = json.loads(label)
            rows.append(_row(self._without_ends(query[len(prompt) :]), known["answer"], _facts(known)))
        judged = self._judge(rows)
        found = torch.tensor([judgement.reward or 0.0 for judgement in judged])
        correct = torch.tensor([float(judgement.verdict == CORRECT) for judgement in judged])
        return {"rewards": found, "scores": found, "extra_logs": {"correct": correct}}

    async def task(self, completion: str, answer: str, facts: str) -> float:
        """One completion of a task of verifiers', which prime-rl trains on."""
        return await self._later(_row(completion, answer, _facts({FACTS: facts})))

    async def _later(self, row: Answered) -> float:
        return (await asyncio.wrap_future(self._one(row))) or 0.0

    def _one(self, row: Answered) -> Future[float | None]:
        with self._starting:
            if self._dispatcher is None:
                self._dispatcher = threading.Thread(target=self._dispatch, name="cropi-rewards", daemon=True)
                self._dispatcher.start()
        future: Future[float | None] = Future()
        self._waiting.put((row, future))
        return future

    def _dispatch(self) -> None:
        """Judge all waiting rows at once, for as long as the process lives."""
        while True:
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            try:
                values = self([row for row, _ in batch])
            except Exception as error:  # passed on to every caller
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), value in zip(batch, values, strict=True):
                future.set_result(value)

    def _without_ends(self, text: str) -> str:
        """The text without special tokens at its end."""
        while text.endswith(self._ends):
            text = next(text.removesuffix(end) for end in self._ends if text.endswith(end)).rstrip()
        return text


def _facts(known: Mapping[str, Any]) -> dict[str, str]:
    """Prompt, source and extra of a row: those of its export, else those of its columns."""
    if isinstance(known.get(FACTS), str):
        return dict(json.loads(known[FACTS]))
    prompt = known.get("prompts", known.get("prompt"))
    extra = next((known[name] for name in ("extra", "extra_info", "metadata") if known.get(name)), "")
    return {
        "prompt": "" if prompt is None else json.dumps(prompt, default=str),
        "source": str(known.get("source") or ""),
        "extra": extra if isinstance(extra, str) else json.dumps(extra, default=str),
    }


def _row(completion: str, gold: Any, facts: Mapping[str, str]) -> Answered:
    return Answered(completion, str(gold), facts["source"], facts["prompt"], facts["extra"])


def _text(completion: Any) -> str:
    """The text of a completion of TRL: text, or the last of its chat messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
