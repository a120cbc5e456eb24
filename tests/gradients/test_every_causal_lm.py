"""Each causal language model of transformers, as small as its config allows, is scored as autograd scores it, one
trajectory at a time, or refused: the whole model and adapters, in float32 and bfloat16."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.gradients.architectures import GROUPS as TRAIN
from tests.gradients.architectures import SETTINGS, draw_group, influence_by_autograd, perturbed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cropi.errors import PolicyError
from cropi.gradients.influence_scorer import Scorer, ScorerOptions

VALIDATION = [draw_group(5, [6, 4, 7], seed=4), draw_group(2, [5, 3], seed=5)]
MOST_PARAMETERS = 3_000_000
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2.5e-2}

# Sizes of a small model by their names in configs, and what else a kind needs.
_TABLES = json.loads(Path(__file__).with_name("every_causal_lm.json").read_text(encoding="utf-8"))
BY_NAME = {name: int(size) for size, names in _TABLES["sizes"].items() for name in names.split()}
OTHERWISE: dict[str, dict[str, Any]] = _TABLES["otherwise"]


def build(kind: str) -> Any:
    """A model of the kind; None where its config does not become small by the names above."""
    config_class = CONFIG_MAPPING[kind]
    try:
        defaults = config_class().to_dict()
        settings = {n: size for n, size in BY_NAME.items() if type(defaults.get(n)) is int} | {"initializer_range": 0.2}
        ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
        settings |= {name: token for name, token in ids.items() if defaults.get(name) is not None}
        layers = settings.get("num_hidden_layers", 4)
        for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
            if isinstance(defaults.get(name), list):
                kinds = list(dict.fromkeys(defaults[name]))
                settings[name] = [kinds[layer % len(kinds)] for layer in range(layers)]
        config = config_class(**settings | OTHERWISE.get(kind, {}))
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > MOST_PARAMETERS:
            return None
        torch.manual_seed(0)
        model = perturbed(model_class(config).float().eval())
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception:  # sizes that do not fit together
        return None
    return model


def adapted(model: Any) -> Any:
    """With adapters on the linear layers of its attention, or on all linear layers; None where PEFT refuses."""
    peft = pytest.importorskip("peft")
    names = {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if type(module) is torch.nn.Linear}
    attention = names & {"q_proj", "v_proj", "o_proj", "query_key_value", "c_attn", "qkv_proj", "query", "value"}
    settings = peft.LoraConfig(r=2, target_modules=sorted(attention or names - {"lm_head"}), task_type="CAUSAL_LM")
    try:
        found = peft.get_peft_model(model, settings)
    except ValueError:
        return None
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return found.eval()


def check(model: Any, estimator: Any) -> str:
    """`right` or `refused`; an AssertionError for wrong numbers."""
    try:
        scorer = Scorer(model, SETTINGS, ScorerOptions(estimator=estimator, score="cosine"))
        scorer.aim({"v": VALIDATION})
        scored = scorer(TRAIN)
    except PolicyError:
        return "refused"
    alone = torch.tensor([scorer([group]).products_NV[0, 0] for group in TRAIN])
    dots, cosines = torch.tensor(scored.products_NV[:, 0]), torch.tensor(scorer.values(scored)[:, 0])
    right, lengths = influence_by_autograd(model, TRAIN, VALIDATION)
    close = partial(torch.testing.assert_close, atol=TOLERANCE[model.dtype], rtol=0)
    close(dots / lengths, right / lengths)
    close(cosines, right / lengths)
    close(alone / lengths, dots / lengths)
    return "right"


def outcomes(kind: str) -> dict[str, str]:
    """By way of training and estimator; nothing where the model is not to be had small."""
    model, found = build(kind), {}
    if model is None:
        return {}
    for way in ("whole", "adapters", "adapters in bfloat16"):
        if way == "adapters":
            model = adapted(model)
        if model is None:
            break
        model = model.bfloat16() if "bfloat16" in way else model
        found |= {f"{way}, {estimator}": check(model, estimator) for estimator in ("exact", "reference")}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_causal_language_model_is_right_or_refused(kind: str) -> None:
    if not outcomes(kind):
        pytest.skip("its config does not become small by itself")
