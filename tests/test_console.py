import pytest

from cropi import console


def test_plain_lines_carry_the_time_left_and_thin_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(console, "_terminal", lambda: None)
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
