"""Selections for trainers that are not ours, in their formats, and their rollouts back as trajectories."""
