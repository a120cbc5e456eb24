"""The report of an audit, from a made-up audit."""

from __future__ import annotations

from typing import Any

import pytest

from cropi.lab.audit.audit_report import agreement_by_count, audit_sections
from cropi.report.blocks import Table


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


@pytest.mark.parametrize(("stored", "judgement"), [(0.3, "fresher trajectories would"), (0.55, "within noise")])
def test_the_headline_says_what_would_help(stored: float, judgement: str) -> None:
    lead = audit_sections(made_up(stored))[0].blocks[0]
    assert f"{stored:.2f} of at most 0.60 on `sum`" in lead.text
    assert judgement in lead.text


def test_tables_hold_the_numbers() -> None:
    blocks = [block for section in audit_sections(made_up(0.3)) for block in section.blocks]
    tables = [block for block in blocks if isinstance(block, Table)]
    agreement, variants, gradients = (table.rows[0] for table in tables)
    assert agreement[:5] == ["3", "sum", "8", "0.30 [0.20, 0.40]", "0.60 [0.50, 0.70]"]
    assert agreement[-2:] == ["0.75", "0.123"]
    assert variants[:4] == ["3", "sum", "token", "0.12"]
    assert gradients == ["3", "160", "0.25", "12.5 %", "0.25", "12.5 %", "0.50", "0.75", "0.94"]
    for table in tables:
        assert all(len(row) == len(table.header) for row in table.rows)


def test_without_enough_trajectories_nothing_is_drawn() -> None:
    found = made_up(0.3)
    assert agreement_by_count(found["stages"]) is not None
    found["stages"][0]["sets"]["sum"]["by_trajectories"] = []
    assert agreement_by_count(found["stages"]) is None
    lead = audit_sections(found)[0].blocks[0]
    assert "Too few trajectories" in lead.text
