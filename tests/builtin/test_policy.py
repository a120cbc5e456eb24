import importlib.util
import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cropi.builtin import FAMILIES, POLICY_DIR
from cropi.builtin.families import draw
from cropi.config import PolicyConfig
from cropi.errors import PolicyError
from cropi.policy import load_policy

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_builtin.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_builtin", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY_DIR)


@pytest.fixture(scope="module")
def policy():
    return AutoModelForCausalLM.from_pretrained(POLICY_DIR)


@pytest.fixture(scope="module")
def stored():
    return json.loads((POLICY_DIR / "pass_rates.json").read_text())


def test_loading_warns_of_nothing(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoTokenizer.from_pretrained(POLICY_DIR)
        _, info = AutoModelForCausalLM.from_pretrained(POLICY_DIR, output_loading_info=True)
    assert not any(info.values())
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_encode_to_bare_ids_and_decode_to_themselves(family, tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        problem = draw(family, rng, FAMILIES[family].default)
        for text in (problem.prompt, problem.steps, f"answer {problem.answer}"):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_padding_and_unknown_words(tokenizer):
    batch = tokenizer(["sum mod 7 : 3 =", "unheard of"], padding=True)
    assert batch["attention_mask"] == [[1] * 6, [0, 0, 0, 0, 1, 1]]
    assert batch["input_ids"][1] == [tokenizer.pad_token_id] * 4 + [tokenizer.unk_token_id, *tokenizer("of").input_ids]
    assert tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True) == "of"


@pytest.mark.parametrize("family", ["product"])
def test_the_packaged_policy_passes_as_often_as_stored(family, stored, script, policy, tokenizer):
    torch.manual_seed(0)
    measured = script.measure(policy, tokenizer, family, prompts=64, K=8)
    # four standard errors of a share near a half over 64 prompts, were all of a prompt's samples alike
    assert abs(measured["pass_rate"] - stored["families"][family]["pass_rate"]) < 0.12
    assert abs(measured["step_share"] - stored["families"][family]["step_share"]) < 0.12


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_model_that_names_a_kernel_of_the_hub_is_refused(tmp_path, key):
    shutil.copytree(POLICY_DIR, tmp_path / "policy")
    settings = json.loads((POLICY_DIR / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps(settings | {key: "someone/kernel"}))
    with pytest.raises(PolicyError, match="names a kernel of the Hub"):
        load_policy(PolicyConfig(path=str(tmp_path / "policy")))
