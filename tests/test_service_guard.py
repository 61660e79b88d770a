"""Logins with a brake, and the middleware in front of a real gradio app."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from multilora.web.service import Limits
from multilora.web.service.guard import LOCKED_SECONDS, WRONG, Guard, Logins, hashed, launch_options, read_users


class Standing:
    """A service as the guard sees it."""

    limits = Limits(upload_bytes=1000, hour_bytes=9 * 2**20)

    def health(self):
        return {"status": "ok"}

    def metrics(self):
        return "multilora_up 1\n"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_name_is_locked_after_wrong_passwords_and_others_are_not():
    clock = Clock()
    logins = Logins({"ann": hashed("right horse"), "bob": hashed("battery")}, clock)
    assert logins("ann", "right horse")
    assert not logins("eve", "right horse")
    assert [logins("ann", "wrong") for _ in range(WRONG)] == [False] * WRONG
    assert not logins("ann", "right horse"), "locked, also against the right one"
    assert logins("bob", "battery")
    clock.now = LOCKED_SECONDS + 1
    assert logins("ann", "right horse")


def test_passwords_are_stored_salted_and_the_file_is_read_back(tmp_path):
    path = tmp_path / "users"
    path.write_text(f"# people\nann:{hashed('right horse')}\nbob:{hashed('right horse')}\n")
    users = read_users(path)
    assert users["ann"] != users["bob"]
    assert "right" not in path.read_text()
    assert Logins(users)("bob", "right horse")
    for text, words in (("ann:secret", "line 1: wanted NAME:HASH"), ("", "names no user")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words) as caught:
            read_users(path)
        assert "secret" not in str(caught.value)


def client(auth=None, clock=None):
    """A browser for a gradio app behind the guard; more browsers of one app by `another`."""
    import gradio as gr
    from gradio.routes import App
    from starlette.middleware import Middleware
    from starlette.testclient import TestClient

    with gr.Blocks() as blocks:
        text = gr.Textbox()
        text.submit(lambda x: x, text, text, api_name="echo")
        text.blur(lambda x: x, text, text, api_name="own", api_visibility="private", queue=False)
    blocks.auth = auth
    blocks.max_file_size = None
    app = App.create_app(
        blocks, app_kwargs={"middleware": [Middleware(Guard, service=Standing(), clock=clock or Clock())]}
    )
    app.auth = auth
    return lambda: TestClient(app, client=("127.0.0.1", 5000))


def test_health_and_metrics_and_headers():
    browser = client()()
    assert browser.get("/healthz").json() == {"status": "ok"}
    assert browser.get("/metrics").text == "multilora_up 1\n"
    page = browser.get("/config")
    assert page.status_code == 200
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "HttpOnly" in page.headers["set-cookie"]
    from starlette.testclient import TestClient

    away = TestClient(browser.app, client=("192.0.2.1", 5000))
    assert away.get("/healthz").status_code == 200
    assert away.get("/metrics").status_code == 404


def test_an_upload_is_its_owner_s():
    another = client()
    mine, other, bare = another(), another(), another()
    for browser in (mine, other):
        browser.get("/config")
    path = mine.post("/gradio_api/upload", files={"files": ("a.txt", b"hello")}).json()[0]
    assert mine.get(f"/gradio_api/file={path}").content == b"hello"
    for browser in (other, bare):
        assert browser.get(f"/gradio_api/file={path}").status_code == 403
    folder, _, name = path.rpartition("/")
    for detour in (
        f"{folder}//{name}",
        f"{folder}/./{name}",
        f"{folder}/x/../{name}",
        path.replace("a.txt", "%61.txt"),
    ):
        assert other.get(f"/gradio_api/file={detour}").status_code in (403, 404)
    body = {"data": [{"path": path}], "fn_index": 0, "session_hash": "theirs"}
    assert other.post("/gradio_api/queue/join", json=body).status_code == 403
    assert mine.post("/gradio_api/queue/join", json={**body, "session_hash": "mine"}).status_code == 200
    # The same bytes under the same name have the same path, and are then of both.
    assert other.post("/gradio_api/upload", files={"files": ("a.txt", b"hello")}).json() == [path]
    for browser in (mine, other):
        assert browser.get(f"/gradio_api/file={path}").content == b"hello"
    assert bare.get(f"/gradio_api/file={path}").status_code == 403


def test_uploads_and_bodies_have_limits():
    browser = client()()
    too_much = b"x" * (9 * 2**20)
    assert browser.post("/gradio_api/upload", files={"files": ("a.txt", too_much)}).status_code == 413
    half = b"x" * (5 * 2**20)
    codes = [browser.post("/gradio_api/upload", files={"files": ("a.txt", half)}).status_code for _ in range(2)]
    assert codes == [200, 429]
    body = {"data": ["x" * 9 * 2**20], "fn_index": 0, "session_hash": "s"}
    assert browser.post("/gradio_api/queue/join", json=body).status_code == 413
    assert browser.post("/gradio_api/queue/join", content=b"{").status_code == 400


def test_a_page_s_own_events_have_no_name_for_programs():
    browser = client()()
    for way in ("run", "api", "call", "call/v2"):
        for name in ("own", "none", "predict" if way.startswith("call") else "none"):
            answer = browser.post(f"/gradio_api/{way}/{name}", json={"data": ["x"]})
            assert (answer.status_code, answer.text) == (404, "There is no such endpoint."), (way, name)
    assert browser.post("/gradio_api/call/echo", json={"data": ["x"]}).status_code == 200
    pages = {"data": ["x"], "fn_index": 1, "session_hash": "s"}
    assert browser.post("/gradio_api/run/predict", json=pages).json()["data"] == ["x"]


def test_what_gradio_cannot_read_is_a_refusal_and_no_mistake_of_the_server():
    browser = client()()
    unknown = {"data": ["x"], "fn_index": 99, "session_hash": "s"}
    answer = browser.post("/gradio_api/queue/join", json=unknown)
    assert (answer.status_code, answer.text) == (400, "This request cannot be read.")
    endless = b'{"data": ["x"], "fn_index": 0, "session_hash": Infinity}'
    assert browser.post("/gradio_api/queue/join", content=endless).status_code == 422
    assert browser.post("/gradio_api/call/v2/echo", json={"nothing": 1}).status_code == 400
    assert browser.post("/gradio_api/upload", files={"files": ("", b"hello")}).status_code == 400
    wrong = {"data": [], "fn_index": 1, "session_hash": "s"}  # too few values, without the queue
    assert browser.post("/gradio_api/run/predict", json=wrong).status_code == 422
    assert browser.post("/gradio_api/run/predict", json={**wrong, "data": ["x"]}).status_code == 200


def test_a_path_that_ends_in_a_newline_is_no_way_past():
    """Starlette's routes match it."""
    another = client(Logins({"ann": hashed("right horse")}))
    for path in ("/login%0A", "/gradio_api/cancel%0A", "/gradio_api/upload%0A", "/gradio_api/queue/join%0A"):
        body = {"session_hash": "s", "event_id": "e", "fn_index": 0}
        assert another().post(path, json=body).status_code == 404, path


