"""Random mutations of a valid config: each is used, or refused by an error that says how to mend it.

`make test-fuzz` tries 1,000; `make test-fuzz CASES=10000` more.
"""

import copy
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cropi.config.loading import load_config
from cropi.errors import UserError
from cropi.prompts import checked_prompts
from cropi.rollouts.shards import plan
from cropi.stages.evaluate import questions
from cropi.stages.run import Setup
from tests.runs import cropi

pytestmark = pytest.mark.usefixtures("trial_step")

CASES = int(os.environ.get("CASES", "1000"))
CHUNKS = 20
RUNS = 3  # of the accepted configs of a chunk, carried out to their end

TINY: dict[str, Any] = {
    "name": "tiny",
    "policy": {"path": "builtin", "cpu_threads": 1},
    "prompts": {"train": [{"type": "builtin", "families": ["sum", "parity"], "count": 6, "seed": 1}],
        "validation": {"sum": [{"type": "builtin", "families": ["sum"], "count": 6, "seed": 2}]},
        "test": {"sum": {"sources": [{"type": "builtin", "families": ["sum"], "count": 4, "seed": 3}]}}},
    "verifier": {"type": "exact", "marker": "answer"},
    "verification": {"processes": 1},
    "collect": {"num_generations": 8, "validation_num_generations": 8, "max_completion_length": 24},
    "select": {"strategy": {"type": "influence"}, "fraction": 0.5},
    "train": {"stages": 2, "steps_per_stage": 1},
    "trainer": {"num_generations": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-4, "beta": 0.0},
}  # fmt: skip

NUMBERS = [0, 1, 2, 3, 7, -1, 0.5, 1.0, -0.5, 1e-300, 1e300, -0.0, 2**31, 2**32, 2**63, 10**30, int("9" * 400)]
TEXTS = ["", " ", "~", "####", "&x", "*x", "!x", "false", "1_000", "5e-5", "x" * 300, "\u202e", "\ud800", "\0", "é"]
TEXTS += ["../x"]
TEXTS += ["/proc/x", "/dev/null", "none", "auto", "a: b", "{{ x }}", "$HOME", "-1", "\x1b[31m", "\u2028", "a\nb"]
OTHERS: list[Any] = [None, True, False, float("nan"), float("inf"), [], {}, [None], [[]], {"a": {}}, {"": 1}, [1, "a"]]
OTHERS += [{"type": "cropi"}, {"type": "full"}, {1: 2}, {"type": ["x"]}, [{"type": "random"}] * 3]
TRAINER_KEYS = """
bf16 fp16 tf32 optim optim_args lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1
adam_epsilon max_grad_norm gradient_accumulation_steps num_iterations steps_per_generation generation_batch_size
loss_type scale_rewards importance_sampling_level epsilon epsilon_high delta top_k min_p repetition_penalty
mask_truncated_completions reward_weights sync_ref_model top_entropy_quantile disable_dropout save_strategy
save_steps save_total_limit logging_steps report_to deepspeed accelerator_config neftune_noise_alpha
generation_kwargs cache_implementation pad_to_multiple_of ddp_timeout nosuch run_name
"""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in nested tables and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *places(inner, (*path, key)))]


def mutated(rng: random.Random) -> dict[str, Any]:
    values = load(TINY) if rng.random() < 0.5 else copy.deepcopy(TINY)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *path, last = rng.choice(places(values))
        if rng.random() < 0.15 and "trainer" in values:  # an earlier change may have removed it
            path, last = ["trainer"], rng.choice(TRAINER_KEYS.split())
        table = values
        for key in path:
            table = table[key] if isinstance(table, dict) else table[min(key, len(table) - 1)]
            if not isinstance(table, dict | list) or not table:
                break
        else:
            change(table, last, rng, values)
    return values


def change(table: Any, last: Any, rng: random.Random, values: dict[str, Any]) -> None:
    if isinstance(table, list):
        last = min(last, len(table) - 1) if isinstance(last, int) else 0
    kind = rng.random()
    if kind < 0.1:
        table.pop(last, None) if isinstance(table, dict) else table.pop(last)
    elif kind < 0.15 and isinstance(table, dict):
        table[rng.choice(TEXTS)] = rng.choice(NUMBERS)
    elif kind < 0.2:
        table[last] = copy.deepcopy(rng.choice([values["select"], values.get("policy"), TINY["prompts"]["train"]]))
    else:
        table[last] = copy.deepcopy(rng.choice(rng.choice([NUMBERS, TEXTS, OTHERS])))


def load(values: dict[str, Any]) -> dict[str, Any]:
    """All settings of a config, defaults included."""
    from cropi.config.loading import validate_config

    return validate_config(values, "test").resolved()


def damaged(text: str, rng: random.Random) -> str:
    """A text with a few characters lost, doubled or replaced."""
    for _ in range(rng.choice([1, 2, 5])):
        place = rng.randrange(len(text))
        text = (
            text[:place]
            + rng.choice(["", text[place] * 2, *"#&*!|>%@`'\"{}[]:,-?\t\0é", "\n", "  "])
            + text[place + 1 :]
        )
    return text


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_mutated_config_is_used_or_refused(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng, accepted, messages = random.Random(chunk), [], [""]
    for case in range(CASES // CHUNKS):
        path = tmp_path / f"case-{case}.yaml"
        text = yaml.dump(mutated(rng), allow_unicode=False)
        path.write_text(damaged(text, rng) if rng.random() < 0.2 else text, encoding="utf-8", errors="surrogatepass")
        began = time.process_time()
        try:
            config = load_config(str(path))
            setup = Setup.of(config)
            rows = checked_prompts(config).rows
            plan(config, setup.policy, rows)
            questions(config, setup.policy, [row for row in rows if row["set"].startswith("test/")])
            accepted.append(path)
        except UserError as error:
            messages.append(str(error))
        except Exception as error:
            raise AssertionError(
                f"{path}: {type(error).__name__}\n{path.read_text(errors='replace')[:3000]}"
            ) from error
        finally:
            torch.set_num_threads(1)
        assert time.process_time() - began < 10, path.read_text()
    assert max(map(len, messages)) < 3000
    for number, path in enumerate(rng.sample(accepted, min(RUNS, len(accepted)))):
        try:
            done = cropi("run", str(path), f"run_dir=run-{number}", cwd=tmp_path)
        except Exception as error:
            raise AssertionError(f"{path}: {type(error).__name__}\n{path.read_text()[:3000]}") from error
        assert done.returncode in (0, 2), done.stderr
