"""Influence in memory, without a run: groups of trajectories in, a number per prompt and validation set out.

    python examples/influence/score.py

The groups here are sampled from the built-in policy; yours may come from anywhere, as token ids, rewards and log-probs.
"""

import numpy as np
import torch

import cropi
from cropi.builtin import generate
from cropi.config import PolicyConfig
from cropi.policy import completion_logprobs, load_policy
from cropi.prompts.encoding import encode_prompts
from cropi.rewards.verifier import Answered, reward
from cropi.rewards.verifiers.exact_text import ExactVerifier
from cropi.rollouts.generation import Sampling, TransformersGenerator

K = 8


def sample_groups(policy, problems, seed):
    """K completions of each problem, judged, with the log-probs that the policy gave them."""
    prompts = encode_prompts(policy.tokenizer, [problem["prompt"] for problem in problems])
    repeated = [ids for ids in prompts for _ in range(K)]
    completions = TransformersGenerator(policy, 256)(repeated, Sampling(32, temperature=1.0), seed=seed)
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    verify = ExactVerifier(type="exact", marker="answer").load()
    groups = []
    for n, problem in enumerate(problems):
        mine = slice(n * K, (n + 1) * K)
        with torch.no_grad():
            logprobs, _ = completion_logprobs(policy.model, [prompts[n]] * K, completions[mine], temperature=1.0)
        groups.append(
            cropi.Group(
                prompt_id=problem["prompt_id"],
                prompt_ids=prompts[n],
                completions=completions[mine],
                rewards=[reward(verify(Answered(text, problem["answer"]))) for text in texts[mine]],
                behaviour_logprobs=[row[: len(c)].tolist() for row, c in zip(logprobs, completions[mine], strict=True)],
            )
        )
    return groups


def main():
    policy = load_policy(PolicyConfig(path="builtin"))
    families = ("sum", "machine", "compass", "depth")
    pool = [problem for family in families for problem in generate(family, split="train", count=16, seed=1)]
    train = sample_groups(policy, pool, seed=1)
    validation = {
        name: sample_groups(policy, generate(name, split="validation", count=16, seed=2), seed=2)
        for name in ("sum", "machine")
    }

    surrogate = cropi.SurrogateSettings(normalizer="constant", max_completion_length=32)
    scores = cropi.influence(policy.model, train, validation, surrogate=surrogate)

    print(f"{scores.tokens_given} tokens given, {scores.tokens_computed} computed\n")
    print(f"{'pool':10} " + " ".join(f"{name:>10}" for name in scores.validation))
    for family in families:
        rows = [n for n, problem in enumerate(pool) if problem["source"] == family]
        print(f"{family:10} " + " ".join(f"{value:10.3g}" for value in np.mean(scores.values[rows], axis=0)))
    best = int(np.argmax(scores.values[:, 0]))
    print(f"\nmost helpful for {scores.validation[0]}: {pool[best]['prompt']}")


if __name__ == "__main__":
    main()
