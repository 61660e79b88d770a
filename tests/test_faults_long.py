"""Short runs of the scripts benchmarks/faults.py and benchmarks/faults_app.py, whose long ones are in their report."""

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


def test_fresh_mutants():
    found = faults.mutants(400, cores=1)
    assert found["found"] == []
    assert found["count"] == 400


def test_eight_clients_at_once():
    """A tenth of them hang up; every picture that is finished is that of a lone run."""
    found = faults_app.clients(64, count=8, warm=16)
    assert found["right"] + found.get("cut", 0) == 64, found
    assert found["right"] >= 50
    assert found["stuck"] == 0
    assert found["right after it"] == 1


def test_more_clients_than_the_queue_takes():
    found = faults_app.flood(60, waiting=45)
    assert found["other"] == found["stuck"] == 0
    assert found["clear"] == found["refused"] > 0
    assert found["drawn"] >= 45
    assert found["after"] == "complete"


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
