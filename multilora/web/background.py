"""Commands that a page leaves running: `multilora eval`, `grid` and `search`, each a process on a folder of its own.

The folder is the session's, so that a page which is loaded again finds its run, and a run that was stopped goes on.
One run at a time on a server, at low priority: the pictures of others come first.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from multilora.web.service import Refused, Session

GRACE = 30.0  # seconds that a run gets to finish its picture and its report
OUT = {"eval": "", "grid": "", "search": "weights.json"}  # in the folder: what --out names
RUNNING, DONE, STOPPED, FAILED, NONE = "running", "done", "stopped", "failed", "none"


@dataclass(frozen=True)
class State:
    """How a run stands. `done` and `total` are pictures, of a search candidates; `left` are seconds, 0 while unknown;
    `message` is the command's error when it failed."""

    status: str
    folder: Path | None = None
    done: int = 0
    total: int = 0
    left: float = 0.0
    message: str = ""


@dataclass
class _Run:
    folder: Path
    total: int
    process: subprocess.Popen
    began: float
    before: int


class Background:
    """The runs of all sessions of a server, by session and kind ("eval", "grid", "search"); the latest of each kind is
    kept."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], _Run] = {}
        self._lock = threading.Lock()
        atexit.register(self.close)

    def start(self, session: Session, kind: str, words: Sequence[str], total: int) -> Path:
        """Run `multilora KIND WORDS` for `total` steps; the same words go on in the same folder. Its folder.

        Raises Refused while another run is going on, whosever it is.
        """
        digest = hashlib.sha256(json.dumps([kind, *words]).encode()).hexdigest()[:12]
        folder = session.folder / "runs" / f"{kind}-{digest}"
        with self._lock:
            for (owner, _), run in self._runs.items():
                if run.process.poll() is None:
                    whose = "yours is" if owner == session.key else "another user's is"
                    raise Refused(
                        f"one evaluation, grid or search at a time, and {whose} running; wait for it or stop it",
                        "busy",
                    )
            folder.mkdir(parents=True, exist_ok=True)
            nice = ["nice", "-n", "10"] if shutil.which("nice") else []
            ahead = ["--out", str(folder / OUT[kind]), "--json"]
            command = [*nice, sys.executable, "-m", "multilora.cli", kind, *ahead, *words]
            with open(_beside(folder, "log"), "w") as log, open(_beside(folder, "json"), "w") as out:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log)
            run = _Run(folder, total, process, time.monotonic(), sum(_counts(folder, kind)))
            self._runs[session.key, kind] = run
        return folder

    def state(self, session: Session, kind: str) -> State:
        """How the session's latest run of a kind stands; NONE when there was none."""
        run = self._runs.get((session.key, kind))
        if run is None:
            return State(NONE)
        code = run.process.poll()
        done, failed = _counts(run.folder, kind)
        now = done + failed - run.before
        spent = time.monotonic() - run.began
        left = spent / now * (run.total - done - failed) if now > 0 and code is None else 0.0
        status = RUNNING if code is None else {0: DONE, 130: STOPPED, -signal.SIGTERM: STOPPED}.get(code, FAILED)
        message = _error(_beside(run.folder, "log")) if status == FAILED else ""
        if failed and not message:
            message = f"{failed} pictures could not be drawn"
        return State(status, run.folder, done + failed, run.total, left, message)

    def stop(self, session: Session, kind: str) -> bool:
        """Ask the session's run to finish its picture and report what there is; False when none is running."""
        run = self._runs.get((session.key, kind))
        if run is None or run.process.poll() is not None:
            return False
        run.process.send_signal(signal.SIGTERM)
        return True

    def printed(self, session: Session, kind: str) -> dict:
        """What the session's finished run printed as JSON, without the server's paths; {} when there is nothing."""
        run = self._runs.get((session.key, kind))
        try:
            told = json.loads(_beside(run.folder, "json").read_text()) if run else {}
        except (OSError, ValueError):
            return {}
        for place in ("sheet", "path", "plot"):
            told.pop(place, None)
        # A client of gradio would take an object with a "path" for a file to download.
        told["cells"] = [_without_path(cell) for cell in told.get("cells", [])]
        return told

    def close(self) -> None:
        """End what is running, by force after GRACE seconds."""
        going = [run.process for run in self._runs.values() if run.process.poll() is None]
        for process in going:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE
        for process in going:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _without_path(cell: object) -> object:
    return {k: v for k, v in cell.items() if k != "path"} if isinstance(cell, dict) else cell


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def searched(folder: Path) -> list[tuple[tuple[float, ...], float, float]]:
    """(weights, loss, penalty) of the candidates of a search, also while it is at work; the result's when it has one.

    While it is at work the penalties are not known, and 0.
    """
    for name in (OUT["search"], "weights.state.json"):
        try:
            trials = json.loads((folder / name).read_text())["trials"]
        except (OSError, ValueError, KeyError):  # not there yet
            continue
        rows = [(t["weights"], t["loss"], t["penalty"]) if isinstance(t, dict) else (*t, 0.0) for t in trials]
        return [(tuple(weights), loss, penalty) for weights, loss, penalty in rows]
    return []


def _counts(folder: Path, kind: str) -> tuple[int, int]:
    """(done, failed) of a run's folder, also while its process is at work."""
    if kind == "search":
        return len(searched(folder)), 0
    from multilora.lab.evaluate.journal import read_rows

    try:
        rows = read_rows(folder)
    except Exception:  # no journal yet, or one that is just being made
        return 0, 0
    return sum(r["status"] == "done" for r in rows), sum(r["status"] == "failed" for r in rows)


def _error(log: Path) -> str:
    """The command's own message, else the last line that it wrote."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    _, found, message = text.rpartition("error: ")
    lines = text.strip().splitlines()
    return message.strip() if found else (lines[-1] if lines else "it ended without a word")
