import subprocess
import sys
from pathlib import Path

import pytest

from cropi.artifacts import write_json
from cropi.config.loading import TYPES, load_config, merged, parse_verifier, presets, recipe_names, validate_config
from cropi.config.yaml_text import flow_yaml, parse_yaml
from cropi.curriculum.strategies import FullStrategy
from cropi.errors import ConfigError
from tests.runs import refused_settings


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name: str) -> None:
    assert load_config(name).name == name.rpartition("/")[2]


def test_overrides_reach_lists_tables_and_the_trainer() -> None:
    config = load_config("quickstart", ["seed=3", "trainer.learning_rate=1e-3", "prompts.train.0.count=5"])
    assert (config.seed, config.trainer["learning_rate"], config.prompts.train[0].count) == (3, 1e-3, 5)


def test_a_strategy_by_its_name_takes_settings() -> None:
    config = load_config("quickstart", ["select.strategy=cropi", "select.strategy.observe_only=true"])
    assert config.select.strategy.observe_only
    assert (
        load_config("quickstart", ["select.strategy=bmc", "select.strategy.type=thompson"]).select.label == "thompson"
    )


@pytest.mark.parametrize(("override", "message"), refused_settings("config"))
def test_mistakes_are_named_with_a_way_out(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    assert message in str(caught.value)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize("override", [text for (text,) in refused_settings("code")])
def test_no_setting_lets_a_models_code_run(override: str) -> None:
    with pytest.raises(ConfigError, match=r"trust_remote_code|code that comes with a model is never run"):
        load_config("quickstart", [override])


@pytest.mark.parametrize("override", [text for (text,) in refused_settings("value")])
def test_values_that_no_run_could_use_are_refused(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    assert override.partition("=")[0].split(".")[0].rstrip("s") in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_run_folder_may_lie_under_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config("quickstart", ["run_dir=~/runs"]).folder == tmp_path / "runs" / "quickstart"
    assert load_config("quickstart", ["run_dir=~"]).folder == tmp_path / "quickstart"
    assert load_config("quickstart", ["run_dir=a~b"]).folder == Path("a~b/quickstart")


def test_a_faulty_entry_is_reported_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", ["prompts.train.0.cout=5"])
    assert "at least 1" not in str(caught.value)


def test_no_such_config_lists_the_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        load_config("quikstart")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(tmp_path / "missing.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("on", "on"), ("true", True), ("012", 12), ("1_000", "1_000"), (".5", 0.5),
        ("2001-01-01", "2001-01-01"),
    ],
)  # fmt: skip
def test_numbers_and_booleans_are_those_of_yaml_1_2(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_yaml_is_data_only_and_repeated_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("!!python/object/apply:os.system ['true']", "test")
    with pytest.raises(ConfigError, match="occurs twice"):
        parse_yaml("seed: 1\nseed: 2", "test")


MARKERS = r"""
####/# of it/a #b/&x/*x/~/Null/!x/!!int 5/|/>/%a/@/`/- x/? x/a: b/Answer:/Answer: /---/--- a/=/<</on/1_000/0x1f/False
2001-01-01/→ 😀/\boxed{/,/]/}""".strip()


@pytest.mark.parametrize("text", [text for line in MARKERS.splitlines() for text in line.split("/")])
def test_a_command_lines_text_is_the_text(text: str) -> None:
    assert parse_verifier("exact", [f"marker={text}"]).marker == text  # type: ignore[union-attr]
    assert load_config("quickstart", [f"verifier.marker={text}"]).verifier.marker == text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "value"),
    [("null", None), ("'####'", "####"), ('"~"', "~"), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}), ("-1e-3", -1e-3)],
)
def test_a_command_lines_value_is_yaml_where_it_is_quoted_bracketed_or_a_number(text: str, value: object) -> None:
    assert load_config("quickstart", [f"trainer.x={text}"]).trainer["x"] == value


@pytest.mark.parametrize("override", ["verifier.marker=", "verifier.marker= ", "verifier={type: exact, marker: &x}"])
def test_a_key_without_a_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"no value is given(.|\n)*null"):
        load_config("quickstart", [override])


@pytest.mark.parametrize("override", ["verifier.marker=42", "verifier.marker=true", "name=7"])
def test_a_number_for_a_text_is_refused_with_the_quotes_it_needs(override: str) -> None:
    with pytest.raises(ConfigError, match="quote"):
        load_config("quickstart", [override])


