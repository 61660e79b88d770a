"""The journal of measurements: what is there stays, and each line says when, on what and in what time it was made."""

import json
import time
from datetime import UTC, datetime

import pytest

from multilora.lab import journal as journals
from multilora.lab.journal import Journal, ran
from multilora.lab.machine import machine, processor


def test_a_line_has_the_time_since_the_line_before_in_whatever_journal(tmp_path):
    one, other = Journal(tmp_path / "one.jsonl"), Journal(tmp_path / "deep" / "other.jsonl")
    one.add("a/1", right=3)
    time.sleep(0.3)
    other.add("b/1", right=4)
    one.add("a/2", right=5)
    assert other.lines["b/1"]["ran"]["seconds"][0] == pytest.approx(0.3, abs=0.15)
    assert other.lines["b/1"]["ran"]["seconds"][1] < 0.2  # it slept
    assert one.lines["a/2"]["ran"]["seconds"][0] < 0.2
    assert one.lines["a/1"]["ran"]["on"] == datetime.now(UTC).date().isoformat()
    assert Journal(one.path).lines == one.lines
    assert [e["right"] for e in Journal(one.path).of("a")] == [3, 5]


def test_what_went_before_a_restarted_clock_belongs_to_no_line(tmp_path):
    kept = Journal(tmp_path / "j.jsonl")
    time.sleep(0.3)
    journals.restart_clock()
    kept.add("a/1")
    assert kept.lines["a/1"]["ran"]["seconds"][0] < 0.2


def line(on, wall, cpu, **facts):
    return {"key": on, "ran": {"on": on, "machine": "a CPU, 2 cores", "seconds": [wall, cpu]}, **facts}


def test_runs_are_summed_with_days_and_machines():
    found = ran([line("2026-11-25", 60, 90), line("2026-11-27", 30, 60, device="H100"), line("2026-11-26", 0, 0)])
    assert found == ["2026-11-25 to 2026-11-27", "a CPU, 2 cores; H100", "1.5", "2.5", "3"]
    assert ran([line("2026-11-25", 6, 9, device="CPU")]) == ["2026-11-25", "a CPU, 2 cores", "0.1", "0.1", "1"]


def test_lines_of_before_are_said_not_guessed():
    found = ran([{"key": "a"}, {"key": "b", "device": "H100"}, line("2026-11-25", 60, 60)])
    assert found == ["2026-11-25", "a CPU, 2 cores; H100", "1.0", "1.0", "3, 2 of them without date and time"]
    assert ran([{"key": "a"}]) == ["", "", "", "", "1, 1 of them without date and time"]


def test_the_machine_is_named(tmp_path):
    assert processor() in machine()
    assert " cores, torch 2." in machine()
    kept = Journal(tmp_path / "j.jsonl")
    kept.add("a")
    assert json.loads(kept.path.read_text())["ran"]["machine"] == machine()
