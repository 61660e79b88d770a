"""The Evaluate page: what may be asked for, runs in the background, what a page that is loaded again finds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from multilora.web import background as module
from multilora.web.background import DONE, FAILED, NONE, RUNNING, STOPPED, Background, State
from multilora.web.evaluating import eval_words, framed, grid_words, method_names, report_files, status
from multilora.web.service import Limits, Refused, Service

# A stand-in for `python -m multilora.cli`: draws "pictures" into a journal until it is told to stop.
COMMAND = """
import json, signal, sys, time
from pathlib import Path
from PIL import Image
from multilora.lab.evaluate.batch import run_batch
from multilora.lab.evaluate.items import items_of
from multilora.cli.batch import stopped_by_signals
kind, words = sys.argv[1], sys.argv[2:]
out = Path(words[words.index("--out") + 1])
if "fail" in words:
    print("some line\\nerror: there is no such thing", file=sys.stderr)
    sys.exit(2)
class Draw:
    def __call__(self, recipe, cancel=None):
        time.sleep(0.02 if "quick" in words else 0.2)
        return Image.new("RGB", (8, 8)), recipe
rows = [{"prompt": f"p{i}", "base": "embedded", "steps": 1} for i in range(4 if "quick" in words else 400)]
with stopped_by_signals() as stop:
    summary = run_batch(items_of(rows), out, Draw, stop=stop)
