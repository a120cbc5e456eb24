"""The real command, end to end, and its exit codes."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from cropi.builtin import POLICY_DIR
from cropi.inspection import _token_warnings
from tests.runs import SMALL, cropi, cropi_error, cropi_ok, cropi_process, evaluations, json_lines, selections


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    cwd = tmp_path_factory.mktemp("run")
    (cwd / "stdout").write_text(cropi_ok("run", "quickstart", *SMALL, cwd=cwd).stdout)
    return cwd


def test_a_run_ends_with_headline_report_and_all_files(finished: Path) -> None:
    folder = finished / "runs" / "quickstart"
    output = (finished / "stdout").read_text()
    assert "report: runs/quickstart/report.html" in output
    assert "`influence`" in output
    assert (folder / "checkpoints" / "checkpoint-6" / "model.safetensors").is_file()
    assert [row["step"] for row in json_lines(folder / "steps.jsonl")] == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in (folder / "evaluations").iterdir())
    assert names == ["manifest.json", *(f"step-00000{step}.parquet" for step in (0, 2, 4, 6))]
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text())


def test_training_saw_only_the_selection_of_its_stage(finished: Path) -> None:
    folder = finished / "runs" / "quickstart"
    for stage in range(2):
        chosen = {row["prompt_id"] for row in json_lines(folder / f"selections/stage-{stage:03}/selected.jsonl")}
        rows = json_lines(folder / "rewards.jsonl")
        seen = {i for row in rows if stage * 3 <= row["step"] < stage * 3 + 3 for i in row["prompt_ids"]}
        assert len(chosen) == 12
        assert seen
        assert seen <= chosen


def test_rewards_are_audited_on_what_the_run_collected(finished: Path) -> None:
    done = cropi_ok("audit-rewards", "runs/quickstart", cwd=finished)
    assert "384 completions, collected by the run" in done.stdout
    assert "gold answers against themselves: 70 correct" in done.stdout


def test_the_same_command_again_changes_nothing(finished: Path) -> None:
    before = selections(finished), evaluations(finished)
    stamp = (finished / "runs/quickstart/trajectories/manifest.json").stat().st_mtime_ns
    assert json.loads(cropi_ok("run", "quickstart", *SMALL, "--json", cwd=finished).stdout)
    assert (selections(finished), evaluations(finished)) == before
    assert (finished / "runs/quickstart/trajectories/manifest.json").stat().st_mtime_ns == stamp


def test_a_changed_policy_or_data_file_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(POLICY_DIR, tmp_path / "policy")
    command = ["collect", "quickstart", *SMALL, "policy.path=./policy"]
    cropi_ok(*command, cwd=tmp_path)
    settings = tmp_path / "policy" / "generation_config.json"
    settings.write_text(settings.read_text() + " ")
    done = cropi_error(*command, cwd=tmp_path)
    assert "made from another policy" in done.stderr


def test_a_moved_run_goes_on_and_a_busy_one_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "elsewhere")
    command = ["run", "quickstart", *SMALL, "run_dir=elsewhere"]
    cropi_ok(*command, cwd=tmp_path)
    with (tmp_path / "elsewhere/quickstart/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in cropi_error(*command, cwd=tmp_path).stderr


def test_a_lost_final_evaluation_is_made_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    path = tmp_path / "runs/quickstart/evaluations/step-000006.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    done = cropi_error("run", "quickstart", *SMALL, cwd=tmp_path)
    assert f"Fix: delete runs/quickstart/evaluations/{path.name}" in done.stderr
    path.unlink()
    cropi_ok("run", "quickstart", *SMALL, cwd=tmp_path)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_checkpoint_from_elsewhere_is_scored_and_selected_by_itself(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    other = ["--checkpoint", "runs/quickstart/checkpoints/checkpoint-6"]
    for verb in ("score", "select", "evaluate"):
        cropi_ok(verb, "quickstart", *SMALL, *other, "--json", cwd=tmp_path)
    assert len(list((tmp_path / "runs/quickstart/other-checkpoints").iterdir())) == 1
    assert selections(tmp_path) == selections(finished)
    cropi_error("select", "quickstart", *SMALL, "name=new", "--stage", "1", cwd=tmp_path)


def test_a_run_killed_while_it_claimed_its_folder_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / ".config.json.123.part").write_text("{")
    cropi_ok("collect", "quickstart", *SMALL, cwd=tmp_path)


def test_remote_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(POLICY_DIR, tmp_path / "policy")
    settings = json.loads((tmp_path / "policy/config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "policy/config.json").write_text(json.dumps(settings))
    (tmp_path / "policy/evil.py").write_text("open('ran', 'w')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))  # as if somebody said yes
    cropi_error("collect", "quickstart", *SMALL, "policy.path=./policy", cwd=tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quickstart", "policy.path=./nowhere"], "there is no folder"),
        (["run", "quickstart", "trainer.learning_rat=1"], "did you mean 'learning_rate'"),
        (["run", "quickstart", "trainer.max_steps=5"], "train.stages"),
        (["run", "quickstart", "trainer.num_generations=7"], "trainer"),
        (["score", "quickstart", "select.strategy=influence"], "run `cropi collect` first"),
        (["score", "quickstart"], "cropi reads no trajectories"), (["run", "nosuch"], "no recipe named 'nosuch'"),
        (["recipes", "copy", "nosuch"], "there is no recipe"), (["report", "quickstart"], "there is no such run"),
        (["frobnicate"], "No such command"), (["run", "quickstart", "run_dir=/dev/null/x"], "cannot be used"),
        (["recipes", "copy", "quickstart", "nowhere/x.yaml"], "cannot be written"),
        (["score", "quickstart", "--checkpoint", "nowhere"], "there is no folder nowhere"),
        (["check", "quickstart", "verifier.type=numeric", "verifier.marker=x"], "unknown key verifier.marker"),
    ],
)  # fmt: skip
def test_what_a_user_can_fix_exits_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in cropi_error(*arguments, cwd=tmp_path).stderr


def test_it_does_so_without_traceback(tmp_path: Path) -> None:
    done = cropi_process("run", "quickstart", "sed=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'seed'" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_mixed_group_is_refused_after_collection(tmp_path: Path) -> None:
    done = cropi_error("run", "quickstart", *SMALL, "verifier.marker=never", cwd=tmp_path)
    assert "both better and worse" in done.stderr


def collecting(cwd: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, once it has written a shard."""
    command = [sys.executable, "-m", "cropi", "collect", "quickstart", *SMALL]
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(cwd.glob("runs/*/trajectories/part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return process


def test_interrupt_exits_130_and_the_run_goes_on(tmp_path: Path) -> None:
    process = collecting(tmp_path)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "goes on from here" in stderr
    cropi_ok("collect", "quickstart", *SMALL, cwd=tmp_path)


def test_a_second_interrupt_shows_no_traceback_either(tmp_path: Path) -> None:
    """As a terminal sends them, to the command and its workers alike."""
    process, deadline = collecting(tmp_path), time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=60)
    # Python takes its handlers away while it shuts down: an interrupt then ends it without another word.
    assert process.returncode in (130, -signal.SIGINT), stderr
    assert "Traceback" not in stderr
    assert "goes on from here" in stderr


def test_check_judges_real_rows_and_writes_nothing(tmp_path: Path) -> None:
    done = cropi_ok("check", "quickstart", *SMALL, "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["gold_against_itself"] == {"correct": 48 + 6 + 16}
    assert result["prompts"]["train"] == 48
    assert result["groups"] == 8
    assert Counter(sample["verdict"] for sample in result["samples"]) == {"correct": 2, "wrong": 2}
    assert len({sample["prompt"] for sample in result["samples"] if sample["verdict"] == "wrong"}) == 2
    assert {sample["reward"] for sample in result["samples"] if sample["verdict"] == "correct"} == {1}
    assert list(tmp_path.iterdir()) == []


def test_check_shows_the_prompt_as_the_model_gets_it_and_the_whole_run_beside_plain_grpo(finished: Path) -> None:
    changed = "trainer.learning_rate=1e-5"
    done = cropi_ok("check", "quickstart", *SMALL, changed, "--dollars-per-hour", "36", "--json", cwd=finished)
    assert "loading the policy builtin" in done.stderr
    result, parts = json.loads(done.stdout), json.loads(done.stdout)["estimates"]
    prompts = pq.read_table(finished / "runs/quickstart/prompts/prompts.parquet").column("messages").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(POLICY_DIR)
    encoded = tokenizer([json.loads(prompt) for prompt in prompts])["input_ids"]
    assert any("started with another config: trainer.learning_rate" in line for line in result["warnings"])
    assert result["model_input"] in {tokenizer.decode(ids) for ids in encoded}
    assert result["tokens"]["prompt longest"] <= max(map(len, encoded))
    assert result["tokens"]["completion longest"] <= 32
    assert 0 <= result["tokens"]["share cut off"] <= 1
    scored = 2 * parts["score_per_stage_s"] + parts["collect_s"]
    assert parts["plain_grpo_s"] == pytest.approx(parts["train_s"] + parts["evaluate_s"])
    assert parts["whole_run_s"] == pytest.approx(parts["plain_grpo_s"] + scored)
    assert parts["whole_run_tokens"] == pytest.approx(parts["train_tokens"] + parts["collect_tokens"])
    assert (parts["selected_prompts_per_stage"], parts["drawn_prompts_per_stage"]) == (12, 3 * 32 / 8)
    assert parts["whole_run_dollars"] == pytest.approx(parts["whole_run_s"] / 100)
    assert parts["plain_grpo_dollars"] == pytest.approx(parts["plain_grpo_s"] / 100)
    assert parts["free_memory_bytes"] > parts["most_at_once_bytes"] > parts["model_and_optimiser_bytes"] > 0


def test_doctor_and_recipes_answer_in_json(tmp_path: Path) -> None:
    assert json.loads(cropi("doctor", "--json", cwd=tmp_path).stdout)["torch"]
    assert "quickstart" in json.loads(cropi("recipes", "--json", cwd=tmp_path).stdout)
    cropi_ok("recipes", "copy", "quickstart", cwd=tmp_path)
    cropi_error("recipes", "copy", "quickstart", cwd=tmp_path)
    cropi_ok("check", "quickstart.yaml", *SMALL, cwd=tmp_path)


def test_two_tokens_of_the_beginning_are_warned_of() -> None:
    policy = SimpleNamespace(
        tokenizer=SimpleNamespace(bos_token_id=1, bos_token="<s>", unk_token_id=None, unk_token=None)
    )
    shards = [SimpleNamespace(prompt_ids=[[1, 1, 5], [1, 5], [1]]), SimpleNamespace(prompt_ids=[[1, 1]])]
    assert _token_warnings(policy, shards) == ["2 prompts begin with two <s>: remove it from their text"]  # type: ignore[arg-type]
    assert _token_warnings(policy, shards[2:]) == []  # type: ignore[arg-type]
    none = SimpleNamespace(
        tokenizer=SimpleNamespace(bos_token_id=None, bos_token=None, unk_token_id=5, unk_token="<unk>")
    )
    assert _token_warnings(none, shards) == []  # type: ignore[arg-type]
    unread = [SimpleNamespace(prompt_ids=[[5, 5, 1], [5, 1]])]
    assert _token_warnings(none, unread) == [  # type: ignore[arg-type]
        "1 prompts are mostly <unk> to the policy, which cannot read them"
    ]