def test_a_session_s_name_is_short():
    browser = client()()
    join = {"data": ["x"], "fn_index": 0, "session_hash": "s" * 129}
    answer = browser.post("/gradio_api/queue/join", json=join)
    assert (answer.status_code, answer.text) == (400, "A session's name has at most 128 characters.")
    assert browser.post("/gradio_api/queue/join", json={**join, "session_hash": "s" * 128}).status_code == 200


def test_a_session_of_gradio_is_its_owner_s():
    another = client()
    mine, other = another(), another()
    for browser in (mine, other):
        browser.get("/config")
    join = {"data": ["x"], "fn_index": 0, "session_hash": "s1"}
    event = mine.post("/gradio_api/queue/join", json=join).json()["event_id"]
    cancel = {"session_hash": "s1", "fn_index": 0, "event_id": event}
    assert other.post("/gradio_api/cancel", json=cancel).status_code == 403
    assert another().post("/gradio_api/cancel", json=cancel).status_code == 403
    assert other.post("/gradio_api/queue/join", json=join).status_code == 403
    assert mine.post("/gradio_api/cancel", json=cancel).status_code == 200


def test_with_logins_cancel_wants_one_and_addresses_are_braked():
    clock = Clock()
    another = client(Logins({"ann": hashed("right horse")}), clock)
    browser = another()
    cancel = {"session_hash": "s1", "fn_index": 0, "event_id": "e"}
    assert browser.post("/gradio_api/cancel", json=cancel).status_code == 401
    assert browser.post("/gradio_api/reset", json={"event_id": "e"}).status_code == 401
    good = {"username": "ann", "password": "right horse"}
    assert browser.post("/login", data=good).status_code == 200
    assert browser.post("/gradio_api/cancel", json=cancel).status_code == 200
    codes = [another().post("/login", data={"username": f"x{i}", "password": "no"}).status_code for i in range(20)]
    assert codes == [400] * 19 + [429]
    assert another().post("/login", data=good).status_code == 429
    clock.now = 301
    assert another().post("/login", data=good).status_code == 200


def test_launch_options_are_arguments_of_launch():
    import inspect

    import gradio as gr

    options = launch_options(Standing(), users={"ann": hashed("right horse")})
    assert set(options) <= set(inspect.signature(gr.Blocks.launch).parameters)
    assert (options["server_name"], options["share"], options["allowed_paths"]) == ("127.0.0.1", False, [])
    assert options["auth"]("ann", "right horse")


def test_the_command_refuses_to_be_open_by_accident_and_adds_users(tmp_path):
    from multilora.cli import app

    with pytest.raises(ValueError, match="give --auth FILE"):
        CliRunner().invoke(app, ["app", "--host", "0.0.0.0"], catch_exceptions=False)
    users = tmp_path / "users"
    CliRunner().invoke(app, ["app", "--auth", str(users), "--new-user", "ann"], input="right horse\n",
                       catch_exceptions=False)  # fmt: skip
    assert Logins(read_users(users))("ann", "right horse")
    assert users.stat().st_mode & 0o77 == 0
    with pytest.raises(ValueError, match="less than 8"):
        CliRunner().invoke(
            app, ["app", "--auth", str(users), "--new-user", "bob"], input="short\n", catch_exceptions=False
        )


def test_a_password_that_is_typed_is_asked_for_twice(tmp_path, monkeypatch):
    command = importlib.import_module("multilora.cli.app")  # the package's `app` is typer's
    monkeypatch.setattr(command.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    answers = iter(["right horse", "wrong horse", "right horse", "right horse"])
    monkeypatch.setattr(command.getpass, "getpass", lambda prompt: next(answers))
    with pytest.raises(ValueError, match="two passwords are not the same; nothing was added"):
        command._add_user("ann", tmp_path / "users", hashed)
    assert not (tmp_path / "users").exists()
    command._add_user("ann", tmp_path / "users", hashed)
    assert Logins(read_users(tmp_path / "users"))("ann", "right horse")
