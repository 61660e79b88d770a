"""A batch: every item once, whatever dies on the way, and nothing but the recipe decides a picture."""

import errno
import hashlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from multilora.lab.evaluate import batch as batch_module
from multilora.lab.evaluate import journal as journal_module
from multilora.lab.evaluate.batch import BatchStopped, run_batch
from multilora.lab.evaluate.items import BatchError, items_of
from multilora.lab.evaluate.journal import Journal, read_rows, read_settings
from multilora.lab.evaluate.workers import Unusable
from multilora.recipe import Recipe
from tests.batch_standin import StandIn, lines

SCRIPT = Path(__file__).parent / "batch_standin.py"


def pictures(folder):
    return {p.name: p.read_bytes() for p in Path(folder, "pictures").iterdir()}


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and "-shm" not in p.name}


def driver(folder, recipes, seconds=0.0, **options):
    """A driver process on folder/recipes.jsonl, folder/out and folder/log."""
    (folder / "recipes.jsonl").write_text("\n".join(json.dumps(line) for line in recipes))
    command = [sys.executable, str(SCRIPT), *(str(folder / n) for n in ("recipes.jsonl", "out", "log")), str(seconds)]
    return subprocess.Popen(command, **options)


def until(condition, seconds=60.0):
    """Wait for something to become true, which it must."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The pictures of lines(12), drawn without interruption."""
    out = tmp_path_factory.mktemp("reference")
    run_batch(items_of(lines(12)), out, StandIn)
    return pictures(out)


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


# -- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_batch_and_loses_nothing(tmp_path, monkeypatch, reference):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(journal_module.os, "fsync", full)
    with pytest.raises(BatchStopped, match=r"cannot be written to: No space left on device\. What is done is safe"):
        run_batch(items_of(lines(12)), tmp_path, StandIn)
    monkeypatch.undo()
    there = pictures(tmp_path)
    assert 0 < len(there) < 12
    assert all(reference[name] == data for name, data in there.items())  # and no part of another
    assert run_batch(items_of(lines(12)), tmp_path, StandIn).drawn == 12 - len(there)
    assert pictures(tmp_path) == reference
    assert {row["kills"] for row in read_rows(tmp_path)} <= {0, 1}


def test_a_full_disk_under_the_journal(tmp_path, monkeypatch):
    """SQLite has no page left, when the picture is there already: it is found the next time."""
    real = journal_module._connected

    def small(path):
        db = real(path)
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")
        return db

    given = lines(150)
    run_batch(items_of(given), tmp_path, StandIn, stop=_set())  # the items are in the journal
    monkeypatch.setattr(journal_module, "_connected", small)
    with pytest.raises(BatchStopped, match="database or disk is full"):
        run_batch(items_of(given), tmp_path, StandIn)
    monkeypatch.undo()
    there = len(pictures(tmp_path))
    assert 0 < there < 150
    summary = run_batch(items_of(given), tmp_path, StandIn)
    assert (summary.done, summary.drawn) == (150, 150 - there)


def _set():
    stop = threading.Event()
    stop.set()
    return stop


@pytest.mark.parametrize("folder", ["/proc/batch", "/proc/self/task", "chmod"])
def test_a_folder_that_cannot_be_written_to(tmp_path, folder):
    """/proc refuses root as well, whom permissions do not."""
    if folder == "chmod":
        if os.geteuid() == 0:
            folder = "/proc/self"
        else:
            folder = tmp_path
            folder.chmod(0o500)
    drawn = tmp_path.parent / f"{tmp_path.name}.log"
    with pytest.raises(BatchStopped, match="cannot be written to"):
        run_batch(items_of(lines(2)), folder, partial(StandIn, str(drawn)))
    assert not drawn.exists()
    tmp_path.chmod(0o700)


