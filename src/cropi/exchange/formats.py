"""Prompts in the form of a trainer's data file, and what to tell the trainer. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cropi.errors import DataError

Prompt = str | list[dict[str, Any]]  # text, or chat messages


@dataclass(frozen=True)
class Item:
    """A prompt to be trained or tested on, and its place in the file."""

    prompt_id: str
    prompt: Prompt
    answer: str
    source: str
    extra: dict[str, Any]
    split: str
    place: int


@dataclass(frozen=True)
class Facts:
    """What the commands of a trainer depend on."""

    name: str  # of the run
    stage: int
    policy: str  # path or Hub id of the policy that the stage begins with
    chat: bool
    num_generations: int
    max_completion_length: int
    temperature: float
    learning_rate: float
    prompts_per_step: int
    steps: int
    folder: str


@dataclass(frozen=True)
class Format:
    """A trainer: its files, its rows, the reward function that is written beside them, and how it is told of both."""

    suffix: Literal["parquet", "jsonl"]
    row: Callable[[Item], dict[str, Any]]
    reward: str  # the name in reward.py, and which of `Rewards` it is
    usage: Callable[[Facts], str]


def messages(item: Item) -> list[dict[str, Any]]:
    """The prompt as chat messages."""
    return [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt


def _trl(item: Item) -> dict[str, Any]:
    return {
        "prompt": item.prompt,
        "answer": item.answer,
        "source": item.source,
        "prompt_id": item.prompt_id,
        "extra": json.dumps(item.extra) if item.extra else "",
    }


def _verl(item: Item) -> dict[str, Any]:
    return {
        "data_source": item.source,
        "prompt": messages(item),
        "ability": item.source,
        "reward_model": {"style": "rule", "ground_truth": item.answer},
        "extra_info": item.extra | {"split": item.split, "index": item.place, "prompt_id": item.prompt_id},
    }


def _slime(item: Item) -> dict[str, Any]:
    facts = {"prompt_id": item.prompt_id, "source": item.source}
    return {"prompt": item.prompt, "label": item.answer, "metadata": item.extra | facts}


def _openrlhf(item: Item) -> dict[str, Any]:
    return {"prompt": item.prompt, "label": item.answer, "datasource": item.source, "prompt_id": item.prompt_id}


def _prime_rl(item: Item) -> dict[str, Any]:
    return {
        "id": item.prompt_id,
        "prompt": messages(item),
        "answer": item.answer,
        "source": item.source,
        "extra": json.dumps(item.extra) if item.extra else "",
    }


def _use_trl(facts: Facts) -> str:
    return f"""\
```python
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from reward import reward

GRPOTrainer(
    model={facts.policy!r},
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir="stage-{facts.stage}",
        max_steps={facts.steps},
        num_generations={facts.num_generations},
        max_completion_length={facts.max_completion_length},
        temperature={facts.temperature},
        learning_rate={facts.learning_rate},
    ),
    train_dataset=load_dataset("parquet", data_files="{facts.folder}/train.parquet", split="train"),
).train()
```"""


def _use_verl(facts: Facts) -> str:
    return f"""\
```
python -m verl.trainer.main_ppo \\
  algorithm.adv_estimator=grpo \\
  data.train_files={facts.folder}/train.parquet data.val_files={facts.folder}/validation.parquet \\
  data.prompt_key=prompt data.train_batch_size={facts.prompts_per_step} \\
  data.max_response_length={facts.max_completion_length} \\
  actor_rollout_ref.model.path={facts.policy} \\
  actor_rollout_ref.actor.optim.lr={facts.learning_rate} \\
  actor_rollout_ref.actor.ppo_mini_batch_size={facts.prompts_per_step} \\
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n={facts.num_generations} \\
  actor_rollout_ref.rollout.temperature={facts.temperature} \\
  reward.custom_reward_function.path={facts.folder}/reward.py reward.custom_reward_function.name=compute_score \\
  trainer.total_training_steps={facts.steps} trainer.resume_mode=disable \\
  trainer.default_local_dir=checkpoints/stage-{facts.stage} trainer.rollout_data_dir=rollouts/stage-{facts.stage}
```

