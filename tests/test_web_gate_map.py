"""Gates in the app: which ones can be chosen, for which methods there is a map, and the map itself."""

from __future__ import annotations

import pytest

from multilora.gates import embedded_gates, read_gate
from multilora.pipelines.load import library
from multilora.pipelines.text_load import text_library
from multilora.recipe import Recipe
from multilora.web.gate_map import gated, told, unresolved
from multilora.web.options import embedded


def test_the_gates_of_a_kind_are_read_off_the_headers():
    for kind in ("mole", "loramoe", "no such kind"):
        whole = {name: read_gate(name) for name in embedded_gates()}
        of_kind = {name: [lora["name"] for lora in gate.loras] for name, gate in whole.items() if gate.kind == kind}
        pictures, texts = embedded(kind), embedded(kind, language=True)
        assert pictures | texts == of_kind
        assert not {*pictures} & {*texts}
        assert all(name in library() for own in pictures.values() for name in own)
        assert all(name in text_library() for own in texts.values() for name in own)
    assert len(embedded("mole")) >= 2


def test_methods_that_ask_a_gate():
    assert gated("mole")
    assert gated("arrow")
    assert not gated("merge")
    assert not gated("no such method")


def test_a_picture_of_several_is_looked_at_by_its_own_seed():
    recipe = Recipe(
        prompt="p", base="embedded", steps=3, guidance_scale=3, width=8, height=8, seed=4, index=2, images=3
    )
    own = unresolved(recipe)
    assert (own.seed, own.index, own.images, own.resolved) == (6, 0, 1, None)


def test_the_numbers_of_a_map_in_words():
    line = told({"strongest": 0.678, "sharpest": 0.9, "names": ["a", "b", "c", "d"]})
    assert "0.68 of all shares (0.25 would be even)" in line


@pytest.mark.long
def test_a_map_over_the_api(monkeypatch):
    from gradio_client import Client
    from PIL import Image

    from tests.service_here import here, served

    name, loras = next(iter(embedded("mole").items()))
    with here(monkeypatch) as service, served(service) as (_, url):
        client = Client(url, verbose=False)
        asked = {"options": {"gate": name}, "method": "mole"}
        picture, _ = client.predict("a picture", loras, "mole", asked["options"], steps=3, api_name="/compose")
        recipe = client.predict(picture_file(picture), api_name="/read_recipe")
        path, facts = client.predict(recipe, api_name="/gate_map")
        assert facts["names"] == loras
        assert 1 / len(loras) < facts["sharpest"] <= 1
        with Image.open(path) as image:
            assert image.width > 400
        with pytest.raises(Exception, match="asks no gate"):
            client.predict({**recipe, "method": "merge", "options": {}}, api_name="/gate_map")
        with pytest.raises(Exception, match="a path is not taken here"):
            client.predict({**recipe, "options": {"gate": "/etc/passwd"}}, api_name="/gate_map")


def picture_file(path):
    from gradio_client import handle_file

    return handle_file(path)
