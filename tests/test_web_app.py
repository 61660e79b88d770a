"""The app on the service: its endpoints, the same picture as without it, refusals in words, the command."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from multilora.web import app as web
from multilora.web.app import PAGES, build
from multilora.web.service import Limits, Service


@pytest.fixture(scope="module")
def app():
    with Service(engine="tests.service_engine:Stub", limits=Limits(waiting=2, seconds=60, prompt=100)) as service:
        yield build(service)


def test_every_public_endpoint_has_a_docstring_and_types_and_the_pages_own_events_are_hidden(app):
    public = {f.api_name: f for f in app.fns.values() if f.api_visibility == "public"}
    assert {"compose", "compose_recipe", "compare_methods", "read_recipe", "share_recipe", "list_methods"} <= {*public}
    for name, made in public.items():
        assert not str(name).startswith(("lambda", "_")), name
        assert inspect.getdoc(made.fn), name
        missing = [p for p in inspect.signature(made.fn).parameters.values() if p.annotation is p.empty]
        assert not missing, (name, missing)


def test_the_door_knows_what_draws(app):
    """By a mark that has to survive gradio's and our own wrappers."""
    drawing = [f for f in app.fns.values() if getattr(f.fn, "draws", False)]
    assert {f.api_name for f in drawing if f.api_visibility == "public"} == {
        "compose", "compose_recipe", "compare_methods"
    }  # fmt: skip
    assert sorted(f.fn.__name__ for f in drawing if f.api_visibility == "private") == ["many", "one", "one"]


def test_there_is_a_tab_for_every_page(app):
    tabs = [block.label for block in app.blocks.values() if type(block).__name__ == "Tab"]
    assert [title for _, title, _ in PAGES] == [label for label in tabs if label in {title for _, title, _ in PAGES}]


def test_gradio_has_a_thread_for_everyone_who_waits_and_more(monkeypatch):
    """Its 40 threads and its own limit once held back those who were to hear that the server is busy."""
    found = {}

    class Blocks:
        def queue(self, **options):
            found.update(options)

        def launch(self, **options):
            found.update(options)
            return None, "http://address", None

    class Standing:
        limits, workers = Limits(waiting=90), [1, 2]

    monkeypatch.setattr(web, "build", lambda service: Blocks())
    assert web.launch(Standing(), quiet=True)[1] == "http://address"
    assert found["default_concurrency_limit"] is None
    assert found["max_threads"] >= 2 * 92
    assert found["quiet"]


@pytest.mark.long
@pytest.mark.parametrize("command", [["-m", "multilora.cli", "app"], ["app.py"]])
def test_the_command_serves_the_picture_of_a_lone_run(command, tmp_path):
    from gradio_client import Client

    from multilora.pipelines.image import Composer
    from multilora.recipe import Recipe

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = tmp_path / "said"
    with said.open("w") as stream:
        server = subprocess.Popen([sys.executable, *command, "--port", str(port)], env=environment, stderr=stream)
    try:
        _until_ready(f"http://127.0.0.1:{port}/healthz", server)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=tmp_path)
        korv = {"reference": "korv", "weight": 0.8}
        path, about = client.predict("a korv fox", [korv], seed=7, steps=6, api_name="/compose")
    finally:
        server.terminate()
        assert server.wait(60) == 0
    assert f"multilora is at http://127.0.0.1:{port}/ (Ctrl-C ends it)" in said.read_text()
    composer = Composer.from_pretrained("embedded", device="cpu")
    composer.add("korv", weight=0.8)
    alone = composer("a korv fox", method="merge", seed=7, num_inference_steps=6).images[0]
    with Image.open(path) as image:
        assert np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(alone, int)).max() <= 1  # threads may differ
    assert Recipe.from_png(path).seed == about["recipe"]["seed"] == 7


def _until_ready(address: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the app was not ready: status {server.poll()}")
