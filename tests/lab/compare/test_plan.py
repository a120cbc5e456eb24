"""Plans of comparisons, and requests refused before anything runs."""

import json
from pathlib import Path

import pytest

from cropi.config.loading import load_config, merged
from cropi.errors import ArtifactError, ConfigError, UserError
from cropi.lab.compare.comparison_plan import lock, make_plan, parse_seeds, read_patches, read_plan


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-2", [0, 1, 2]), ("3", [3]), ("0,1,7", [0, 1, 7]), ("5-6, 1", [5, 6, 1])]
)
def test_seeds(text: str, seeds: list[int]):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "4-2",
        "1,,2",
        "-1",
        "1.5",
        "0-99999999999",
        "9" * 5000,
        "0-9999999999",
        "²",
        str(2**32),
        "4294967295-4294967296",
    ],
)
def test_what_is_no_seed_is_refused(text: str):
    with pytest.raises(ConfigError, match="no seed and no range"):
        parse_seeds(text)
    with pytest.raises(ConfigError, match="seed 3 is given twice"):
        parse_seeds("0-4,3")


def test_patches_merge_key_by_key_and_tables_of_a_type_replace():
    values = {"select": {"strategy": {"type": "influence", "static": True}, "fraction": 0.2}, "score": {"score": "dot"}}
    patch = {"select": {"strategy": {"type": "random"}}, "collect": {"temperature": 0.5}}
    assert merged(values, patch) == {
        "select": {"strategy": {"type": "random"}, "fraction": 0.2},
        "score": {"score": "dot"},
        "collect": {"temperature": 0.5},
    }
    assert values["select"]["strategy"]["type"] == "influence"


