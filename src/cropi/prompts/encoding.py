"""Write prompts in the words and tokens that a policy sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cropi.errors import DataError, PolicyError, first_line
from cropi.prompt_text import turn_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cropi.config import PromptsConfig

Encode = Callable[[Sequence[Mapping[str, Any]]], list[list[int]]]  # token ids of rows of the prompt table


def uses_chat(tokenizer: PreTrainedTokenizerBase, chat: bool | None, system_prompt: str | None = None) -> bool:
    """Whether prompts go through the chat template. PolicyError if a setting needs a template that is missing."""
    has_template = bool(tokenizer.chat_template)
    if system_prompt is not None and not (has_template and chat is not False):
        raise PolicyError(
            "a system prompt needs the tokenizer's chat template, which is missing or switched off",
            where="prompts.system_prompt",
            fix="leave it out, or put its text into the prompts.",
        )
    if chat and not has_template:
        raise PolicyError("the tokenizer has no chat template", where="prompts.chat", fix="set prompts.chat=false.")
    return has_template if chat is None else chat


def chat_warnings(tokenizer: PreTrainedTokenizerBase, chat: bool | None, messages: Iterable[str]) -> list[str]:
    """Warn of chat messages that become plain text because the tokenizer has no chat template and `chat` is unset."""
    chats = sum(text.startswith("[") for text in messages) if chat is None and not tokenizer.chat_template else 0
    told = (
        f"the tokenizer has no chat template: {chats} prompts of chat messages become plain text, contents without "
        "roles. Put chat_template.jinja beside the tokenizer, or silence this with prompts.chat=false"
    )
    return [told] if chats else []


def trainer_prompt(messages: str, *, chat: bool, system_prompt: str | None) -> str | list[dict[str, Any]]:
    """A stored prompt in the form TRL takes: a string, or a list of chat messages.

    Raises DataError for messages that as plain text would lose what they hold beside roles and contents.
    """
    value = json.loads(messages)
    if chat:
        turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
        system = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
        return system + turns
    if isinstance(value, str):
        return value
    lost = sorted({key for turn in value for key in turn} - {"role", "content"})
    if lost:
        raise DataError(
            f"without a chat template prompts are plain text, which has no place for the messages' {', '.join(lost)}",
            where="prompts.chat",
            fix="give the tokenizer a chat template, or remove these keys from the messages.",
        )
    return "\n".join(map(turn_text, value))


def trainer_prompts(
    tokenizer: PreTrainedTokenizerBase, settings: PromptsConfig, rows: Iterable[Mapping[str, Any]]
) -> list[str | list[dict[str, Any]]]:
    """Prompts of rows of the prompt table in the form TRL takes, by a run's settings."""
    chat, system = uses_chat(tokenizer, settings.chat, settings.system_prompt), settings.system_prompt
    return [trainer_prompt(row["messages"], chat=chat, system_prompt=system) for row in rows]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, settings: PromptsConfig, rows: Sequence[Mapping[str, Any]]
) -> list[list[int]]:
    """Token ids of rows of the prompt table, by a run's settings."""
    return encode_prompts(tokenizer, trainer_prompts(tokenizer, settings, rows))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict[str, Any]]], **template: Any
) -> list[list[int]]:
    """Token ids of prompts, the same that TRL's GRPOTrainer gives the model. `template` has further arguments of the
    chat template.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    settings = template | {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    try:
        return tokenizer.apply_chat_template(conversation=list(prompts), **settings)["input_ids"]
    except Exception as error:  # a template is a program of the model's: it may fail in any way
        if len(prompts) > 1:  # which of them is it?
            for prompt in prompts:
                encode_prompts(tokenizer, [prompt], **template)
        raise PolicyError(
            f"the tokenizer's chat template refuses the prompt {str(prompts[0])[:120]}: {first_line(error)}",
            where="prompts",
            fix="change prompts.system_prompt or the messages, or set prompts.chat=false.",
        ) from None
