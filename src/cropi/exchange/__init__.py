"""Export selections in the formats of other trainers, and import their rollouts as trajectories."""
