"""The door: who may come in while the line is full, what others are told, and that gradio hears nothing of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from types import SimpleNamespace

import pytest

from multilora.web.service import Limits, Refused
from multilora.web.service.door import Door, Doorkeeper, _going, draws
from multilora.web.service.health import Counts
from multilora.web.service.jobs import Line


def door(waiting=3, per_user=2, workers=1):
    return Door(Line(Limits(waiting=waiting, per_user=per_user)), workers, Counts())


def test_as_many_come_in_as_may_wait_and_run_and_an_ended_event_makes_room():
    found, going = door(), {"a", "b", "c", "d"}
    for event in "abcd":
        found.enter("", going).event = event
    with pytest.raises(Refused, match=r"busy: 3 requests wait.*try again in 10 s") as caught:
        found.enter("", going)
    assert caught.value.code == "busy"
    going.remove("b")
    last = found.enter("", going)  # gradio has not given it an event yet: it keeps its place
    with pytest.raises(Refused):
        found.enter("", going)
    found.leave(last)
    found.enter("", going)


def test_a_user_has_his_part_of_it_and_nobody_has_no_name():
    found = door(waiting=20)
    for _ in range(3):  # one runs, two wait
        found.enter("visitor:a", ())
    with pytest.raises(Refused, match="2 of your requests wait already") as caught:
        found.enter("visitor:a", ())
    assert caught.value.code == "limit"
    for _ in range(5):
        found.enter("visitor:b" if _ < 3 else "", ())


def test_jobs_that_did_not_come_by_the_door_fill_the_line_too():
    found = door()
    found.line._waiting = [object()] * 3
    with pytest.raises(Refused, match="busy"):
        found.enter("", ())


def test_when_to_try_again_is_what_a_job_takes():
    found = door(workers=2)
    assert found.seconds() == 10
    for seconds in (4.0, 20.0):
        found.counts.took("compose", seconds, 0.0)
    assert found.seconds() == 6
    found.counts.took("compose", 1e4, 0.0)
    assert found.seconds() == 60


def test_a_page_is_told_once_and_only_so_many_are_remembered():
    found = door()
    for i in range(1200):
        found.tell(f"page {i}", f"why {i}")
    assert found.told("page 1199") == "why 1199"
    assert found.told("page 1199") == found.told("page 3") == found.told(None) == ""
    assert len(found._told) == 999


class Gradio:
    """What is behind the door: it counts who comes, and answers as gradio's routes do."""

    def __init__(self, status=200, fails=False):
        self.status, self.fails, self.asked, self.waiting, self.running = status, fails, [], [], []
        drawing, other = draws(lambda: None), (lambda: None)
        self.fns = {0: SimpleNamespace(_id=0, api_name="compose", fn=drawing),
                    1: SimpleNamespace(_id=1, api_name="list_methods", fn=other)}  # fmt: skip
        line = SimpleNamespace(queue=self.waiting)
        self._queue = SimpleNamespace(event_queue_per_concurrency_id={"line": line}, active_jobs=[None, self.running])

    def get_blocks(self):
        return self

    async def __call__(self, scope, receive, send):
        self.asked.append(scope["path"])
        if self.fails:
            raise KeyError("fn_index")
        event = f"event {len(self.asked)}"
        (self.waiting if self.running else self.running).append(SimpleNamespace(_id=event))
        body = json.dumps({"event_id": event} if self.status == 200 else {"detail": "no"}).encode()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": body[:5], "more_body": True})
        await send({"type": "http.response.body", "body": body[5:]})


def posts(gradio, waiting=1):
    """A function that posts, (path, data) -> (status, JSON, headers), with what was refused in `refused`."""
    service = SimpleNamespace(door=door(waiting), refused=lambda error, **about: post.refused.append(error.code))
    keeper = Doorkeeper(gradio, service)

    def post(path, data, owner=""):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "app": gradio, "multilora.asked": (owner, data)}
        asyncio.run(keeper(scope, None, send))
        body = json.loads(b"".join(m.get("body", b"") for m in sent))
        return sent[0]["status"], body, dict(sent[0]["headers"])

    post.refused, post.door = [], service.door
    return post


