"""TRL integration: an epoch of the trainer is a stage, and a stage trains on its selection only."""
