"""The cost of the curriculum in a TRL script is measured as the script says."""

import json
import sys

import script_overhead


def test_it_trains_both_ways_on_recorded_completions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script_overhead.py", "--steps", "2", "--rounds", "1"])
    monkeypatch.setattr(script_overhead, "RECORDED", 2)
    script_overhead.main()
    (line,) = [json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith('{"plain"')]
    assert line["ratio"] > 1
    assert line["plain"] > 0