def test_a_strategy_may_be_a_file_named_by_its_stem(tmp_path: Path):
    (tmp_path / "wide.yaml").write_text("select: {strategy: {type: random}, fraction: 0.5}")
    assert read_patches(["full", str(tmp_path / "wide.yaml")])["wide"]["select"]["fraction"] == 0.5
    with pytest.raises(ConfigError, match="wide is named twice"):
        read_patches([str(tmp_path / "wide.yaml")] * 2)
    (tmp_path / "shared-x.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="cannot name a strategy"):
        read_patches([str(tmp_path / "shared-x.yaml")])


def test_runs_interleave_the_strategies_within_a_seed(tmp_path: Path):
    plan = make_plan(["quickstart"], ["train.stages=2"], ["full", "influence", "random"], [4, 0], tmp_path / "out")
    assert [(run.seed, run.strategy) for run in plan.wanted] == [
        (seed, name) for seed in (4, 0) for name in ("full", "influence", "random")
    ]
    run = plan.wanted[1]
    assert run.config.folder == tmp_path / "out" / "quickstart" / "seed-4" / "influence"
    assert (run.config.seed, run.config.train.stages, run.config.select.label) == (4, 2, "influence")
    assert run.config.select.fraction == load_config("quickstart").select.fraction


def test_what_is_shared_goes_by_what_it_depends_on(tmp_path: Path):
    (tmp_path / "fewer.yaml").write_text("{collect: {num_generations: 4}, trainer: {num_generations: 4}}")
    (tmp_path / "slower.yaml").write_text("{trainer: {learning_rate: 1.0e-6}}")
    names = ["full", "influence", "learnability", *(str(tmp_path / n) for n in ("fewer.yaml", "slower.yaml"))]
    plan = make_plan(["quickstart"], ["select.strategy=random"], names, [0, 1], tmp_path / "out")
    folders = {(run.seed, run.strategy): run.shared.folder for run in plan.wanted}
    assert folders[0, "full"] == folders[0, "slower"] != folders[0, "fewer"]
    assert folders[0, "influence"] == folders[0, "learnability"] != folders[0, "full"]  # which collects nothing
    assert folders[0, "full"] != folders[1, "full"]
    assert folders[0, "full"].parent == tmp_path / "out" / "quickstart" / "seed-0"


def test_a_patch_without_a_strategy_keeps_that_of_the_config(tmp_path: Path):
    (tmp_path / "slower.yaml").write_text("{trainer: {learning_rate: 1.0e-6}}")
    names = ["influence", str(tmp_path / "slower.yaml")]
    influence, slower = (run.config for run in make_plan(["quickstart"], [], names, [0], tmp_path / "out").wanted)
    own = load_config("quickstart")
    assert (slower.select, slower.collect) == (own.select, own.collect)
    assert influence.collect == own.collect  # nothing of the config's preset reaches it


def test_all_strategies_are_evaluated_at_the_same_steps(tmp_path: Path):
    (tmp_path / "short.yaml").write_text("{train: {stages: 6, steps_per_stage: 8}}")
    plan = make_plan(
        ["quickstart"], ["evaluate.every=null"], ["full", str(tmp_path / "short.yaml")], [0], tmp_path / "o"
    )
    assert [run.config.evaluate.every for run in plan.wanted] == [16, 16]


PAIRED, NO_TABLE = "the same for all that are compared", r"strategy own on quickstart: select is(.|\n)*Fix: "


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        *((text, PAIRED) for text in ("{seed: 1}", "{prompts: {chat: true}}", "{evaluate: {every: 1}}")),
        *((f"select: {text}", NO_TABLE) for text in ("null", "5", "[1]", "full")),
        ("{select: {fractoin: 0.3}}", r"strategy own on quickstart.*fractoin"),
        ("{train: {stages: 6}}", "trains 96 steps, the config 48"),
    ],
)
def test_a_patch_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, patch: str, message: str):
    (tmp_path / "own.yaml").write_text(patch)
    with pytest.raises(ConfigError, match=message):
        make_plan(["quickstart"], [], ["full", str(tmp_path / "own.yaml")], [0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("configs", "override", "strategy", "seed", "message"),
    [
        (["quickstart"], "seed=1", "full", 0, "sets seed itself\nFix: use --seeds"),
        (["quickstart"], "run_dir=x", "full", 0, "sets run_dir itself\nFix: use --folder"),
        (["quickstart"], "train.stages=2", "influense", 0, "no strategy 'influense' - did you mean 'influence'"),
        (["quickstart", "quickstart"], "train.stages=2", "full", 0, "two configs have the name quickstart"),
        (["quickstart"], "train.stages=2", "full", 5_000_000_000, "seed is 5000000000"),
    ],
)
def test_requests_that_cannot_be_meant(tmp_path, configs, override, strategy, seed, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(configs, [override], [strategy], [seed], tmp_path / "out")
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_second_call_adds_to_the_first(tmp_path: Path):
    make_plan(["quickstart"], [], ["full", "random"], [0], tmp_path)
    plan = make_plan(["quickstart"], [], ["influence", "random"], [1], tmp_path)
    assert [(run.seed, run.strategy) for run in plan.wanted] == [(1, "influence"), (1, "random")]
    assert [(run.seed, run.strategy) for run in plan.all] == [
        (0, "full"),
        (0, "random"),
        (1, "influence"),
        (1, "random"),
    ]
    assert plan.strategies == ["full", "random", "influence"]
    assert read_plan(tmp_path).all == plan.all


def test_other_settings_of_what_has_begun_are_refused(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("{select: {fraction: 0.3}}")
    own, out = str(tmp_path / "own.yaml"), tmp_path / "out"
    plan = make_plan(["quickstart"], ["train.stages=2"], ["full", own], [0], out)
    make_plan(["quickstart"], ["train.stages=1"], ["full", own], [0], out)  # nothing has begun yet
    for run in plan.wanted:
        run.config.folder.mkdir(parents=True)
    make_plan(["quickstart"], ["train.stages=1"], ["full", own], [0, 1], out)
    before = (out / "plan.json").read_bytes()
    with pytest.raises(ConfigError, match=r"quickstart was begun here with other settings: train.stages: 1 -> 2"):
        make_plan(["quickstart"], ["train.stages=2"], ["full", own], [0], out)
    (tmp_path / "own.yaml").write_text("{select: {fraction: 0.4}}")
    with pytest.raises(ConfigError, match=r"own was begun here with other settings: select.fraction: 0.3 -> 0.4"):
        make_plan(["quickstart"], ["train.stages=1"], [own], [0], out)
    assert (out / "plan.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is no comparison"):
        make_plan(["quickstart"], [], ["full"], [0], tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        make_plan(["quickstart"], [], ["full"], [0], tmp_path)


def test_settings_that_came_up_later_do_not_spoil_a_folder(tmp_path: Path):
    run = make_plan(["quickstart"], [], ["full"], [0], tmp_path).wanted[0]
    run.config.folder.mkdir(parents=True)
    claim = json.loads((tmp_path / "plan.json").read_text())
    del claim["scenarios"]["quickstart"]["collect"]["temperature"]  # as if it had not been a setting then
    (tmp_path / "plan.json").write_text(json.dumps(claim))
    assert make_plan(["quickstart"], [], ["full"], [0], tmp_path).wanted == (run,)


def test_one_comparison_works_in_a_folder_at_a_time(tmp_path: Path):
    with lock(tmp_path / "out"), pytest.raises(UserError, match="another comparison is working"):
        lock(tmp_path / "out")
    lock(tmp_path / "out").close()
