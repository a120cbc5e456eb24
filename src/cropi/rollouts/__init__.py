"""Generation backends and trajectory collection."""
