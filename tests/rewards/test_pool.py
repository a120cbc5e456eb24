"""The pool of killable processes: order, limits, retries, verdicts of its own, and hostile answers by the hundred."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cropi.config import VerificationConfig
from cropi.errors import ConfigError
from cropi.rewards.pool import Pool, judge_of
from cropi.rewards.verifier import CORRECT, ERROR, TIMEOUT, UNPARSEABLE_GOLD, VERDICTS, WRONG, Answered
from cropi.rewards.verifiers.boxed import BoxedVerifier
from cropi.rewards.verifiers.exact_text import ExactVerifier
from cropi.rewards.verifiers.gsm8k import Gsm8kVerifier
from cropi.rewards.verifiers.math_answer import MathVerifier
from cropi.rewards.verifiers.numeric import NumericVerifier
from cropi.rewards.verifiers.python_function import FunctionVerifier
from tests.rewards import functions, hostile

LIMITS = VerificationConfig(seconds=1.0, memory_mb=256)
EXACT = ExactVerifier(type="exact")


def function(name: str) -> FunctionVerifier:
    return FunctionVerifier(type="function", path=f"tests.rewards.functions.{name}")


def test_verdicts_come_in_the_order_of_the_rows() -> None:
    rows = [Answered(str(n), str(n if n % 3 else n + 1)) for n in range(500)]
    with Pool(EXACT, LIMITS) as pool:
        verdicts = [judgement.verdict for judgement in pool(rows)]
    assert verdicts == [CORRECT if n % 3 else WRONG for n in range(500)]
    assert pool.counts == {CORRECT: 333, WRONG: 167}


def test_grades_come_out_of_the_processes_and_what_is_outside_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    graded = function("grades").model_copy(update={"graded": True})
    with Pool(graded, LIMITS) as pool:
        found = pool([Answered(text, "7") for text in ("0.25", "1", "0", "3", "no number")])
    assert [one.verdict for one in found] == [WRONG, CORRECT, WRONG, ERROR, ERROR]
    assert [one.reward for one in found] == [0.25, 1, 0, 0, 0]
    assert "the score 3.0 is outside 0 to 1" in found[3].note
    told = capsys.readouterr().err
    assert told.count("the verifier failed on a completion") == 1
    assert "could not convert string to float: 'no number'" in told  # with a score out of range the run ends
    with Pool(graded, LIMITS) as pool:
        pool([Answered("3", "7")])
    assert capsys.readouterr().err == ""


def test_a_process_that_died_while_idle_is_replaced_and_no_row_is_blamed() -> None:
    with Pool(EXACT, LIMITS) as pool:
        pool([Answered(str(n), "7") for n in range(200)])
        for worker in pool._workers:
            worker.process.kill()
            worker.process.wait()
        assert [one.verdict for one in pool([Answered("7", "7"), Answered("8", "7 ")])] == [CORRECT, WRONG]
        assert pool.kills <= 1  # one may have died while it started


def test_a_thread_that_asked_first_may_end() -> None:
    """The system ends a process with the thread that started it."""
    with Pool(EXACT, LIMITS) as pool:
        asking = threading.Thread(target=lambda: pool([Answered("7", "7")]))
        asking.start()
        asking.join()
        time.sleep(0.2)
        assert not any(worker.gone for worker in pool._workers)
        assert pool([Answered("8", "8")])[0].verdict == CORRECT


def test_an_answer_that_ended_two_processes_is_remembered_unless_the_verifier_is_yours(monkeypatch):
    limits = LIMITS.model_copy(update={"seconds": 0.3, "processes": 1})
    bad = Answered("bad", "7")
    with Pool(function("hangs"), limits) as pool:
        assert [pool([bad])[0].verdict for _ in range(2)] == [TIMEOUT] * 2
        assert pool.kills == 4
    monkeypatch.setattr(FunctionVerifier, "pure", True)  # as those of libraries are
    for name, verdict in (("hangs", TIMEOUT), ("dies", ERROR)):
        with Pool(function(name), limits) as pool:
            first, twin = pool([bad, bad])
            assert first == twin == pool([bad])[0]  # the very same seconds
            assert (first.verdict, pool.kills) == (verdict, 2)


def test_a_function_that_misbehaves_costs_its_own_row_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = f"300.{secrets.randbelow(10**9):09}"
    monkeypatch.setenv("CROPI_TEST_SLEEP", sleep)
    deeds = functions.DEEDS | {str(n): (None, CORRECT) for n in range(30)}
    rows = [Answered(deed, deed) for deed in sorted(deeds, key=lambda deed: deed[::-1])]  # mixed
    with Pool(function("does"), LIMITS) as pool:
        judged = pool(rows)
        assert {row.answer: one.verdict for row, one in zip(rows, judged, strict=True)} == {
            deed: verdict for deed, (_, verdict) in deeds.items()
        }
    assert [p for p in psutil.process_iter(["cmdline"]) if sleep in (p.info["cmdline"] or [])] == []


def test_a_process_that_is_stopped_between_two_calls_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """More text than a pipe holds waits for it, and no row has begun."""
    monkeypatch.setattr("cropi.rewards.pool.GRACE_S", 0.5)
    with Pool(function("stops_later"), LIMITS.model_copy(update={"processes": 1})) as pool:
        pool([Answered("bad", "bad")])
        time.sleep(0.5)
        long = "7" * 500_000
        assert [one.verdict for one in pool([Answered(long, long), Answered("8", "7")])] == [CORRECT, WRONG]
        assert pool.kills == 1


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("hangs", TIMEOUT), ("hangs_later", TIMEOUT), ("fills_memory", ERROR), ("dies", ERROR), ("raises", ERROR),
        ("raises_later", ERROR),
    ],
)  # fmt: skip
def test_a_bad_row_costs_its_own_verdict_only(name: str, verdict: str) -> None:
    """Those before, beside and after it in the same chunk are judged as if it were not there."""
    rows = [Answered("bad" if n in (3, 40) else str(n), str(n)) for n in range(60)]
    with Pool(function(name), LIMITS) as pool:
        judged = pool(rows)
        again = pool([Answered("5", "5")])
    assert [one.verdict for one in judged] == [verdict if n in (3, 40) else CORRECT for n in range(60)]
    assert [one.verdict for one in again] == [CORRECT]
    assert pool.kills == (0 if name.startswith("raises") else 4)  # each twice
    assert judged[3].note


def test_a_row_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROPI_TEST_MARKER", str(tmp_path / "seen"))
    with Pool(function("dies_once"), LIMITS) as pool:
        assert pool([Answered("7", "7")])[0].verdict == CORRECT
        assert pool.kills == 1


def test_equal_rows_are_judged_once_unless_the_verifier_is_a_function_of_yours() -> None:
    rows = [Answered("7", "7")] * 9
    with Pool(EXACT, LIMITS) as pool:
        first = pool(rows)
        assert pool(rows) == first  # the very same seconds: remembered
        assert pool.counts == {CORRECT: 18}
    with Pool(function("counts_calls"), LIMITS.model_copy(update={"processes": 1})) as pool:
        assert [one.verdict for one in pool(rows)] == [WRONG] * 4 + [CORRECT] * 5  # right from the fifth call on


def test_a_verifier_that_cannot_be_set_up_is_an_error_of_the_user() -> None:
    with (
        Pool(FunctionVerifier(type="function", path="no.such_thing"), LIMITS) as pool,
        pytest.raises(ConfigError) as at,
    ):
        pool([Answered("7", "7")])
    assert "no.such_thing cannot be imported" in str(at.value)
    with Pool(function("missing"), LIMITS) as pool, pytest.raises(ConfigError):
        pool([Answered("7", "7")])


def test_an_interrupt_leaves_no_process_and_a_pool_that_works() -> None:
    with Pool(function("hangs"), LIMITS.model_copy(update={"seconds": 60.0})) as pool:
        before = len(psutil.Process().children())
        threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool([Answered("bad", "7")])
        assert len(psutil.Process().children()) == before
        assert pool([Answered("7", "7")])[0].verdict == CORRECT


def test_processes_end_with_their_owner() -> None:
    """Even where it has no time to say so."""
    code = (
        "import os, psutil; from cropi.config import VerificationConfig; "
        "from cropi.rewards.verifiers.python_function import FunctionVerifier;"
        "from cropi.rewards.pool import Pool; from cropi.rewards.verifier import Answered;"
        "p = Pool(FunctionVerifier(type='function', path='tests.rewards.functions.does'), VerificationConfig());"
        "p([Answered('forked', '7')]); all = psutil.Process().children(recursive=True); assert len(all) == 3;"
        "print(*[one.pid for one in all], flush=True); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"CROPI_TEST_SLEEP": "300.456"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert len(done.stdout.split()) == 3, done.stderr
    for pid in map(int, done.stdout.split()):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(timeout=5)


def test_one_pool_serves_all_who_ask() -> None:
    assert judge_of(EXACT, LIMITS) is judge_of(EXACT, LIMITS)
    assert judge_of(EXACT, LIMITS) is not judge_of(NumericVerifier(type="numeric"), LIMITS)


VERIFIERS = (
    *(MathVerifier(type="math"), NumericVerifier(type="numeric"), ExactVerifier(type="exact", marker="is")),
    *(BoxedVerifier(type="boxed"), Gsm8kVerifier(type="gsm8k")),
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", VERIFIERS, ids=lambda config: config.type)
def test_hostile_answers(config: object, every: int, tmp_path: Path) -> None:
    """No hang, no crash, nothing run, no wrong `correct`, bounded memory, and the pool serves on after every one."""
    marker = tmp_path / "ran"
    rows = [Answered(*row) for row in hostile.rows(str(marker))][::every]
    assert len(set(rows)) >= 500 / every
    plain = Answered("so #### 7, the answer is \\boxed{7}" if config.type != "exact" else "is 7", "7")  # type: ignore[attr-defined]
    with Pool(config, LIMITS.model_copy(update={"seconds": 0.5})) as pool:  # type: ignore[arg-type]
        judged = pool(rows)
        assert {one.verdict for one in judged} <= set(VERDICTS) - {UNPARSEABLE_GOLD}
        right = [row.completion for row, one in zip(rows, judged, strict=True) if one.verdict == CORRECT]
        assert right == [text for text in right if config.type == "numeric" and _ends_in_seven(text)]  # type: ignore[attr-defined]
        assert pool([plain])[0].verdict == CORRECT
        started = [psutil.Process(worker.process.pid) for worker in pool._workers]
        processes = [process for keeper in started for process in (keeper, *keeper.children(recursive=True))]
        memory = sum(process.memory_info().rss for process in processes)
        assert memory < 2 * (LIMITS.memory_mb + 300) * 2**20
    assert not marker.exists()


def _ends_in_seven(completion: str) -> bool:
    """Whether 7 is the last number: then `numeric` may say right, whatever else stands there."""
    return re.findall(r"(?<!\^)\d+", completion)[-1] == "7"
