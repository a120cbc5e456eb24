"""Experiments about the method: comparisons, audits of the estimate, benchmarks. Nothing outside imports it."""
