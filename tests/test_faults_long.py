"""Short runs of the scripts benchmarks/faults.py and benchmarks/faults_app.py, whose long ones are in their report."""

import json

import pytest

from benchmarks import faults, faults_app, faults_fuzz
from multilora.web.service import guard

pytestmark = pytest.mark.long


def test_apply_and_restore():
    found = faults.restore(300)
    assert found["cycles"] == found["applied"] == 300
    assert found["bits"] == 0
    assert found["wrong"] == []


def test_load_and_unload():
    assert faults.loads(150, warm=60)["growth"] < faults.GROWTH_MB


def test_fresh_mutants(tmp_path):
    state = faults.mutants(400, cores=1, path=tmp_path / "state.json", piece=200)
    assert (state["done"], state["found"]) == ([[0, 400]], [])
    assert json.loads((tmp_path / "state.json").read_text()) == state


class Alone:
    """A pool of this process."""

    Pool = __enter__ = lambda self, *_: self
    __exit__ = lambda self, *_: None  # noqa: E731
    imap_unordered = staticmethod(map)


def test_mutants_add_up_and_where_something_was_found_they_are_done_again(tmp_path, monkeypatch):
    asked, bad = [], {130: "hang", -1: "the pipeline changed"}

    def run(seed, first, count):
        asked.append((first, count))
        found = [(seed, n, what) for n, what in bad.items() if first <= n < first + count or (n < 0 and first == 50)]
        return {"found": found, "slowest": 0.1, "grown": 2**20, "accepted": count // 2, "cpu": 1.0}

    monkeypatch.setattr(faults.multiprocessing, "get_context", lambda kind: Alone())
    monkeypatch.setattr(faults.fuzz_files, "run", run)
    path = tmp_path / "state.json"
    state = faults.mutants(220, path=path, piece=50)
    assert asked == [(0, 50), (50, 50), (100, 50), (150, 50), (200, 20)]
    assert state["done"] == [[0, 50], [150, 220]]
    assert [f[:2] for f in faults.unmended(state)] == [[130, "hang"], [50, "the pipeline changed"]][::-1]
    asked.clear()
    del bad[-1]  # mended
    state = faults.mutants(130, path=path, piece=100)
    assert asked == [(50, 100), (220, 30)]
    assert [f[:2] for f in faults.unmended(state)] == [[50, "the pipeline changed"], [130, "hang"]], "neither is done"
    bad.clear()
    state = faults.mutants(100, path=path, piece=100)
    assert state["done"] == [[0, 250]]
    assert faults.unmended(state) == []
    assert len(state["found"]) == 2
    assert [run["mutants"] for run in state["runs"]] == [220, 130, 100]


def test_a_run_that_is_stopped_keeps_its_finished_pieces(tmp_path, monkeypatch):
    def run(seed, first, count):
        if first == 60:
            raise KeyboardInterrupt
        return {"found": [], "slowest": 0.1, "grown": 0, "accepted": 0, "cpu": 1.0}

    monkeypatch.setattr(faults.multiprocessing, "get_context", lambda kind: Alone())
    monkeypatch.setattr(faults.fuzz_files, "run", run)
    assert faults.mutants(200, path=tmp_path / "state.json", piece=20)["done"] == [[0, 60]]
    assert json.loads((tmp_path / "state.json").read_text())["done"] == [[0, 60]]


def test_eight_clients_at_once():
    """A tenth of them hang up; every picture that is finished is that of a lone run."""
    found = faults_app.clients(64, count=8, warm=16)
    assert found["right"] + found.get("cut", 0) == 64, found
    assert found["right"] >= 50
    assert found["stuck"] == 0
    assert found["right after it"] == 1


def test_more_clients_than_the_queue_takes():
    found = faults_app.flood(80, waiting=20)
    assert found["other"] == found["stuck"] == 0
    assert found["clear"] == found["refused"] > 40
    # Before gradio is asked, but for who enters while the worker has yet to take the first one from the line.
    assert found["refused"] - 2 <= found["door"] <= found["refused"]
    assert found["drawn"] >= 20
    assert found["after"] == "complete"
    assert found["latest"] < 2 * faults_app.REFUSED_SECONDS  # twice: the machine may have other work


def test_calls_of_any_endpoint():
    found = faults_fuzz.fuzz(300, seed=2)
    assert found["found"] == []
    assert set(found["codes"]) > {200, 404, 422}


def test_the_calls_find_what_the_guard_keeps_out(monkeypatch):
    """Without it there are mistakes of the server to be found."""

    async def open_door(self, scope, receive, send):
        await self.app(scope, receive, send)

    monkeypatch.setattr(guard.Guard, "__call__", open_door)
    found = faults_fuzz.fuzz(120, seed=2)["found"]
    assert any("status 500" in wrong for *_, wrong in found)
