"""The abuse list of SECURITY.md's app over HTTP: each attempt, and what must come of it. The model is a stand-in.

Attempts whose test is elsewhere: guessed uploads, quotas, logins, others' jobs (test_service_guard.py); a full line
and one greedy user (test_service.py, test_faults_long.py); hostile metadata (test_admit.py, test_web_compose.py); two
users at once, lost workers (test_service_long.py, test_faults_long.py).
"""

import json
import socket
import time

import pytest

from benchmarks.faults import resident
from benchmarks.faults_app import STUB, Browser, app, idle
from multilora.web import history
from multilora.web.service import Limits, Service
from multilora.web.service.sessions import Sessions
from tests import bad_files

pytestmark = pytest.mark.long
RECIPE = {"prompt": "x", "base": "embedded", "steps": 3, "guidance_scale": 3.0, "width": 8, "height": 8, "seed": 1}


@pytest.fixture(scope="module")
def served():
    with Service(engine=STUB, limits=Limits(waiting=5, per_user=3, seconds=60)) as service, app(service) as address:
        service.about()
        yield service, address


@pytest.fixture
def browser(served):
    return Browser(served[1])


def mine(service, browser):
    return service.session(f"visitor:{browser.http.cookies['multilora-visitor']}")


def compose(**changes):
    given = {
        "prompt": "x", "loras": [], "method": "merge", "options": {}, "negative_prompt": "", "seed": 1, "steps": 2,
        "guidance_scale": 3.0, "width": 8, "height": 8, "scheduler": None, "score": False, "base": None,
    }  # fmt: skip
    return list({**given, **changes}.values())


def test_a_closed_tab_stops_its_job_and_keeps_no_picture(served, browser):
    service, _ = served
    slow = {**RECIPE, "steps": 150, "extra": {"pause": 0.2}}
    began = time.monotonic()
    assert browser.ask("compose_recipe", [slow, False], cut=1.5)[0] == "cut"
    assert idle(service, 25) == 0
    assert time.monotonic() - began < 29  # of the 30 s that it would draw
    assert history.files(mine(service, browser)) == []
    assert browser.ask("compose_recipe", [RECIPE, False])[0] == "complete"


BAD = {
    "a dict for a prompt": (compose(prompt={"a": 1}), "prompt"),
    "steps NaN": (compose(steps=float("nan")), "steps"),
    "steps infinite": (compose(steps=float("inf")), "steps"),
    "steps 151": (compose(steps=151), "steps is 151, this server allows up to 150"),
    "steps 2.5": (compose(steps=2.5), "steps=2.5"),
    "a width of a million": (compose(width=10**6), "width is 1e+06"),
    "a negative seed": (compose(seed=-1), "seed"),
    "a thousand LoRAs": (compose(loras=["korv"] * 1000), "number of LoRAs is 1000"),
    "a path for a LoRA": (compose(loras=["/etc/passwd"]), "'/etc/passwd' is not in your library"),
    "a climbing path": (compose(loras=["../korv"]), "'../korv' is not in your library"),
    "another's upload": (compose(loras=["upload:0123456789abcdef"]), "upload its file again"),
    "a tag": (compose(prompt="<lora:/etc/passwd:1>"), "tags are not read here"),
    "an unknown base": (compose(base="/srv/other"), "/srv/other"),
    "an option that is a path": (compose(method="mole", options={"gate": "../gate.safetensors"}), "gate"),
    "a long prompt": (compose(prompt="x" * 5000), "length of the prompt is 5000"),
    "no method": (compose(method="__class__"), "__class__"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_asked_is_refused_in_words_before_the_model(served, browser, name):
    service, _ = served
    data, words = BAD[name]
    tasks = service.workers[0].starts, len(service._line.jobs())
    sent = {"content": json.dumps({"data": data}), "headers": {"content-type": "application/json"}}  # with its NaN
    answer = browser.http.post("/gradio_api/call/compose", **sent)
    assert answer.status_code == 200, answer.text
    text = browser.http.get(f"/gradio_api/call/compose/{answer.json()['event_id']}").text
    assert "event: error" in text
    assert words in json.loads(text.rpartition("data: ")[2])["error"]
    assert "Traceback" not in text
    assert (service.workers[0].starts, len(service._line.jobs())) == tasks


def test_ten_megabytes_are_not_read(browser):
    answer = browser.http.post("/gradio_api/call/compose", json={"data": compose(prompt="x" * 10**7)})
    assert (answer.status_code, answer.text) == (413, "A request may have 8,388,608 bytes.")


FILES = {
    "x.exe": b"MZ\x90\x00" + bytes(60), "x.html": b"<html><script>1</script>", "x.bin": b"\x80\x04\x95" + bytes(60),
    "x.safetensors": b"PK\x03\x04" + bytes(60), "y.safetensors": bad_files.good_bytes()[:-1],
    "z.safetensors": b"<svg onload='alert(1)'/>", "<img src=x onerror=1>.safetensors": b"x" * 50,
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_lora_is_refused_by_its_content_and_shown_as_text(served, browser, name):
    service, _ = served
    path = browser.http.post("/gradio_api/upload", files={"files": (name, FILES[name])}).json()[0]
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": name}
    kind, told, _ = browser.ask("upload_lora", [file, None])
    assert kind == "error"
    assert told["error"], "in words"
    assert "<img" not in told["error"]
    assert mine(service, browser).uploads == {}
    got = browser.http.get(f"/gradio_api/file={path}")  # whose own it is: as a file to keep, never as a page
    assert got.headers["content-disposition"].startswith("attachment")
    assert got.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "/proc/self/environ", "pyproject.toml"])
def test_a_file_that_was_not_uploaded_is_not_read(browser, path):
    for name, more in (("upload_lora", [None]), ("read_recipe", [])):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        kind, told, _ = browser.ask(name, [file, *more])
        assert kind == "error"
        assert "root:" not in json.dumps(told)
    assert browser.http.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_no_address_is_called_for_a_client(browser):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(1.0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.safetensors"
        for file in ({"path": url}, {"path": "x", "url": url}, {"path": url, "url": url}):
            file = {**file, "meta": {"_type": "gradio.FileData"}}
            assert browser.ask("upload_lora", [file, None])[0] == "error"
        for place in (f"/gradio_api/file={url}", f"/gradio_api/proxy={url}"):
            assert browser.http.get(place).status_code >= 400
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_page_s_own_events_have_no_name(served, browser):
    config = browser.http.get("/config").json()
    hidden = [d["api_name"] for d in config["dependencies"] if d.get("api_visibility") == "private" and d["api_name"]]
    assert len(hidden) > 10
    for name in hidden:
        assert browser.http.post(f"/gradio_api/call/{name}", json={"data": []}).status_code == 404, name


def test_another_site_may_not_act_for_a_user(browser):
    for origin, site in (("http://evil.example", "cross-site"), ("null", "cross-site")):
        headers = {"origin": origin, "sec-fetch-site": site}
        answer = browser.http.post("/gradio_api/call/compose", json={"data": compose()}, headers=headers)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    headers = {"origin": str(browser.http.base_url), "sec-fetch-site": "same-origin"}
    assert browser.http.post("/gradio_api/call/compose", json={"data": compose()}, headers=headers).status_code == 200


def test_ten_thousand_sessions_are_bounded(tmp_path):
    sessions = Sessions(tmp_path, Limits(sessions=50))
    for i in range(500):
        sessions.get(f"warm {i}")
    before = resident()
    for i in range(10_000):
        sessions.get(f"visitor {i}")
    assert len(sessions) == len(list(tmp_path.iterdir())) == 50
    assert resident() - before < 20
