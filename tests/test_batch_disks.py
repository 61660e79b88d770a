"""A batch on full, failing and read-only disks, and after torn files: nothing that was drawn is lost or mistaken."""

import errno
import os
import sqlite3
import threading
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from multilora.lab.evaluate import batch as batch_module
from multilora.lab.evaluate import journal as journal_module
from multilora.lab.evaluate.batch import BatchStopped, run_batch
from multilora.lab.evaluate.items import items_of
from multilora.lab.evaluate.journal import Journal, read_rows
from tests.batch_runs import driver, pictures, reference, until
from tests.batch_standin import StandIn, lines

__all__ = ["reference"]  # a fixture


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
