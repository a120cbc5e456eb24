from pathlib import Path

import pytest

from cropi.cli.main import copy_recipe, show_recipe
from cropi.config.loading import load_config, merged, presets, recipe_names, recipe_text, suite_names, validate_config
from cropi.errors import UserError


def test_recipes_in_folders_are_named_by_their_path() -> None:
    names = recipe_names()
    assert "quickstart" in names
    assert set(suite_names()) == {name for name in names if "/" in name}
    assert "presets" not in names  # strategies, not a recipe
    assert load_config("suite/targeted", ["seed=7"]).seed == 7


def test_a_recipe_of_a_folder_is_shown_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_recipe("suite/targeted")
    assert capsys.readouterr().out == recipe_text("suite/targeted")
    copy_recipe("suite/targeted", tmp_path)
    written = (tmp_path / "targeted.yaml").read_text(encoding="utf-8")
    assert written.partition("\n")[2] == recipe_text("suite/targeted")  # below the line for editors
    assert load_config(str(tmp_path / "targeted.yaml")) == load_config("suite/targeted")


@pytest.mark.parametrize("name", ["targeted", "suite", "suite/nosuch", "../recipes/quickstart"])
def test_what_is_no_recipe_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)there is no recipe.*suite/targeted"):
        copy_recipe(name, tmp_path)
    with pytest.raises(UserError, match="there is no recipe"):
        show_recipe(name)


@pytest.mark.parametrize("name", ["paper-1.5b", "paper-7b"])
def test_the_paper_s_recipes_choose_as_the_preset_of_its_name(name: str) -> None:
    config = load_config(name)
    patched = merged(config.resolved(), presets()["cropi-paper"]["config"])
    assert validate_config(patched, "test") == config
    assert config.trainer["per_device_train_batch_size"] * config.trainer["gradient_accumulation_steps"] == 128 * 8