(out / "report.html").write_text("<b>report</b>")
print(json.dumps({"cells": [summary.done]}))
sys.exit(130 if summary.stopped else 0)
"""


@pytest.fixture(scope="module")
def service():
    with Service(engine="tests.service_engine:Stub", limits=Limits(seconds=60, prompt=100, steps=50)) as service:
        yield service


@pytest.fixture
def background(monkeypatch, tmp_path):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)

    def standing_in(command, **options):
        at = command.index("-m")
        return subprocess.Popen([sys.executable, str(script), *command[at + 2 :]], **options)

    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=standing_in, **names))
    made = Background()
    yield made
    made.close()


def until(condition, seconds=90.0, every=0.05):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(every)


def test_a_run_goes_on_by_itself_is_found_again_and_stopped(service, background):
    session = service.session("ann")
    assert background.state(session, "eval") == State(NONE)
    folder = background.start(session, "eval", ["--count", "9"], 400)
    assert folder.is_relative_to(session.folder)
    until(lambda: background.state(session, "eval").done >= 2)
    now = background.state(service.session("ann"), "eval")  # a page that is loaded again has the same session
    assert (now.status, now.total, now.folder) == (RUNNING, 400, folder)
    assert now.left > 0
    assert background.state(service.session("bob"), "eval").status == NONE
    with pytest.raises(Refused, match="another user's is running"):
        background.start(service.session("bob"), "grid", [], 4)
    with pytest.raises(Refused, match="yours is running"):
        background.start(session, "grid", [], 4)
    assert not background.stop(service.session("bob"), "eval")
    assert background.stop(session, "eval")
    until(lambda: background.state(session, "eval").status != RUNNING)
    now = background.state(session, "eval")
    assert now.status == STOPPED
    assert 2 <= now.done < 400
    assert background.printed(session, "eval") == {"cells": [now.done]}
    assert report_files(folder) == [str(folder / "report.html")]
    again = background.start(session, "eval", ["--count", "9"], 400)
    assert again == folder
    until(lambda: background.state(session, "eval").done > now.done)


def test_a_run_that_ends_and_one_that_fails(service, background):
    session = service.session("cat")
    background.start(session, "grid", ["quick"], 4)
    until(lambda: background.state(session, "grid").status == DONE)
    assert background.state(session, "grid").done == 4
    background.start(session, "eval", ["fail"], 4)
    until(lambda: background.state(session, "eval").status == FAILED)
    assert background.state(session, "eval").message == "there is no such thing"
    assert background.printed(session, "eval") == {}
    assert background.state(session, "grid").status == DONE


def test_closing_ends_what_runs(service, background):
    session = service.session("dog")
    background.start(session, "eval", [], 400)
    until(lambda: background.state(session, "eval").done)
    background.close()
    assert background.state(session, "eval").status == STOPPED


def test_the_words_of_an_evaluation(service):
    words, total = eval_words(service, ["none", "merge"], [3, 2], 5, "test", 9)
    assert total == 20
    assert words[:10] == ["--methods", "none,merge", "--k", "2,3", "--count", "5", "--split", "test", "--steps", "9"]
    good = {"names": ["merge"], "ks": [2], "count": 3, "split": "test", "steps": 5}
    for changed, told in (
        ({"names": []}, "methods none chosen"),
        ({"names": ["merge", "--out=/"]}, "--out=/"),
        ({"ks": []}, "LoRAs in a picture"),
        ({"ks": [1]}, "LoRAs in a picture"),
        ({"count": 0}, "0 pictures"),
        ({"count": 10**6}, "1000000 pictures"),
        ({"split": "x"}, "split 'x'"),
        ({"steps": 51}, "steps 51: wanted 1 to 50"),
        ({"steps": "many"}, "steps 'many'"),
    ):
        with pytest.raises(Refused, match=told):
            eval_words(service, **{**good, **changed})
    assert {"none", "merge", "composite"} <= set(method_names())
    assert "mole" not in method_names()


def test_the_words_of_a_grid(service):
    session = service.session("ann")
    words, total = grid_words(service, session, "-h a fox", ["korv"], "weight=0.6,1", "method=merge,switch", 7, 4)
    assert total == 4
    assert words[:4] == ["--lora", "korv", "--x=weight=0.6,1", "--y=method=merge,switch"]
    assert words[-2:] == ["--", "-h a fox"]  # no prompt is taken for an option
    good = {"prompt": "a fox", "references": ["korv"], "x": "weight=0.6,1", "y": "", "seed": 1, "steps": 5}
    assert grid_words(service, session, **good)[1] == 2
    for changed, told in (
        ({"prompt": " "}, "prompt: say what"),
        ({"prompt": "a <lora:/etc/x:1>"}, "chosen in the list"),
        ({"x": "prompt=a|<lora:/etc/x:1>"}, "chosen in the list"),
        ({"prompt": "x" * 101}, "at most 100"),
        ({"references": ["../secret"]}, "is not in your library"),
        ({"x": ""}, "across: wanted FIELD"),
        ({"x": "base=/etc,/root"}, "field 'base'"),
        ({"x": "gate=/etc/passwd,x"}, "field 'gate'"),
        ({"x": "korv.mask=/etc/a.png,/etc/b.png"}, "field 'korv.mask'"),
        ({"x": "steps=5,500"}, "steps 500"),
        ({"x": "size=64x64,9000x64"}, "size 9000"),
        ({"x": "weight=1,1"}, "there twice"),
        ({"x": "seed=" + ",".join(map(str, range(37)))}, "37 pictures"),
    ):
        with pytest.raises(Refused, match=told):
            grid_words(service, session, **{**good, **changed})


def test_how_a_run_stands_in_words():
    assert "nothing yet" in status(State(NONE), "nothing yet")
    assert "loading the base" in status(State(RUNNING, total=9), "")
    line = status(State(RUNNING, done=3, total=12, left=125.0), "")
    assert "3 of 12 pictures, about 2 min 5 s left" in line
    assert "width:25%" in line
    assert "the same settings go on" in status(State(STOPPED, done=3, total=12), "")
    assert "&lt;b&gt;" in status(State(FAILED, message="<b>"), "")


def test_a_report_in_a_frame_is_not_part_of_the_page(tmp_path):
    (tmp_path / "report.html").write_text('<b class="x">"></iframe><script>')
    text = framed(tmp_path / "report.html")
    assert text.startswith("<iframe sandbox ")
    assert text.count("<") == 2  # the frame and its end


@pytest.mark.long
def test_an_evaluation_and_a_grid_over_the_api(monkeypatch):
    from gradio_client import Client

    from tests.service_here import here, served

    with here(monkeypatch) as service, served(service) as (_, url):
        client = Client(url, verbose=False)
        said = client.predict(["none", "merge"], [2], 2, "test", 2, api_name="/evaluate")
        assert said == "4 pictures"
        until(lambda: client.predict("eval", api_name="/evaluation_state")["status"] != "running", 600, every=2.0)
        state = client.predict("eval", api_name="/evaluation_state")
        assert (state["status"], state["done"]) == ("done", 4), state
        assert {r["method"] for r in state["result"]["cells"]} == {"none", "merge"}
        page = client.predict("eval", api_name="/evaluation_report")
        assert "data:image/jpeg;base64," in Path(page).read_text()
        client.predict("a korv fox", ["korv"], "weight=0.5,1", "", 3, 2, api_name="/evaluate_grid")
        until(lambda: client.predict("grid", api_name="/evaluation_state")["status"] != "running", 600, every=2.0)
        state = client.predict("grid", api_name="/evaluation_state")
        assert [json.dumps(c["x"]) for c in state["result"]["cells"]] == ['"0.5"', '"1"']
