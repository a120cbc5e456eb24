"""Chat prompts with tools, reasoning and names: the ids that are stored and trained on are those of the whole row.

Oracles: the tokenizer's own `apply_chat_template` on the rows as they were written, and what TRL tokenizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer

from cropi.config import Config
from cropi.config.loading import validate_config
from cropi.errors import DataError, PolicyError
from cropi.inspection import check_run
from cropi.pipeline import train_all
from cropi.prompts.encoding import encode_prompts
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.training.stage_trainer import StageTrainer
from cropi.trl import CurriculumTrainer, Selector
from tests.conftest import tiny_llama
from tests.runs import grpo_args

PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a\n{% endif %}"
)
RICH = (
    "{% for m in messages %}<s>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or [] %}[{{ p.text }}]{% endfor %}"
    "{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WHOLE = "{{ messages | tojson }}{% if add_generation_prompt %}<s>{% endif %}"
TEMPLATES = {"plain": PLAIN, "rich": RICH, "whole": WHOLE}


def call(**arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


def conversation(number: int) -> list[dict[str, Any]]:
    """Rows of several kinds: no two have the same keys."""
    ask = {"role": "user", "content": f"What is {number} + 1?"}
    kinds: list[list[dict[str, Any]]] = [
        [ask],
        [{"role": "system", "content": "be brief", "name": "rules"}, ask | {"name": f"user{number}"}],
        [ask | {"content": [{"type": "text", "text": "sum"}, {"type": "text", "text": f"of {number} and 1"}]}],
        [
            ask,
            {"role": "assistant", "content": None, "tool_calls": [call(a=number), call(b=[1], c=None)]},
            {"role": "tool", "name": "add", "content": str(number + 1)},
        ],
        [ask, {"role": "assistant", "content": "hm", "reasoning_content": f"{number}, then one"}, ask],
    ]
    return kinds[number % len(kinds)]


def rows(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [{"prompt": conversation(number), "answer": str(number + 1)} for number in numbers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads bytes."""
    place = tmp_path_factory.mktemp("chat")
    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate([*special, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.save_pretrained(place)
    sizes = {"vocab_size": len(letters) + len(special), "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"max_position_embeddings": 512, "eos_token_id": 2}
    tiny_llama(tied=False, dtype=torch.float32, **sizes).save_pretrained(place)
    return place


def tokenizer_of(folder: Path, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def expected(tokenizer: PreTrainedTokenizerFast, row: Mapping[str, Any]) -> tuple[int, ...]:
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True)
    return tuple(ids["input_ids"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """What TRL tokenizes while it trains."""
    found: set[tuple[int, ...]] = set()
    original = GRPOTrainer._tokenize_prompts

    def noting(self: GRPOTrainer, prompts: list[Any]) -> Any:
        result = original(self, prompts)
        if isinstance(self, StageTrainer | CurriculumTrainer):  # and not the trial step
            found.update(map(tuple, result[0]))
        return result

    monkeypatch.setattr(GRPOTrainer, "_tokenize_prompts", noting)
    return found


EVERY = {"select": {"strategy": {"type": "pass_rate", "low": 0, "high": 1}, "fraction": 1.0}}  # collects, and takes all


def config(folder: Path, run: Path, train: list[Any], validation: list[Any], test: list[Any], **prompts: Any) -> Config:
    sources = {}
    for name, held in (("train", train), ("validation", validation), ("test", test)):
        path = run / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in held))
        sources[name] = [{"type": "file", "path": str(path)}]
    held = {"validation": {"mine": sources["validation"]}, "test": {"mine": {"sources": sources["test"]}}}
    values = {
        "name": "chat",
        "run_dir": str(run),
        "policy": {"path": str(folder), "cpu_threads": 1},
        "prompts": {"train": sources["train"], **held, "leakage": "allow", **prompts},
        "verifier": {"type": "function", "path": "tests.rewards.functions.mixed"},
        "collect": {"num_generations": 2, "validation_num_generations": 2, "max_completion_length": 6},
        **EVERY,
        "train": {"stages": 1, "steps_per_stage": 1},
        "trainer": {"num_generations": 2, "per_device_train_batch_size": 20, "gradient_accumulation_steps": 1},
    }
    return validate_config(values, "test")


def pipeline(folder: Path, run: Path, train: list[Any], validation: list[Any], **prompts: Any) -> Run:
    return Run(config(folder, run, train, validation, rows(range(90, 92)), **prompts))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_run_stores_and_trains_on_the_whole_row(folder, tmp_path, name, seen):
    tokenizer = tokenizer_of(folder, TEMPLATES[name])
    train, validation = rows(range(10)), rows(range(50, 55))
    made = pipeline(folder, tmp_path, train, validation)
    collect(made)
    stored = {
        s: {tuple(row["prompt_ids"]) for row in table.to_pylist()} for s, table in made.trajectories.tables.items()
    }
    assert stored["train"] == {expected(tokenizer, row) for row in train}
    assert stored["validation/mine"] == {expected(tokenizer, row) for row in validation}
    train_all(made)
    made.folder.unlock()
    assert seen == stored["train"]


def script(folder: Path, out: Path, template: str | None, train: Dataset, validation: Dataset) -> CurriculumTrainer:
    tokenizer = tokenizer_of(folder, template)
    sizes = {"per_device_train_batch_size": len(train) * 2, "num_generations": 2, "max_completion_length": 6}
    args = grpo_args(out, **sizes, max_steps=1)

    def mixed(completion_ids: Sequence[Any], **_: Any) -> list[float]:
        return [float(sum(ids) % 2 == 0) for ids in completion_ids]

    return CurriculumTrainer(
        model=str(folder),
        reward_funcs=mixed,
        args=args,
        train_dataset=train,
        processing_class=tokenizer,
        selector=Selector(validation=validation),
    )


@pytest.mark.parametrize("name", ["rich"])
def test_a_script_chooses_by_the_ids_that_trl_trains_on(folder, tmp_path, name, seen):
    """Rows as a dataset gives them: it fills the keys of other rows with None."""
    train, validation = (
        Dataset.from_list([row for row in rows(range(first, first + 10)) if (row["answer"][-1] not in "38")])
        for first in (0, 50)
    )
    made = script(folder, tmp_path, TEMPLATES[name], train, validation)
    made.train()
    known = {expected(made.processing_class, row) for row in train}
    assert set(made.curriculum.prompt_tokens.values()) == known
    assert known <= seen <= known | {expected(made.processing_class, row) for row in validation}
    assert made.curriculum.metrics()["curriculum/rows_dropped"] == 0


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ 'a' + m.content }}{% endfor %}",  # TypeError for a list of parts
        "{% for m in messages %}{{ raise_exception('no') if m.role == 'tool' }}{% endfor %}",
        "{% for m in messages %}{{ m.content.strip().nothing.at_all }}{% endfor %}",
        "{% for m in messages %}{{ 1 / (m.content | length - 2) }}{% endfor %}",
        "{% for m in messages",
    ],
)
def test_a_template_that_fails_is_an_error_that_shows_the_prompt(folder: Path, template: str) -> None:
    tokenizer = tokenizer_of(folder, template)
    with pytest.raises(PolicyError, match=r"template refuses the prompt \[\{'role': 'user'"):
        encode_prompts(tokenizer, [conversation(n) for n in (0, 2, 3)])


