"""Prompts from their sources: read, checked, and written as the prompt table."""

from cropi.prompts.prompt_table import (
    checked_messages,
    checked_prompts,
    content_id,
    data_identity,
    leakage_warnings,
    load_prompts,
    make_prompts,
    refuse_unseen,
)

__all__ = [
    "checked_messages",
    "checked_prompts",
    "content_id",
    "data_identity",
    "leakage_warnings",
    "load_prompts",
    "make_prompts",
    "refuse_unseen",
]
