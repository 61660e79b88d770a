"""Service: what pages call. It checks and queues, hands jobs to workers, replaces a worker that failed."""

from __future__ import annotations

import atexit
import itertools
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multilora.web.service import health
from multilora.web.service.door import Door
from multilora.web.service.jobs import Job, Line
from multilora.web.service.limits import Limits, Refused, check
from multilora.web.service.log import Log
from multilora.web.service.sessions import Entry, Session, Sessions
from multilora.web.service.spec import Base, Event, Request, Result, Text
from multilora.web.service.worker import Answer, Task, Worker, WorkerLost

EMBEDDED = "embedded"
TRIES = 2
CANCEL_SECONDS = 2.0  # after which the user is answered, whatever the worker does
GRACE_SECONDS = 60.0  # that a cancelled task has to end by itself: a step, or the last decoding, may take long


class Service:
    """Workers and the line before them.

    bases    "embedded", folders or hub ids that may be used; the first is the default
    open_bases  whether users may name others, any folder or hub id: for a server that only its owner reaches
    devices  one worker each; None: the best there is
    loras    a folder whose .safetensors files everyone may use
    clip     scorer for bases other than the embedded one, a name for multilora.lab.score.clip.load_clip, "" for none
    engine   "module:class" that the worker imports and makes; this process needs no torch
    """

    def __init__(
        self,
        bases: str | Sequence[str] = EMBEDDED,
        *,
        devices: Sequence[str | None] = (None,),
        limits: Limits | None = None,
        open_bases: bool = False,
        loras: str | Path | None = None,
        clip: str = "",
        log: Log | None = None,
        engine: str = "multilora.web.service.engine:Engine",
    ):
        self.bases = [bases] if isinstance(bases, str) else list(bases)
        self.open_bases = open_bases
        self.limits, self.log = limits or Limits(), log or Log()
        self.started, self.counts = time.time(), health.Counts()
        self._root = Path(tempfile.mkdtemp(prefix="multilora-"))
        self._sessions = Sessions(self._root, self.limits)
        self._folder = Path(loras).expanduser().resolve() if loras else None
        self._facts: dict[str, dict[str, Any]] = {}
        self._known = threading.Condition()
        self._numbers = itertools.count(1)
        self._line = Line(self.limits)
        self.door = Door(self._line, len(devices), self.counts)
        self._stopping = threading.Event()
        self._closed = False
        settings = {"base": self.bases[0], "clip": clip}
        self.workers = [Worker(engine, {**settings, "device": device}) for device in devices]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True, name=f"multilora-{i}")
            for i, worker in enumerate(self.workers)
        ]
        for worker, thread in zip(self.workers, self._threads, strict=True):
            worker.start()
            thread.start()
        atexit.register(self.close, 0)

    # -- what pages call ----------------------------------------------------------------------------------------

    def session(self, key: str) -> Session:
        """The session of a browser's token or a user's name; a new one the first time."""
        return self._sessions.get(key, [job.session for job in self._line.jobs()])

    def about(self, base: str | None = None, timeout: float = 300.0) -> dict[str, Any]:
        """Facts of a base, when a worker holds it: base, family, device, dtype, steps, guidance_scale, width, height,
        scheduler, schedulers, tasks, threads, denoiser. Waits for the first worker.

        Raises Refused when it could not be loaded, or was not loaded yet and is not the first one.
        """
        base = base or self.bases[0]
        until = time.monotonic() + timeout
        with self._known:
            while base not in self._facts:
                broken = [w.broken for w in self.workers if w.broken]
                if len(broken) == len(self.workers):
                    raise Refused(broken[0], "worker")
                if base != self.bases[0]:
                    raise Refused(f"base {base!r} is not loaded yet; submit Base(base=...) first")
                if not self._known.wait(min(1.0, until - time.monotonic())) and time.monotonic() >= until:
                    raise Refused(f"base {base!r} was not ready within {timeout:g} s", "worker")
            return dict(self._facts[base])

    def known(self, base: str) -> dict[str, Any] | None:
        """The facts of a base that a worker has held; None when none has yet."""
        with self._known:
            return dict(self._facts[base]) if base in self._facts else None

    def library(self, session: Session) -> list[Entry]:
        """The LoRAs that a session may use: the embedded ones, the server's folder, then its own uploads."""
        return [*self._shared(), *session.uploads.values()]

    def entry(self, session: Session, reference: str) -> Entry:
        """The library's entry of a reference. Raises Refused when the session has none."""
        for entry in self.library(session):
            if entry.reference == reference:
                return entry
        hint = "; upload its file again" if reference.startswith("upload:") else ""
        raise Refused(f"LoRA {reference!r:.80} is not in your library{hint}")

    def upload(self, session: Session, path: str | Path, base: str | None = None, name: str | None = None) -> Entry:
        """Admit a LoRA file into a session's library; its own until it is removed or the session ends.

        Raises Refused with the reason, naming file, key and limit.
        """
        base = base or self.bases[0]
        against = None
        if base == EMBEDDED or Path(base).expanduser().exists():
            from multilora.bases import base_of

            against = base_of(base)
        entry = self._sessions.upload(session, path, against, name)
        self.log("upload", session=session.label, bytes=entry.path.stat().st_size, sha256=entry.sha256)
        return entry

    def remove(self, session: Session, reference: str) -> None:
        """Delete an upload. Raises Refused when it is not this session's."""
        self._sessions.remove(session, reference)

    def set_preview(self, session: Session, reference: str, png: bytes) -> Entry:
        """Give an upload a preview picture."""
        return self._sessions.set_preview(session, reference, png)

    def submit(self, request: Request, session: Session) -> Job:
        """Check a request and put it in line. Raises Refused: bad request, over a limit, or too many wait."""
        check(request, self.limits)
        bases = request.bases() - {"", *self.bases}
        if bases and not (isinstance(request, (Base, Text)) and self.open_bases):
            raise Refused(f"base {sorted(bases)[0]!r:.80} is not served here; served are: {', '.join(self.bases)}")
        places = {reference: self._place(session, reference) for reference in request.references()}
        number = next(self._numbers)
        folder = session.folder / f"job-{number}"
        job = Job(number, session.key, request, b"")
        job.payload = pickle.dumps(Task(number, request, places, str(folder)))
        job._on_cancel = self._cancel
        try:
            self._line.join(job)
        except Refused as error:
            self.refused(error, session=session.label, action=request.action)
            raise
        self.log("queued", job=number, session=session.label, **self.log.of(request))
        return job

    def refused(self, error: Refused, **about: Any) -> None:
        """Count a request that was not taken, and write it into the log."""
        self.counts.add("refused", error.code)
        self.log("refused", code=error.code, **about)

    def cancel(self, job_id: str, session: Session) -> bool:
        """Cancel a job of this session by its id; False when it has none with it that runs or waits."""
        for job in self._line.jobs():
            if job.id == job_id and job.session == session.key:
                job.cancel()
                return True
        return False

    def health(self) -> dict[str, Any]:
        """Whether it works: status "ok", "starting", "stopping" or "broken", workers, queue."""
        return health.health(self)

    def metrics(self) -> str:
        """Counts and gauges in Prometheus' text format."""
        return health.metrics(self)

    def close(self, seconds: float = 30.0) -> None:
        """Stop: waiting jobs end with an error, running ones have `seconds`, then are cancelled; workers end."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self.log("stopping", waiting=len(self._line), running=self._line.running)
        for job in self._line.close("the server is stopping; please try again in a minute"):
            job.put(Event("error", message=self._line.closed, code="stopped"))
        if not self._line.wait_idle(seconds):
            for job in self._line.jobs():
                job.cancel()
            self._line.wait_idle(CANCEL_SECONDS)
        self._stopping.set()
        for worker in self.workers:
            worker.kill()
        for thread in self._threads:
            thread.join(10)
        shutil.rmtree(self._root, ignore_errors=True)
        self.log("stopped")

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- the threads that wait for the workers ------------------------------------------------------------------

    def _serve(self, worker: Worker) -> None:
        self._ready(worker)
        while not self._stopping.is_set():
            job = self._line.take(0.5)
            if job is None:
                if not worker.alive and not worker.broken and not self._stopping.is_set():
                    self._restart(worker, "it ended while it was idle")
                continue
            try:
                self._answered(job, worker)
            except Exception as error:  # a mistake here must not end the thread that serves everyone
                self.log("mistake", job=job.number, error=f"{type(error).__name__}: {error}")
                words = "this server made a mistake; please try again"
                if isinstance(error, OSError):
                    words = f"this server cannot keep what you ask for: {error.strerror}. Please tell who runs it"
                job.put(Event("error", message=words, code="disk" if isinstance(error, OSError) else "worker"))
            finally:
                self._line.done(job)
        worker.stop()

    def _answered(self, job: Job, worker: Worker) -> None:
        """Run a job, at most TRIES times, and give it its last message."""
        began = time.monotonic()
        answer = Answer("cancelled")
        for attempt in range(1, TRIES + 1):
            if job.cancelled.is_set():
                break
            there = worker.alive and worker.about is not None
            if not there and not self._restart(worker, "it was not there"):
                answer = Answer("failed", code="worker", message=f"the worker cannot start: {worker.broken}")
                break
            task: Task = pickle.loads(job.payload)
            Path(task.folder).mkdir(parents=True, exist_ok=True)
            again = attempt < TRIES and not self._stopping.is_set()
            try:
                answer = worker.run(task, job.put, job.cancelled, self.limits.seconds, GRACE_SECONDS)
            except WorkerLost as error:
                late = time.monotonic() - began >= self.limits.seconds
                answer = _lost(job, str(error), late, self.limits.seconds)
                if self._stopping.is_set() and answer.kind == "failed":
                    answer = Answer("failed", code="stopped", message=self._line.closed)
                again = again and answer.code == "worker"
                self._replace(worker, str(error))
            else:
                if answer.drift:
                    self.counts.add("drift")
                    self._replace(worker, "; ".join(answer.drift))
                elif answer.spent:
                    self._replace(worker, answer.message)
                again = again and bool(answer.drift)
                if answer.drift and answer.kind == "done":
                    answer = Answer("failed", code="worker", message=_CHANGED)
            if not again or answer.kind == "cancelled" or answer.code not in ("worker", ""):
                break
            self.counts.add("retried")
            job.put(Event("note", message="the worker had to be restarted; your request is run once more"))
        self._finish(job, answer, time.monotonic() - began)

    def _finish(self, job: Job, answer: Answer, seconds: float) -> None:
        task: Task = pickle.loads(job.payload)
        result = answer.result or Result()
        if answer.kind == "done":
            session = self.session(job.session)
            files = [self._sessions.keep(session, output) for output in result.files]
            result = Result(result.pictures, result.facts, files)
            if isinstance(task.request, Base):
                self._learn(result.facts)
                if result.facts["base"] not in self.bases:
                    self.bases.append(result.facts["base"])
        if not result.files:
            shutil.rmtree(task.folder, ignore_errors=True)
        self.counts.add("jobs", f"{job.action}:{answer.kind}")
        self.counts.took(job.action, seconds, job.started - job.submitted)
        self.counts.add("pictures", amount=len(result.pictures))
        self.log("ended", job=job.number, action=job.action, outcome=answer.kind, code=answer.code,
                 seconds=round(seconds, 3), waited=round(job.started - job.submitted, 3))  # fmt: skip
        if answer.kind == "done":
            job.put(Event("done", result=result))
        elif answer.kind == "cancelled":
            job.put(Event("cancelled", message="cancelled; there is no picture"))
        else:
            job.put(Event("error", message=answer.message, code=answer.code))

    def _cancel(self, job: Job) -> None:
        """A waiting job ends at once; of a running one the user hears after CANCEL_SECONDS at the latest."""
        ended = Event("cancelled", message="cancelled; there is no picture")
        if self._line.leave(job):
            self.counts.add("jobs", f"{job.action}:cancelled")
            job.put(ended)
            return
        timer = threading.Timer(CANCEL_SECONDS, job.put, [ended])
        timer.daemon = True
        timer.start()

    def _ready(self, worker: Worker) -> bool:
        ready = worker.wait_ready(stop=self._stopping.is_set)
        if ready:
            self._learn(worker.about)
            self.log("ready", pid=worker.pid, device=worker.about.get("device"))
        elif not self._stopping.is_set():
            self.log("broken", message=worker.broken)
        with self._known:
            self._known.notify_all()
        return ready

    def _learn(self, facts: dict[str, Any]) -> None:
        with self._known:
            self._facts[facts["base"]] = facts
            self._known.notify_all()

    def _replace(self, worker: Worker, why: str) -> None:
        if not self._stopping.is_set():
            self._restart(worker, why)

    def _restart(self, worker: Worker, why: str) -> bool:
        self.counts.add("restarts")
        self.log("restart", why=why)
        worker.start()
        return self._ready(worker)

    # -- references ---------------------------------------------------------------------------------------------

    def _shared(self) -> list[Entry]:
        entries = []
        if EMBEDDED in self.bases:
            from multilora.pipelines.load import library

            for name, e in library().items():
                folder = Path(e["path"]).parent
                words = (e["category"], e["trigger"], e["description"])
                entries.append(Entry(name, name, *words, folder / e["preview"], Path(e["path"]), sha256=e["sha256"]))
        if self._folder is not None:
            for path in sorted(self._folder.glob("*.safetensors")):
                preview = path.with_suffix(".png")
                shown = preview if preview.is_file() else None
                entries.append(Entry(path.stem, path.stem, "server", preview=shown, path=path))
        return entries

    def _place(self, session: Session, reference: str) -> str:
        """What the worker reads for a reference. Raises Refused for one that is not this session's to use."""
        if reference.startswith("file:"):
            if reference not in session.outputs:
                raise Refused(f"{reference!r:.80} is not a file that one of your requests made")
            return str(session.outputs[reference].path)
        entry = self.entry(session, reference)
        embedded = not entry.owned and entry.path.parent != self._folder
        return entry.reference if embedded else str(entry.path)


_CHANGED = (
    "the model was not as before after this picture, twice in a row, so the picture was thrown away; please tell who "
    "runs this server"
)


def _lost(job: Job, why: str, late: bool, seconds: float) -> Answer:
    if job.cancelled.is_set():
        return Answer("cancelled")
    if late:
        return Answer(
            "failed", code="timeout", message=f"stopped after {seconds:g} s, which is as long as one may run"
        )
    return Answer("failed", code="worker", message=f"{why} while it ran your request, and the next one as well; other "
                  "requests are not affected")  # fmt: skip
