"""The policy under training: how it is loaded, sampled, identified and copied to workers."""

from cropi.policy.loaded_policy import (
    Policy,
    Replica,
    completion_logprobs,
    device_of,
    fingerprint,
    load_policy,
    load_tokenizer,
    longest_alike,
    policy_location,
    shared_prefixes,
    weights_identity,
)
from cropi.policy.worker_copy import PolicyCopy

__all__ = [
    "Policy",
    "PolicyCopy",
    "Replica",
    "completion_logprobs",
    "device_of",
    "fingerprint",
    "load_policy",
    "load_tokenizer",
    "longest_alike",
    "policy_location",
    "shared_prefixes",
    "weights_identity",
]
