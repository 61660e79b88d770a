"""The service around its workers: order, limits, faults, cancels, shutdown. The worker's engine is a stand-in."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import time

import pytest

from multilora.recipe import LoraUse, PictureUse, Recipe
from multilora.web.service import Base, Compare, Compose, Limits, Merge, Refused, Score, Service, Share
from multilora.web.service.limits import check

STUB = "tests.service_engine:Stub"


def recipe(seed: int = 0, steps: int = 3, **more) -> Recipe:
    fields = {"prompt": "a secret fox", "base": "embedded", "guidance_scale": 3.0, "width": 8, "height": 8}
    return Recipe(**{**fields, "seed": seed, "steps": steps, **more})


def held(tmp_path, seed: int = 0, name: str = "go") -> Recipe:
    """A recipe that stops at its second step until tmp_path / name is there."""
    return recipe(seed, extra={"fault": "hang", "until": str(tmp_path / name)})


@pytest.fixture(scope="module")
def shared():
    with Service(engine=STUB, limits=Limits(waiting=3, per_user=2, seconds=60)) as service:
        yield service


def started(service, request, session):
    """A job that runs: its events are read up to the first step, the others are in `watched`."""
    job = service.submit(request, session)
    job.watched = job.events(timeout=60)
    while next(job.watched).kind != "progress":
        pass
    return job


def color(result) -> tuple:
    return result.pictures[0].image.getpixel((0, 0))


def test_the_process_of_the_service_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, multilora.web.service; assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_events_come_in_order_and_the_result_last(shared):
    job = shared.submit(Compose(recipe=recipe(7)), shared.session("a"))
    events = list(job.events(timeout=60))
    kinds = [e.kind for e in events]
    assert kinds[-1] == "done"
    assert set(kinds[:-1]) <= {"queued", "progress"}
    assert color(job.result()) == (7, 0, 0)
    assert [e.step for e in events if e.kind == "progress"][-1] == 3
    assert list(job.events())[-1].kind == "done", "read again, it ends at once"


def test_what_is_changed_after_submit_changes_nothing(shared, tmp_path):
    first = started(shared, Compose(recipe=held(tmp_path)), shared.session("a"))
    mine = recipe(9)
    job = shared.submit(Compose(recipe=mine), shared.session("a"))
    mine.seed = 200
    (tmp_path / "go").touch()
    first.result(60)
    assert color(job.result(60)) == (9, 0, 0)


def test_users_take_turns(shared, tmp_path):
    first = started(shared, Compose(recipe=held(tmp_path)), shared.session("a"))
    jobs = {name: shared.submit(Compose(recipe=recipe(i)), shared.session(name[0]))
            for i, name in enumerate(("a1", "b1", "b2"))}  # fmt: skip
    watched = {name: job.events(timeout=60) for name, job in jobs.items()}
    assert {name: next(events).position for name, events in watched.items()} == {"b1": 0, "a1": 1, "b2": 2}
    (tmp_path / "go").touch()
    first.result(60)
    assert all(list(events)[-1].kind == "done" for events in watched.values())
    assert jobs["b1"].started < jobs["a1"].started < jobs["b2"].started


def test_a_full_line_refuses_politely_and_serves_those_it_took(shared, tmp_path):
    first = started(shared, Compose(recipe=held(tmp_path)), shared.session("first"))
    taken, refused = [], []
    for i in range(30):
        try:
            taken.append(shared.submit(Compose(recipe=recipe(i)), shared.session(f"user {i}")))
        except Refused as error:
            refused.append(error)
    assert (len(taken), len(refused)) == (3, 27)
    assert {e.code for e in refused} == {"busy"}
    assert "try again" in str(refused[0])
    assert "3 requests wait" in str(refused[0])
    (tmp_path / "go").touch()
    assert first.result(60)
    assert [color(job.result(60))[0] for job in taken] == [0, 1, 2]


def test_one_user_may_have_so_many_waiting_and_others_are_served_before_the_second(shared, tmp_path):
    first = started(shared, Compose(recipe=held(tmp_path)), shared.session("greedy"))
    mine = [shared.submit(Compose(recipe=recipe(i)), shared.session("greedy")) for i in (1, 2)]
    with pytest.raises(Refused, match="2 of your requests wait already") as caught:
        shared.submit(Compose(recipe=recipe(3)), shared.session("greedy"))
    assert caught.value.code == "limit"
    other = shared.submit(Compose(recipe=recipe(4)), shared.session("other"))
    assert [j.number for j in shared._line._order()] == [other.number, *(j.number for j in mine)]
    (tmp_path / "go").touch()
    for job in (first, *mine, other):
        job.result(60)


def test_a_worker_killed_in_mid_picture_is_replaced_and_the_picture_made(shared, tmp_path):
    before = shared.workers[0].starts
    job = started(shared, Compose(recipe=held(tmp_path, 5)), shared.session("a"))
    os.kill(shared.workers[0].pid, signal.SIGKILL)
    (tmp_path / "go").touch()
    kinds = [e.kind for e in job.watched]
    assert kinds[-1] == "done"
    assert kinds.count("note") == 1, "the user is told"
    assert color(job.result()) == (5, 0, 0)
    assert shared.workers[0].starts == before + 1


def test_a_request_that_kills_the_worker_twice_gets_one_error_and_the_next_one_works(shared):
    job = shared.submit(Compose(recipe=recipe(extra={"fault": "die"})), shared.session("a"))
    events = list(job.events(timeout=60))
    assert events[-1].kind == "error"
    assert events[-1].code == "worker"
    assert "SIGKILL" in events[-1].message
    assert sum(e.last for e in events) == 1
    assert color(shared.submit(Compose(recipe=recipe(6)), shared.session("b")).result(60)) == (6, 0, 0)


def test_a_worker_that_dies_while_idle_is_replaced(shared):
    os.kill(shared.workers[0].pid, signal.SIGKILL)
    assert color(shared.submit(Compose(recipe=recipe(8)), shared.session("a")).result(60)) == (8, 0, 0)


def test_a_picture_of_a_changed_model_is_thrown_away_and_drawn_again(shared, tmp_path):
    flag = str(tmp_path / "once")
    job = shared.submit(Compose(recipe=recipe(4, extra={"fault": "drift", "flag": flag})), shared.session("a"))
    assert color(job.result(60)) == (4, 0, 0)
    always = shared.submit(Compose(recipe=recipe(4, extra={"fault": "drift"})), shared.session("a"))
    with pytest.raises(Refused, match="not as before"):
        always.result(60)
    assert color(shared.submit(Compose(recipe=recipe(3)), shared.session("a")).result(60)) == (3, 0, 0)


def test_a_failure_is_not_tried_again(shared):
    before = shared.workers[0].starts
    with pytest.raises(Refused, match="on purpose") as caught:
        shared.submit(Compose(recipe=recipe(extra={"fault": "raise"})), shared.session("a")).result(60)
    assert caught.value.code == "failed"
    assert shared.workers[0].starts == before


def test_cancel_of_a_running_and_of_a_waiting_job(shared):
    slow = recipe(steps=150, extra={"pause": 0.05})
    job = started(shared, Compose(recipe=slow), shared.session("a"))
    waits = shared.submit(Compose(recipe=recipe()), shared.session("a"))
    assert not shared.cancel(job.id, shared.session("b")), "only its owner's"
    assert not shared.cancel("guessed", shared.session("a"))
    assert job.state == "running"
    waits.cancel()
    assert waits.last.kind == "cancelled"
    assert shared.cancel(job.id, shared.session("a"))
    last = list(job.watched)[-1]
    assert last.kind == "cancelled"
    with pytest.raises(Refused, match="no picture"):
        job.result()
    before = shared.workers[0].starts
    assert shared.submit(Compose(recipe=recipe()), shared.session("a")).result(60)
    assert shared.workers[0].starts == before, "a cancel costs no worker"


def test_a_cancel_is_answered_even_while_the_worker_does_not_listen(shared, tmp_path):
    job = started(shared, Compose(recipe=held(tmp_path)), shared.session("a"))
    job.cancel()
    assert list(job.watched)[-1].kind == "cancelled", "the file that it waits for is not there yet"
    (tmp_path / "go").touch()
    assert shared.submit(Compose(recipe=recipe()), shared.session("a")).result(60)


def test_closing_the_events_cancels(shared):
    job = started(shared, Compose(recipe=recipe(steps=150, extra={"pause": 0.05})), shared.session("a"))
    job.watched.close()
    with pytest.raises(Refused):
        job.result(60)
    assert job.last.kind == "cancelled"


def test_an_unread_preview_is_replaced_by_the_next_one(shared):
    job = shared.submit(Compose(recipe=recipe(steps=50)), shared.session("a"))
    job.result(60)
    assert [e.kind for e in job.events()] in (["queued", "progress", "done"], ["progress", "done"])


def test_one_may_run_only_so_long(tmp_path):
    with Service(engine=STUB, limits=Limits(seconds=1.0)) as service:
        service.about()
        job = service.submit(Compose(recipe=held(tmp_path)), service.session("a"))
        with pytest.raises(Refused, match="stopped after 1 s") as caught:
            job.result(60)
        assert caught.value.code == "timeout"
        assert service.submit(Compose(recipe=recipe()), service.session("a")).result(60)


def test_shutdown_answers_everyone(tmp_path):
    service = Service(engine=STUB)
    job = started(service, Compose(recipe=held(tmp_path)), service.session("a"))
    waits = service.submit(Compose(recipe=recipe()), service.session("b"))
    pid, root = service.workers[0].pid, service._root
    service.close(0.1)
    assert waits.last.code == "stopped"
    assert "stopping" in waits.last.message
    assert list(job.watched)[-1].last
    with pytest.raises(Refused, match="stopping"):
        service.submit(Compose(recipe=recipe()), service.session("a"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not root.exists()
    service.close()


def test_a_base_that_cannot_be_loaded_is_said(tmp_path):
    with Service("missing", engine=STUB) as service:
        with pytest.raises(Refused, match="'missing': no such folder"):
            service.about(timeout=60)
        with pytest.raises(Refused, match="cannot start: base 'missing'"):
            service.submit(Compose(recipe=recipe(base="missing")), service.session("a")).result(60)
        assert service.health()["status"] == "broken"


def test_health_and_metrics(shared):
    shared.submit(Compose(recipe=recipe()), shared.session("a")).result(60)
    health = shared.health()
    assert health["status"] == "ok"
    assert health["workers"][0]["device"] == "stub"
    text = shared.metrics()
    samples = dict(re.findall(r"^(multilora_\w+(?:\{[^}]*\})?) ([-+\d.e]+)$", text, re.M))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(lines), "every line is a sample, and none is there twice"
    assert float(samples['multilora_jobs_total{action="compose",outcome="done"}']) >= 1
    assert samples["multilora_up"] == "1"
    assert "secret" not in text


def test_logs_have_no_prompt_unless_asked_for(shared, caplog):
    with caplog.at_level(logging.INFO, "multilora.service"):
        shared.submit(Compose(recipe=recipe()), shared.session("a key")).result(60)
        while not any('"ended"' in m for m in caplog.messages):
            time.sleep(0.01)
        shared.log.prompts = True
        shared.submit(Compose(recipe=recipe()), shared.session("a key")).result(60)
        shared.log.prompts = False
    entries = [json.loads(m) for m in caplog.messages]
    assert [e["event"] for e in entries][:2] == ["queued", "ended"]
    assert entries[1]["outcome"] == "done"
    silent = caplog.messages[: [e["event"] for e in entries].index("ended") + 1]
    assert not any("secret" in m or "a key" in m for m in silent)
    assert any("a secret fox" in m for m in caplog.messages)


USE = LoraUse(name="fox", reference="zib")
BAD = [
    (Compose(recipe=recipe(steps=151)), "steps is 151, this server allows up to 150"),
    (Compose(recipe=recipe(width=10**6)), "width is 1e\\+06"),
    (Compose(recipe=recipe(images=5)), "number of pictures is 5"),
    (Compose(recipe=recipe(prompt="x" * 10**7)), "length of the prompt is 1e\\+07"),
    (Compose(recipe=recipe(negative_prompt="x" * 5000)), "length of the negative prompt"),
    (Compose(recipe=recipe(prompt="<lora:/etc/passwd:1>")), "tags are not read here"),
    (Compose(recipe=recipe(controlnet="/srv/net")), "controlnet"),
    (Compose(recipe=recipe(loras=[USE] * 17)), "number of LoRAs is 17"),
    (Compose(recipe=recipe(loras=[LoraUse(name="fox")])), "LoRA 'fox' has no reference"),
    (Compose(recipe=recipe(loras=[LoraUse(name="fox", reference="zib", mask="/etc/passwd")])), "mask of LoRA 'fox'"),
    (Compose(recipe=recipe(pictures=[PictureUse(role="image", reference="/x.png", sha256="0")])), "image: send the"),
    (Compose(recipe=recipe(options={"file": "/etc/passwd"})), "option file='/etc/passwd'"),
    (Compose(recipe=recipe(options={"gate": "mine.safetensors"})), "option gate='mine.safetensors'"),
    (Compose(recipe=recipe(scheduler_config={"num_train_timesteps": 10**9})), "num_train_timesteps is 1e\\+09"),
    (Compose(recipe=recipe(extra={"x": "y" * 2**21})), "length of the recipe"),
    (Compose(recipe=recipe(), masks={"fox": b""}), "masks: 'fox' is not a LoRA"),
    (Compose(recipe=recipe(), pictures={"photo": b""}), "pictures: 'photo' is not one of"),
    (Compose(recipe=recipe(), pictures={"image": bytes(2**25 + 1)}), "image: number of bytes"),
    (Compare(recipes=[recipe()] * 13), "number of variants is 13"),
    (Score(images=(b"",) * 17, prompt=""), "number of pictures is 17"),
    (Merge(loras=(Share(reference="zib"),) * 17), "number of LoRAs is 17"),
]


@pytest.mark.parametrize(("request_", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_a_request_over_a_limit_is_refused_by_name(request_, message):
    with pytest.raises(Refused, match=message):
        check(request_, Limits())


@pytest.mark.parametrize(
    "reference", ["/etc/passwd", "../zib", "upload:0123456789abcdef", "file:0123", "zib.safetensors"]
)
def test_a_lora_is_named_by_a_reference_of_the_session_and_never_by_a_path(shared, reference):
    asked = Compose(recipe=recipe(loras=[LoraUse(name="x", reference=reference)]))
    with pytest.raises(Refused, match=re.escape(reference)):
        shared.submit(asked, shared.session("a"))


def test_a_base_that_is_not_served_is_refused(shared):
    with pytest.raises(Refused, match="base '/srv/other' is not served here"):
        shared.submit(Compose(recipe=recipe(base="/srv/other")), shared.session("a"))
    with pytest.raises(Refused, match="not served here"):
        shared.submit(Base(base="owner/name"), shared.session("a"))


def test_sessions_are_bounded_and_take_their_files_with_them():
    with Service(engine=STUB, limits=Limits(sessions=5)) as service:
        first = service.session("0")
        (first.folder / "mine").write_bytes(b"x")
        for i in range(1, 300):
            service.session(str(i))
        assert service.health()["sessions"] == 5
        assert not first.folder.exists()
        with pytest.raises(Refused, match="1 to 200 characters"):
            service.session("x" * 201)
