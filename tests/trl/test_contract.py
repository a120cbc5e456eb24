"""What of TRL and transformers the trainers rest on. A failure here names what changed, before anything else breaks."""

from __future__ import annotations

import ast
import inspect
import re
from types import ModuleType

import pytest
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

from cropi.stages.online_trainer import ReadsInfluence
from cropi.trl import CurriculumTrainer, script_run
from cropi.trl import trainer as trl_trainer

METHODS = {
    # method of GRPOTrainer that is overridden or called: (parameters that are used, what for)
    "_get_train_sampler": (
        ["self", "dataset"],
        "the sampler of a stage replaces TRL's (training.stage_trainer.StageTrainer)",
    ),
    "_calculate_rewards": (
        ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "a CurriculumTrainer sees the rewards of a batch (trl.trainer)",
    ),
    "_generate_and_score_completions": (
        ["self", "inputs"],
        "rollouts are recorded and refilled (training.stage_trainer); a CurriculumTrainer calls it to sample and judge "
        "validation prompts (trl.trainer)",
    ),
    "_compute_loss": (["self", "model", "inputs"], "the rows of a loss are found again (training.train)"),
    "_get_per_token_logps_and_entropies": (["self", "model"], "log-probs of rollouts (training.train)"),
}
SETTINGS = (
    "steps_per_generation",
    "generation_batch_size",
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "temperature",
    "top_p",
    "loss_type",
    "scale_rewards",
    "max_steps",
    "gradient_accumulation_steps",
)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_overridden_has_the_parameters_it_had(name: str) -> None:
    parameters, use = METHODS[name]
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"TRL has no GRPOTrainer.{name} any more: {use}"
    found = list(inspect.signature(method).parameters)[: len(parameters)]
    assert found == parameters, f"TRL changed the parameters of GRPOTrainer.{name} to {found}: {use}"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_read_is_still_there(name: str) -> None:
    assert name in GRPOConfig.__dataclass_fields__, f"TRL has no GRPOConfig.{name} any more"


def test_the_trainer_s_arguments_that_are_passed_on() -> None:
    found = inspect.signature(GRPOTrainer.__init__).parameters
    for name in ("model", "reward_funcs", "args", "train_dataset", "processing_class", "callbacks", "peft_config"):
        assert name in found, f"TRL's GRPOTrainer takes no {name} any more: examples and trl.trainer name it"


def test_a_generation_batch_serves_steps_per_generation_times_iterations() -> None:
    source = inspect.getsource(GRPOTrainer._get_train_sampler)
    sizes = "generation_batch_size // self.num_generations", "self.num_iterations * self.args.steps_per_generation"
    for text in sizes:
        assert text in source, f"TRL lays out its batches in another way ({text} is gone): StageSampler copies it"


def test_reward_functions_get_all_columns_of_a_row() -> None:
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert '["prompt", "completion", "completion_ids"]' in source, "TRL passes other columns to reward functions"
    assert GRPOConfig.__dataclass_fields__["remove_unused_columns"].default is False, "TRL drops columns by default"


def test_an_epoch_begins_before_its_batches_are_made() -> None:
    """Elsewhere a test shows it; this one says where to look."""
    loop = inspect.getsource(Trainer._inner_training_loop)
    begins, runs = loop.find("on_epoch_begin("), loop.find("self._run_epoch(")
    assert 0 < begins < runs, "transformers no longer says that an epoch begins before it runs it: stages start there"
    assert "iter(train_dataloader)" in inspect.getsource(Trainer._run_epoch), "it makes an epoch's batches elsewhere"
    told = "train_dataloader.set_epoch(epoch)" in inspect.getsource(Trainer._run_epoch)
    assert told, "transformers tells a loader no epochs any more: trl.script_run.ChosenRows counts by them"


def private_names(*modules: ModuleType) -> set[str]:
    """Private attributes of TRL's trainer that modules call, read or set: not those that they define themselves."""
    found, own = set(), set()
    for tree in (ast.parse(inspect.getsource(module)) for module in modules):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
    return {name for name in found - own if re.search(rf"\bself\.{name}\b", inspect.getsource(GRPOTrainer))}


CALLED = {
    "_generate_and_score_completions": "samples and judges validation prompts as an evaluation does",
    "_metrics": "is kept free of these: they are no evaluation of the user's",
}


def test_a_script_s_trainer_calls_two_private_names_and_overrides_one() -> None:
    assert private_names(script_run, trl_trainer) == set(CALLED)
    source = inspect.getsource(GRPOTrainer)
    for name, use in CALLED.items():
        assert f"self.{name}" in source, f"TRL's trainer has no {name} any more: it {use}"
    overridden = {name for name in vars(CurriculumTrainer) | vars(ReadsInfluence) if hasattr(GRPOTrainer, name)}
    private = {name for name in overridden if not name.startswith("__") and name.startswith("_")}
    assert private == {"_calculate_rewards"}


def test_an_evaluation_samples_by_these_names() -> None:
    source = inspect.getsource(GRPOTrainer)
    for name in ("self.num_generations_eval", "self.reward_weights", "self.tools", "self.chat_template_kwargs"):
        assert name in source, f"TRL's trainer has no {name} any more: trl.trainer and trl.script_run read it"
    assert '"train" if self.model.training else "eval"' in source, "TRL tells evaluation from training in another way"
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask"):
        assert f'"{name}"' in source, f"TRL gives a loss no {name} any more"
