"""GRPO for a small model on one CPU core: a fast sampler, and a step in which a prompt's completions share its pass.

TRL computes each completion with a copy of its prompt. Here one row holds a prompt without its last token, then for
each completion that last token and the completion; the mask lets a completion see its prompt and itself. Groups whose
rewards are equal have no gradient and are left out. The gradient is that of TRL's `dr_grpo` loss without a KL term.
Since a row holds one prompt, sums over a row's tokens are that prompt's own gradient.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from decode import sample
from task import chat, is_correct
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

EPSILON = 1e-4  # added to a group's standard deviation, as TRL does
IGNORED = -100  # a token without a loss
R = TypeVar("R", bound="Row")


@dataclass(frozen=True)
class Question:
    """A problem, its answer, its kind, and the tokens that the policy sees."""

    text: str
    answer: str
    source: str
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """The K completions of a question and their rewards."""

    question: Question
    completions: list[list[int]]
    rewards: list[float]

    @property
    def pass_rate(self) -> float:
        return sum(self.rewards) / len(self.rewards)

    @property
    def is_mixed(self) -> bool:
        """Whether its rewards differ, without which there is no gradient."""
        return len(set(self.rewards)) > 1

    @property
    def row(self) -> "Row":
        """All its completions, with their advantages as weights."""
        return Row(self.question.prompt, self.completions, self.advantages().tolist())

    def advantages(self) -> Tensor:
        """(r - mean) / (s + EPSILON), with Bessel's correction in s."""
        rewards = torch.tensor(self.rewards)
        return (rewards - rewards.mean()) / (rewards.std() + EPSILON)


