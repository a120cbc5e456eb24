"""The cost and fidelity of reading influence are measured as the script says."""

import json
import sys

import pytest
import reading


@pytest.mark.parametrize("command", ["cost", "memory", "fidelity"])
def test_it_measures_the_built_in_policy(command, monkeypatch, capsys):
    monkeypatch.setattr(reading, "ROUNDS", 2)
    monkeypatch.setattr(reading, "MEMORY_ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["reading.py", command, "--rows", "4", "--tokens", "8", "--sets", "2"])
    reading.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if command == "cost":
        assert lines[0]["share_read"] == pytest.approx(1)
        assert lines[0]["ratio"] > 0
    elif command == "memory":
        assert lines[0]["plain_mib"] > 0
        assert 0.5 < lines[0]["ratio"] < 5
    else:
        assert [line["rank"] for line in lines] == [4, 8, 16, 32, 64]
        assert lines[-1]["spearman"] > 0.9
