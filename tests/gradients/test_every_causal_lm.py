"""Each causal language model of transformers, as small as its config allows, is scored as autograd scores it, one
trajectory at a time, or refused: the whole model and adapters, in float32 and bfloat16."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from tests.gradients.architectures import GROUPS as TRAIN
from tests.gradients.architectures import SETTINGS, Gradients, autograd, draw_group, perturbed
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cropi.errors import PolicyError
from cropi.gradients.influence_scorer import Scorer, ScorerOptions

VALIDATION = [draw_group(5, [6, 4, 7], seed=4), draw_group(2, [5, 3], seed=5)]
MOST_PARAMETERS = 3_000_000
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2.5e-2}

SIZES = {
    41: "vocab_size vocab_size_per_layer_input",
    16: "hidden_size d_model n_embd embed_dim dim word_embed_proj_dim embedding_size lru_width attention_hidden_size",
    24: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_ff d_inner ffn_hidden_size dff",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
    8: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size head_dim kv_channels q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim "
    "attention_chunk_size mamba_d_head mamba_d_state mamba_head_dim ssm_state_size state_size mamba_chunk_size "
    "chunk_size linear_key_head_dim linear_value_head_dim index_head_dim hidden_size_per_layer_input o_lora_rank",
    4: "num_hidden_layers num_layers num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim "
    "rotary_dim sliding_window attention_window window_size mamba_n_heads mamba_num_heads mamba_dt_rank "
    "time_step_rank index_topk",
    2: "n_layer n_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers num_attention_heads "
    "n_head n_heads decoder_attention_heads encoder_attention_heads num_heads num_decoder_attention_heads "
    "num_encoder_attention_heads num_experts_per_tok moe_k moe_topk top_k_experts num_experts_per_token n_mamba_heads "
    "linear_num_key_heads linear_num_value_heads index_n_heads o_groups",
    1: "num_key_value_heads n_shared_experts n_group topk_group first_k_dense_replace moe_layer_start_index "
    "num_dense_layers mamba_n_groups n_groups",
    12: "qk_head_dim",
    32: "mamba_d_ssm",
}
BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}

_LATENT = {"head_dim": 4, "num_key_value_heads": 2}  # attention through a latent: the rotated part alone has this size
_ZAMBA = {"attention_head_dim": 16, "attention_hidden_size": 32, "num_key_value_heads": 2}
OTHERWISE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ["axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"],
        _LATENT,
    ),
    "youtu": _LATENT,
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "bailing_hybrid": {"num_key_value_heads": 2, "num_expert_group": 1},
    "kimi_linear": {"num_key_value_heads": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"n_head": 4},
    "deepseek_v4": {"hc_mult": 2, "hc_sinkhorn_iters": 2},
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 8],
        "attn_layers": ["local"] * 4,
        "feed_forward_size": 24,
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "roc_bert": {"pronunciation_vocab_size": 41, "shape_vocab_size": 41},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
    },
}


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


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


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
    direction = sum(flat(autograd(model, group)) for group in VALIDATION) / len(VALIDATION)
    gradients = [flat(autograd(model, group)) for group in TRAIN]
    lengths = torch.stack([gradient.norm() * direction.norm() for gradient in gradients])
    expected = torch.stack([gradient @ direction for gradient in gradients]) / lengths
    close = partial(torch.testing.assert_close, atol=TOLERANCE[model.dtype], rtol=0)
    close(dots / lengths, expected)
    close(cosines, expected)
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


@pytest.mark.parametrize("kind", ["falcon_h1", "lfm2"])
def test_what_carries_a_state_is_refused_by_the_engine_and_right_by_reference(kind: str) -> None:
    found = outcomes(kind)
    assert {outcome for way, outcome in found.items() if "exact" in way} == {"refused"}
    assert {outcome for way, outcome in found.items() if "reference" in way} == {"right"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_causal_language_model_is_right_or_refused(kind: str) -> None:
    if not outcomes(kind):
        pytest.skip("its config does not become small by itself")
