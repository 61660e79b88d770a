"""Tokens coloured by gate: the shares are the gate's own, the words are safe and do without colour."""

from __future__ import annotations

import re

import pytest
import torch

from multilora.method import resolve
from multilora.pipelines.text import TextComposer, composing_text
from multilora.trace import traced
from multilora.web.service import Refused
from multilora.web.text import asked
from multilora.web.text_gate import coloured, gates_of, looked_at, options_of
from tests.service_here import here

LORAS = ["reverse", "sort"]


@pytest.fixture(scope="module")
def shell():
    class Shell:
        pass

    with pytest.MonkeyPatch.context() as patch, here(patch) as service:
        Shell.service = service
        yield Shell


def test_the_shares_are_those_of_one_run_over_the_whole_text(shell):
    """Arrow, layer by layer; the reference reads the text at once, not token by token."""
    session = shell.service.session("ann")
    request = asked("sort dbca =", LORAS, [1.0, 0.5], "arrow", tokens=6, temperature=1.5, seed=3)
    path, facts = looked_at(shell, request, session)
    assert path.read_bytes()[:4] == b"\x89PNG"
    tokens = facts["tokens"]
    assert facts["names"] == LORAS
    composer = TextComposer.from_pretrained("embedded", device="cpu")
    for name, weight in zip(LORAS, (1.0, 0.5), strict=True):
        composer.add(name, weight=weight)
    said = composer("sort dbca =", "arrow", max_new_tokens=6, do_sample=True, temperature=1.5, seed=3)
    words = "".join(t["token"] for t in tokens)
    assert words.removesuffix("</s>") == "sort dbca =" + said
    assert "".join(t["token"] for t in tokens if t["prompt"]) == "sort dbca ="
    assert [t["shares"] is None for t in tokens] == [False] * (len(tokens) - 1) + [True]
    watched, runs = traced(resolve("route", "arrow"))
    ids = torch.tensor([[composer.tokenizer.convert_tokens_to_ids(t["token"]) for t in tokens]])
    with composing_text(composer.model, LORAS, watched, weights=[1.0, 0.5]), torch.no_grad():
        composer.model(ids)
    (shares,) = (p.row.shares for run in runs for seen in run for p in seen.passes if p.row.shares)
    mean = torch.stack([one[0] for one in shares.values()]).mean(0)[:-1]
    assert facts["groups"] == len(shares)
    torch.testing.assert_close(torch.tensor([t["shares"] for t in tokens[:-1]]), mean, rtol=0, atol=1e-5)


def test_what_is_refused_is_said_in_words(shell):
    session = shell.service.session("bob")
    for request, message in (
        (asked("sort ab =", LORAS, None), "method 'merge' asks no gate"),
        (asked("sort ab =", [], None, "arrow"), "no LoRA is chosen"),
        (asked("sort ab =", LORAS, [0.0, 0.0], "arrow"), "no LoRA with a weight other than 0"),
        (asked("sort ab =", ["../sort"], None, "arrow"), "unknown text LoRA"),
        (asked("x" * 4001, LORAS, None, "arrow"), "length of the prompt is 4001"),
    ):
        with pytest.raises(ValueError, match=message):
            looked_at(shell, request, session)
    for method, gate in (("mole", "/etc/passwd"), ("merge", "zib_merlo_burgo"), ("mole", "zib_merlo_burgo")):
        with pytest.raises(ValueError, match=f"unknown gate of {method} '{gate}'"):
            asked("sort ab =", LORAS, None, method, gate)
    assert options_of("merge", "") == {}
    assert gates_of("merge") is gates_of("arrow") is None
    with pytest.raises(Refused, match="no prompt"):
        asked(" ", LORAS, None, "arrow")


FACTS = {
    "names": ["<b>", "two"],
    "colours": ["#0072b2", "#e69f00"],
    "groups": 3,
    "tokens": [
        {"token": "<i>", "prompt": True, "shares": [0.75, 0.25]},
        {"token": " ", "prompt": False, "shares": [0.5, 0.5]},
        {"token": "z", "prompt": False, "shares": [0.1, 0.9]},
        {"token": "</s>", "prompt": False, "shares": None},
    ],
}


def test_tokens_have_number_and_shares_beside_their_colour():
    shown = coloured(FACTS)
    assert "<i>" not in shown.replace("<i style", "")
    assert "<b> " not in shown
    marks = re.findall(r'class="ml-token"([^>]*)>([^<]*)<small>([^<]*)</small>', shown)
    assert [mark for *_, mark in marks] == ["1", "=", "2", "–"]
    assert [word for _, word, _ in marks] == ["&lt;i&gt;", "␣", "z", "&lt;/s&gt;"]
    styles = [style for style, *_ in marks]
    assert ["--hue:#0072b2" in styles[0], "--hue" in styles[1], "--hue:#e69f00" in styles[2]] == [True, False, True]
    assert 'title="&lt;b&gt; 0.75, two 0.25"' in styles[0]
    assert "0.45 of all shares, most at 1 of 3 tokens" in shown  # (0.75 + 0.5 + 0.1) / 3
    rows = re.findall(r"<tr>(.*?)</tr>", shown)
    assert len(rows) == 1 + len(FACTS["tokens"])
    assert rows[1] == '<td>prompt</td><th scope="row">&lt;i&gt;</th><td><b>0.75</b></td><td>0.25</td>'
    assert rows[4].count("not read") == 2
    assert shown.index("Prompt") < shown.index("Answer")
