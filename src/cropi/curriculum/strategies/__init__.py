"""Strategies: the ways to choose the prompts of a stage, one file each."""
