"""What a person sees of a run that goes on: the line of a stage, the page that reloads itself, and `cropi watch`."""

import re
from pathlib import Path

import pytest
from tests.report.conftest import WINNING, write_evaluation
from tests.runs import SMALL, cropi_ok

from cropi import pipeline
from cropi.cli import runs
from cropi.report.summary import stage_line, summarise
from cropi.run_folder import RunFolder
from cropi.streams import append_jsonl


def line_of(space, stage):
    return stage_line(space, summarise(space.config, space), stage)


def test_the_line_of_a_stage_by_hand(finished):
    """Stages of 4 steps of 2 s. Stage 0: near 3 of 4, far 1 of 2; one prompt of each source; 10 + 3 + 0.5 s beside."""
    assert line_of(finished, 0) == (
        "stage 0 (1 of 2) · accuracy 0.62, was 0.12 · chose sum 33 %, swaps 33 %, sort 33 %"
        " · 21.5 s, 63 % beside training"
    )
    assert line_of(finished, 1).startswith("stage 1 (2 of 2) · accuracy 1.00, was 0.62 · chose ")
    assert line_of(finished, 1).endswith(" · 11.5 s, 30 % beside training")


def test_a_stage_whose_batches_were_chosen_one_by_one_counts_their_places(fabricate):
    space = fabricate(strategy="cropi", evaluations={}, trained=False)
    line = {"batch": 0, "step": 0, "stage": 0, "asked_at": 0, "why": ["uniform"] * 4}
    append_jsonl(space.stages.choices, line | {"prompt_ids": ["p000", "p000", "p003", "p001"]})
    assert line_of(space, 0).endswith("chose sum 75 %, swaps 25 %")


def test_full_chooses_nothing(fabricate):
    assert "· all 12 prompts ·" in line_of(fabricate(strategy="full", evaluations={8: WINNING[8]}), 0)


def test_a_run_says_a_line_for_every_stage_and_rewrites_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(run, **options):
        summary = make(run, **options)
        seen.append((summary.steps, 'http-equiv="refresh"' in (run.folder / "report.html").read_text(encoding="utf-8")))
        return summary

    make = pipeline.make_report
    monkeypatch.setattr(pipeline, "make_report", noted)
    done = cropi_ok("run", "quickstart", *SMALL, "select.strategy={type: random}", cwd=tmp_path)
    assert seen == [(0, True), (2, True), (6, False)]  # three steps a stage, evaluated every two
    told = re.findall(
        r"^stage (\d) \(\d of 2\) · accuracy 0\.\d\d, was 0\.\d\d · chose ", done.stderr, flags=re.MULTILINE
    )
    assert told == ["0", "1"]


def test_watch_follows_a_run_to_its_end(fabricate, monkeypatch, capsys):
    """Locked, with the first stage evaluated; while `watch` sleeps, the second is trained and the run ends."""
    space = fabricate(evaluations={2: WINNING[2], 4: WINNING[4]})
    owner = RunFolder(space.config)
    owner.lock()

    def slept(_):
        for step in (6, 8):
            write_evaluation(
                space.stages.evaluations, step, dict(zip(("near", "far", "other"), WINNING[step], strict=True))
            )
        owner.unlock()

    opened = []
    monkeypatch.setattr(runs.time, "sleep", slept)
    monkeypatch.setattr(runs.webbrowser, "open", opened.append)
    (space.folder / "report.html").write_text("")
    runs.watch(str(space.folder), open_page=True)
    out, err = capsys.readouterr()
    assert out == f"report: {space.folder / 'report.html'}\n"
    assert opened == [(space.folder / "report.html").as_uri()]
    assert [line[:7] for line in err.splitlines() if line.startswith("stage")] == ["stage 0", "stage 1"]
    assert "nobody works" not in err


def test_watch_ends_where_nobody_works_on_the_run(fabricate, capsys):
    runs.watch(str(fabricate(evaluations={2: WINNING[2]}).folder))
    assert "nobody works on the run any more, after 8 of 8 steps" in capsys.readouterr().err
