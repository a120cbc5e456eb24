"""The stages of a run: the only code that knows run folders."""
