import io

import pytest
from rich.console import Console

from cropi import console
from cropi.errors import UserError, printable


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which stands until it is advanced; no terminal."""
    seconds = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(console, "_terminal", lambda: None)
    return seconds


def test_plain_lines_carry_the_time_left_and_thin_out(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with console.progress("score", 1000, "prompts") as bar:
        for _ in range(1000):
            clock[0] += 1.0
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "score  10/1000 prompts  16:30 left"
    assert lines[-1] == "score  1000 prompts  16:40"
    assert 30 < len(lines) < 90


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1:01"), (3600, "1:00:00"), (float("nan"), "?")]
)
def test_durations(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_the_time_left_leaves_out_what_was_done_before_and_the_first_piece(capsys, clock):
    """A training resumed at step 100 of 200 that scores for 60 s before its first step, then takes 2 s a step."""
    with console.progress("train", 200, "steps", done=100) as bar:
        clock[0] += 60.0
        bar.advance()
        for _ in range(10):
            clock[0] += 2.0
            bar.advance()
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first == "train  101/200 steps"
    assert second == "train  106/200 steps  3:08 left"


def test_the_last_line_counts_what_is_done(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    """As where a run that is watched stops before its end."""
    with console.progress("run", 8, "steps", done=2) as bar:
        bar.advance()
    assert capsys.readouterr().err == "run  3 steps  0.0 s\n"


def test_one_bar_over_all_stages_names_the_present_one(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with console.progress("train", 8, "steps", stages=2) as bar:
        for _ in range(8):
            clock[0] += 20.0
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[2] == "train  stage 1/2  3/8 steps  1:40 left"
    assert lines[3] == "train  stage 2/2  4/8 steps  1:20 left"
    assert lines[-1] == "train  8 steps  2:40"


def test_a_terminal_shows_the_stage_and_warnings_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, color_system="standard", width=100)
    monkeypatch.setattr(console, "_terminal", lambda: terminal)
    with console.progress("train", 8, "steps", done=3, stages=2) as bar:
        bar.advance()
    assert "train  stage 2/2" in shown.getvalue()
    console.warn("[b]look[/b]")
    assert "\x1b[33mwarning: [b]look[/b]\x1b[0m" in shown.getvalue()


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\rerror\u202eabc\u2066\ud800\u2028"


def test_what_a_terminal_would_act_on_is_replaced() -> None:
    shown = printable(f"a\tb\n{HOSTILE}ü\u200d→")
    assert shown.startswith("a\tb\n\ufffd]0;owned\ufffd\ufffd[2J\ufffd31m\ufffderror\ufffdabc\ufffd")
    assert shown.endswith("ü\u200d→")
    assert all(character.isprintable() or character in "\t\n\u200d" for character in shown)


def test_warnings_and_errors_are_filtered_where_they_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    console.warn(HOSTILE)
    console.say(HOSTILE)
    assert capsys.readouterr().err == f"warning: {printable(HOSTILE)}\n{printable(HOSTILE)}\n"
    assert HOSTILE not in str(UserError(HOSTILE, where=HOSTILE, fix=HOSTILE))