JOINS = [("/gradio_api/queue/join", 0), ("/gradio_api/queue/join", "0"), ("/gradio_api/queue/join", 0.0),
         ("/gradio_api/call/compose", None), ("/gradio_api/call/compose", -1), ("/gradio_api/call/v2/compose", None),
         ("/gradio_api/run/predict", 0), ("/gradio_api/api/compose/", None)]  # fmt: skip


@pytest.mark.parametrize(("path", "number"), JOINS)
def test_a_refusal_is_gradio_s_own_kind_and_gradio_is_not_asked(path, number):
    gradio = Gradio()
    post = posts(gradio)
    data = {"data": ["x"], "fn_index": number, "session_hash": "tab"}
    assert [post(path, data)[0] for _ in range(2)] == [200, 200], "one runs, one waits"
    status, body, headers = post(path, data)
    assert status == 503
    assert body["detail"] == body["error"]
    assert "the server is busy: 1 requests wait" in body["detail"]
    assert headers[b"retry-after"] == b"10"
    assert len(gradio.asked) == 2
    assert post.refused == ["busy"]
    assert post.door.told("tab") == body["detail"]
    del gradio.running[0]
    assert post(path, data)[0] == 200


def test_what_does_not_draw_is_never_refused_nor_counted():
    gradio = Gradio()
    post = posts(gradio)
    others = [("/gradio_api/queue/join", {"fn_index": 1}), ("/gradio_api/call/list_methods", {"data": []}),
              ("/gradio_api/cancel", {"fn_index": 0}), ("/gradio_api/queue/join", {"fn_index": "x"}),
              ("/gradio_api/queue/join", {"fn_index": 0.5}), ("/gradio_api/queue/join", {}),
              ("/gradio_api/queue/join", [])]  # fmt: skip
    for path, data in others * 5:
        assert post(path, data)[0] == 200
    assert post.door.places == []
    for _ in range(2):
        post("/gradio_api/call/compose", {"data": []})
    for path, data in others:
        assert post(path, data)[0] == 200


def test_a_user_s_own_limit_is_status_429():
    post = posts(Gradio(), waiting=20)
    for _ in range(3):
        post("/gradio_api/call/compose", {"data": []}, "visitor:a")
    assert post("/gradio_api/call/compose", {"data": []}, "visitor:a")[0] == 429
    assert post("/gradio_api/call/compose", {"data": []}, "visitor:b")[0] == 200


@pytest.mark.parametrize("gradio", [Gradio(status=422), Gradio(fails=True)], ids=["refuses", "fails"])
def test_what_gradio_does_not_take_keeps_no_place(gradio):
    post = posts(gradio)
    for _ in range(4):
        with contextlib.suppress(KeyError):
            assert post("/gradio_api/call/compose", {"data": []})[0] == 422
    assert len(gradio.asked) == 4
    assert post.door.places == []


def test_an_event_that_is_cancelled_while_it_ends_keeps_no_place():
    """Two cancels, a moment apart, leave it in gradio's `event_ids_to_events`, where nothing takes it out."""
    import gradio as gr
    import httpx
    from gradio.routes import App

    def slow():
        for i in range(8):
            time.sleep(0.2)
            yield str(i)

    with gr.Blocks() as blocks:
        gr.Button().click(draws(slow), None, gr.Textbox(), api_name="slow")
    app, queue = App.create_app(blocks), blocks._queue

    async def until(reached):
        async with asyncio.timeout(20):
            while not reached():
                await asyncio.sleep(0.02)

    async def visit():
        blocks.is_running = True
        blocks.run_startup_events()
        if not queue.active_jobs:
            queue.start()
        await blocks.run_extra_startup_events()
        queue.set_server_app(app)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://t") as browser:
            asked = {"data": [], "fn_index": next(iter(blocks.fns)), "session_hash": "s"}
            event = (await browser.post("/gradio_api/queue/join", json=asked)).json()["event_id"]
            assert _going(queue) == {event}
            await until(lambda: any(queue.active_jobs))
            assert _going(queue) == {event}
            for _ in range(2):
                with contextlib.suppress(KeyError):  # gradio's own, at the second
                    await browser.post("/gradio_api/cancel", json={**asked, "event_id": event})
                await asyncio.sleep(0.06)
            await until(lambda: not _going(queue))

    asyncio.run(visit())
