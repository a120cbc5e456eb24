"""The contenders of a measurement: floors and our engines. Free of torch."""

from __future__ import annotations

FLOORS = {
    "forward": "our packed forward pass and the head's log-probs, prompts with signal alone",
    "floor": "the same and the backward pass through activations; nothing is read",
    "stock": "as many tokens as `floor` through transformers' own model (sdpa): rows of one length, no padding, logits "
    "of all positions, backward to the embeddings' output",
}
"""Passes over the train prompts' tokens that read nothing."""

SCORERS = {
    "exact": "influence without projection, 2 validation sets",
    "exact-cosine": "the same, with the norm of every gradient",
    "sketch": "the default projection",
    "sketch-uniform": "coordinates kept at random, q = 0.1, as in the paper",
    "reference": "autograd, one prompt at a time, full gradients, no projection",
}
"""Engines that score train prompts against validation prompts."""

CONTENDERS = FLOORS | SCORERS
