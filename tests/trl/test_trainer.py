"""The curriculum inside a training script of TRL's: what it leaves alone, what it shows, how it goes on."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from cropi.errors import ArtifactError, ConfigError, DataError, UserError
from cropi.stages.validation_pass import SampledGroup, ValidationPass
from cropi.trl import CurriculumTrainer, Verified
from tests.runs import cropi_error, cropi_ok, json_lines
from tests.trl.scripts import problems, right, select, short, trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
POOL = problems("sum", "parity", count=4)  # two generation batches


def run_of(folder: Path) -> Path:
    return folder / "_curriculum" / "run"


def choices(folder: Path) -> list[list[str]]:
    return [row["prompt_ids"] for row in json_lines(run_of(folder) / "choices.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CurriculumTrainer]:
    folder = tmp_path_factory.mktemp("whole")
    trained = trainer(folder, train_dataset=POOL, save_strategy="steps", save_steps=1)
    trained.train()
    return folder, trained


def test_a_script_gains_the_curriculum_with_two_lines() -> None:
    """The class and the selector: of the rest only the import, the docstring and the output folder differ."""
    examples = ROOT / "examples" / "trl"
    before, after = ((examples / name).read_text().splitlines() for name in ("grpo.py", "curriculum.py"))
    changed = [line[1:].strip() for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[0] == "+"]
    assert [line for line in changed if not line.startswith(("++", '"""', "from ", "output_dir"))] == [
        "trainer = CurriculumTrainer(",
        "selector=Selector(validation=held_out),",
    ]


def test_every_prompt_has_a_line(whole: tuple[Path, CurriculumTrainer]) -> None:
    folder, trained = whole
    table = trained.curriculum.table()
    assert sorted(table["prompt"]) == sorted(POOL["prompt"])
    assert table["times_drawn"].is_monotonic_decreasing
    drawn = [prompt_id for batch in choices(folder) for prompt_id in batch]
    assert list(table["times_drawn"]) == [drawn.count(prompt_id) for prompt_id in table["prompt_id"]]
    assert all(
        (why == "not chosen yet") == (times == 0) for why, times in zip(table["why"], table["times_drawn"], strict=True)
    )
    assert {"source", "pass_rate", "influence/validation", "standard_error/validation"} <= set(table.columns)


def test_the_numbers_of_the_curriculum_stand_beside_those_of_training(whole: tuple[Path, CurriculumTrainer]) -> None:
    folder, trained = whole
    logged = [line for line in trained.state.log_history if "loss" in line]
    assert len(logged) == STEPS
    for line in logged:
        assert sum(value for name, value in line.items() if name.startswith("curriculum/chosen_by/")) == 1
        assert sum(value for name, value in line.items() if name.startswith("curriculum/source/")) == 1
        assert line["curriculum/overhead_seconds"] > 0
        assert line["curriculum/overhead_tokens"] > 0
        assert line["curriculum/rows_dropped"] == 0
    assert "curriculum/validation/reliability" in logged[-1]
    assert [row["step"] for row in json_lines(run_of(folder) / "metrics.jsonl")][:STEPS] == [1, 2, 3, 4]


def test_the_output_folder_is_explained_and_reported(whole: tuple[Path, CurriculumTrainer]) -> None:
    folder, trained = whole
    told = json.loads(cropi_ok("explain", str(folder), "--json", cwd=folder).stdout)["prompts"]
    drawn = trained.curriculum.table().set_index("prompt_id")["times_drawn"]
    assert told
    for prompt in told:
        assert sum(prompt["stages"][0]["drawn"].values()) == drawn[prompt["prompt_id"]]
        assert prompt["stages"][0]["influence"]["validation"]["standard_error"] > 0
    cropi_ok("report", str(folder), cwd=folder)
    text = (run_of(folder) / "report.md").read_text()
    assert "no test set" in text
    assert f"# curriculum of {folder.name}\n" in text
    assert "cropi run" not in text
    assert f"**{STEPS}** steps" in text
    (listed,) = json.loads(cropi_ok("ls", str(folder), "--json", cwd=folder).stdout)["runs"]
    assert (listed["state"], listed["steps"]) == ("finished", f"{STEPS}/{STEPS}")


@pytest.mark.parametrize("command", ["run", "audit"])
def test_only_the_script_goes_on_with_its_curriculum(whole: tuple[Path, CurriculumTrainer], command: str) -> None:
    done = cropi_error(command, str(whole[0]), cwd=whole[0])
    assert "the curriculum of a TRL script" in done.stderr