The rollouts of the stage can be read back with `cropi import`. A checkpoint of verl's becomes one in Hugging Face
format by `python -m verl.model_merger merge`."""


def _use_slime(facts: Facts) -> str:
    template = " --apply-chat-template" if facts.chat else ""
    return f"""\
```
PYTHONPATH={facts.folder}:$PYTHONPATH python train.py \\
  --hf-checkpoint {facts.policy} \\
  --prompt-data {facts.folder}/train.jsonl --input-key prompt --label-key label --metadata-key metadata{template} \\
  --rollout-shuffle --custom-rm-path reward.custom_rm \\
  --num-rollout {facts.steps} --rollout-batch-size {facts.prompts_per_step} \\
  --n-samples-per-prompt {facts.num_generations} --global-batch-size {facts.prompts_per_step * facts.num_generations} \\
  --rollout-max-response-len {facts.max_completion_length} --rollout-temperature {facts.temperature} \\
  --advantage-estimator grpo --lr {facts.learning_rate} --save checkpoints/stage-{facts.stage}
```"""


def _use_openrlhf(facts: Facts) -> str:
    template = " --data.apply_chat_template" if facts.chat else ""
    episodes = f"--train.num_episodes 1 --rollout.batch_size {facts.prompts_per_step}"
    return f"""\
```
python -m openrlhf.cli.train_ppo_ray \\
  --actor.model_name_or_path {facts.policy} \\
  --data.prompt_dataset {facts.folder}/train.jsonl --data.input_key prompt --data.label_key label{template} \\
  --reward.remote_url {facts.folder}/reward.py --rollout.n_samples_per_prompt {facts.num_generations} \\
  {episodes} --train.batch_size {facts.prompts_per_step * facts.num_generations} \\
  --rollout.temperature {facts.temperature} --ckpt.output_dir checkpoints/stage-{facts.stage} --ckpt.save_hf
```

An episode is one pass over the file: repeat `--train.num_episodes` until {facts.steps} steps are done."""


def _use_prime_rl(facts: Facts) -> str:
    return f"""\
```toml
# rl.toml, with PYTHONPATH={facts.folder}
max_steps = {facts.steps}

[model]
name = "{facts.policy}"

[orchestrator]
batch_size = {facts.prompts_per_step * facts.num_generations}
rollouts_per_example = {facts.num_generations}

[[orchestrator.train.source]]
name = "{facts.name}"
env.taskset.id = "cropi_stage"
env.taskset.path = "{facts.folder}/train.jsonl"
env.agent.harness.id = "null"
env.agent.runtime.type = "subprocess"
```"""


FORMATS = {
    "trl": Format("parquet", _trl, "reward = Rewards({verifier}, {verification}).trl", _use_trl),
    "verl": Format("parquet", _verl, "compute_score = Rewards({verifier}, {verification}).verl", _use_verl),
    "slime": Format("jsonl", _slime, "custom_rm = Rewards({verifier}, {verification}).slime", _use_slime),
    "openrlhf": Format("jsonl", _openrlhf, "reward_func = Rewards({verifier}, {verification}).openrlhf", _use_openrlhf),
    "prime-rl": Format("jsonl", _prime_rl, "rewards = Rewards({verifier}, {verification})", _use_prime_rl),
}
"""By the name that `cropi export --format` takes."""

TASKSET = '''\
"""The stage as a taskset of verifiers': its reward is the run's verifier."""

import json
from collections.abc import Iterator
from pathlib import Path

import verifiers.v1 as vf
from reward import rewards


class StageData(vf.TaskData):
    answer: str
    source: str = ""
    extra: str = ""


class StageTask(vf.Task[StageData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return await rewards.task(trace.last_reply, self.data.answer, self.data.source, self.data.extra)


class StageConfig(vf.TasksetConfig):
    path: str


class StageTaskset(vf.Taskset[StageTask, StageConfig]):
    def load(self) -> Iterator[StageTask]:
        with Path(self.config.path).open(encoding="utf-8") as file:
            for line in file:
                yield StageTask(StageData(**json.loads(line)), self.config.task)
'''
"""`cropi_stage.py`, beside the files for prime-rl."""


def named(name: str) -> Format:
    """A format by name. DataError for one that there is not."""
    if name not in FORMATS:
        raise DataError(f"there is no format {name!r}", where="--format", fix=f"give one of {', '.join(FORMATS)}.")
    return FORMATS[name]
