"""The app for programs: the examples on a served app, tools as MCP sees them, refusals in words, two clients apart."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from PIL import Image

import multilora
from examples import api_client, mcp_client
from multilora.pipelines.load import find_lora
from multilora.web.endpoints import endpoint, in_words, typed
from tests.service_here import here
from tests.service_here import served as serve

OURS = {
    "merge", "list_merge_methods", "compare_loras", "preview_merge", "list_loras", "upload_lora", "inspect_lora",
    "remove_lora", "load_base", "answer", "list_text_loras", "text_gate_map",
}  # fmt: skip


@pytest.fixture(scope="module")
def served():
    with pytest.MonkeyPatch.context() as patch, here(patch) as service, serve(service, mcp_server=True) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client

    return Client(served[1], verbose=False)


def test_the_program_of_the_examples(served, tmp_path):
    files = api_client.run(served[1], tmp_path, steps=2)
    sources = [multilora.load(find_lora(name)[0], base="embedded") for name in ("korv", "dotta")]
    own = multilora.merge(sources, [0.9, 0.8], method="ties", density=0.5)
    made = multilora.load(files["merge"], base="embedded")
    for key in list(own)[::17]:
        delta = [part.up.double() @ part.down.double().flatten(1) for part in (made[key], own[key])]
        assert float((delta[0] - delta[1]).norm() / delta[1].norm()) < 1e-5
    pixels = [np.asarray(Image.open(files[name]).convert("RGB"), int) for name in ("picture", "again")]
    assert np.abs(pixels[0] - pixels[1]).max() > 10  # composite and a merge are not the same picture


def test_the_assistant_of_the_examples(served):
    found = asyncio.run(mcp_client.run(served[1]))
    assert {*found["tools"]} >= OURS
    facts, file = found["merge"]
    assert facts["ranks"] == [4]
    assert [i["weight"] for i in facts["inputs"]] == [0.8, -0.3]
    assert file.endswith("pair.safetensors")
    assert found["answers"] == {"base": "korv", "loras": "vrok", "merged": "vrok"}
    again = asyncio.run(mcp_client.run(served[1]))  # another caller, with cookies of its own
    assert again["answers"] == found["answers"]


def test_a_tool_says_what_its_arguments_are(served):
    public = {f.api_name: f.fn for f in served[0].fns.values() if f.api_visibility == "public"}
    assert {*public} >= OURS
    for name in OURS:
        text = inspect.getdoc(public[name])
        wanted = [p for p in inspect.signature(public[name]).parameters if p != "request"]
        missing = [p for p in wanted if not re.search(rf"^    {p}: \w", text, re.MULTILINE)]
        assert not missing, (name, missing)


@pytest.mark.parametrize(
    ("endpoint", "arguments", "words"),
    [
        ("/merge", (["korv", "dotta"], [0.8]), "weights: 1 numbers for 2 LoRAs"),
        ("/merge", (["korv", "../x"],), "not in your library"),
        ("/merge", (["korv"], None, "tis"), "Nearest: ties"),
        ("/merge", ([],), "no LoRA is chosen"),
        ("/inspect_lora", ("upload:0123",), "not in your library; upload its file again"),
        ("/remove_lora", ("korv",), "only those can be removed"),
        ("/load_base", ("/etc",), "not served here"),
        ("/answer", ("reverse korv =", ["/etc/passwd"]), "unknown text LoRA"),
        ("/answer", (" ",), "no prompt"),
        ("/text_gate_map", ("sort ab =", ["sort"], None, "mole", "/etc/passwd"), "unknown gate of mole"),
        ("/text_gate_map", ("sort ab =", ["sort"], None, "merge"), "asks no gate"),
        ("/preview_merge", (["korv"], "file:none"), "not a file"),
    ],
)
def test_what_is_refused_is_said_in_words(client, endpoint, arguments, words):
    with pytest.raises(Exception, match=words) as refused:
        client.predict(*arguments, api_name=endpoint)
    assert "Traceback" not in str(refused.value)


def test_a_bad_file_is_refused_in_words_and_two_clients_are_apart(served, client, tmp_path):
    from gradio_client import Client, handle_file

    bad = tmp_path / "evil.safetensors"
    bad.write_bytes(b"PK\x03\x04")
    with pytest.raises(Exception, match=r"evil\.safetensors: not safetensors, this is a zip or a PyTorch pickle"):
        client.predict(handle_file(bad), None, api_name="/upload_lora")
    good = tmp_path / "mine.safetensors"
    multilora.save(multilora.load(find_lora("zib")[0], base="embedded"), good)
    mine = client.predict(handle_file(good), "mine", api_name="/upload_lora")["reference"]
    assert mine in [e["reference"] for e in client.predict("", "my uploads", api_name="/list_loras")]
    other = Client(served[1], verbose=False)
    assert not other.predict("", "my uploads", api_name="/list_loras")
    with pytest.raises(Exception, match="not in your library"):
        other.predict(mine, api_name="/inspect_lora")
    assert client.predict(mine, api_name="/remove_lora") == "removed"


def test_a_refusal_in_a_function_becomes_gradios_error():
    import gradio as gr

    def fails() -> int:
        raise ValueError("seven was wanted")

    def says() -> None:
        yield 1
        raise ValueError("eight was wanted")

    with pytest.raises(gr.Error, match="seven was wanted"):
        in_words(fails)()
    going = in_words(says)()
    assert next(going) == 1
    with pytest.raises(gr.Error, match="eight was wanted"):
        next(going)
    assert in_words(lambda: ({4: Path("/a/b")}, [Path("c")], None))() == ({"4": "/a/b"}, ["c"], None)
    with gr.Blocks() as app:
        assert endpoint(fails) is fails
    assert [f.api_name for f in app.fns.values()] == ["fails"]


def test_a_value_of_another_type_is_refused_by_the_name_of_its_argument():
    def draws(request: str, loras: list[Any], size: int | None = None, title: str = "plain") -> tuple:
        return request, loras, size, title

    asked = typed(draws, get_type_hints(draws))
    assert asked("a", ["x"], None, None) == ("a", ["x"], None, "plain")
    assert asked("a", [{"reference": "x"}], 3.0) == ("a", [{"reference": "x"}], 3, "plain")
    for given, words in (
        (({}, []), "request={}: Input should be a valid string"), (("a", 5), "loras=5: Input should be a valid list"),
        (("a", [], 2.5), "size=2.5: "), (("a", [], float("inf")), "size=inf: "), (("a", None), "loras=None: "),
        (("a", [], None, ["x"]), "title=['x']: Input"), (("a", "x" * 99), "loras='xxx"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)) as refused:
            asked(*given)
        assert len(str(refused.value)) < 150

    def tells(count: int) -> Iterator[int]:
        yield from range(count)

    assert list(typed(tells, get_type_hints(tells))(2)) == [0, 1]
    with pytest.raises(ValueError, match="count='x'"):
        next(typed(tells, get_type_hints(tells))("x"))


def test_tools_are_not_served_behind_logins(tmp_path):
    from typer.testing import CliRunner

    from multilora.cli import app

    with pytest.raises(ValueError, match="--mcp with --auth"):
        CliRunner().invoke(app, ["app", "--mcp", "--auth", str(tmp_path / "users")], catch_exceptions=False)
