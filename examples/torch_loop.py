"""GRPO in plain torch. Influence on the held-out prompts is read from the backward pass that trains anyway."""

import torch

from cropi.builtin import generate
from cropi.config import PolicyConfig
from cropi.curriculum.curriculum import Curriculum
from cropi.functional.points import principal_points
from cropi.gradients.direction import DirectionSketch, inner
from cropi.gradients.training_influence import Reader
from cropi.policy import completion_logprobs, load_policy
from cropi.rollouts.generation import Sampling, TransformersGenerator

STEPS, PROMPTS, K, LENGTH = 16, 4, 8, 24
policy = load_policy(PolicyConfig(path="builtin", cpu_threads=1))
model, sampler = policy.model, TransformersGenerator(policy, batch_size=256)
train = [row for family in ("sum", "parity", "count") for row in generate(family, split="train", count=20, seed=0)]
held_out = generate("sum", split="validation", count=12, seed=0)


def mean_states(rows):
    encoded = policy.tokenizer([row["prompt"] for row in rows])["input_ids"]
    layers = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in encoded]
    return torch.stack([states[-1][0].mean(0) for states in layers]).detach().numpy()


def rollout(rows, counts, seed):
    """Sample so many completions of each row: a function that computes their loss, and their rewards by row."""
    asked = [rows[n] for n, count in enumerate(counts) for _ in range(count)]
    prompts = policy.tokenizer([row["prompt"] for row in asked])["input_ids"]
    completions = sampler(prompts, Sampling(LENGTH, 1.0), seed=seed)
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = [text.rpartition("answer ")[2].strip() == row["answer"] for text, row in zip(texts, asked, strict=True)]
    rewards = torch.tensor(right).float().split(counts)
    advantages = torch.cat([(own - own.mean()) / (own.std() + 1e-4) / len(own) for own in rewards if len(own)])
    return lambda: -advantages @ completion_logprobs(model, prompts, completions, temperature=1.0)[0].sum(1), rewards


points = principal_points(mean_states(train), mean_states(held_out))
curriculum = Curriculum(points[: len(train)], {"sum": points[len(train) :]}, seed=0, batch=PROMPTS, generations=K)
sketch, optimizer = DirectionSketch(model), torch.optim.AdamW(model.parameters(), lr=1e-4)
for step in range(STEPS):
    for counts in curriculum.validation_due(step).values():
        loss, rewards = rollout(held_out, counts, seed=step)
        with sketch.sketching(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) % 2):
            loss().backward()
        reader, unit = Reader(model, sketch.directions()), inner(*2 * sketch.directions()[:1]) ** 0.5
        for member in (m for m, count in enumerate(counts) if count):
            curriculum.observe_validation("sum", member, rewards[member].tolist(), step=step)
    choices = curriculum.next(PROMPTS, step)
    loss, rewards = rollout([train[choice.place] for choice in choices], [K] * PROMPTS, seed=STEPS + step)
    ranks = torch.cat([own.argsort(stable=True).argsort() for own in rewards])  # halves have better and worse ones
    optimizer.zero_grad()
    with reader.reading(torch.arange(PROMPTS).repeat_interleave(K) * 2 + ranks % 2):
        loss().backward()
    optimizer.step()
    halves = torch.zeros(PROMPTS * 2, 2).index_add(0, *reader.take()).div(unit).view(PROMPTS, 2, 2).tolist()
    for n, (choice, own) in enumerate(zip(choices, rewards, strict=True)):
        curriculum.observe(choice, own.tolist(), step=step, group=f"{step}-{n}", influence={"sum": halves[n]})
print(curriculum.table([row["prompt_id"] for row in train]).to_pandas().sort_values("influence/sum").tail().to_string())
