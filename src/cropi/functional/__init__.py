"""Equations: arrays in, arrays out. Imports nothing from the rest of the package.

Shape suffixes of names, in the whole package:
`N` train prompts, `M` validation prompts, `K` completions of a group, `T` tokens, `P` parameters of one tensor,
`D` length of a gradient feature, `V` validation sets.
"""
