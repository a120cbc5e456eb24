"""What `run` refuses of a config, its policy and its folder, `check` refuses in the same words; nothing is written."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cropi.artifacts import read_sealed
from cropi.builtin import POLICY_DIR
from cropi.cli import shell
from cropi.errors import ArtifactError
from cropi.lab.compare.result_table import RESULTS, read_results
from cropi.streams import Ledger
from tests.runs import SMALL, cropi, cropi_error

pytestmark = pytest.mark.usefixtures("trial_step")


def refused(cwd: Path, *overrides: str, verbs: tuple[str, ...] = ("check", "run")) -> str:
    """The one message of all verbs, each of which ends with code 2 within ten seconds of a processor."""
    messages = set()
    for verb in verbs:
        began = time.process_time()
        done = cropi(verb, "quickstart", *SMALL, *overrides, cwd=cwd)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "Traceback" not in done.stderr
        assert "\nFix: " in done.stderr
        assert time.process_time() - began < 10
        messages.add(done.stderr[done.stderr.index("error: ") :][:80])  # after lines of progress
    assert len(messages) == 1
    return done.stderr


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1", "trainer.learning_rate=-1", "trainer.fsdp=full_shard", "collect.vllm={}", "prompts.test={}",
        "verifier={type: exact, marker: ####}",
    ],
    ids=lambda override: override[:40],
)  # fmt: skip
def test_check_and_run_refuse_alike(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # accelerate takes settings of FSDP from there
    refused(tmp_path, override)
    assert list(tmp_path.iterdir()) == []


def with_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[max(weights)][-1] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_template(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return change


POLICIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nan": (with_nan, "not all finite numbers"),
    "raises": (with_template("{{ raise_exception('not so') }}"), ": not so"),
    "syntax": (with_template("{% if %}"), "template refuses the prompt"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "the model at"),
    "config": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot be loaded"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("token*")], "tokenizer"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "the tokenizer at"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_cannot_be_used_is_refused_before_anything_is_sampled(name: str, tmp_path: Path) -> None:
    change, message = POLICIES[name]
    shutil.copytree(POLICY_DIR, tmp_path / "policy")
    change(tmp_path / "policy")
    assert message in refused(tmp_path, f"policy.path={tmp_path / 'policy'}", "prompts.chat=true")
    assert not (tmp_path / "runs" / "quickstart" / "trajectories").exists()


def test_a_claimed_folder_is_refused_by_check_too(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "quickstart"
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "manifest.json").write_text("{}")
    assert "exists and is not a run" in refused(tmp_path)
    for text in ("", "[]", "[" * 100_000):
        (folder / "config.json").write_text(text)
        assert "Fix: delete" in refused(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be used" in refused(tmp_path, "run_dir=file")
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "runs cannot be written to" in refused(tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), "runs/x: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: Permission denied"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
        (MemoryError("Unable to allocate 9 TiB"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_an_error_of_the_machine_is_explained(error: Exception, message: str) -> None:
    assert shell.machine_error(error).startswith(message)
    assert "\nFix: " in shell.machine_error(error)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), OSError("x"), ConnectionError(1, "x")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert shell.machine_error(error) == ""


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_file_of_a_run_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=str(path)):
        read_sealed(path)
    path.write_bytes(content + b"\n{}\n")
    with pytest.raises(ArtifactError, match=str(path)):
        Ledger(path).entries()


def test_a_damaged_table_of_a_comparison_is_named(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = tmp_path / "results.parquet"
    pq.write_table(RESULTS.empty_table(), path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(ArtifactError):  # some bytes change nothing
            read_results(path)
    path.write_bytes(whole[: len(whole) // 2])
    cropi_error("compare", "--results", str(path), cwd=tmp_path)
