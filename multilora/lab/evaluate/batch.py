"""Run a batch: every item once, whatever dies on the way.

The driver checks that nothing has changed, mends what the last driver left, gives items to workers, and alone writes
pictures and journal.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multilora.lab.evaluate.items import BatchError, Item
from multilora.lab.evaluate.journal import DONE, FAILED, WAITING, Journal
from multilora.lab.evaluate.workers import (
    BACK,
    DRAWN,
    KILLED,
    UNUSABLE,
    WRONG,
    Crash,
    InProcess,
    Outcome,
    Renderer,
    Workers,
    crash_file,
)  # fmt: skip

GRACE = 4.0  # seconds that workers get to finish their items when the batch is stopped
SHOWN = 12  # differences in one message


class BatchStopped(OSError):
    """The folder cannot be written to any more. What is done is safe; the same call goes on when there is room."""


@dataclass(frozen=True)
class Progress:
    """How a batch stands. `rate` is pictures per second of this run, `left` seconds, both 0 while unknown."""

    total: int
    done: int
    failed: int
    rate: float = 0.0
    left: float = 0.0
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Summary:
    """What a run has left. `rows` has one dict per item, in the items' order (see Journal.rows), with its `path`."""

    total: int
    done: int
    failed: int
    drawn: int
    seconds: float
    stopped: bool
    rows: list[dict[str, Any]] = field(repr=False, default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_batch(
    items: Sequence[Item],
    folder: str | Path,
    make: Callable[[], Renderer],
    *,
    settings: Mapping[str, Any] | None = None,
    workers: Callable[[Callable[[], Renderer], Path], Workers] | None = None,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
    retry_failed: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Draw the items into folder/pictures/<id>.png, those that are not there yet.

    make          makes a renderer, such as partial(ComposerRenderer, "cpu", 1)
    settings      JSON-able values that decide the pictures beside the recipes; with other ones, or other items, the
                  folder is refused
    workers       makes what runs the renderers, such as partial(RayWorkers, workers=2); default this process
    stop          when set, items in hand are finished or given back, and the call returns within seconds
    progress      called at the start and after every outcome
    retry_failed  also the items that were left alone

    Raises BatchError when the folder belongs to another batch or is in use, a renderer can draw nothing, or no worker
    can be started; BatchStopped when the folder cannot be written to.
    """
    stop = stop or threading.Event()
    began = time.monotonic()
    settings = json.loads(json.dumps(dict(settings or {})))
    try:
        with Journal(folder) as journal:
            known = journal.recipes()
            if known:
                _refuse_changes(Path(folder), items, known, journal.settings(), settings)
            else:
                journal.enter(items, settings)
            journal.mend(Crash(crash_file(journal.folder)).read())
            if retry_failed:
                journal.retry_failed()
            for text in journal.notes:
                note(text)
            drawn = _Run(journal, items, stop, progress, began).draw(workers or InProcess, make)
            counts = journal.counts()
            rows = [{**row, "path": str(journal.picture(row["id"]))} for row in journal.rows()]
            _write_results(journal.folder / "results.jsonl", rows)
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BatchStopped(
            f"{folder}: cannot be written to: {reason}. What is done is safe; make room or give another --out, and "
            "run the same command again"
        ) from error
    return Summary(
        len(items), counts[DONE], counts[FAILED], drawn, time.monotonic() - began,
        counts[WAITING] > 0, rows, journal.notes,
    )  # fmt: skip


class _Run:
    """The driver's loop over what is waiting."""

    def __init__(
        self, journal: Journal, items: Sequence[Item], stop: Any, progress: Callable | None, began: float
    ) -> None:
        self.journal, self.stop, self.progress, self.began = journal, stop, progress, began
        waiting = journal.waiting()
        by_id = {one.id: one for one in items}
        # What went wrong comes last, so that it holds nobody up; pictures of one base come together, so that workers
        # seldom load another.
        order = sorted(waiting, key=lambda id: (waiting[id], by_id[id].recipe.base, by_id[id].recipe.controlnet))
        self.queue = deque(by_id[id] for id in order)
        self.drawn = 0
        self.counts = journal.counts()
        self.total = sum(self.counts.values())

    def draw(self, workers: Callable, make: Callable[[], Renderer]) -> int:
        """Number of pictures drawn."""
        self._tell(None)
        if not self.queue or self.stop.is_set():
            return 0
        team = workers(make, self.journal.folder)
        try:
            while (self.queue or team.busy()) and not self.stop.is_set():
                while self.queue and team.free():
                    item = self.queue.popleft()
                    if team.shares_fate:
                        self.journal.started(item.id)
                    team.give(item)
                for outcome in team.results(self.stop):
                    self._settle(outcome)
        except BaseException:
            team.end(0.0)
            raise
        for outcome in team.end(GRACE):
            self._settle(outcome)
        return self.drawn

    def _settle(self, outcome: Outcome) -> None:
        item, journal = outcome.item, self.journal
        last = False
        if outcome.end == DRAWN:
            journal.drawn(item.id, outcome.png, outcome.seconds, outcome.worker)
            self.drawn += 1
            self.counts[DONE] += 1
        elif outcome.end == WRONG:
            last = journal.failed(item.id, outcome.error)
        elif outcome.end == KILLED:
            last = journal.killed(item.id)
        else:
            journal.given_back(item.id)
        self.counts[FAILED] += last
        if outcome.end == UNUSABLE:
            raise BatchError(f"nothing can be drawn: {outcome.error}")
        if outcome.end in (WRONG, KILLED, BACK) and not last:
            self.queue.append(item)
        self._tell(outcome)

    def _tell(self, outcome: Outcome | None) -> None:
        if self.progress is None:
            return
        done, failed = self.counts[DONE], self.counts[FAILED]
        rate = self.drawn / max(time.monotonic() - self.began, 1e-9)
        left = (self.total - done - failed) / rate if rate else 0.0
        self.progress(Progress(self.total, done, failed, rate, left, outcome))


def _refuse_changes(
    folder: Path,
    items: Sequence[Item],
    known: Mapping[str, tuple[int, str]],
    then: Mapping[str, Any],
    now: Mapping[str, Any],
) -> None:
    """Raise BatchError with a diff when items or settings are not those of the folder; their order is free."""
    changed = [f"{k}: {then.get(k)!r} -> {now.get(k)!r}" for k in {**then, **now} if then.get(k) != now.get(k)]
    new = {one.line: one for one in items if one.id not in known}
    ids = {one.id for one in items}
    old = {line: json.loads(text) for id, (line, text) in known.items() if id not in ids}
    for line in sorted({*old, *new}):
        if line not in new:
            changed.append(f"line {line}: was {_short(old[line])}, is gone")
        elif line not in old:
            changed.append(f"line {line}: is new, {_short(new[line].recipe.model_dump(mode='json'))}")
        else:
            fields = _differences("", old[line], new[line].recipe.model_dump(mode="json"))
            changed.append(f"line {line}: " + "; ".join(fields))
    if changed:
        more = [f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
        raise BatchError(
            f"{folder}: this folder holds another batch, and nothing was changed in it; give another --out, or the "
            "recipes and settings that it was made with. What differs:\n  " + "\n  ".join([*changed[:SHOWN], *more])
        )


def _short(recipe: Mapping[str, Any]) -> str:
    return f"{recipe['prompt']!r:.60} by {recipe['method']}, seed {recipe['seed']}"


def _differences(path: str, old: Any, new: Any) -> list[str]:
    """`field: old -> new` of two JSON values, field by field."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in _differences(f"{path}.{k}" if path else k, old.get(k), new.get(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(f"{path}.{i}", a, b)]
    return [] if old == new else [f"{path}: {old!r:.60} -> {new!r:.60}"]


def _write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line of JSON per item: what became of it, and where its picture is."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
