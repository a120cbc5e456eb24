"""Strategies: tables in, selection out. Free of torch."""
