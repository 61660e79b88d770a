"""What the tables of goals say of a number, and what `make bench` makes of missed and failed ones."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import results
from goals import Row, Times, in_turn, shown


@pytest.mark.parametrize(
    ("measured", "bound", "spread", "least", "want"),
    [
        (1.02, 1.03, None, False, "met"), (1.03, 1.03, None, False, "met"), (1.04, 1.03, None, False, "missed"),
        (1.04, 1.03, (0.98, 1.01), False, "met within A/A"), (1.04, 1.03, (1.0, 1.2), False, "missed"),
        (1.10, 1.03, (0.98, 1.01), False, "missed"), (2.9, 2.8, None, True, "met"), (2.7, 2.8, None, True, "missed"),
        (2.7, 2.8, (0.9, 1.05), True, "met within A/A"), (5.0, None, None, False, ""), (1, 0, None, False, "missed"),
    ],
)  # fmt: skip
def test_a_bound_is_met_missed_or_within_the_spread(measured, bound, spread, least, want):
    assert Row("C1", "x", measured, bound, None, spread, least).verdict == want


def test_a_line_has_every_column():
    line = str(Row("C2", "time of x / y", 0.91234, 0.93, 0.8, (0.987, 1.012)))
    assert line == "| C2 | time of x / y | 0.912 | 0.99 to 1.01 | <= 0.93 | <= 0.8 | met |"
    assert [shown(v) for v in (0, 1.0, 12.5, 0.00012)] == ["0", "1", "12.5", "1.2e-04"]


def test_ways_run_in_turn_so_that_none_follows_itself():
    calls = []
    found = in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, 2)
    assert "".join(calls) == "abc" * 5  # the first does not count
    assert [len(each) for each in found.each.values()] == [4, 4, 4]
    times = Times({"a": [1.0, 1.0, 2.0, 3.0, 3.0, 3.0], "b": [1.0, 1.0, 8.0, 1.0, 1.0, 1.0]})
    assert times.over("b", "a") == 0.4
    assert times.spread == (1.0, 1.25)


def test_missed_counts_and_failures_are_the_exit_status_and_times_are_not(tmp_path, monkeypatch, capsys):
    def raises():
        raise RuntimeError("no model")

    parts = {
        "a.py times": (
            lambda: [Row("C3", "time of a / b", 2.0, 1.0)],
            "| C3 | time of a / b | 2 |  | <= 1 |  | missed | a.py |",
        ),
        "b.py": (lambda: [Row("C1", "operations", 2.0, 1.0)], "| C1 | operations | 2 |  | <= 1 |  | missed | b.py |"),
        "c.py": (raises, "| | **failed: RuntimeError: no model** | | | | | | c.py |"),
    }
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "gpu", lambda: "no GPU")
    monkeypatch.setattr(results, "scripts", lambda: {name: rows for name, (rows, _) in parts.items()})
    for words, status in ((["times"], 0), (["b.py"], 1), (["c.py"], 1), (["times"], 1), ([], 1)):
        monkeypatch.setattr(sys, "argv", ["results.py", *words])
        assert results.main() == status
        written = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
        there = {name for name, (_, line) in parts.items() if line in written.splitlines()}
        assert "a.py times" in there  # what is measured once stays until all is measured anew
        assert written.count("load average") == len(there)
    assert there == set(parts)
    assert written.index("operations") < written.index("time of a")  # by goal