TEXTS = [{"prompt": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(20, 26)]
CHATS = [{"prompt": [{"role": "user", "content": row["prompt"] + " ok"}], "answer": row["answer"]} for row in TEXTS]


def test_text_beside_chat_messages_is_the_user_s_turn(folder: Path, tmp_path: Path, seen: set[tuple[int, ...]]) -> None:
    """In a run with a chat template, wherever it stands."""
    train, validation = [*TEXTS[:3], *CHATS[3:]], [*CHATS[:2], *TEXTS[4:]]
    tokenizer = tokenizer_of(folder, RICH)
    made = pipeline(folder, tmp_path, train, validation)
    collect(made)
    for name, held in (("train", train), ("validation/mine", validation)):
        asked = [
            row if isinstance(row["prompt"], list) else {"prompt": [{"role": "user", "content": row["prompt"]}]}
            for row in held
        ]
        stored = {tuple(row["prompt_ids"]) for row in made.trajectories.tables[name].to_pylist()}
        assert stored == {expected(tokenizer, row) for row in asked}
    train_all(made)
    made.folder.unlock()
    assert seen == {tuple(row["prompt_ids"]) for row in made.trajectories.tables["train"].to_pylist()}


def test_check_warns_where_chat_messages_become_plain_text(folder, tmp_path, capsys):
    tokenizer_of(folder, None)
    given = config(folder, tmp_path, [*TEXTS, CHATS[0]], CHATS, TEXTS[:1])
    (told,) = [text for text in check_run(given).warnings if "no chat template" in text]
    assert "7 prompts" in told
    made = Run(given)
    collect(made)
    made.folder.unlock()
    assert told in capsys.readouterr().err
    for values in ({"chat": False}, {}):
        silent = config(folder, tmp_path / "silent", TEXTS, CHATS if values else TEXTS, TEXTS[:1], **values)
        assert not [text for text in check_run(silent).warnings if "chat template" in text]


def test_check_refuses_test_prompts_that_a_run_refuses(folder: Path, tmp_path: Path) -> None:
    tokenizer_of(folder, None)
    with pytest.raises(DataError, match="no place for the messages' name"):
        check_run(config(folder, tmp_path, TEXTS, TEXTS, rows([1])))
    long = [{"prompt": "a" * 600, "answer": "1"}]
    with pytest.raises(DataError, match="no room for a completion in 512"):
        check_run(config(folder, tmp_path, TEXTS, TEXTS, long))


def test_a_template_that_fails_in_a_script_is_told_of_in_its_words(folder: Path, tmp_path: Path) -> None:
    train, validation = (Dataset.from_list(part) for part in (CHATS[:4], CHATS[4:]))
    made = script(folder, tmp_path, "{{ raise_exception('no') }}", train, validation)
    with pytest.raises(
        PolicyError, match=r"(?s)^the prompts: .*refuses the prompt .*change the messages or the chat temp"
    ):
        made.train()
