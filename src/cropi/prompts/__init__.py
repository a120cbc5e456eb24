"""Prompts from their sources: read, checked, and written as the prompt table."""

from cropi.prompts.prompt_table import checked_prompts as checked_prompts
from cropi.prompts.prompt_table import content_id as content_id
from cropi.prompts.prompt_table import data_identity as data_identity
from cropi.prompts.prompt_table import leakage_warnings as leakage_warnings
from cropi.prompts.prompt_table import make_prompts as make_prompts
from cropi.prompts.prompt_table import require_pairs as require_pairs
