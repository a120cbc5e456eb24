"""Trajectories, and the influence that is read from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AnyHttpUrl, Field, model_validator

from cropi.setting_types import FreeTable, Positive, Table, Temperature


def _address(url: str) -> str:
    parts = AnyHttpUrl(url)
    if parts.query or parts.fragment:
        raise ValueError("must end in a path, such as /v1")
    return url


class ServerConfig(Table):
    """A server with OpenAI's completions API and the base policy's weights."""

    url: Annotated[str, AfterValidator(_address)]
    """Base URL of its API, e.g. `http://localhost:8000/v1`."""
    model: str
    """The policy's name there."""
    prompts: Literal["tokens", "text"] = "tokens"
    """Send prompts as token ids (vLLM, SGLang, llama.cpp), or as text that tokenises back (`transformers serve`)."""
    api_key_env: str | None = None
    """Environment variable that holds the key, where the server needs one."""
    body: FreeTable = Field(default={})
    """Further fields of a request, as the server names them. Sampling must be plain for the log-probs to be those of
    the policy: `{"top_k": -1, "return_token_ids": true}` for vLLM."""

    @model_validator(mode="after")
    def _nothing_that_is_ours(self) -> ServerConfig:
        ours = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n", "best_of", "echo", "stream"}
        if ours & set(self.body):
            raise ValueError(f"{', '.join(sorted(ours & set(self.body)))} cannot be set by body")
        return self


class CollectConfig(Table):
    """Trajectories, sampled once from the base policy if the strategy reads them."""

    num_generations: Annotated[int, Field(ge=2, le=10_000)] = 8
    """K, completions per training prompt (paper: 8)."""
    validation_num_generations: Annotated[int, Field(ge=2, le=10_000)] = 32
    """Completions per validation prompt (paper's code: 32)."""
    max_completion_length: Positive
    """Longest completion, in tokens."""
    temperature: Temperature = 1.0
    """Sampling temperature; the importance ratio is taken at the same one. 1 keeps the behaviour policy exact."""
    batch_size: Positive = 256
    """Sequences generated at once, also by a server; halved automatically if memory runs out."""
    batch_tokens: Positive = 8192
    """Padded tokens per forward pass when the behaviour log-probs are computed."""
    shard_prompts: Positive = 128
    """Prompts per shard, the unit of progress that an interruption can lose."""
    server: ServerConfig | None = None
    """Take the completions from a server instead of generating them in this process. Completions of later policies
    (validation, evaluation, training) are still generated here or by the trainer."""
    vllm: FreeTable | None = None
    """Take the completions from vLLM in this process, with the base policy's weights beside those that are trained;
    those of later policies as with `server`. It holds arguments of `vllm.LLM`, e.g. `{"max_model_len": 4096}`; if
    unset, `gpu_memory_utilization` is 0.7. The table `policy` decides model, tokenizer, revision and dtype."""

    @model_validator(mode="after")
    def _one_backend(self) -> CollectConfig:
        if self.server is not None and self.vllm is not None:
            raise ValueError("collect.server and collect.vllm exclude each other: remove one")
        return self

    @model_validator(mode="after")
    def _nothing_that_the_run_decides(self) -> CollectConfig:
        options = self.vllm or {}
        taken = {"model", "tokenizer", "revision", "dtype", "generation_config", "trust_remote_code"} & set(options)
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))} cannot be set by collect.vllm")
        longest = options.get("max_model_len")
        if longest is not None and (type(longest) is not int or longest < 1):
            raise ValueError(f"collect.vllm.max_model_len is {longest!r}: must be a whole number of at least 1")
        return self


class ScoreConfig(Table):
    """Influence of every training prompt on every validation set, at the current policy."""

    normalizer: Literal["auto", "sequence", "token", "constant"] = "auto"
    """The divisor of a prompt's surrogate. `auto` matches the trainer's loss; see research/decisions."""
    score: Literal["dot", "cosine", "gain"] = "dot"
    """`dot` is the first-order gain of a step along the prompt's gradient; `cosine` is what the paper's runs use;
    `gain` is cosine x standard deviation of the rewards."""
    advantage_std: bool | Literal["auto"] = "auto"
    """Divide advantages by the group's standard deviation (GRPO). `auto` follows `trainer.scale_rewards`."""
    estimator: Literal["sketch", "exact", "reference"] = "sketch"
    """Gradients are compared projected, without projection, or by autograd one prompt at a time, which is also what
    architectures get that the first two do not cover."""
    batch_tokens: Positive | None = None
    """Tokens of a forward pass; a larger group is split and its gradients are added. Unset: what memory allows."""
    standard_errors: bool = False
    """Also estimate the error of every influence, from two halves of the prompt's trajectories. Prompts are computed
    twice."""
    mask: Literal["structured", "uniform"] = "structured"
    """The coordinates of a gradient that the sketch keeps. `structured`: of each layer eight directions and 3 % of the
    columns, at a third of the extra cost; `uniform`: each coordinate with a chance of 10 %, as the paper has it."""
