"""Per-prompt policy gradients at the current policy, their features, and influence scores."""
