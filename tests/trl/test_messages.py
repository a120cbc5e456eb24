"""Messages in a TRL script name the script's arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from trl import GRPOConfig

import cropi
from cropi.config.loading import load_config
from cropi.console import say
from cropi.errors import ConfigError, DataError
from cropi.trl import Selector, Verified
from cropi.trl.messages import in_script, reworded, worded

PACKAGE = Path(cropi.__file__).parent
# Rooms that a CurriculumTrainer calls.
REACHED = ["curriculum", "gradients", "policy", "prompts", "rollouts", "stages", "trl"]
MODULES = ["artifacts", "pipeline", "run_folder"]
# Words of a config or of the command line that a script has no use for.
FOREIGN = r"`cropi (?!explain|doctor|select`|run`\.)|\brun_dir\b|\bname=|disjoint hash_range|graded: true"
# Messages of a run that is not a script's: another process or machine collects, or a command was given.
ELSEWHERE = {"server.py"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lower trainer.learning_rate.", "lower args.learning_rate."),
        ("set collect.num_generations=8", "set args.num_generations=8"),
        (
            "raise collect.validation_num_generations.",
            'raise Selector.settings["collect"]["validation_num_generations"].',
        ),
        ("set score.estimator=reference.", 'set Selector(settings={"score": {"estimator": "reference"}}).'),
        ("score.standard_errors=true", 'Selector(settings={"score": {"standard_errors": True}})'),
        ("prompts.train.0", "train_dataset"),
        ("in prompts.validation.mine, say", "in Selector.validation, say"),
        ("prompts.leakage=warn", 'Selector(settings={"prompts": {"leakage": "warn"}})'),
        ("policy.path", "model"),
        ("select.strategy", "Selector.strategy"),
        ("collect.server.url: no address", 'Selector.settings["collect"]["server"]["url"]: no address'),
        ("/a/prompts/prompts.parquet", "/a/prompts/prompts.parquet"),
        ("my-train.stages.jsonl", "my-train.stages.jsonl"),
        ("raise verification.memory_mb", 'raise verification["memory_mb"]'),
        ("give the run another name (name=...).", "give another Selector.folder."),
        (
            "name its own config (/a/b.json) instead of a recipe, or give the new run another name (name=...).",
            "delete the folder, or give another Selector.folder.",
        ),
    ],
)
def test_keys_become_arguments(text: str, expected: str) -> None:
    assert in_script(text) == expected


def keys(values: dict[str, object], before: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{before}{name}.")


OTHERS = ("train_dataset", "model", "peft_config", "processing_class.chat_template")  # of the trainer's arguments


def test_every_setting_has_a_name_that_a_script_has() -> None:
    tables = {"prompts", "policy", "verifier", "collect", "score", "select", "train", "trainer", "evaluate"}
    for key in keys(load_config("quickstart").resolved()):
        if key.partition(".")[0] not in tables or "." not in key:
            continue
        named = in_script(f"{key}: no")
        argument = re.match(r"(args|Selector)\.(\w+)", named)
        if argument is not None:
            kind = {"args": GRPOConfig, "Selector": Selector}[argument[1]]
            assert argument[2] in kind.__dataclass_fields__, named
        else:
            assert named.partition(":")[0] in OTHERS


def messages(path: Path) -> Iterator[str]:
    """Texts of the errors and warnings of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", "")
        if name.endswith("Error") or name in ("warn", "warn_once", "say"):
            for given in [*node.args, *(keyword.value for keyword in node.keywords)]:
                texts = [part.value for part in ast.walk(given) if isinstance(part, ast.Constant)]
                yield "".join(text if isinstance(text, str) else "x" for text in texts)


def test_no_message_sends_a_script_to_the_command_line() -> None:
    paths = [path for folder in REACHED for path in (PACKAGE / folder).glob("*.py") if path.name not in ELSEWHERE]
    paths += [PACKAGE / f"{name}.py" for name in MODULES]
    found = [text for path in paths for text in messages(path)]
    assert len(found) > 100
    left = [text for text in map(in_script, found) if re.search(FOREIGN, text)]
    assert not left


def test_what_is_said_and_raised_within_is_reworded(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with worded():
            say("collect.temperature is low")
            raise DataError("no", where="prompts", fix="set collect.temperature=1.")

    with pytest.raises(DataError) as caught:
        fail()
    assert "args.temperature is low" in capsys.readouterr().err
    assert str(caught.value) == "the prompts: no\nFix: set args.temperature=1."
    say("collect.temperature is low")
    assert "collect.temperature is low" in capsys.readouterr().err
    assert str(reworded(ConfigError("a", where="verifier"))) == "Verified: a"


def test_verified_names_its_own_arguments() -> None:
    with pytest.raises(ConfigError, match=r'^Verified: .*verification\["seconds"\]'):
        Verified("math", verification={"seconds": -1})
    with pytest.raises(ConfigError) as caught:
        Selector(validation=None, strategy="nothing")
    assert "YAML" not in str(caught.value)
