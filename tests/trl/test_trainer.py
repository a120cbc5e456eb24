"""The curriculum inside a training script of TRL's."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig

from cropi.builtin import POLICY_DIR, generate
from cropi.console import warn_once
from cropi.errors import ArtifactError, ConfigError, DataError, PolicyError, SignalError, UserError
from cropi.stages.score import score_pool
from cropi.streams import read_jsonl
from cropi.trl import CurriculumTrainer, Selector, Verified
from tests.runs import cropi_error, cropi_ok, json_lines

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def right(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    return [float(c.rpartition("answer ")[2].strip() == a) for c, a in zip(completions, answer, strict=True)]


def short(completions: Sequence[str], **_: Any) -> list[float]:
    return [1 / (1 + len(c)) for c in completions]


async def right_later(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    return right(completions, answer)


def problems(*families: str, split: str = "train", count: int = 12) -> Dataset:
    rows = [row for family in families for row in generate(family, split=split, count=count, seed=0)]
    return Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"], "level": 1} for row in rows])


def chat(content: Any) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": content}], "answer": "1"}])


CHAT = chat("a")


def trainer(folder: Path, selector: Selector | None = None, **changes: Any) -> CurriculumTrainer:
    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    arguments = {name: changes.pop(name) for name in list(changes) if name in GRPOConfig.__dataclass_fields__}
    given: dict[str, Any] = {
        "model": str(POLICY_DIR),
        "reward_funcs": right,
        "args": GRPOConfig(**(settings | arguments)),
        "train_dataset": problems("sum", "parity", "count", "machine"),
        "selector": selector or select(),
    }
    return CurriculumTrainer(**(given | changes))


def select(**changes: Any) -> Selector:
    given: dict[str, Any] = {
        "validation": problems("sum", split="validation", count=8),
        "strategy": "influence",
        "fraction": 0.25,
        "stages": 2,
        "settings": {"collect": {"validation_num_generations": 8}},
    }
    return Selector(**(given | changes))


def selections(folder: Path) -> list[set[str]]:
    stages = sorted((folder / "_curriculum" / "run" / "selections").iterdir())
    return [{row["prompt_id"] for row in json_lines(stage / "selected.jsonl")} for stage in stages]


def rewards(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "_curriculum" / "run" / "rewards.jsonl"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CurriculumTrainer]:
    folder = tmp_path_factory.mktemp("whole")
    trained = trainer(folder)
    trained.train()
    return folder, trained


@pytest.mark.parametrize("place", ["", "_curriculum", "_curriculum/run"])
def test_the_output_folder_is_reported_as_the_run_it_is(whole: tuple[Path, CurriculumTrainer], place: str) -> None:
    folder = whole[0] / place
    done = cropi_ok("report", str(folder), cwd=folder)
    assert "no test set, so its accuracy is not measured" in done.stdout
    said = re.search(
        r"mean reward of training went from ([\d.]+) in the first stage to ([\d.]+) in stage 1", done.stdout
    )
    by_stage = [
        [r for row in rewards(whole[0]) if row["step"] // 2 == stage for r in row["rewards"]] for stage in (0, 1)
    ]
    assert said is not None
    assert [float(number) for number in said.groups()] == [pytest.approx(sum(r) / len(r), abs=0.006) for r in by_stage]
    text = (whole[0] / "_curriculum" / "run" / "report.md").read_text()
    assert "over those selected" in text


@pytest.mark.parametrize("command", ["check", "run", "score", "select", "evaluate", "audit", "audit-rewards"])
def test_only_the_script_goes_on_with_its_curriculum(whole: tuple[Path, CurriculumTrainer], command: str) -> None:
    done = cropi_error(command, str(whole[0]), cwd=whole[0])
    assert "the curriculum of a TRL script" in done.stderr
    assert "Fix: run the script to go on" in done.stderr


def test_a_script_gains_the_curriculum_with_two_lines() -> None:
    """The class and the selector: of the rest only the import, the docstring and the output folder differ."""
    examples = ROOT / "examples" / "trl"
    before, after = ((examples / name).read_text().splitlines() for name in ("grpo.py", "curriculum.py"))
    changed = [line[1:].strip() for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[0] == "+"]
    assert [line for line in changed if not line.startswith(("++", '"""', "from ", "output_dir"))] == [
        "trainer = CurriculumTrainer(",
        "selector=Selector(validation=held_out, stages=3),",
    ]


