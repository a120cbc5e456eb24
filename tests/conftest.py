"""Shared fixtures: tiny random models, and the environment every test runs in."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the commands that tests start

import hypothesis
import jaxtyping
import pytest
import torch
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM

from cropi.training import grpo_settings
from cropi.training.grpo_settings import try_one_step

hypothesis.settings.register_profile("any-machine", deadline=None)  # a busy one is slow, not wrong
hypothesis.settings.load_profile("any-machine")

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for commands in the background

VOCABULARY = 13

LONG = {"test_compare", "test_cli", "test_pool", "test_trainer", "test_sharded_parameters", "test_train"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that at the end no worker has one alone."""
    items.sort(key=lambda item: item.path.stem not in LONG)


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 64}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def tiny_llama(*, tied: bool = True, dtype: torch.dtype = torch.float64, **changed: Any) -> LlamaForCausalLM:
    """A random Llama of a few hundred parameters per layer, without dropout."""
    torch.manual_seed(0)
    settings = SIZES | TOKENS | {"initializer_range": 0.4, "tie_word_embeddings": tied} | changed
    return LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Whatever the test before has set."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_trial_step() -> Iterator[None]:
    """Skip the step of training that tries settings, half a second for each config, but in tests that ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_settings, "try_one_step", lambda *_: None)
        yield


@pytest.fixture
def trial_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try settings by a step of training, as a command does."""
    monkeypatch.setattr(grpo_settings, "try_one_step", try_one_step)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """No checks of shapes at run time: where arrays are small and calls many, they take most of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """This process as one that has the whole mesh."""
    from tests.gradients.ranks import processes

    with processes(0, 1, tmp_path) as mesh:
        yield mesh


@pytest.fixture(scope="session")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What each of two processes found of a case. They start once, for all files and all workers of pytest."""
    from tests.gradients import test_sharded_parameters, test_sharded_reading
    from tests.gradients.ranks import run_on_processes
    from tests.test_parallel import collectives

    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "of-two"
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            cases = test_sharded_parameters.CASES | test_sharded_reading.CASES | {"collectives": collectives}
            torch.save(dict(zip(cases, run_on_processes(list(cases.values()), 2), strict=True)), path)
        found = torch.load(path, weights_only=False)

    def of(name: str) -> list[Any]:
        failed = [part for part in found[name] if isinstance(part, str) and "Traceback" in part]
        assert not failed, failed[0]
        return found[name]

    return of