def test_the_closing_line_says_what_was_chosen_and_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, max_steps=2).train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("curriculum: ")]
    chosen = {prompt_id for batch in choices(tmp_path) for prompt_id in batch}
    assert f"trained on {len(chosen)} of 12 prompts" in lines[-1]
    assert f"`cropi explain {tmp_path}`" in lines[-1]


def test_the_rewards_of_training_are_recorded_as_trl_weighs_them(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_funcs=[short, right], reward_weights=[0.25, 1.0])
    made.train()
    logged = [line["reward"] for line in made.state.log_history if "reward" in line]
    recorded = json_lines(run_of(tmp_path) / "rewards.jsonl")
    assert [sum(row["rewards"]) / len(row["rewards"]) for row in recorded] == pytest.approx(logged)


def test_an_infinite_reward_is_none_and_training_goes_on(tmp_path: Path) -> None:
    def endless(completions: list[str], **_: Any) -> list[float]:
        return [float("-inf"), *(float(len(text)) for text in completions[1:])]

    made = trainer(tmp_path, reward_funcs=[endless])
    made.train()
    rewards = [reward for row in json_lines(run_of(tmp_path) / "rewards.jsonl") for reward in row["rewards"]]
    assert None in rewards
    assert made.state.global_step == STEPS


def test_training_notices_nothing_of_the_validation_completions(tmp_path: Path) -> None:
    """Not the random state, the mode, the metrics of an evaluation, or the tokens counted."""
    made = trainer(tmp_path)
    made._metrics["eval"]["reward"].append(7.0)
    before, seen = torch.random.get_rng_state(), made.state.num_input_tokens_seen
    rows = [dict(row) for row in problems("sum", split="validation", count=2) for _ in range(2)]
    first, again, other = (made.answered(rows, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert made.model.training
    assert dict(made._metrics["eval"]) == {"reward": [7.0]}
    assert not made._metrics["train"]
    assert made.num_generations_eval == 4
    assert made.state.num_input_tokens_seen == seen
    assert first == again != other
    texts = made.processing_class.batch_decode([one.completion for one in first], skip_special_tokens=True)
    assert [one.reward for one in first] == right(texts, [row["answer"] for row in rows])
    assert [list(one.prompt) for one in first] == [made.processing_class(row["prompt"])["input_ids"] for row in rows]


@pytest.mark.parametrize("family", ["sum", "parity"])
def test_an_evaluation_on_the_validation_prompts_serves_as_their_round(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one on other prompts. Its completions are differentiated, and nothing is sampled besides."""
    held_out, judged, groups = problems("sum", split="validation"), list[tuple[str, float]](), list[SampledGroup]()
    differentiate = ValidationPass.differentiate

    def noting(self: ValidationPass, model: Any, given: Any) -> Any:
        groups.extend(group for own in given.values() for group in own)
        return differentiate(self, model, given)

    def noted(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        rewards = right(completions, answer) if columns["trainer_state"].global_step else short(completions)
        judged.extend((text, round(reward, 6)) for text, reward in zip(completions, rewards, strict=True))
        return rewards

    monkeypatch.setattr(ValidationPass, "differentiate", noting)
    made = trainer(
        tmp_path,
        select(validation=held_out),
        reward_funcs=noted,
        eval_dataset=problems(family, split="validation").shuffle(seed=1),
        eval_on_start=True,
        max_steps=2,
    )
    made.train()
    assert groups
    texts = made.processing_class.batch_decode([c for g in groups for c in g.completions], skip_special_tokens=True)
    sampled = [(text, round(r, 6)) for text, r in zip(texts, [r for g in groups for r in g.rewards], strict=True)]
    evaluated = judged[: 6 * made.num_generations_eval]
    assert (set(sampled) <= set(evaluated)) == (family == "sum")
    assert (made.curriculum.metrics()["curriculum/overhead_tokens"] == 0) == (family == "sum")
    assert made.curriculum.table()["influence/validation"].notna().all()


def test_a_pool_smaller_than_a_batch_is_repeated(tmp_path: Path) -> None:
    trainer(tmp_path, train_dataset=problems("sum", count=3), max_steps=2).train()
    for row in json_lines(run_of(tmp_path) / "rewards.jsonl"):
        assert (len(row["prompt_ids"]), len(set(row["prompt_ids"]))) == (16, 3)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 3  # in the middle of the second epoch


def test_a_resumed_training_ends_as_an_uninterrupted_one(whole: tuple[Path, CurriculumTrainer], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train_dataset": POOL, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, callbacks=[Stop()], **settings).train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert choices(tmp_path) == choices(whole[0])
    rewards = [json_lines(run_of(folder) / "rewards.jsonl") for folder in (tmp_path, whole[0])]
    assert rewards[0] == rewards[1]
    for name, weight in whole[1].model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_checkpoint_without_the_curriculum_s_state_is_refused(
    whole: tuple[Path, CurriculumTrainer], tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ArtifactError, match=r"curriculum's state is missing"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_training_that_begins_anew_forgets_the_one_before(tmp_path: Path) -> None:
    """Whatever is changed, and unless another process works on it."""
    trainer(tmp_path).train()
    first = choices(tmp_path)
    trainer(tmp_path, learning_rate=1e-9).train()
    assert choices(tmp_path)[:2] == first[:2]
    assert [row["step"] for row in json_lines(run_of(tmp_path) / "rewards.jsonl")] == [0, 1, 2, 3]
    trainer(tmp_path, train_dataset=problems("parity", count=4), seed=3, max_steps=1).train()
    assert [row["step"] for row in json_lines(run_of(tmp_path) / "rewards.jsonl")] == [0]
    with (run_of(tmp_path) / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="another process is working"):
            trainer(tmp_path).train()
    assert choices(tmp_path)


def test_a_resumed_training_may_be_longer(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, max_steps=2, **settings).train()
    longer = trainer(tmp_path, max_steps=3, **settings)
    longer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in json_lines(run_of(tmp_path) / "rewards.jsonl")] == [0, 1, 2]
    (listed,) = json.loads(cropi_ok("ls", str(tmp_path), "--json", cwd=tmp_path).stdout)["runs"]
    assert (listed["state"], listed["steps"]) == ("finished", "3/3")


def test_validation_sets_may_have_columns_of_their_own(tmp_path: Path) -> None:
    """TRL reads the columns of a batch's first row from all."""
    first, second = problems("sum", split="validation", count=2), problems("parity", split="validation", count=2)
    sets = {"a": first.add_column("year", [1, 2]), "b": second}
    seen: list[bool] = []

    def noted(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        seen.append("year" in columns)
        return right(completions, answer)

    made = trainer(tmp_path, select(validation=sets), reward_funcs=noted, max_steps=2)
    made.train()
    assert set(seen) == {True, False}
    asked = [("b", 1), ("a", 0), ("b", 0)]
    answers = made.curriculum._ask([each for each in asked for _ in range(2)], 0)[::2]
    encoded = [made.processing_class(sets[name][n]["prompt"])["input_ids"] for name, n in asked]
    assert [list(answer.prompt) for answer in answers] == encoded


def test_a_strategy_that_reads_rewards_alone_samples_no_validation_prompts(tmp_path: Path) -> None:
    made = trainer(tmp_path, select(strategy="mopps"))
    made.train()
    assert len(choices(tmp_path)) >= STEPS
    assert made.curriculum.table()["times_drawn"].sum() == sum(map(len, choices(tmp_path)))
    assert made.curriculum.metrics()["curriculum/overhead_tokens"] == 0


def test_a_curriculum_that_only_observes_passes_over_all_prompts(tmp_path: Path) -> None:
    made = trainer(tmp_path, select(strategy={"select": {"strategy": {"type": "cropi", "observe_only": True}}}))
    made.train()
    recorded = [row["prompt_ids"] for row in json_lines(run_of(tmp_path) / "rewards.jsonl")]
    assert len({prompt_id for batch in recorded[:3] for prompt_id in batch}) == 12
    assert "influence/validation" in made.curriculum.table()


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "mine" / "run" / "model.safetensors"
    other.parent.mkdir(parents=True)
    other.write_text("weights")
    with pytest.raises(UserError, match="it holds files that are no curriculum's"):
        trainer(tmp_path, select(folder=tmp_path / "mine")).train()
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["run", "model.safetensors"]


def test_a_compiled_model_is_refused_where_influence_is_read(tmp_path: Path) -> None:
    made = trainer(tmp_path, select())
    made.args.torch_compile = True
    with pytest.raises(UserError, match="influence cannot be read from a compiled model"):
        made.train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: select(validation=None), "Selector.validation: it is a NoneType"),
        (lambda: select(validation={"a": [{"prompt": "a"}]}), r"Selector.validation\['a'\]: it is a list"),
        (lambda: select(validation=problems("sum").select([])), "Selector.validation: it holds no rows"),
        (
            lambda: select(validation=problems("sum").rename_column("prompt", "question")),
            "Selector.validation: it has no column prompt",
        ),
        (lambda: select(strategy="inflence"), "did you mean 'influence'"),
        (lambda: select(validation=problems("sum")), "stand in another role"),
        (lambda: select(settings={"collect": {"no_such": 1}}), "unknown key collect.no_such"),
        (lambda: select(settings={"prompts": {"empty": "drop"}}), "none can be dropped"),
        (
            lambda: select(validation=problems("sum", split="validation").select([0])),
            "unless it has two prompts",
        ),
        (lambda: select(strategy="influence"), "chooses the prompts of a stage"),
        (lambda: select(strategy="dapo"), "leaves out groups that were sampled"),
        (lambda: select(strategy="lze"), "leaves out groups that were sampled"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        trainer(tmp_path, make()).train()
    assert "trainer." not in str(caught.value)


def test_a_generator_that_leaves_training_mode_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be told from training"):
        trainer(tmp_path, use_transformers_continuous_batching=True)


def test_terms_of_the_loss_beside_the_rewards_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, beta=0.1, entropy_coef=0.1, max_steps=1).train()
    said = capsys.readouterr().err
    assert "args.beta is set, so the influence that is read contains the term of KL" in said
    assert "args.entropy_coef is set" in said


def test_two_rows_with_one_id_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": "a", "answer": "1", "prompt_id": 3}] * 2)
    with pytest.raises(DataError, match="the same prompt_id"):
        trainer(tmp_path, train_dataset=rows)


def test_a_verifier_as_a_reward_function(tmp_path: Path) -> None:
    """The same rewards as the function in plain Python; None where gold is unreadable; a run trains on them."""
    by_marker = Verified("exact", marker="answer", verification={"processes": 1})
    completions = ["steps 1 answer 3", "answer 4", "3"]
    assert by_marker(completions, answer=["3", "3", "3"]) == right(completions, answer=["3", "3", "x"])
    assert Verified("numeric")([[{"role": "assistant", "content": "it is 7"}]], solution=[7]) == [1.0]
    assert Verified("numeric")(["7"], answer=["seven"]) == [None]
    graded = Verified("function", path="tests.rewards.functions.near", graded=True, verification={"processes": 1})
    assert graded(["answer 4", "answer 3"], answer=["3", "3"]) == [0.5, 1]
    with pytest.raises(DataError, match="no recorded answers"):
        by_marker(["answer 3"])
    with pytest.raises(ConfigError, match="did you mean 'numeric'"):
        Verified("numerik")
    with pytest.raises(ConfigError, match=r"verification\.proceses"):
        Verified("numeric", verification={"proceses": 2})
    trainer(tmp_path, reward_funcs=by_marker, max_steps=2).train()
    assert {value for row in json_lines(run_of(tmp_path) / "rewards.jsonl") for value in row["rewards"]} == {0.0, 1.0}


@pytest.mark.slow
def test_two_processes_share_the_work_and_choose_alike(tmp_path: Path) -> None:
    trained_by_two(tmp_path)


def trained_by_two(tmp_path: Path, **environment: str) -> None:
    """Two processes on the CPU, started as `accelerate launch` starts several GPUs."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from cropi.training.sharding import gathered\n"
        "from tests.trl.scripts import trainer\n"
        "t = trainer(Path('out'), per_device_train_batch_size=4)\n"
        "t.train()\n"
        "with gathered(t):\n"
        "    total = sum(float(getattr(p, 'full_tensor', lambda: p)().sum()) for p in t.model.parameters())\n"
        "stage = t.accelerator.state.deepspeed_plugin.zero_stage if t.is_deepspeed_enabled else t.is_fsdp_enabled\n"
        "told = f'{t.accelerator.num_processes} {total} {t.curriculum.table().to_dict()!r} {stage}'\n"
        "Path(f'told-{t.accelerator.process_index}').write_text(told)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"told-{process}").read_text() for process in (0, 1))
    assert first == second
    assert first.startswith("2 ")
    recorded = json_lines(run_of(tmp_path / "out") / "rewards.jsonl")
    assert [row["step"] for row in recorded] == [0, 1, 2, 3]
    assert [list(dict.fromkeys(row["prompt_ids"])) for row in recorded] == choices(tmp_path / "out")[:STEPS]
    assert all(len(row["rewards"]) == 16 for row in recorded)
    assert "influence/validation" in first
