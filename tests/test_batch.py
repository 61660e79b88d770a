"""A batch: every item once, whatever dies on the way, and nothing but the recipe decides a picture."""

import hashlib
import json
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from multilora.lab.evaluate.batch import run_batch
from multilora.lab.evaluate.items import BatchError, items_of
from multilora.lab.evaluate.journal import read_rows, read_settings
from multilora.lab.evaluate.workers import Unusable
from multilora.recipe import Recipe
from tests.batch_runs import driver, pictures, reference, until
from tests.batch_standin import StandIn, lines

__all__ = ["reference"]  # a fixture


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and "-shm" not in p.name}


# -- what is there afterwards ----------------------------------------------------------------------------------------


def test_pictures_journal_and_results_agree(tmp_path):
    items = items_of(lines(5))
    seen = []
    summary = run_batch(items, tmp_path / "new" / "out", StandIn, settings={"threads": 1}, progress=seen.append)
    assert (summary.total, summary.done, summary.failed, summary.drawn, summary.stopped) == (5, 5, 0, 5, False)
    assert [p.done for p in seen] == [0, 1, 2, 3, 4, 5]
    assert seen[0].rate == 0
    assert seen[2].rate > 0
    assert seen[2].left == pytest.approx(3 / seen[2].rate)
    out = tmp_path / "new" / "out"
    assert {p.name for p in out.iterdir()} == {"pictures", "journal.sqlite", "driver.lock", "results.jsonl"}
    assert sorted(pictures(out)) == sorted(f"{one.id}.png" for one in items)
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == summary.rows
    assert read_settings(out) == {"threads": 1}
    for one, row in zip(items, read_rows(out), strict=True):
        data = (out / "pictures" / f"{one.id}.png").read_bytes()
        expected = {"id": one.id, "line": one.line, "status": "done", "seed": one.recipe.seed, "bytes": len(data)}
        assert {name: row[name] for name in expected} == expected
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        recipe = Recipe.from_png(out / "pictures" / f"{one.id}.png")
        assert recipe == one.recipe.model_copy(update={"extra": {"item": one.id}})


def test_order_shards_and_grouping_change_no_picture(tmp_path, reference):
    given = lines(12)
    items = items_of(given)
    run_batch(items[::-1], tmp_path / "back", StandIn)
    assert pictures(tmp_path / "back") == reference
    shards = {}
    for n in range(3):
        run_batch(items_of(given[n::3]), tmp_path / f"shard {n}", StandIn)
        shards |= pictures(tmp_path / f"shard {n}")
    assert shards == reference


def test_it_goes_on_where_it_stopped(tmp_path, reference):
    items, log = items_of(lines(12)), tmp_path / "log"
    for wanted in (3, 7, 12):
        stop = threading.Event()

        def enough(now, wanted=wanted, stop=stop):
            if now.done >= wanted:
                stop.set()

        run_batch(items, tmp_path / "out", partial(StandIn, str(log)), stop=stop, progress=enough)
        assert len(pictures(tmp_path / "out")) == wanted
    summary = run_batch(
        items[::-1], tmp_path / "out", partial(StandIn, str(log))
    )  # in another order it is the same batch
    assert (summary.drawn, summary.done) == (0, 12)
    assert len(log.read_text().splitlines()) == 12
    assert pictures(tmp_path / "out") == reference


def test_progress_can_be_read_while_it_runs(tmp_path):
    counts = []

    def look(now):
        counts.append(sum(row["status"] == "done" for row in read_rows(tmp_path)))

    run_batch(items_of(lines(3)), tmp_path, StandIn, progress=look)
    assert counts == [0, 1, 2, 3]
    with pytest.raises(BatchError, match="no batch in this folder"):
        read_rows(tmp_path / "pictures")


# -- items that go wrong ---------------------------------------------------------------------------------------------


def test_an_item_that_fails_three_times_is_left_alone(tmp_path, reference):
    log = tmp_path / "log"
    given = [{**lines(1)[0], "prompt": "raises"}, *lines(12)]
    summary = run_batch(items_of(given), tmp_path / "out", partial(StandIn, str(log)))
    assert (summary.done, summary.failed, summary.stopped) == (12, 1, False)
    assert summary.rows[0]["status"] == "failed"
    assert summary.rows[0]["error"] == "ArithmeticError: this one always fails"
    assert log.read_text().count("raises") == 3
    assert pictures(tmp_path / "out") == reference
    assert run_batch(items_of(given), tmp_path / "out", partial(StandIn, str(log))).drawn == 0
    assert log.read_text().count("raises") == 3
    again = run_batch(items_of(given), tmp_path / "out", partial(StandIn, str(log)), retry_failed=True)
    assert (again.failed, log.read_text().count("raises")) == (1, 6)


def test_a_failure_in_passing_is_forgotten(tmp_path):
    class Moody(StandIn):
        calls = 0

        def __call__(self, recipe, cancel=None):
            self.calls += 1
            if self.calls in (1, 2, 4):
                raise MemoryError("for now")
            return super().__call__(recipe)

    summary = run_batch(items_of(lines(4)), tmp_path, lambda: Moody())
    assert (summary.done, summary.failed, summary.drawn) == (4, 0, 4)
    assert sorted(row["tries"] for row in summary.rows) == [0, 1, 1, 1]
    assert {row["error"] for row in summary.rows} == {None}


