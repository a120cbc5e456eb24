"""Load a policy, identify its weights, and copy it to Ray workers."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cropi import __version__
from cropi.config import BUILTIN_POLICY, LoraConfig, PolicyConfig
from cropi.errors import ConfigError, PolicyError, first_line
from cropi.fsdp import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
READ_BY_ONE = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # what transformers asks


@dataclass(frozen=True)
class Policy:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a completion: those of the generation config, and the tokenizer's own."""
        configured = self.model.generation_config.eos_token_id
        listed = configured if isinstance(configured, list) else [configured]
        return sorted({i for i in [*listed, self.tokenizer.eos_token_id] if i is not None})

    @property
    def context_length(self) -> int | None:
        """Longest sequence that the model has positions for; None if its config does not say."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def policy_location(config: PolicyConfig) -> str:
    """The path or Hub id to load from."""
    if config.path == BUILTIN_POLICY:
        from cropi.builtin import POLICY_DIR

        return str(POLICY_DIR)
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") > 1
    path = Path(config.path).expanduser()
    if looks_local and not path.is_dir():
        raise PolicyError(
            f"there is no folder {path}",
            where="policy.path",
            fix="give a folder in Hugging Face format (config.json, *.safetensors, tokenizer), or a Hub id.",
        )
    return str(path) if path.is_dir() else config.path


def device_of(config: PolicyConfig) -> torch.device:
    """Return the device that the config asks for."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise PolicyError("no CUDA device is available", where="policy.device", fix="set policy.device=auto.")
    return torch.device(config.device)


