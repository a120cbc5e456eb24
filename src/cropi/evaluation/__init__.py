"""Greedy accuracy and avg@n on test sets, with intervals over questions."""
