"""How a trainer is told of an export: a command, a script or a table, with the run's settings. Free of torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What the commands of a trainer depend on."""

    name: str  # of the run
    stage: int
    policy: str  # path or Hub id of the policy that the stage begins with
    folder: str  # of the export
    chat: bool
    longest_prompt: int  # tokens
    num_generations: int
    max_completion_length: int
    temperature: float
    learning_rate: float
    loss_type: str
    beta: float
    prompts_per_step: int
    steps: int
    per_device: int  # completions of a forward pass, as TRL counts them
    accumulation: int
    scheduler: str

    @property
    def completions_per_step(self) -> int:
        """Completions that one optimiser step is made of."""
        return self.prompts_per_step * self.num_generations


def _shell(lines: list[str]) -> str:
    joined = " \\\n  ".join(lines)
    return f"```\n{joined}\n```"


def _trl(facts: Facts) -> str:
    settings = {
        "output_dir": f"stage-{facts.stage}",
        "max_steps": facts.steps,
        "per_device_train_batch_size": facts.per_device,
        "gradient_accumulation_steps": facts.accumulation,
        "num_generations": facts.num_generations,
        "max_completion_length": facts.max_completion_length,
        "temperature": facts.temperature,
        "learning_rate": facts.learning_rate,
        "lr_scheduler_type": facts.scheduler,
        "loss_type": facts.loss_type,
        "beta": facts.beta,
        "log_completions": True,  # for `cropi import`
    }
    arguments = "\n".join(f"        {name}={value!r}," for name, value in settings.items())
    return f"""\
```python
# PYTHONPATH must name this folder
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from reward import reward

trainer = GRPOTrainer(
    model={facts.policy!r},
    reward_funcs=reward,
    args=GRPOConfig(
{arguments}
    ),
    train_dataset=load_dataset("parquet", data_files={f"{facts.folder}/train.parquet"!r}, split="train"),
)
trainer.train()
trainer.save_model({f"policies/{facts.stage}"!r})
```"""


def _verl(facts: Facts) -> str:
    values = {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": f"{facts.folder}/train.parquet",
        "data.val_files": f"{facts.folder}/validation.parquet",
        "data.prompt_key": "prompt",
        "data.train_batch_size": facts.prompts_per_step,
        "data.max_prompt_length": facts.longest_prompt,
        "data.max_response_length": facts.max_completion_length,
        "actor_rollout_ref.model.path": facts.policy,
        "actor_rollout_ref.actor.optim.lr": facts.learning_rate,
        "actor_rollout_ref.actor.ppo_mini_batch_size": facts.prompts_per_step,
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": True,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": facts.num_generations,
        "actor_rollout_ref.rollout.temperature": facts.temperature,
        "reward.custom_reward_function.path": f"{facts.folder}/reward.py",
        "reward.custom_reward_function.name": "compute_score",
        "trainer.total_training_steps": facts.steps,
        "trainer.total_epochs": facts.steps,  # no fewer passes over the file than steps
        "trainer.save_freq": facts.steps,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": f"checkpoints/stage-{facts.stage}",
        "trainer.rollout_data_dir": f"rollouts/stage-{facts.stage}",
    }
    if facts.beta:
        values |= {"actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_coef": facts.beta}
    lines = [f"{key}={shlex.quote(str(value))}" for key, value in values.items()]
    command = _shell(["python -m verl.trainer.main_ppo", *lines])
    return f"""{command}

`cropi import` reads `rollouts/stage-{facts.stage}` back. `python -m verl.model_merger merge` makes a checkpoint in
Hugging Face format."""


def _slime(facts: Facts) -> str:
    policy, folder = shlex.quote(facts.policy), shlex.quote(facts.folder)
    lines = [
        f"PYTHONPATH={folder}:$PYTHONPATH python train.py",
        f"--hf-checkpoint {policy} --ref-load {policy}",
        f"--prompt-data {folder}/train.jsonl --input-key prompt --label-key label --metadata-key metadata",
        *(["--apply-chat-template"] if facts.chat else []),
        "--rollout-shuffle --rollout-skip-special-tokens --custom-rm-path reward.custom_rm",
        f"--num-rollout {facts.steps} --rollout-batch-size {facts.prompts_per_step}",
        f"--n-samples-per-prompt {facts.num_generations} --global-batch-size {facts.completions_per_step}",
        f"--rollout-max-response-len {facts.max_completion_length} --rollout-temperature {facts.temperature}",
        f"--advantage-estimator grpo --kl-loss-coef {facts.beta} --lr {facts.learning_rate}",
        f"--save checkpoints/stage-{facts.stage} --save-interval {facts.steps}",
    ]
    rest = "Add the arguments of your model and cluster; slime's tools convert the checkpoint to Hugging Face format."
    return f"{_shell(lines)}\n\n{rest}"


def _openrlhf(facts: Facts) -> str:
    folder = shlex.quote(facts.folder)
    estimator = "dr_grpo" if facts.loss_type == "dr_grpo" else "group_norm"
    lines = [
        "python -m openrlhf.cli.train_ppo_ray",
        f"--actor.model_name_or_path {shlex.quote(facts.policy)} --actor.adam.lr {facts.learning_rate}",
        f"--data.prompt_dataset {folder}/train.jsonl --data.input_key prompt --data.label_key label",
        *(["--data.apply_chat_template"] if facts.chat else []),
        f"--data.max_len {facts.longest_prompt + facts.max_completion_length}",
        f"--reward.remote_url {folder}/reward.py",
        f"--algo.advantage.estimator {estimator} --algo.kl.init_coef {facts.beta}",
        f"--rollout.n_samples_per_prompt {facts.num_generations} --rollout.batch_size {facts.prompts_per_step}",
        f"--rollout.max_new_tokens {facts.max_completion_length} --rollout.temperature {facts.temperature}",
        f"--train.batch_size {facts.completions_per_step} --train.num_episodes 1",
        f"--ckpt.output_dir checkpoints/stage-{facts.stage} --ckpt.save_hf",
    ]
    rest = f"An episode is one pass over the file: raise `--train.num_episodes` until {facts.steps} steps are done."
    return f"{_shell(lines)}\n\n{rest}"


def _prime_rl(facts: Facts) -> str:
    text = {name: json.dumps(value) for name, value in vars(facts).items() if isinstance(value, str)}
    return f"""\
```toml
# rl.toml; PYTHONPATH must name this folder
max_steps = {facts.steps}
seq_len = {facts.longest_prompt + facts.max_completion_length}

[model]
name = {text["policy"]}

[orchestrator]
batch_size = {facts.completions_per_step}
group_size = {facts.num_generations}

[orchestrator.train.sampling]
max_completion_tokens = {facts.max_completion_length}
temperature = {facts.temperature}

[[orchestrator.train.source]]
name = {text["name"]}
env.taskset.id = "cropi_stage"
env.taskset.path = {json.dumps(f"{facts.folder}/train.jsonl")}
env.agent.harness.id = "null"
env.agent.runtime.type = "subprocess"

[trainer.optim]
lr = {facts.learning_rate}

[ckpt]

[inference]
```"""


USAGES: dict[str, Callable[[Facts], str]] = {
    "trl": _trl,
    "verl": _verl,
    "slime": _slime,
    "openrlhf": _openrlhf,
    "prime-rl": _prime_rl,
}
"""By the name of the format."""
