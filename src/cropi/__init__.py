"""Data-efficient reinforcement learning with verifiable rewards: train on the prompts that help most now."""

__version__ = "0.1.0"
