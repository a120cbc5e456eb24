"""Sample a policy on files of problems and print, by kind: pass rate, mixed groups, tokens and truncation at T = 1."""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from grpo import Group, Policy


def line(groups: list[Group], longest: int) -> str:
    """One kind's numbers; ± is one standard error over questions."""
    rates = np.array([group.pass_rate for group in groups])
    lengths = np.array([len(completion) for group in groups for completion in group.completions])
    error = rates.std(ddof=1) / len(rates) ** 0.5 if len(rates) > 1 else float("nan")
    mixed = ((rates > 0) & (rates < 1)).mean()
    return (
        f"{len(rates)} questions, pass rate {rates.mean():.3f} ± {error:.3f}, mixed {mixed:.2f}, "
        f"median tokens {np.median(lengths):.0f}, at the limit {(lengths == longest).mean():.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder written by convert.py or warm_start.py")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL files written by pool.py")
    parser.add_argument("--questions", type=int, help="of each file, the first (default: all)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each question (default: 8)")
    parser.add_argument("--longest", type=int, default=48, help="tokens of a completion (default: 48)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy(arguments.model, learning_rate=0.0, longest=arguments.longest, seed=arguments.seed)
    for path in arguments.data:
        groups = policy.sample(policy.questions(path)[: arguments.questions], arguments.group_size)
        for kind in dict.fromkeys(group.question.source for group in groups):
            own = [group for group in groups if group.question.source == kind]
            print(f"{path.stem}, {kind}: {line(own, arguments.longest)}", flush=True)


if __name__ == "__main__":
    main()