HOSTILE_YAML = {
    "marker: ####": "no value is given",
    "marker: &x": "no value is given",
    "a: !!int abc": "tags are not read",
    "a: !!timestamp abc": "tags are not read",
    "a: !x": "tags are not read",
    "{[1]: 2}": "a key must be a text",
    "a: " + "7" * 5000: "number of 5000 digits",
    "[" * 900 + "]" * 900: "too deep",
    "[" * 100_000: "too deep",
    "{a: " * 100_000: "too deep",
    "&a [*a]": "aliases are not read",
    "a: &a 1\nb: *a": "aliases are not read",
    r'a: "\ud800"': "surrogate",
    r'a: "\ude00\ud83d"': "surrogate",
    r'a: "\0"': "NUL",
    r'a: "\x7f"': "DEL",
    "a: \x07": "not valid YAML",
    "a: 1\n---\nb: 2": "not valid YAML",
}


def test_what_is_written_as_yaml_is_read_back() -> None:
    texts = [
        "08",
        "1e5",
        "1_0",
        "0x1f",
        "1:30",
        "on",
        "null",
        "~",
        "",
        "2020-01-01",
        ".5",
        "+.inf",
        "a: b",
        "# é \U0001f916",
    ]
    values = {"texts": texts, **dict.fromkeys(texts, 1), "numbers": [8, 1e-6, 1e5, True, None]}
    assert parse_yaml(flow_yaml(values), "test") == values


@pytest.mark.parametrize(("text", "message"), HOSTILE_YAML.items(), ids=range(len(HOSTILE_YAML)))
def test_yaml_that_cannot_be_meant_is_refused_in_a_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "test")
    assert len(str(caught.value)) < 500


def test_a_runs_config_is_read_back_whatever_its_texts_hold(tmp_path: Path) -> None:
    text = '\U0001f916 é \u2028 \x85 / \\ud83d " \t\n\N{ZERO WIDTH JOINER}'
    values = load_config("quickstart", [f"run_dir={tmp_path}"]).resolved()
    config = load_config(values | {"prompts": values["prompts"] | {"system_prompt": text}})
    write_json(config.folder / "config.json", config.resolved())
    assert load_config(config.folder) == config
    assert config.prompts.system_prompt == text


@pytest.mark.parametrize("override", ["prompts.train.²={}", "prompts.train." + "9" * 5000 + "={}", "name=a\udcff"])
def test_odd_positions_and_bytes_of_a_command_line_are_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config("quickstart", [override])


@pytest.mark.parametrize("name", [name for name in presets() if name not in TYPES])
@pytest.mark.parametrize("path", ["select.strategy.type={}", "select.strategy={{type: {}}}", "select.strategy={}"])
def test_a_preset_is_named_as_a_strategys_type(name: str, path: str) -> None:
    config = load_config("quickstart", [path.format(name)])
    patched = merged(load_config("quickstart", ["select.strategy=full"]).resolved(), presets()[name]["config"])
    patched["select"]["name"] = name
    assert config == validate_config(patched, "test")


def test_a_strategy_is_given_by_its_name_alone() -> None:
    assert load_config("quickstart", ["select.strategy=full"]).select.strategy == FullStrategy(type="full")
    with pytest.raises(ConfigError, match="did you mean 'full'"):
        load_config("quickstart", ["select.strategy=fulll"])


def test_what_a_command_line_says_goes_before_what_its_preset_says() -> None:
    config = load_config("quickstart", ["select.strategy.type=dapo", "train.dynamic_sampling=2"])
    assert config.train.dynamic_sampling == 2
    assert config.select.strategy == FullStrategy(type="full")
    assert config.select.label == "dapo"


def test_an_unknown_strategy_is_told_the_nearest_preset_too() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cropi-paper'"):
        load_config("quickstart", ["select.strategy.type=cropi_paper"])


FREE_OF_TORCH = [
    *("config", "cli", "curriculum.strategies", "report.run_report", "prompts", "report.explanations", "lab.commands"),
    "lab.compare.report.comparison_page",
]


def test_imports_leave_torch_out() -> None:
    code = f"import importlib, sys; [importlib.import_module('cropi.' + name) for name in {FREE_OF_TORCH}]"
    code += "; print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
