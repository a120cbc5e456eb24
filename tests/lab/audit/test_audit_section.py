"""The audit's section, from a made-up audit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from cropi.artifacts import write_sealed
from cropi.errors import ArtifactError
from cropi.lab.audit.section import TITLE, agreement_by_count, audit
from cropi.report.blocks import Section, Table, Text
from cropi.report.markdown import markdown
from cropi.report.report import html


def measured(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def made_up(stored: float) -> dict[str, Any]:
    """One policy and one validation set; the ceiling's interval is 0.5 to 0.7."""
    names = ("spearman", "top_overlap", "sign_agreement")
    overall = {name: measured(0.4, 0.3, 0.5) for name in names} | {"pearson_without_noise": None}
    parts = {name: measured(0.125, None, None) for name in ("bias", "variance", "slope")}
    at = {
        "trajectories": 8,
        "off_policy": {name: measured(stored, stored - 0.1, stored + 0.1) for name in names},
        "ceiling": {name: measured(0.6, 0.5, 0.7) for name in names},
    }
    cosines = {"median": 0.25, "above_0.6": 0.125}
    return {
        "settings": {"fraction": 0.1},
        "stages": [
            {
                "stage": 3,
                "prompts": 160,
                "drift": {"ratio_ess": 0.75, "kl": 0.1234},
                "gradient_cosine": {"off_policy": cosines, "ceiling": cosines},
                "sets": {
                    "sum": {
                        "overall": overall,
                        "by_trajectories": [at | {"trajectories": 4}, at],
                        "variants": {"token": parts | {"overall": overall}},
                        "direction_cosine": {"off_policy": 0.5, "ceiling": 0.75},
                        "projection": {"top_overlap": 0.9375},
                    }
                },
            }
        ],
    }


def write(folder: Path, value: Any) -> Path:
    write_sealed(folder / "audit.json", value)
    return folder


def test_no_audit_no_section(tmp_path: Path) -> None:
    assert audit(tmp_path) == []


@pytest.mark.parametrize(
    ("stored", "judgement"),
    [(0.3, "more than noise on sum: fresher trajectories would help"), (0.55, "That is within noise")],
)
def test_the_lead_says_what_would_help(tmp_path: Path, stored: float, judgement: str) -> None:
    lead = audit(write(tmp_path, made_up(stored)))[0]
    assert isinstance(lead, Text)
    assert f"with fresh ones is {stored:.2f} on sum, where as many fresh ones reach 0.60." in lead.text
    assert judgement in lead.text


def test_tables_hold_the_numbers(tmp_path: Path) -> None:
    tables = [block for block in audit(write(tmp_path, made_up(0.3))) if isinstance(block, Table)]
    agreement, variants, gradients = (table.rows[0] for table in tables)
    assert agreement[:5] == ["3", "sum", "8", "0.30 [0.20, 0.40]", "0.60 [0.50, 0.70]"]
    assert agreement[-2:] == ["0.75", "0.123"]
    assert variants[:4] == ["3", "sum", "token", "0.12 [–, –]"]
    assert gradients == ["3", "160", "0.25", "12 %", "0.25", "12 %", "0.50", "0.75", "0.94"]
    for table in tables:
        assert all(len(row) == len(table.header) for row in table.rows)


def test_it_is_drawn_and_written(tmp_path: Path) -> None:
    found = made_up(0.3)
    assert agreement_by_count(found["stages"]) is not None
    blocks = audit(write(tmp_path, found))
    for text in (html("run", [Section(TITLE, blocks)]), markdown("run", [Section(TITLE, blocks)])):
        assert TITLE in text
        assert "0.60 [0.50, 0.70]" in text or r"0.60 \[0.50, 0.70\]" in text


def test_nothing_to_draw(tmp_path: Path) -> None:
    found = copy.deepcopy(made_up(0.3))
    found["stages"][0]["sets"]["sum"]["by_trajectories"] = []
    assert agreement_by_count(found["stages"]) is None
    lead = audit(write(tmp_path, found))[0]
    assert isinstance(lead, Text)
    assert "Too few trajectories" in lead.text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"stages": [], "settings": {"fraction": 1}}', '{"stages": [{}], "settings": {"fraction": 1}}'],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"audit\.json"):
        audit(tmp_path)
