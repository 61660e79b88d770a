"""The Text page's coloured tokens in Debian's Chromium, on the embedded model."""

from __future__ import annotations

import re

import pytest

from tests.test_web_compose_browser import PHONE, browser, server, visit  # noqa: F401

pytestmark = pytest.mark.long


def test_a_chosen_gate_brings_its_loras_and_colours_the_tokens(visit):  # noqa: F811
    page = visit("?tab=text", **PHONE)
    page.get_by_text("Method and settings").click()
    page.get_by_label("Method while it answers").click()
    page.get_by_role("option", name="token switch", exact=True).click()
    page.locator("#ml-text-gate input").click()
    page.get_by_role("option", name="reverse + sort + next + double").click()
    page.get_by_text("weight of double").wait_for()
    page.fill("textarea >> visible=true >> nth=0", "double korv =")
    page.get_by_role("button", name="Answer", exact=True).click()
    page.wait_for_selector("#ml-gate-tokens .ml-token")
    words = page.locator("#ml-gate-tokens .ml-token")
    assert "".join(w.replace("␣", " ").split("\n")[0] for w in words.all_inner_texts())[:13] == "double korv ="
    assert {*page.locator("#ml-gate-tokens .ml-token small").all_inner_texts()} <= {*"1234=–"}
    about = re.fullmatch(r"reverse (.+), sort (.+), next (.+), double (.+)", words.first.get_attribute("title"))
    assert abs(sum(map(float, about.groups())) - 1) < 0.03
    assert page.locator("#ml-answer-loras textarea").input_value() == "kkoorrvv"
    table = page.locator("#ml-gate-tokens table")
    assert not table.is_visible()
    page.locator("#ml-gate-tokens summary").press("Enter")
    assert table.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
