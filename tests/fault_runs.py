"""Cases of the table of faults (tests/fault_rows.py) about runs: pictures, requests, batches, workers."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from unittest import mock

from multilora.lab.evaluate.batch import run_batch
from multilora.lab.evaluate.items import items_of, read_items
from multilora.lab.evaluate.journal import Journal
from multilora.lab.evaluate.workers import Unusable
from multilora.web.service import Compose, Limits, Refused, Service
from multilora.web.service.door import Door
from multilora.web.service.health import Counts
from multilora.web.service.jobs import Job, Line
from multilora.web.service.limits import check
from multilora.web.service.sessions import Sessions
from tests import scene, test_bad_input, test_service
from tests.batch_standin import StandIn, lines
from tests.fault_files import Case, case_of
from tests.test_admit import on_disk

STUB = "tests.service_engine:Stub"


def pictures() -> list[Case]:
    """What a picture can be asked for: tests.test_bad_input.RUN, ADD and COMPOSING."""

    def run(bench, folder, name):
        given, words = test_bad_input.RUN[name]
        asked = {"prompt": "a fox", "num_inference_steps": 2, "seed": 1, **given}
        return test_bad_input.refused(bench.picture, lambda composer: composer(**asked), *words)

    def add(bench, folder, name):
        args, options, words = test_bad_input.ADD[name]
        robe = scene.loras(bench.picture[0].pipe, 2)[1]
        return test_bad_input.refused(bench.picture, lambda c: c.add(*(args or [robe]), **options), *words)

    def block(bench, folder, name):
        from multilora.pipelines.composing import composing

        given, words = test_bad_input.COMPOSING[name]
        given = {"loras": [bench.picture[0].loras["fox"].lora], **given}

        def call(composer):
            with composing(composer.pipe, **given):
                raise AssertionError("entered")

        return test_bad_input.refused(bench.picture, call, *words)

    return [
        *[case_of(f"picture: {n}", words[0], run, name=n) for n, (_, words) in test_bad_input.RUN.items()],
        *[case_of(f"LoRA: {n}", words[0], add, name=n) for n, (_, _, words) in test_bad_input.ADD.items()],
        *[case_of(f"composing: {n}", words[0], block, name=n) for n, (_, words) in test_bad_input.COMPOSING.items()],
    ]


def requests() -> list[Case]:
    """What a server is asked for: tests.test_service.BAD."""

    def say(bench, folder, number):
        return _refused(lambda: check(test_service.BAD[number][0], Limits()))

    return [
        case_of(f"{asked.action} {i + 1}: {words}".replace("\\", ""), words.replace("\\", ""), say, number=i)
        for i, (asked, words) in enumerate(test_service.BAD)
    ]


def queues() -> list[Case]:
    """What the line of a server refuses; who waits in it goes on waiting."""

    def say(bench, folder, waiting, session, closed=False):
        line, jobs = Line(Limits(waiting=3, per_user=2)), []
        for number, owner in enumerate(waiting):
            jobs.append(Job(number, owner, _request(), b""))
            line.join(jobs[-1])
        if closed:
            line.close("the server is stopping; please try again in a minute")
        before = [job.id for job in line.jobs()]
        text = _refused(lambda: line.join(Job(9, session, _request(), b"")))
        assert [job.id for job in line.jobs()] == before
        return text

    def at_door(bench, folder, owners, owner):
        door = Door(Line(Limits(waiting=3, per_user=2)), 1, Counts())
        places = [door.enter(each, ()) for each in owners]
        text = _refused(lambda: door.enter(owner, ()))
        assert door.places == places
        return text

    def session(bench, folder, key):
        return _refused(lambda: Sessions(folder, Limits()).get(key))

    return [
        case_of("a line that is full", "the server is busy: 3 requests wait", say, waiting="abc", session="d"),
        case_of("a third request of one user", "2 of your requests wait already", say, waiting="aa", session="a"),
        case_of("a picture, by the app, while one is drawn and the line is full", "again in 10 s", at_door,
                owners="abcd", owner="e"),
        case_of("a picture, by the app, of one who has one drawn and two waiting", "2 of your requests wait already",
                at_door, owners="aaa", owner="a"),
        case_of("a server that stops", "the server is stopping", say, waiting="a", session="b", closed=True),
        *[case_of(f"session {k!r:.12}", "1 to 200 characters", session, key=k) for k in ("", "x" * 201, None, 3)],
    ]


def references() -> list[Case]:
    """LoRAs that a session does not have."""

    def say(bench, folder, reference):
        service = Service.__new__(Service)  # no worker is needed to look at a library
        service.bases, service._folder = ["embedded"], None
        owner = Sessions(folder, Limits()).get("a")
        return _refused(lambda: service._place(owner, reference))

    return [
        case_of(f"reference {r}", "is not", say, reference=r)
        for r in ("/etc/passwd", "../zib", "upload:0123456789abcdef", "file:0123", "zib.safetensors", "http://x/a")
    ]


BAD_LINES = {
    "{": "not JSON", "[1]": "wanted an object", '{"loras": {}}': "prompt: Field required",
    '{"prompt": "x", "steps": 0}': "steps: ", '{"prompt": "x", "stepz": 3}': "stepz: Extra",
    '{"prompt": "x", "guidance_scale": NaN}': "guidance_scale: a finite",
    '{"prompt": "x", "loras": {"korv": null}}': "a number or a schedule",
    '{"prompt": "x", "method": "swich"}': "swich", '{"prompt": "x", "images": 3}': "one line is one picture",
    '{"prompt": "x", "repeat": -1}': "wanted a whole number from 0", '{"prompt": "x", "seed": -3}': "(got -3)",
    '{"prompt": "x", "loras": {"korf": 1}}': "korf", '{"prompt": "x", "base": "nowhere"}': "nowhere",
}  # fmt: skip


def batch_lines() -> list[Case]:
    def say(bench, folder, line):
        path = folder / "recipes.jsonl"
        given = {**lines(1)[0], **json.loads(line)} if "nowhere" in line else None
        path.write_text('{"prompt": "a korv"}\n' + (json.dumps(given) if given else line))
        before = on_disk(folder)
        text = _refused(lambda: read_items(path))
        assert on_disk(folder) == before
        return text

    return [case_of(f"line of a batch: {line}", words, say, line=line) for line, words in BAD_LINES.items()]


def batches() -> list[Case]:
    """What stops a batch: afterwards its pictures are whole, and the same command goes on."""

    def changed(bench, folder):
        run_batch(items_of(lines(3)), folder, StandIn, settings={"threads": 1})
        before = _pictures(folder)
        text = _refused(lambda: run_batch(items_of(lines(3, steps=9)), folder, StandIn, settings={"threads": 2}))
        assert _pictures(folder) == before
        return text

    def second(bench, folder):
        with Journal(folder) as journal:
            journal.enter(items_of(lines(3)), {})
            text = _refused(lambda: run_batch(items_of(lines(3)), folder, StandIn))
        assert run_batch(items_of(lines(3)), folder, StandIn).drawn == 3
        return text

    def disk(bench, folder, code, call):
        """The third write of a picture, or of the list of results, fails."""
        real, count = os.replace, iter(range(10**6))

        def failing(source, target):
            if Path(target).suffix == call and next(count) == (2 if call == ".png" else 0):
                raise OSError(code, os.strerror(code))
            return real(source, target)

        with mock.patch("os.replace", failing):
            text = _refused(lambda: run_batch(items_of(lines(5)), folder, StandIn))
        assert len(_pictures(folder)) == (2 if call == ".png" else 5)
        assert run_batch(items_of(lines(5)), folder, StandIn).done == 5
        reference = folder / "reference"
        run_batch(items_of(lines(5)), reference, StandIn)
        assert {n: d for n, d in _pictures(folder).items() if "." in n} == _pictures(reference)
        return text

    def closed(bench, folder):
        return _refused(lambda: run_batch(items_of(lines(2)), "/proc/self", StandIn))

    def unusable(bench, folder):
        def draw(recipe, cancel):
            raise Unusable("base 'x': no such weights")

        text = _refused(lambda: run_batch(items_of(lines(3)), folder, lambda: draw))
        assert _pictures(folder) == {}
        return text

    return [
        case_of("a folder with another batch", "this folder holds another batch", changed),
        case_of("a second driver in one folder", "a batch is running in this folder", second),
        *[
            case_of(f"{os.strerror(code)} at {what}", "What is done is safe", disk, code=code, call=call)
            for code in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
            for call, what in ((".png", "the third picture"), (".jsonl", "the list of results"))
        ],
        case_of("an output folder that cannot be written to", "cannot be written to", closed),
        case_of("a worker that can draw nothing", "nothing can be drawn", unusable),
    ]


def saves() -> list[Case]:
    """A LoRA file that cannot be written: neither it nor what was there before changes."""
    import multilora

    def say(bench, folder, code):
        lora = bench.picture[0].loras["fox"].lora
        path = folder / "out.safetensors"
        path.write_bytes(b"older")

        def full(*_):
            raise OSError(code, os.strerror(code))

        before = {k: v[3] for k, v in on_disk(folder).items()}
        with mock.patch("os.fsync", full):
            text = _refused(lambda: multilora.save(lora, path))
        assert {k: v[3] for k, v in on_disk(folder).items()} == before
        return text

    def over(bench, folder):
        path = multilora.save(bench.picture[0].loras["fox"].lora, folder / "fox.safetensors")
        lora, before = multilora.load(path, base=bench.picture[0].pipe), path.read_bytes()
        text = _refused(lambda: multilora.save(2 * lora, path))
        assert path.read_bytes() == before
        return text

    return [case_of("an output that is its own input", "never written over", over)] + [
        case_of(f"a LoRA file and {os.strerror(c)}", os.strerror(c), say, code=c) for c in (errno.ENOSPC, errno.EIO)
    ]


def workers() -> list[Case]:
    """What a user is told when the worker of a server fails; the next request is served."""

    def say(bench, folder, fault, seconds=60.0):
        extra = {"fault": fault, "until": str(folder / "never")}
        with Service(engine=STUB, limits=Limits(seconds=seconds)) as service:
            job = service.submit(Compose(recipe=test_service.recipe(extra=extra)), service.session("a"))
            text = _refused(lambda: job.result(120))
            after = service.submit(Compose(recipe=test_service.recipe(6)), service.session("b")).result(120)
            assert test_service.color(after) == (6, 0, 0)
        return text

    return [
        case_of("a request that ends its worker, twice", "SIGKILL", say, slow=True, fault="die"),
        case_of("a request that fails in the worker", "this request failed", say, slow=True, fault="raise"),
        case_of("a model that is not as before, twice", "not as before", say, slow=True, fault="drift"),
        case_of("a request that takes too long", "stopped after 1 s", say, slow=True, fault="hang", seconds=1.0),
    ]


def engines() -> list[Case]:
    """What the engine says of memory and NaN, on the embedded base; the next picture is that of a lone run."""

    def say(bench, folder, fault):
        from tests import test_service_engine as engines

        engine = _engine()
        extra = {"fault": fault, "at": 1, "room": 0}
        answer, _ = engines.run(engine, Compose(recipe=engines.recipe("zib", "korv", extra=extra)))
        assert (answer.kind, answer.code, answer.drift) == ("failed", fault, [])
        engines.after(engine)
        return answer.message

    return [
        case_of("not enough memory for a picture", "try a smaller size", say, slow=True, fault="memory"),
        case_of("NaN in a prediction", "step 2", say, slow=True, fault="nan"),
    ]


def _engine():
    from tests.service_engine import faulty

    if not hasattr(_engine, "made"):
        _engine.made = faulty()("embedded", "cpu")
    return _engine.made


def _request() -> Compose:
    return Compose(recipe=test_service.recipe())


def _pictures(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder, "pictures").glob("*")}


def _refused(call) -> str:
    """The message of what a call raises: an error of ours or of the system's, for the caller to read."""
    try:
        call()
    except (ValueError, Refused, OSError) as error:
        return str(error)
    raise AssertionError("not refused")
