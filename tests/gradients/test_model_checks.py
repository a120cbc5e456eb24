"""Models that are no policies, or whose trainable weights do not act, are refused by every estimator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.gradients.architectures import GROUPS, SETTINGS, TEXT, VOCABULARY, tiny, tiny_lora
from tests.gradients.footprint import check_unchanged, state
from tests.runs import SMALL, cropi_error
from torch import Tensor, nn

from cropi.builtin import POLICY_DIR
from cropi.errors import PolicyError
from cropi.gradients.influence_scorer import Scorer, ScorerOptions

ENCODER = TEXT | {"max_position_embeddings": 128}
BART = {"vocab_size": VOCABULARY, "d_model": 16, "max_position_embeddings": 64} | {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()
}


def llama(kind: str) -> Any:
    return getattr(transformers, f"Llama{kind}")(tiny("llama").config)


def bert(kind: str) -> Any:
    return getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**ENCODER))


def bart(kind: str) -> Any:
    return getattr(transformers, f"Bart{kind}")(transformers.BartConfig(**BART))


def changed(build: Callable[[], Any], change: Callable[[Any], Any]) -> Any:
    model = build()
    change(model)
    return model


def frozen(model: Any) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def with_transformers_own_adapter() -> Any:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model


def only_an_adapter_out_of_use_is_trainable() -> Any:
    peft = pytest.importorskip("peft")
    model = tiny_lora()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other." in name)
    return model


NO_POLICY: dict[str, tuple[Callable[[], Any], str]] = {
    "Bart": (lambda: bart("ForConditionalGeneration"), "encoder-decoder"),
    "Llama without a head": (lambda: llama("Model"), "no vocabulary head"),
    "of sequences": (lambda: llama("ForSequenceClassification"), "no vocabulary head"),
    "of sequences, by an encoder": (lambda: bert("ForSequenceClassification"), "no vocabulary head"),
    "frozen": (lambda: changed(lambda: tiny("llama"), frozen), "no trainable parameters"),
    "merged adapters": (lambda: changed(tiny_lora, lambda m: m.merge_adapter()), "merged"),
    "adapters merged for good": (lambda: tiny_lora().merge_and_unload(), "no trainable parameters"),
    "adapters off": (lambda: changed(tiny_lora, lambda m: m.base_model.disable_adapter_layers()), "switched off"),
    "adapters of transformers, off": (lambda: changed(with_transformers_own_adapter, lambda m: m.disable_adapters()),
        "switched off"),
    "frozen adapters": (lambda: changed(tiny_lora, frozen), "no trainable parameters"),
}  # fmt: skip


@pytest.mark.parametrize("estimator", ["sketch", "reference"])
@pytest.mark.parametrize("name", NO_POLICY)
def test_what_is_no_policy_is_refused_with_the_reason(name: str, estimator: Any) -> None:
    build, message = NO_POLICY[name]
    model = build().eval()
    before = state(model)
    with pytest.raises(PolicyError, match=message) as caught:
        Scorer(model, SETTINGS, ScorerOptions(estimator=estimator))
    assert "reference" not in str(caught.value)
    check_unchanged(model, before)


def diverged(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "in a wrapper": (lambda: nn.Sequential(tiny("llama")), r"no transformers model.*\n.*without a wrapper"),
    "in float16": (lambda: tiny("llama").half(), "small gradients become 0"),
    "weights that do not act": (only_an_adapter_out_of_use_is_trainable, "none of its trainable parameters"),
    "diverged": (lambda: changed(lambda: tiny("llama"), diverged), "not finite"),
}


@pytest.mark.parametrize("estimator", ["exact", "reference", "sketch"])
@pytest.mark.parametrize("name", UNFIT)
def test_a_policy_that_cannot_be_scored_is_refused(name: str, estimator: Any) -> None:
    build, message = UNFIT[name]
    with pytest.raises(PolicyError, match=message):
        Scorer(build(), SETTINGS, ScorerOptions(estimator=estimator)).aim({"v": GROUPS})


@pytest.mark.parametrize("estimator", ["exact", "reference"])
def test_adapters_loaded_for_inference_are_refused(tmp_path: Path, estimator: Any) -> None:
    peft = pytest.importorskip("peft")
    tiny_lora().save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match="is_trainable=True"):
        Scorer(peft.PeftModel.from_pretrained(tiny("llama"), tmp_path), SETTINGS, ScorerOptions(estimator=estimator))
    trainable = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True).double()
    Scorer(trainable, SETTINGS, ScorerOptions(estimator=estimator)).aim({"v": GROUPS})


NOT_CAUSAL: dict[str, Callable[[], Any]] = {
    "BERT": lambda: bert("ForMaskedLM"),
    "BERT as it is loaded by AutoModelForCausalLM": lambda: bert("LMHeadModel"),
    "BERT in bfloat16": lambda: bert("LMHeadModel").bfloat16(),
    "a causal model whose attention is not": lambda: changed(lambda: tiny("llama"), _look_ahead),
    "a look-ahead far below what rounding does in bfloat16": lambda: changed(tiny("llama").bfloat16, _faint_look_ahead),
}


def _look_ahead(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def _faint_look_ahead(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: output + 1e-5 * output.roll(-1, dims=1))


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_reference_refuses_what_is_not_causal(name: str) -> None:
    model = NOT_CAUSAL[name]().eval()
    before = state(model)
    with pytest.raises(PolicyError, match="depend on later tokens"):
        Scorer(model, SETTINGS, ScorerOptions(estimator="reference"))
    check_unchanged(model, before)


def test_reference_refuses_logits_of_other_tokens_than_those_given() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(PolicyError, match=r"for 24 tokens have the shape \[27, 41\]"):
        Scorer(peft.get_peft_model(tiny("llama"), config), SETTINGS, ScorerOptions(estimator="reference"))


@pytest.mark.parametrize(
    "mixing",
    [
        lambda hidden: hidden + 1e-5 * hidden.flip(0),
        lambda hidden: hidden * (torch.arange(len(hidden))[:, None, None] != 0),  # no room for the first row
    ],
)
def test_reference_refuses_rows_that_see_each_other(mixing: Callable[[Tensor], Tensor]) -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: mixing(output) if len(output) > 1 else output)
    with pytest.raises(PolicyError, match="other rows of a batch"):
        Scorer(model, SETTINGS, ScorerOptions(estimator="reference"))


@pytest.mark.parametrize("estimator", ["sketch", "reference"])
def test_a_run_refuses_a_policy_before_anything_is_collected(estimator: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    tokenizer = transformers.AutoTokenizer.from_pretrained(POLICY_DIR)
    tokenizer.save_pretrained(policy)
    bert_of = transformers.BertConfig(**ENCODER | {"vocab_size": len(tokenizer)})
    transformers.BertLMHeadModel(bert_of).save_pretrained(policy)
    overrides = [f"policy.path={policy}", f"score.estimator={estimator}", "name=refused"]
    ended = cropi_error("run", "quickstart", *SMALL, *overrides, cwd=tmp_path)
    assert "not causal" in ended.stderr
    assert "autograd instead" not in ended.stderr
    assert not list(tmp_path.rglob("trajectories"))
