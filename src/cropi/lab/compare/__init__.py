"""Comparisons of strategies over scenarios and seeds, made of ordinary runs with a shared start."""