def test_a_results_file_that_cannot_be_written_costs_no_picture(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(batch_module.os, "replace", _only("results.jsonl", full, os.replace))
    with pytest.raises(BatchStopped):
        run_batch(items_of(lines(3)), tmp_path, StandIn)
    monkeypatch.undo()
    assert run_batch(items_of(lines(3)), tmp_path, StandIn).drawn == 0
    assert (tmp_path / "results.jsonl").exists()


def _only(name, special, usual):
    return lambda source, target: special() if Path(target).name == name else usual(source, target)


# -- torn files ------------------------------------------------------------------------------------------------------


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path):
    data = bytearray(path.read_bytes())
    data[100:] = b"\xa5" * (len(data) - 100)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "tear",
    [half, garbage, lambda p: p.write_bytes(b"not a database" * 99), lambda p: p.write_bytes(b""), Path.unlink],
    ids=["half", "garbage", "other", "empty", "gone"],
)  # fmt: skip
def test_a_torn_journal_is_made_again_from_the_pictures(tmp_path, tear, reference):
    stop = threading.Event()

    def eight(now):
        if now.done == 8:
            stop.set()

    run_batch(items_of(lines(12)), tmp_path, StandIn, stop=stop, progress=eight)
    tear(tmp_path / "journal.sqlite")
    notes = []
    summary = run_batch(items_of(lines(12)), tmp_path, StandIn, note=notes.append)
    assert (summary.done, summary.drawn) == (12, 4)
    assert pictures(tmp_path) == reference
    assert "8 pictures were there that the journal did not have" in notes
    torn = list(tmp_path.glob("journal.sqlite.torn-1"))
    assert bool(torn) == any("was torn" in text for text in notes)


def test_a_torn_write_ahead_log_loses_no_picture(tmp_path, reference):
    """A driver killed with commits in the log only, whose last bytes never reached the disk."""
    run = driver(tmp_path, lines(12), seconds=0.05)
    wal = tmp_path / "out" / "journal.sqlite-wal"
    until(lambda: (tmp_path / "log").exists() and len((tmp_path / "log").read_text().splitlines()) == 9)
    run.kill()
    run.wait()
    assert wal.stat().st_size > 0
    wal.write_bytes(wal.read_bytes()[:-5000])
    assert run_batch(items_of(lines(12)), tmp_path / "out", partial(StandIn, str(tmp_path / "log"))).done == 12
    assert pictures(tmp_path / "out") == reference
    assert len((tmp_path / "log").read_text().splitlines()) <= 13


def test_pictures_that_are_gone_torn_or_half_written(tmp_path, reference):
    items = items_of(lines(12))
    run_batch(items, tmp_path, StandIn)
    path = [tmp_path / "pictures" / f"{one.id}.png" for one in items]
    path[0].unlink()
    half(path[1])
    (tmp_path / "pictures" / f".{items[2].id}.part").write_bytes(b"x")
    notes = []
    assert run_batch(items, tmp_path, StandIn, note=notes.append).drawn == 2
    assert notes == ["2 pictures are gone or were changed; they are drawn again"]
    assert pictures(tmp_path) == reference


def test_only_whole_pictures_of_the_item_are_taken_over(tmp_path, reference):
    """What lies under an item's name and is torn, or is another item's picture, is drawn again."""
    items = items_of(lines(12))
    (tmp_path / "pictures").mkdir()
    names = [f"{one.id}.png" for one in items]
    whole, torn, other, foreign = ((tmp_path / "pictures" / name) for name in names[:4])
    whole.write_bytes(reference[names[0]])
    torn.write_bytes(reference[names[1]][:-40])
    other.write_bytes(reference[names[5]])
    Image.new("RGB", (4, 4)).save(foreign)
    with Journal(tmp_path) as journal:
        journal.enter(items, {})
        journal.mend()
        assert journal.counts() == {"waiting": 11, "done": 1, "failed": 0}
    assert run_batch(items, tmp_path, StandIn).drawn == 11
    assert pictures(tmp_path) == reference


def test_a_driver_killed_while_it_wrote_down_the_items(tmp_path):
    """All of them are in the journal or none is."""
    items = items_of(lines(4))
    with Journal(tmp_path) as journal:
        with pytest.raises(sqlite3.IntegrityError):
            journal.enter([*items, items[0]], {"threads": 1})
        assert journal.recipes() == {}
        assert journal.settings() == {}
    assert run_batch(items, tmp_path, StandIn).done == 4


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