def test_each_stage_trains_on_its_selection_only(whole: tuple[Path, CurriculumTrainer]) -> None:
    folder, trained = whole
    assert trained.state.global_step == STEPS
    assert trained.steps_per_stage == 2
    chosen = selections(folder)
    assert [len(one) for one in chosen] == [12, 12]
    assert chosen[0] != chosen[1]
    for row in rewards(folder):
        assert set(row["prompt_ids"]) <= chosen[row["step"] // 2]
        assert len(row["rewards"]) == 16
    assert [row["step"] for row in rewards(folder)] == [0, 1, 2, 3]


def test_the_recorded_rewards_are_those_of_the_reward_function(whole: tuple[Path, CurriculumTrainer]) -> None:
    folder, trained = whole
    logged = [entry["rewards/right/mean"] for entry in trained.state.log_history if "rewards/right/mean" in entry]
    assert logged == pytest.approx([sum(row["rewards"]) / 16 for row in rewards(folder)])


def test_a_resumed_training_ends_as_an_uninterrupted_one(whole: tuple[Path, CurriculumTrainer], tmp_path: Path) -> None:
    """Stopped inside the second stage."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer(tmp_path, callbacks=[Stop()]).train()
    assert [row["step"] for row in rewards(tmp_path)] == [0, 1, 2]
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert selections(tmp_path) == selections(whole[0])
    assert rewards(tmp_path) == rewards(whole[0])
    for name, weight in whole[1].model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_a_checkpoint_without_its_trajectories_is_refused(
    whole: tuple[Path, CurriculumTrainer], tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="trajectories of the policy before it are gone"):
        trainer(tmp_path).train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))


def test_lora_several_rewards_and_a_callback(tmp_path: Path) -> None:
    """Gradients are the adapter's; prompts are chosen by the function that says what is right."""

    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1

    counts = Counts()
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trained = trainer(
        tmp_path,
        select(success="right"),
        reward_funcs=[short, right],
        reward_weights=[0.1, 1.0],
        peft_config=adapter,
        callbacks=[counts],
    )
    trained.train()
    assert counts.steps == STEPS
    assert {value for row in rewards(tmp_path) for value in row["rewards"]} <= {0.0, 1.0}
    assert all(len(one) == 12 for one in selections(tmp_path))
    moved = [name for name, weight in trained.model.named_parameters() if weight.requires_grad]
    assert moved
    assert all("lora" in name for name in moved)


def test_the_default_strategy_with_an_asynchronous_reward(tmp_path: Path) -> None:
    selector = Selector(validation={"a": problems("sum", split="validation", count=12)}, stages=2, fraction=0.25)
    trained = trainer(tmp_path, selector, reward_funcs=[right_later], num_train_epochs=1, max_steps=-1)
    assert trained.args.max_steps == 12  # 48 prompts, 4 of them a step
    trained.train()
    assert len(selections(tmp_path)) == 2
    assert len(rewards(tmp_path)) == 12


def test_chat_prompts_and_a_function_beside_the_trainer_s(tmp_path: Path) -> None:
    def says(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
        return right([c[0]["content"] for c in completions], answer)  # type: ignore[return-value]

    def chat(rows: Dataset) -> Dataset:
        return rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POLICY_DIR)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    trained = trainer(
        tmp_path,
        select(validation=chat(problems("sum", split="validation", count=8)), success=says),
        reward_funcs=[lambda completions, **_: [float(len(c[0]["content"])) for c in completions]],
        train_dataset=chat(problems("sum", "parity", "count", "machine")),
        processing_class=tokenizer,
        max_steps=2,
    )
    trained.train()
    assert {value for row in rewards(tmp_path) for value in row["rewards"]} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))}, "is a IterableDataset"),
        ({"train_dataset": Dataset.from_list([{"text": "a"}])}, "no column `prompt`"),
        ({"selector": select(success="wrong")}, "'wrong' names no reward function"),
        ({"selector": select(success="right"), "reward_funcs": [right, right]}, "or more than one"),
        ({"reward_funcs": [short, right]}, r"(?s)Selector.success: .*short, right.*Selector\(success="),
        ({"ignore_data_skip": True}, "shift the ends of stages"),
        ({"selector": select(stages=0)}, "needs stages"),
        ({"selector": select(validation=None)}, "Selector.validation: it is a NoneType"),
        ({"selector": select(validation={"a": [{"prompt": "a"}]})}, r"Selector.validation\['a'\]: it is a list"),
        ({"selector": select(validation=CHAT.select([]))}, "Selector.validation: it holds no rows"),
        ({"selector": select(validation=Dataset.from_list([{"a": 1}]))}, "Selector.validation: there is no column"),
        ({"train_dataset": CHAT}, r"train_dataset\[0\] is chat messages, and that at Selector.validation\[0\] is text"),
        ({"train_dataset": CHAT, "selector": select(validation=CHAT)}, "processing_class: the prompts are chat"),
        (
            {"train_dataset": problems("sum").add_column("tools", [["a"]] * 12)},
            r"train_dataset\[0\]: the column `tools`",
        ),
        ({"train_dataset": chat([{"type": "image"}])}, r"train_dataset\[0\]: .* a part of type 'image'"),
        ({"selector": select(validation=chat(None))}, r"Selector.validation\[0\]: .*message 1 has no `content`"),
    ],
)
def test_what_cannot_be_combined_is_refused_at_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError, PolicyError), match=message) as caught:
        trainer(tmp_path, **changes)
    assert not re.search(r"prompts\.\w", str(caught.value))
    assert not (tmp_path / "_curriculum").exists()


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (select(validation=problems("sum", count=8)), "stand in another role"),
        (select(settings={"collect": {"no_such": 1}}), "unknown key collect.no_such"),
        (select(strategy="dapo"), "only cropi's own trainer"),
        (select(strategy="mopps"), "chooses every generation batch"),
        (select(settings={"collect": {"batch_size": 0}}), r'Selector.settings\["collect"\]\["batch_size"\]'),
        (select(settings={"prompts": {"system_prompt": "a"}}), "the trainer uses the prompts unchanged"),
        (select(settings={"prompts": {"chat": True}}), "the trainer uses the prompts unchanged"),
    ],
)
def test_what_a_selector_refuses_ends_before_the_first_step(selector: Selector, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        trainer(tmp_path, selector).train()
    assert not re.search(r"\b(prompts|trainer)\.\w|hash_range", str(caught.value))


def test_prompts_that_teach_nothing_are_an_error_in_the_words_of_the_script(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_funcs=lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(SignalError, match=r"(?s)^train_dataset: none of .*raise args.num_generations"):
        made.train()


def in_form(completions: Sequence[str], **_: Any) -> list[float]:
    return [0.25 if "answer" in text else -0.5 for text in completions]


def no_row(completions: Sequence[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def on_training(completions: Sequence[str], answer: Sequence[str], level: Sequence[int], **_: Any) -> list[float]:
    """Right answers of the training set only."""
    return [v * (n == 1) for v, n in zip(right(completions, answer), level, strict=True)]


@pytest.mark.parametrize(
    ("function", "changes", "values"),
    [
        (in_form, {}, "values lie between -0.5 and 0.25, and values from 0.5"),
        (in_form, {"threshold": -1.0}, "values lie between -0.5 and 0.25, and values from -1 "),
        (short, {"threshold": 2.0}, "and values from 2 "),
        (no_row, {}, "returned no value"),
        (lambda completions, **_: [0.5] * len(completions), {"graded": True}, "values lie between 0.5 and 0.5"),
    ],
)
def test_values_that_tell_no_completions_apart_are_told_in_words_of_the_script(
    function: Any, changes: dict[str, Any], values: str, tmp_path: Path
) -> None:
    made = trainer(tmp_path, select(success=function, **changes), max_steps=2)
    with pytest.raises(SignalError) as caught:
        made.train()
    told = str(caught.value)
    assert values in told
    assert "Selector(success=...)" in told
    assert str(tmp_path / "_curriculum") in told
    assert told.startswith("train_dataset: ")
    assert not any(key in told for key in ("prompts.", "collect.", "select.", "verifier", "cropi check"))
    assert len(told.splitlines()) == 2
    assert len(caught.traceback) < 5
    with pytest.raises(SignalError, match="were judged earlier"):  # the trajectories are kept
        trainer(tmp_path, select(success=function, **changes), max_steps=2).train()


def test_a_validation_set_without_signal_is_told_in_words_of_the_script(tmp_path: Path) -> None:
    held_out = problems("sum", split="validation", count=8).remove_columns("level").add_column("level", [2] * 8)
    with pytest.raises(SignalError, match=r"^Selector.validation: .*between 0 and 1") as caught:
        trainer(tmp_path, select(validation=held_out, success=on_training), max_steps=2).train()
    assert "prompts." not in str(caught.value)


@pytest.mark.slow
def test_two_processes_train_on_one_selection(tmp_path: Path) -> None:
    trained_by_two(tmp_path)


def trained_by_two(tmp_path: Path, **environment: str) -> None:
    """Two processes on the CPU, started as `accelerate launch` starts several GPUs: both see the first one's choice."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from cropi.training.sharding import gathered\n"
        "from tests.trl.test_trainer import trainer\n"
        "t = trainer(Path('out'), per_device_train_batch_size=8)\n"
        "t.train()\n"
        "with gathered(t):\n"
        "    total = sum(float(p.sum()) for p in t.model.parameters())\n"
        "stage = t.accelerator.state.deepspeed_plugin.zero_stage if t.is_deepspeed_enabled else None\n"
        "told = f'{t.accelerator.num_processes} {total} {stage}'\n"
        "Path(f'sum-{t.accelerator.process_index}').write_text(told)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"sum-{process}").read_text().split() for process in (0, 1))
    assert first[0] == second[0] == "2"
    assert float(first[1]) == pytest.approx(float(second[1]), abs=1e-3)
    chosen = selections(tmp_path / "out")
    recorded = rewards(tmp_path / "out")
    assert [row["step"] for row in recorded] == [0, 1, 2, 3]
    for row in recorded:
        assert len(row["prompt_ids"]) == 16
        assert set(row["prompt_ids"]) <= chosen[row["step"] // 2]


def test_the_run_it_leaves_can_be_explained(whole: tuple[Path, CurriculumTrainer]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cropi", "explain", str(whole[0] / "_curriculum" / "run"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_a_training_that_begins_anew_chooses_anew(tmp_path: Path) -> None:
    """The same script again: its trajectories serve, its selections do not. With another reward it is refused."""
    trainer(tmp_path).train()
    first = selections(tmp_path)
    again = trainer(tmp_path, learning_rate=1e-9)
    again.train()
    assert selections(tmp_path)[0] == first[0]
    assert selections(tmp_path)[1] != first[1]  # the policy has not moved this time
    assert [row["step"] for row in rewards(tmp_path)] == [0, 1, 2, 3]

    def right(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(len(c) % 2) for c in completions]

    with pytest.raises((ConfigError, ArtifactError), match=r"to choose anew, delete"):
        trainer(tmp_path, reward_funcs=right).train()


def test_two_functions_of_one_name_are_told_apart_by_their_place(tmp_path: Path) -> None:
    def make(value: float | None) -> Any:
        def reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
            return right(completions, answer) if value is None else [value] * len(completions)

        return reward

    trainer(tmp_path, select(success=1), reward_funcs=[make(0.0), make(None)]).train()
    assert any(value for row in rewards(tmp_path) for value in row["rewards"])


def test_ids_that_are_numbers_and_columns_that_trl_drops(tmp_path: Path) -> None:
    rows = problems("sum", "parity", "count", "machine")
    numbered = rows.add_column("prompt_id", list(range(len(rows))))
    trained = trainer(tmp_path, select(strategy="learnability-rescored"), train_dataset=numbered)
    trained.train()
    chosen = selections(tmp_path)
    for row in rewards(tmp_path):
        assert set(row["prompt_ids"]) <= chosen[row["step"] // 2]


def test_a_threshold_that_is_a_reward_counts_as_reached(tmp_path: Path) -> None:
    """TRL keeps rewards in float32, where 0.9 is less than 0.9."""

    def mostly(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        return [0.9 * value for value in right(completions, answer)]

    trainer(tmp_path, select(threshold=0.9), reward_funcs=mostly).train()
    assert any(value for row in rewards(tmp_path) for value in row["rewards"])


def near(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """0.2 for an answer in the form asked for, 1 for the right one."""
    given = zip(completions, right(completions, answer), strict=True)
    return [value or 0.2 * ("answer " in text) for text, value in given]


def test_prompts_are_chosen_by_grades(tmp_path: Path) -> None:
    trainer(tmp_path, select(graded=True), reward_funcs=near, max_steps=2).train()
    folder = tmp_path / "_curriculum" / "run" / "trajectories"
    stored = [row for path in folder.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {round(row["reward"], 3) for row in stored} == {0, 0.2, 1}
    assert all((row["verdict"] == "correct") == (row["reward"] >= 0.5) for row in stored)
    assert {round(value, 3) for row in rewards(tmp_path) for value in row["rewards"]} >= {0.2, 1}


def test_a_grade_outside_0_to_1_counts_as_none_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training goes on by the function's own values."""

    def at_times_two(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        return [
            value or 2.0 * ("3" in text) for text, value in zip(completions, right(completions, answer), strict=True)
        ]

    warn_once.cache_clear()
    trained = trainer(tmp_path, select(graded=True), reward_funcs=at_times_two, max_steps=2)
    trained.train()
    assert {value for row in rewards(tmp_path) for value in row["rewards"]} == {0.0, 1.0}
    assert any(row["verdicts"].get("error") for row in rewards(tmp_path))
    assert max(entry.get("rewards/at_times_two/mean", 0) for entry in trained.state.log_history) > 0
    assert capsys.readouterr().err.count("reward function at_times_two gave a value outside 0 to 1") == 1


def test_a_threshold_that_no_grade_reaches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Selector.threshold: no grade reaches 5"):
        select(graded=True, threshold=5.0)
    with pytest.raises(ConfigError, match=r"did you mean 'influence'"):
        select(strategy="inflence")


@pytest.mark.parametrize(
    ("settings", "stages", "steps"),
    [
        ({"max_steps": 24}, 5, 25),
        ({"max_steps": 3}, 3, 3),
        ({"max_steps": 24, "num_iterations": 4}, 3, 24),
        ({"max_steps": 100, "num_iterations": 4, "steps_per_generation": 8, "num_generations": 4}, 4, 128),
        ({"max_steps": -1, "num_train_epochs": 1}, 4, 12),
    ],
)
def test_stages_are_whole_generation_batches_and_few_steps_are_added(
    settings: dict[str, Any], stages: int, steps: int, tmp_path: Path
) -> None:
    made = trainer(tmp_path, select(stages=5), **settings)
    assert (made.stages, made.args.max_steps) == (stages, steps)


def test_an_asynchronous_judge_of_its_own_shares_one_loop(tmp_path: Path) -> None:
    """A lock belongs to the loop it was first used in."""
    import asyncio

    lock = asyncio.Semaphore(1)

    async def judge(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        async def one() -> None:
            async with lock:
                await asyncio.sleep(0.01)

        await asyncio.gather(one(), one())
        return right(completions, answer)

    trainer(tmp_path, select(success=judge), max_steps=2).train()
    assert len(rewards(tmp_path)) == 2


def test_a_verifier_as_a_reward_function(tmp_path: Path) -> None:
    """The same rewards as the function in plain Python; None where gold is unreadable; a run trains on them."""
    by_words, by_marker = right, Verified("exact", marker="answer", verification={"processes": 1})
    completions = ["steps 1 answer 3", "answer 4", "3"]
    assert by_marker(completions, answer=["3", "3", "3"]) == by_words(completions, answer=["3", "3", "x"])
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
    trainer(tmp_path, reward_funcs=by_marker).train()
    assert {value for row in rewards(tmp_path) for value in row["rewards"]} == {0.0, 1.0}


def test_under_mixed_precision_prompts_are_chosen_by_a_rounded_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is scored are the weights of that moment in bfloat16; training's own stay float32."""
    trained = trainer(tmp_path, bf16=True)
    seen = []

    def looks(config: Any, surrogate: Any, model: Any, *rest: Any) -> Any:
        now = trained.model.state_dict()
        seen.append(all(torch.equal(t, now[name].to(torch.bfloat16)) for name, t in model.state_dict().items()))
        return score_pool(config, surrogate, model, *rest)

    monkeypatch.setattr("cropi.stages.score.score_pool", looks)
    trained.train()
    assert seen == [True, True]
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}
