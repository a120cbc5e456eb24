"""Equations only: arrays in, arrays out. Nothing here knows about files, models or the rest of the package.

Shape letters, used as suffixes of names in the whole package:
`N` train prompts, `M` validation prompts, `K` completions of a group, `T` tokens, `P` parameters of one tensor,
`D` length of a gradient feature, `V` validation sets.
"""
