"""The Weights page: what may be asked for, what it shows of a search, and the way back to Compose."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from multilora.web.background import searched
from multilora.web.search import asked, weighed
from multilora.web.searching import best, curve, search_words, table
from multilora.web.service import Limits, Refused, Service

GOOD = {"references": ["korv", "dotta"], "method": "lorahub", "score": "both", "budget": 12, "prompts": "a\n\n b ",
        "pictures": 2, "steps": 5}  # fmt: skip


@pytest.fixture(scope="module")
def service():
    with Service(engine="tests.service_engine:Stub", limits=Limits(seconds=60, prompt=100, steps=50)) as service:
        yield service


def test_the_words_of_a_search(service):
    session = service.session("ann")
    words, total = search_words(service, session, **GOOD)
    assert total == 12
    assert words == ["--lora=korv", "--lora=dotta", "--method", "lorahub", "--budget", "12", "--steps", "5", "--force",
                     "--base", "embedded", "--prompt=a", "--prompt=b", "--score", "both", "--seeds", "2"]  # fmt: skip
    words, total = search_words(service, session, **{**GOOD, "method": "learned"})
    assert total == 13  # the start is scored, too
    assert words[-4:] == ["--option", "scope=global", "--option", "form=free"]
    for changed, told in (
        ({"references": ["korv"]}, "LoRAs: choose two or more"),
        ({"references": ["korv", "../x"]}, "is not in your library"),
        ({"method": "uniform"}, "search 'uniform'"),
        ({"score": "/tmp/x.py:f"}, "score '/tmp/x.py:f'"),
        ({"budget": 401}, "budget 401: wanted 1 to 400"),
        ({"budget": "many"}, "budget 'many'"),
        ({"pictures": 9}, "pictures per prompt 9"),
        ({"steps": 51}, "steps 51"),
        ({"prompts": "x" * 101}, "at most 100 characters"),
        ({"prompts": "\n".join("abcdefghijklmnopq")}, "at most 16"),
        ({"prompts": "a <lora:/etc/x:1>"}, "chosen in the list"),
    ):
        with pytest.raises(Refused, match=told):
            search_words(service, session, **{**GOOD, **changed})


def test_a_search_while_it_runs_and_when_it_is_done(tmp_path):
    assert searched(tmp_path) == []
    assert curve(tmp_path, ["a", "b"]) is None
    assert best(tmp_path) == []
    trials = [[[0.5, 0.5], 2.0], [[1.0, 0.25], 1.0], [[0.0, 1.0], 1.5]]
    (tmp_path / "weights.state.json").write_text(json.dumps({"trials": trials}))
    assert best(tmp_path) == [1.0, 0.25]
    image = curve(tmp_path, ["a", "b"])
    assert image.height > 300
    done = [{"weights": w, "loss": loss, "penalty": 0.9 if loss == 1.0 else 0.0} for w, loss in trials]
    (tmp_path / "weights.json").write_text(json.dumps({"trials": done}))
    assert best(tmp_path) == [0.0, 1.0]  # with the price of large weights
    assert ">0.000<" in table(["a", "b"], best(tmp_path))
    assert table(["a"], []) == ""


def test_the_best_weights_go_back_to_compose(service):
    session, shell = service.session("ann"), SimpleNamespace(service=service)
    recipe = weighed(shell, session, {"loras": ["korv", "dotta"], "prompts": "\n a fox \nb"}, [0.71234, -0.2])
    assert (recipe.prompt, recipe.method) == ("a fox", "merge")
    assert [(u.reference, u.weight) for u in recipe.loras] == [("korv", 0.712), ("dotta", -0.2)]
    without = weighed(shell, session, {"loras": ["korv", "dotta"], "prompts": ""}, [1, 1])
    assert "fox" in without.prompt
    with pytest.raises(Refused, match="no weights yet"):
        weighed(shell, session, {}, [])
    with pytest.raises(Refused, match="is not in your library"):
        weighed(shell, session, {"loras": ["gone"], "prompts": ""}, [1.0])
    assert asked(None) == {}


@pytest.mark.long
def test_a_search_over_the_api_is_stopped_and_keeps_the_best(monkeypatch):
    from gradio_client import Client

    from tests.service_here import here, served

    with here(monkeypatch) as service, served(service) as (_, url):
        client = Client(url, verbose=False)
        said = client.predict(["korv", "dotta"], "lorahub", "presence", 400, "", 1, 2, api_name="/search_weights")
        assert said == "400 candidates"

        def state():
            return client.predict("search", api_name="/evaluation_state")

        end = time.monotonic() + 600
        while state()["done"] < 8:
            assert time.monotonic() < end, state()
            time.sleep(1)
        assert client.predict("search", api_name="/evaluation_stop") == "stopping"
        while (now := state())["status"] == "running":
            assert time.monotonic() < end, now
            time.sleep(1)
        assert now["status"] == "done", now
        assert now["result"]["ended"] == "stopped"
        assert 8 <= len(now["result"]["trials"]) < 400
        found = min(now["result"]["trials"], key=lambda t: t["loss"] + t["penalty"])
        assert [lora["weight"] for lora in now["result"]["loras"]] == found["weights"]
