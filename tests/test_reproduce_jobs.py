"""Experiments in several processes: an error, an interrupt and a dead parent end all of them, and results are kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from multilora.lab.journal import Journal
from multilora.lab.reproduce import mole, page
from multilora.lab.reproduce.bench import SMOKE

PIECES = ["analogy", "lora", "negation", "fisher_text"]


def say(line):
    """What processes say, in a file that the first one named."""
    with Path(os.environ["SAID"]).open("a") as file:
        file.write(line + "\n")


def heed_interrupts():
    """A shell without job control starts what runs in the background, this test too, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def said(tmp_path, monkeypatch):
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    return tmp_path / "said"


def test_an_error_ends_everything(tmp_path, said):
    """No journal can be made: the first cell of whichever piece is ready fails, and no later piece begins."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "text").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="text"):
        page.reproduce(PIECES, tmp_path / "docs", size=SMOKE, jobs=2, work=tmp_path / "work", echo=say)
    time.sleep(1)
    lines = said.read_text().splitlines()
    assert any("failed; the other processes are ended" in line for line in lines)
    titles = {page.experiment(name).title for name in PIECES[2:]}
    assert not titles & set(lines)


def test_a_name_twice_is_one_experiment_and_needs_no_second_process(tmp_path, said):
    page.reproduce(["analogy", "analogy"], tmp_path, size=SMOKE, jobs=4, echo=say)
    keys = [json.loads(line)["key"] for line in (tmp_path / "text" / "report.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) > 1
    (command,) = Journal(tmp_path / "text" / "report.jsonl").of(page.COMMAND)
    assert (command["jobs"], command["experiments"]) == (1, ["analogy"])


def test_moles_parts_are_all_of_it(monkeypatch):
    asked = []
    monkeypatch.setattr(mole, "Bench", lambda *a, **k: None)
    monkeypatch.setattr(mole, "measure_set", lambda own, chosen, *rest: asked.append(chosen))
    bench = type("B", (), {"size": page.FULL, "work": Path("w"), "journal": Journal(Path("a/text/r.jsonl"))})()
    mole.measure(bench)
    whole, asked[:] = sorted(asked), []
    for part in mole.EXPERIMENT.parts.values():
        part(bench)
    assert sorted(asked) == whole
    assert {len(chosen) for chosen in whole} == {2, 3, 4, 5}


@pytest.mark.long
@pytest.mark.parametrize("way", ["interrupt", "kill"])
def test_it_stops_at_once(tmp_path, way):
    words = [sys.executable, "-m", "multilora.cli", "reproduce", *PIECES, "--quick", "-j", "2"]
    started = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": heed_interrupts}
    with subprocess.Popen([*words, "-o", str(tmp_path / "r")], **started) as process:
        line = ""
        while "Analogy" not in line:
            line = process.stderr.readline()
            assert line, "it ended before it began"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        if way == "interrupt":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
        assert process.wait(30) == (130 if way == "interrupt" else -signal.SIGKILL)
        assert page.experiment(PIECES[3]).title not in process.stderr.read()
