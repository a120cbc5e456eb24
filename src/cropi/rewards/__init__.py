"""Rewards: verifiers, the processes that they run in, and an audit of their verdicts."""