@dataclass(frozen=True)
class Row:
    """A prompt and completions that share its pass, with the weight of each in the loss."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    weights: Sequence[float]

    @property
    def size(self) -> int:
        """Tokens that the row takes."""
        return len(self.prompt) - 1 + sum(1 + len(completion) for completion in self.completions)


@dataclass(frozen=True)
class Packed:
    """U prompts with their completions as rows of L tokens; T is all completion tokens."""

    ids_UL: Tensor
    positions_UL: Tensor
    mask_U1LL: Tensor  # True: is seen
    branch_UL: Tensor  # 0: the prompt; n: completion n, with the prompt's last token before it; -1: padding
    before_T: Tensor  # where the token before each completion token stands, in the flat U x L
    tokens_T: Tensor
    weights_T: Tensor


def pack(rows: Sequence[Row]) -> Packed:
    """Pack rows, padded to the longest."""
    length = max(row.size for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)
    before: list[int] = []
    tokens: list[int] = []
    weights: list[float] = []
    for row, each in enumerate(rows):
        prompt, start = each.prompt, len(each.prompt) - 1
        ids[row, :start] = torch.tensor(prompt[:-1])
        positions[row, :start], branch[row, :start] = torch.arange(start), 0
        for number, (completion, weight) in enumerate(zip(each.completions, each.weights, strict=True), start=1):
            end = start + 1 + len(completion)
            ids[row, start:end] = torch.tensor([prompt[-1], *completion])
            positions[row, start:end] = torch.arange(len(prompt) - 1, len(prompt) + len(completion))
            branch[row, start:end] = number
            before += range(row * length + start, row * length + end - 1)
            tokens += completion
            weights += [weight] * len(completion)
            start = end
    order = torch.arange(length)
    same = branch[:, :, None] == branch[:, None, :]
    seen = (order[:, None] >= order) & (same | (branch == 0)[:, None, :]) & (branch >= 0)[:, None, :]
    seen = seen | torch.eye(length, dtype=torch.bool)  # padding sees itself: a row that sees nothing is NaN
    return Packed(
        ids, positions, seen[:, None], branch, torch.tensor(before), torch.tensor(tokens), torch.tensor(weights)
    )


def log_probs(model: PreTrainedModel, packed: Packed, *, by_row: bool = False) -> Tensor:
    """Log-probability of every completion token, float32.

    The head's output is tokens x vocabulary, without padding. `by_row`: rows x tokens x vocabulary, as a `Reader` of
    its gradient needs.
    """
    hidden = model.model(
        input_ids=packed.ids_UL,
        attention_mask=packed.mask_U1LL,
        position_ids=packed.positions_UL,
        use_cache=False,
    ).last_hidden_state
    if not by_row:
        logits = model.lm_head(hidden.flatten(0, 1)[packed.before_T])
        return -nn.functional.cross_entropy(logits.float(), packed.tokens_T, reduction="none")
    counts = torch.bincount(packed.before_T // hidden.shape[1], minlength=len(hidden))
    taken = torch.arange(int(counts.max())) < counts[:, None]
    before, tokens = torch.zeros_like(taken, dtype=torch.long), torch.full_like(taken, IGNORED, dtype=torch.long)
    before[taken], tokens[taken] = packed.before_T % hidden.shape[1], packed.tokens_T
    logits = model.lm_head(hidden[torch.arange(len(hidden))[:, None], before]).flatten(0, 1)
    losses = nn.functional.cross_entropy(logits.float(), tokens.flatten(), reduction="none", ignore_index=IGNORED)
    return -losses.view_as(tokens)[taken]


def chunks(rows: Sequence[R], tokens: int) -> Iterator[list[R]]:
    """Rows by size, in chunks that hold at most `tokens` tokens with their padding, or one row."""
    chunk: list[R] = []
    for row in sorted(rows, key=lambda row: row.size):
        if chunk and row.size * (len(chunk) + 1) > tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


class Policy:
    """float32 weights, trained by AdamW under bfloat16 autocast, and a bfloat16 copy that samples."""

    def __init__(self, folder: Path, *, learning_rate: float, longest: int, seed: int, bf16: bool = True) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.sampler: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16 if bf16 else torch.float32
        ).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.longest, self.bf16 = longest, bf16

    def questions(self, path: Path) -> list[Question]:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        prompts = self.tokenizer.apply_chat_template(
            [chat(row["question"]) for row in rows], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return [
            Question(row["question"], row["answer"], row["source"], tuple(prompt))
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def sample(
        self, questions: Sequence[Question], count: int, *, batch: int = 256, generator: torch.Generator | None = None
    ) -> list[Group]:
        """`count` completions of each question at T = 1, graded; `count` 0: one, greedily."""
        rows = [question for question in questions for _ in range(count or 1)]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].prompt))
        found: list[list[int]] = [[] for _ in rows]
        for start in range(0, len(rows), batch):
            part = order[start : start + batch]
            drawn = sample(
                self.sampler,
                [rows[n].prompt for n in part],
                max_new_tokens=self.longest,
                eos=[self.tokenizer.eos_token_id],
                pad=self.tokenizer.pad_token_id,
                temperature=1.0 if count else None,
                generator=generator or self.generator,
            )
            for n, completion in zip(part, drawn, strict=True):
                found[n] = completion
        texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
        rewards = [float(is_correct(text, row.answer)) for text, row in zip(texts, rows, strict=True)]
        width = count or 1
        return [
            Group(question, found[n * width : (n + 1) * width], rewards[n * width : (n + 1) * width])
            for n, question in enumerate(questions)
        ]

    def accumulate(self, groups: Sequence[Group], *, tokens: int = 1024) -> float:
        """Add the gradient of the loss to `.grad`; returns the loss. Z = completions x `longest`, as in dr_grpo."""
        normaliser = sum(len(group.completions) for group in groups) * self.longest
        rows = [group.row for group in groups if group.is_mixed]
        return sum(self.backward(chunk, normaliser) for chunk in chunks(rows, tokens))

    def backward(self, rows: Sequence[Row], normaliser: float, *, by_row: bool = False) -> float:
        """Add the gradient of some rows' part of the loss to `.grad`; returns that part."""
        packed = pack(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            found = log_probs(self.model, packed, by_row=by_row)
        loss = -(packed.weights_T * (found - found.detach()).exp()).sum() / normaliser
        loss.backward()
        return float(loss.detach())

    def step(self, groups: Sequence[Group]) -> float:
        """One GRPO step; returns the norm of its gradient before clipping to 1."""
        self.accumulate(groups)
        return self.update()

    def update(self) -> float:
        """Step along the gradients that were added up; returns their norm before clipping to 1."""
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.refresh()
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the trained weights to the sampler."""
        for own, trained in zip(self.sampler.parameters(), self.model.parameters(), strict=True):
            own.copy_(trained)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.refresh()