@pytest.mark.parametrize(
    ("prompt", "deaths", "sign", "message"),
    [
        ("crashes", 3, signal.SIGSEGV, "its process crashed: Fatal Python error: Segmentation fault"),
        pytest.param(
            "killed", 10, signal.SIGKILL, "each of the 10 processes that drew it was killed", marks=pytest.mark.long
        ),
    ],
)
def test_an_item_that_kills_its_process_is_left_alone(tmp_path, prompt, deaths, sign, message):
    """The driver dies with it; started again and again, it gets past the item, and all others are drawn once."""
    given = [{**lines(1)[0], "prompt": prompt}, *lines(3)]
    for _ in range(deaths):
        assert driver(tmp_path, given, stderr=subprocess.DEVNULL).wait() == -sign
    assert driver(tmp_path, given).wait() == 1
    rows = read_rows(tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed", "done", "done", "done"]
    assert rows[0]["error"].startswith(message)
    log = (tmp_path / "log").read_text()
    assert log.count(prompt) == deaths
    assert log.count("picture") == 3
    assert not list(tmp_path.glob("out/.crash*"))


def test_a_renderer_that_can_draw_nothing_stops_the_batch(tmp_path):
    def unusable(recipe, cancel):
        raise Unusable("base 'x': no such weights")

    with pytest.raises(BatchError, match="nothing can be drawn: base 'x': no such weights"):
        run_batch(items_of(lines(3)), tmp_path, lambda: unusable)
    assert {(row["status"], row["tries"]) for row in read_rows(tmp_path)} == {("waiting", 0)}
    assert run_batch(items_of(lines(3)), tmp_path, StandIn).drawn == 3


# -- stops -----------------------------------------------------------------------------------------------------------


def test_a_stop_gives_the_item_back(tmp_path):
    """A renderer that looks at `cancel` is out at once, and nothing is held against the item."""
    stop, entered = threading.Event(), threading.Event()

    def patient(recipe, cancel):
        entered.set()
        assert cancel.wait(30)
        raise RuntimeError("cancelled")

    def press():
        entered.wait(30)
        stop.set()

    threading.Thread(target=press).start()
    summary = run_batch(items_of(lines(2)), tmp_path, lambda: patient, stop=stop)
    assert (summary.done, summary.stopped) == (0, True)
    assert [(row["status"], row["tries"], row["kills"]) for row in summary.rows] == [("waiting", 0, 0)] * 2
    assert run_batch(items_of(lines(2)), tmp_path, StandIn).done == 2


def test_sigterm_finishes_the_item(tmp_path, reference):
    run = driver(tmp_path, lines(12), seconds=0.2)
    log = tmp_path / "log"
    until(lambda: log.exists() and len(log.read_text().splitlines()) == 3)
    began = time.monotonic()
    run.terminate()
    assert run.wait(60) == 130
    assert time.monotonic() - began < 30
    done = len(pictures(tmp_path / "out"))
    assert 3 <= done < 12
    assert driver(tmp_path, lines(12)).wait() == 0
    assert pictures(tmp_path / "out") == reference
    assert len(log.read_text().splitlines()) == 12


# -- what is refused -------------------------------------------------------------------------------------------------


def test_another_batch_in_the_folder_is_refused_with_a_diff(tmp_path):
    given = lines(5)
    run_batch(items_of(given), tmp_path, StandIn, settings={"torch": "2.15", "threads": 1})
    before = snapshot(tmp_path)
    changed = [*given[:2], {**given[2], "steps": 3, "loras": {"korv": 1}}, given[3], given[4], *lines(1, seed=8)]
    with pytest.raises(BatchError) as caught:
        run_batch(items_of(changed[1:]), tmp_path, StandIn, settings={"torch": "2.16", "threads": 1})
    text = str(caught.value)
    assert "this folder holds another batch, and nothing was changed in it" in text
    assert "torch: '2.15' -> '2.16'" in text
    assert "threads" not in text
    with pytest.raises(BatchError) as caught:
        run_batch(items_of(changed), tmp_path, StandIn, settings={"torch": "2.15", "threads": 1})
    text = str(caught.value).splitlines()
    assert text[1].startswith("  line 3: loras: ")
    assert "steps: 2 -> 3" in text[1]
    assert text[2] == "  line 6: is new, 'picture 0' by merge, seed 8"
    with pytest.raises(BatchError, match=r"line 5: was 'picture 4' by merge, seed [0-9]+, is gone"):
        run_batch(items_of(given[:4]), tmp_path, StandIn, settings={"torch": "2.15", "threads": 1})
    after = snapshot(tmp_path)
    assert {p: d for p, d in after.items() if p.name != "driver.lock"} == {
        p: d for p, d in before.items() if p.name != "driver.lock"
    }


def test_a_second_driver_is_refused_by_name(tmp_path):
    run = driver(tmp_path, lines(4), seconds=0.5)
    log = tmp_path / "log"
    until(log.exists)
    with pytest.raises(BatchError, match=rf"running in this folder: process {run.pid} on {socket.gethostname()}, "):
        run_batch(items_of(lines(4)), tmp_path / "out", StandIn)
    assert run.wait(60) == 0
    assert len(log.read_text().splitlines()) == 4
    assert run_batch(items_of(lines(4)), tmp_path / "out", StandIn).drawn == 0


# -- clocks ----------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps(tmp_path, monkeypatch, reference):
    real, jumps = time.time, iter([0, 1e9, -1e9, 3e8, -1.7e9] * 99)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    seen = []
    summary = run_batch(items_of(lines(12)), tmp_path, StandIn, progress=seen.append)
    assert pictures(tmp_path) == reference
    assert 0 < summary.seconds < 600
    assert all(0 <= p.rate < 1e6 and 0 <= p.left < 600 for p in seen)
    assert all(0 <= row["seconds"] < 600 for row in summary.rows)
