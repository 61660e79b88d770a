"""The page on the service: the same picture as without it, refusals in words, the command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from multilora.web.app import build
from multilora.web.compose import drawn
from multilora.web.service import Limits, Service


@pytest.fixture(scope="module")
def service():
    with Service(engine="tests.service_engine:Stub", limits=Limits(waiting=2, seconds=60, prompt=100)) as service:
        yield service


def test_a_drawing_tells_its_steps_and_ends_with_picture_and_settings(service):
    said = list(drawn(service, service.session("ann"), "a fox", ["korv", "dotta"], "switch", 0.5, 77))
    image, settings = said[-1]
    assert image.getpixel((0, 0)) == (77, 0, 0)
    assert "Seed: 77" in settings
    assert "<lora:korv:0.5> <lora:dotta:0.5>" in settings
    assert "switch" in settings
    assert "step" in said[-2][1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"names": ["../secret"]}, "'../secret' is not in your library"),
        ({"prompt": "x" * 101}, "100"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_is_refused_is_said_in_words_and_nothing_runs(service, changed, words):
    asked = {"prompt": "a fox", "names": [], "method": "merge", "weight": 1.0, "seed": 1, **changed}
    with pytest.raises(gr.Error, match=words):
        list(drawn(service, service.session("bob"), **asked))
    assert not any(job.session == "bob" for job in service._line.jobs())


def test_leaving_a_drawing_cancels_it(service, tmp_path):
    going = drawn(service, service.session("eve"), "a fox", [], "merge", 1.0, 3)
    next(going)
    going.close()
    deadline = time.monotonic() + 30
    while any(job.session == "eve" for job in service._line.jobs()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(job.session == "eve" for job in service._line.jobs())


def test_the_page_has_one_named_endpoint(service):
    named = [f.api_name for f in build(service).fns.values() if f.api_name and f.api_visibility == "public"]
    assert named == ["compose"]


@pytest.mark.long
@pytest.mark.parametrize("command", [["-m", "multilora.cli", "app"], ["app.py"]])
def test_the_command_serves_the_picture_of_a_lone_run(command, tmp_path):
    from gradio_client import Client

    from multilora.pipelines.image import Composer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, *command, "--port", str(port)], env=environment)
    try:
        _until_ready(f"http://127.0.0.1:{port}/healthz", server)
        client = Client(f"http://127.0.0.1:{port}", verbose=False, download_files=tmp_path)
        path, settings = client.predict("a korv fox", ["korv"], "merge", 0.8, 7, api_name="/compose")
    finally:
        server.terminate()
        assert server.wait(60) == 0
    composer = Composer.from_pretrained("embedded", device="cpu")
    composer.add("korv", weight=0.8)
    alone = composer("a korv fox", method="merge", seed=7).images[0]
    with Image.open(path) as image:
        assert np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(alone, int)).max() <= 1  # threads may differ
    assert "Seed: 7" in settings


def _until_ready(address: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the app was not ready: status {server.poll()}")
