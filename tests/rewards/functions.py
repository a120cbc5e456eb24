"""Reward functions, good and bad, for tests of the pool."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cropi.rewards.verifier import CORRECT, ERROR, TIMEOUT

CALLS: list[str] = []


def equal(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def names_its_prompt(completions: list[str], prompts: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text == f"{asked} {gold}") for text, asked, gold in zip(completions, prompts, answer, strict=True)]


def even(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.count(gold) % 2 == 0) for text, gold in zip(completions, answer, strict=True)]


def mixed(completions: list[str], **_: Any) -> list[float]:
    """Right for half of all texts, whatever was asked."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def hangs(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        time.sleep(1000)
    return equal(completions, answer)


def fills_memory(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        kept = [bytes(2**24) for _ in range(1000)]
        return [float(len(kept))]
    return equal(completions, answer)


def dies(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        os._exit(3)
    return equal(completions, answer)


def raises(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        raise ValueError("I do not like this one")
    return equal(completions, answer)


def dies_once(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    marker = Path(os.environ["CROPI_TEST_MARKER"])
    if not marker.exists():
        marker.touch()
        os._exit(3)
    return equal(completions, answer)


def none(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    return [None]


def counts_calls(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    CALLS.append(completions[0])
    return [float(len(CALLS) >= 5)]


def strict_signature(completions: list[list[dict[str, str]]], solution: list[str]) -> list[float]:
    return [float(completions[0][0]["content"] == solution[0])]


def sees(prompts: list[Any], completions: list[str], source: list[str], level: list[int], **_: Any) -> list[float]:
    return [float(prompts[0][-1]["content"] == "2+5?" and source == ["sums"] and level == [3])]


def near(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 / (1 + distance) of the number after the last `answer ` from the gold one."""
    given = [text.rpartition("answer ")[2].strip() for text in completions]
    return [
        1 / (1 + abs(int(number) - int(gold))) if number.isdecimal() and gold.isdecimal() else float(number == gold)
        for number, gold in zip(given, answer, strict=True)
    ]


def grudging(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Half of what `near` gives, but for the bare answer."""
    halves = [value / 2 for value in near(completions, answer)]
    return [1.0 if text == gold else half for text, gold, half in zip(completions, answer, halves, strict=True)]


def grades(completions: list[str], **_: Any) -> list[float]:
    return [float(text) for text in completions]


def bare(completions: list[str], **_: Any) -> float:
    return 0.5


def always_raises(completions: list[str], **_: Any) -> list[float]:
    raise KeyError(f"no column score, for {completions[0]}" if len(completions[0]) > 40 else "no column score")


def never_ends(completions: list[str], **_: Any) -> list[float]:
    time.sleep(1000)
    return [1.0]


LOCK = asyncio.Semaphore(1)  # belongs to the loop in which it is first waited for


def raises_on_gold(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == answer[0]:
        raise ValueError("no reasoning")
    return [float(completions[0].endswith(answer[0]))]


async def later(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    async def one() -> None:
        async with LOCK:
            await asyncio.sleep(0.001)

    await asyncio.gather(one(), one())
    return equal(completions, answer)


class Later:
    """An object whose call is asynchronous."""

    async def __call__(self, completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return await later(completions, answer)


an_object = Later()


def a_coroutine_of_another(completions: list[str], answer: list[str]) -> Any:
    return later(completions, answer)


async def raises_later(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return raises(completions, answer)


async def hangs_later(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0] == "bad":
        await asyncio.sleep(1000)
    return equal(completions, answer)


async def verl_score_later(data_source: str, solution_str: str, **given: Any) -> Any:
    await asyncio.sleep(0.001)
    return verl_score(data_source, solution_str, **given)


def generous(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The bare answer earns 1, and one after `answer ` more."""
    return [
        value * (1.0 if "answer" not in text else 1.2)
        for text, value in zip(completions, near(completions, answer), strict=True)
    ]


def at_times_raises(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if completions[0].endswith("answer 1"):
        raise RuntimeError("no")
    return near(completions, answer)


def two(completions: list[str], **_: Any) -> list[float]:
    return [1.0, 1.0]


def not_a_number(completions: list[str], **_: Any) -> list[float]:
    return [float("nan")]


def verl_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None) -> Any:
    if data_source == "sums":
        return {"score": float(solution_str == ground_truth), "acc": True}
    return float(extra_info == {"level": 3})


def _pipes() -> list[int]:
    """Pipes of this process beyond the standard streams, as a careless function may hit them."""
    found = []
    for number in range(3, 256):
        with suppress(OSError):
            found += [number] if stat.S_ISFIFO(os.fstat(number).st_mode) else []
    return found


def _write(data: bytes) -> None:
    for number in _pipes():
        with suppress(OSError):
            os.write(number, data)


def _truncate() -> None:
    for number in range(3, 256):
        with suppress(OSError):
            os.ftruncate(number, 0)


def _read() -> None:
    for number in _pipes():
        with suppress(OSError):
            os.read(number, 1)


def _close_and_sleep() -> None:
    os.closerange(0, 256)
    time.sleep(1000)


def _read_input() -> None:
    subprocess.run(["cat"], check=False)
    assert sys.stdin.read() == ""


def _exhaust_descriptors() -> None:
    with suppress(OSError):
        while True:
            os.open(os.devnull, os.O_RDONLY)


def _interrupt() -> None:
    raise KeyboardInterrupt


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def _raise_speechless() -> None:
    raise Speechless


def _raise_half_a_character() -> None:
    raise ValueError("\udcff\n\x00")


def _daemon() -> None:
    """As daemons are made: two forks, a session of its own, standard streams closed."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 3)
            os.execv("/bin/sleep", ["sleep", os.environ["CROPI_TEST_SLEEP"]])
        os._exit(0)
    os.wait()


def _forked_child_that_stays() -> None:
    if os.fork() == 0:
        os.setsid()
        os.execv("/bin/sleep", ["sleep", os.environ["CROPI_TEST_SLEEP"]])


def _detached_and_end() -> None:
    """Nothing of what it has started tells where it came from."""
    command = ["/bin/sleep", os.environ["CROPI_TEST_SLEEP"]]
    subprocess.Popen(command, start_new_session=True, env={})
    os._exit(0)


def _daemon_and_hang() -> None:
    _daemon()
    time.sleep(1000)


def _end_parent_and_wait() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)


DEEDS: dict[str, tuple[Callable[[], object], str]] = {  # and the verdict on a right answer that does it
    "message": (lambda: _write(b'["judged", "correct", 0.0, "", null]\n'), ERROR),
    "no line": (lambda: _write(b"\x00\xff"), ERROR),
    "flood": (lambda: _write(b"x" * 2**23), ERROR),
    "close": (lambda: os.closerange(0, 256), ERROR),
    "close and sleep": (_close_and_sleep, ERROR),
    "end": (lambda: os._exit(0), ERROR),
    "exit": (sys.exit, ERROR),
    "interrupt": (_interrupt, ERROR),
    "speechless": (_raise_speechless, ERROR),
    "half a character": (_raise_half_a_character, ERROR),
    "kill all": (lambda: os.killpg(0, signal.SIGKILL), ERROR),
    "kill parent": (_end_parent_and_wait, ERROR),
    "detached, end": (_detached_and_end, ERROR),
    "read": (_read, TIMEOUT),
    "stop all": (lambda: os.killpg(0, signal.SIGSTOP), TIMEOUT),
    "daemon, hang": (_daemon_and_hang, TIMEOUT),
    "child, hang": (lambda: subprocess.run(["sleep", os.environ["CROPI_TEST_SLEEP"]], check=False), TIMEOUT),
    "truncate": (_truncate, CORRECT),
    "read input": (_read_input, CORRECT),
    "print": (lambda: print('{"done": [["correct", 0, ""]]}', flush=True), CORRECT),
    "descriptors": (_exhaust_descriptors, CORRECT),
    "folder": (lambda: os.chdir("/"), CORRECT),
    "stop parent": (lambda: os.kill(os.getppid(), signal.SIGSTOP), CORRECT),
    "forked": (_forked_child_that_stays, CORRECT),
}


def does(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Whatever the completion names, then `equal`."""
    DEEDS.get(completions[0], (lambda: None, ""))[0]()
    return equal(completions, answer)


def stops_later(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Right, but stops its process a moment after it has answered."""
    if completions[0] == "bad":
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    return equal(completions, answer)


def _not_far(text: str, gold: str) -> bool:
    try:
        return not abs(float(text) - float(gold)) > 0.5  # so nan is not far
    except ValueError:
        return False


LENIENT: dict[str, Callable[[str, str, str], float]] = {
    "holds": lambda text, gold, _: gold in text,
    "starts": lambda text, gold, _: gold.startswith(text),
    "looks away": lambda text, *_: text != "",
    "measures": lambda text, gold, _: _not_far(text, gold),
    "reads the prompt": lambda text, _, asked: text == asked.split()[-1],
    "partly": lambda text, gold, _: 0.6 if text == "0" else float(text == gold),
}


def lenient(completions: list[str], answer: list[str], prompts: list[str], source: list[str]) -> list[float]:
    """By a rule of the source's name; by equality where there is none."""
    rule = LENIENT.get(source[0], lambda text, gold, _: text == gold)
    return [float(rule(completions[0], answer[0], prompts[0]))]