def load_tokenizer(config: PolicyConfig, location: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone. It has a padding token and an end-of-sequence token."""
    from transformers import AutoTokenizer

    location = location or policy_location(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=config.revision, padding_side="left", trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds; each means that it cannot be had
        raise _cannot_load("tokenizer", location, error) from None
    if tokenizer.eos_token_id is None or len(tokenizer) == 0:
        raise PolicyError(
            "the model comes without a usable tokenizer (no end-of-sequence token)",
            where=f"policy.path {location}",
            fix="put tokenizer.json and tokenizer_config.json beside the weights.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Replica:
    """A bfloat16 copy of a policy that is trained in float32 but sampled and scored in bfloat16.

    There is one copy, 2 bytes per parameter, which is refilled each time. It has the dtypes of a policy loaded in
    bfloat16; of a policy in float32, trained and frozen parameters are rounded. Sharded weights are not copied: FSDP's
    mixed precision rounds them when it gathers them.
    """

    def __init__(self, like: Policy, config: PolicyConfig) -> None:
        self._like, self._rounds = like, config.dtype == "bfloat16"
        self._copy: PreTrainedModel | None = None

    @torch.no_grad()
    def of(self, model: Any) -> Any:
        """Return the model itself, or the copy with the model's current weights."""
        if not self._rounds or model.dtype != torch.float32 or is_sharded(model):
            return model
        if self._copy is None:
            # parameters are rounded as they are copied; buffers are not: rotary frequencies stay as they are
            rounded = {
                id(parameter): nn.Parameter(parameter.detach().to(torch.bfloat16), parameter.requires_grad)
                for parameter in self._like.model.parameters()
                if parameter.dtype == torch.float32 and self._like.model.dtype == torch.float32
            }
            self._copy = copy.deepcopy(self._like.model, rounded).eval()
            for wrapped in ("forward", "_original_forward"):  # a trainer's mixed precision
                self._copy.__dict__.pop(wrapped, None)
        own = self._copy.state_dict()
        for name, tensor in model.state_dict().items():
            own[name].copy_(tensor)
        return self._copy


def load_policy(config: PolicyConfig, location: str | None = None, *, dtype: str | None = None) -> Policy:
    """Load the policy named in the config, or a checkpoint of it from `location`. Remote code is never run.

    `dtype` is that of the config unless it is given.

    With `policy.lora` a checkpoint holds adapters, and the weights are those of the policy that was named.

    Raises PolicyError for a missing folder, missing weights or a missing tokenizer.
    """
    from transformers import AutoModelForCausalLM

    named = policy_location(config)
    adapters = location if config.lora is not None and location not in (None, named) else None
    location = named if adapters is not None else location or named
    # transformers and peft ask under a name that transformers has deprecated, here and at each checkpoint
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    tokenizer = load_tokenizer(config, location)
    _refuse_kernels(location, config.revision)
    try:
        with _read_by_all():
            model = AutoModelForCausalLM.from_pretrained(
                location,
                revision=config.revision,
                dtype=getattr(torch, dtype or config.dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
    except Exception as error:  # as above; a damaged file has an error class of its own
        raise _cannot_load("model", location, error) from None
    _require_finite(model, location)
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise PolicyError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {rows}",
            where=f"policy.path {location}",
            fix="put the tokenizer beside the weights that it belongs to.",
        )
    if config.lora is not None:
        model = _with_adapters(model, config.lora, adapters)
    return Policy(model.to(device_of(config)).eval(), tokenizer)


def _refuse_kernels(location: str, revision: str | None) -> None:
    """Raise PolicyError if a model names a kernel of the Hub, which transformers would fetch and run."""
    from transformers import PreTrainedConfig

    adapters = Path(location, "adapter_config.json")
    try:
        if adapters.is_file() and not Path(location, "config.json").is_file():
            location = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
        text = json.dumps(PreTrainedConfig.get_config_dict(location, revision=revision)[0], default=str)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _cannot_load("model", location, error) from None
    found = re.search(r'_implementation[a-z_]*": "([^"]*/[^"]*)"', text)
    if found:
        raise PolicyError(
            f"the model's config.json names a kernel of the Hub ({found[1]}), and no code of a model is run",
            where=f"policy.path {location}",
            fix="remove that line from it.",
        )


@torch.no_grad()
def _require_finite(model: nn.Module, location: str) -> None:
    """Raise PolicyError if some weights are not finite. Otherwise a run would find them only after collection."""
    for name, weight in model.named_parameters():
        if weight.dtype in FLOATS and weight.numel() and not weight.is_meta:
            low, high = weight.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise PolicyError(
                    f"the weights {name} are not all finite numbers",
                    where=f"policy.path {location}",
                    fix="download or save them again; a policy that has diverged cannot be used.",
                )


@contextmanager
def _read_by_all() -> Iterator[None]:
    """Let every rank read the weights, since every rank samples before they are sharded.

    Under `accelerate launch --use_fsdp`, transformers would let only rank 0 read them.
    """
    asked = os.environ.get(READ_BY_ONE)
    if asked is not None:
        os.environ[READ_BY_ONE] = "false"
    try:
        yield
    finally:
        if asked is not None:
            os.environ[READ_BY_ONE] = asked


def _with_adapters(model: PreTrainedModel, settings: LoraConfig, location: str | None) -> PreTrainedModel:
    """Freeze a model and add trainable adapters: new ones from a fixed seed, or those of a checkpoint."""
    try:
        import peft
    except ImportError:
        raise PolicyError("PEFT is not installed", where="policy.lora", fix="pip install 'cropi[lora]'.") from None
    targets = settings.target_modules
    modules = targets if isinstance(targets, str) else list(targets)
    adapter = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        if location is not None:
            return peft.PeftModel.from_pretrained(model, location, is_trainable=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return peft.get_peft_model(model, adapter)
    except Exception as error:  # PEFT raises many kinds, for names that no layer has and for damaged files
        raise PolicyError(
            f"the adapters cannot be made or loaded: {first_line(error)}",
            where="policy.lora" if location is None else location,
            fix="check target_modules, or the checkpoint's files.",
        ) from None


def fingerprint(config: PolicyConfig, location: str | None = None) -> str:
    """Return the SHA-256 of the files of a local policy, or the commit of one on the Hub."""
    if config.lora is not None and location is None:
        plain = fingerprint(config.model_copy(update={"lora": None}))
        return hashlib.sha256(f"{plain} {config.lora.model_dump_json()}".encode()).hexdigest()
    location = location or policy_location(config)
    folder = Path(location)
    if not folder.is_dir():
        from transformers import AutoConfig

        commit = AutoConfig.from_pretrained(location, revision=config.revision, trust_remote_code=False)._commit_hash
        return f"{location}@{commit}"
    digest = hashlib.sha256()
    for path in sorted(
        p for p in folder.iterdir() if p.suffix in {".safetensors", ".json", ".jinja", ".model", ".txt"}
    ):
        if path.name not in {"trainer_state.json", "manifest.json", "pass_rates.json"}:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


HASHED_BYTES = 1 << 20  # of every weight


def weights_identity(model: torch.nn.Module) -> str:
    """Identify a policy in memory by the SHA-256 of the names, shapes and first bytes of all weights.

    All ranks gather sharded weights one by one, so the result does not depend on sharding.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _plain_parts(weight.detach()):
            head = part.flatten()[: HASHED_BYTES // max(1, part.element_size())].contiguous().cpu()
            digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_parts(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that store a weight: itself, or the codes and scales of a quantised one."""
    names = getattr(weight, "__tensor_flatten__", None)
    if names is None:
        yield weight
    else:
        for name in names()[0]:
            yield from _plain_parts(getattr(weight, name))


def _cannot_load(what: str, location: str, error: Exception) -> PolicyError:
    return PolicyError(
        f"the {what} at {location} cannot be loaded: {first_line(error)}",
        where="policy.path",
        fix="check the path or Hub id and its files (config.json, *.safetensors, tokenizer.json).",
    )


@dataclass(frozen=True)
class PolicyCopy:
    """Everything a worker needs to load the policy that this process has."""

    config: PolicyConfig
    identity: str  # of its weights
    weights: Mapping[str, Tensor]  # those that training may have changed
    folder: str  # relative paths start here
    version: str = __version__

    @classmethod
    def of(cls, config: PolicyConfig, model: nn.Module, *, trained: bool) -> PolicyCopy:
        """Describe a model that `config` has loaded; if it may be `trained`, with its trainable weights."""
        trainable = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad and trained)
        weights = {name: weight.detach().cpu() for name, weight in trainable}
        return cls(config, weights_identity(model), weights, str(Path.cwd()))

    def load(self) -> Policy:
        """Load the policy in a worker. ConfigError for another version of this package, PolicyError where the policy
        cannot be loaded or has other weights."""
        if self.version != __version__:
            raise ConfigError(
                f"a worker has cropi {__version__}, and the command was given to cropi {self.version}",
                where="--ray",
                fix="install the same version on all nodes.",
            )
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        policy = load_policy(self.config)
        policy.model.load_state_dict(self.weights, strict=False)
        if weights_identity(policy.model) != self.identity:
            raise PolicyError(
                "a worker has loaded other weights than this process",
                where=f"policy.path {self.config.path}",
                fix="put the same files at this path on all nodes, or pin policy.revision.",
            )
        return policy
