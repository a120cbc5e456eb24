"""Verifiers: is a completion's answer right? Pure string work, so no completion can hang or run anything."""
