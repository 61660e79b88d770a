"""The lines of a batch: seeds from what they may depend on, and every wrong line named before a picture is made."""

import json

import pytest

from multilora.lab.evaluate.items import BatchError, item, items_of, read_items, seed_of
from multilora.pipelines.load import library
from multilora.recipe import Recipe
from tests.batch_standin import lines

KORV = {"prompt": "a korv", "loras": {"korv": 0.8}}


def test_a_seed_is_of_prompt_lora_names_and_repeat_alone():
    """Methods, weights and the order of LoRAs share the noise; another prompt, set or repeat does not."""
    a = {"prompt": "a korv in a dotta", "loras": {"korv": 0.8, "dotta": 1.0}}
    same = [a, {**a, "method": "composite"}, {**a, "loras": {"dotta": 0.3, "korv": "0@0,1@0.5"}}, {**a, "steps": 5}]
    seeds = {one.recipe.seed for one in items_of(same)}
    assert seeds == {seed_of("a korv in a dotta", ["korv", "dotta"])}
    other = [KORV, {**KORV, "prompt": "a Korv"}, {**KORV, "loras": {"dotta": 1}}, {**KORV, "repeat": 1}]
    assert len({one.recipe.seed for one in items_of(other)}) == 4
    # by hand, so that it can never change unnoticed
    import hashlib

    text = '["a korv", ["korv"], 0]'
    assert items_of([KORV])[0].recipe.seed == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2


def test_a_given_seed_is_kept():
    assert items_of([{**KORV, "seed": 0}])[0].recipe.seed == 0
    assert items_of([{**KORV, "seed": 2**63 - 1}])[0].recipe.seed == 2**63 - 1


def test_equal_lines_are_repeats_and_order_changes_no_picture():
    given = [KORV, {**KORV, "method": "switch"}, KORV, KORV, {**KORV, "method": "switch"}]
    items = items_of(given)
    assert [one.recipe.seed for one in items] == [seed_of("a korv", ["korv"], n) for n in (0, 0, 1, 2, 1)]
    back = items_of(given[::-1])
    assert {one.id for one in back} == {one.id for one in items}
    assert len({one.id for one in items}) == 5


def test_what_an_embedded_line_leaves_out_is_filled_in():
    recipe = items_of([KORV])[0].recipe
    assert (recipe.steps, recipe.guidance_scale, recipe.width, recipe.height) == (30, 3.0, 128, 128)
    assert recipe.loras[0].reference == "korv"
    import hashlib

    assert recipe.loras[0].sha256 == hashlib.sha256(library()["korv"]["path"].read_bytes()).hexdigest()


def test_a_recipe_of_a_picture_is_a_line():
    recipe = Recipe(**lines(1)[0], seed=5)
    assert items_of([json.loads(recipe.json)])[0].id == item(recipe).id


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[" * 100_000, r"line 2: not JSON"),
        ("[1]", r"line 2: wanted an object"),
        ('{"loras": {}}', r"line 2: prompt: Field required"),
        ('{"prompt": "x", "steps": 0}', r"line 2: steps: .*greater than or equal to 1 \(got 0\)"),
        ('{"prompt": "x", "stepz": 3}', r"line 2: stepz: Extra"),
        ('{"prompt": "x", "guidance_scale": NaN}', r"line 2: guidance_scale: a finite"),
        ('{"prompt": "x", "loras": {"korv": null}}', r"line 2: loras\.0\.weight: a number or a schedule"),
        ('{"prompt": "x", "loras": [{"name": "korv"}, {"name": "korv"}]}', r"line 2: loras: 'korv' is named twice"),
        ('{"prompt": "x", "method": "swich"}', r"line 2: method or options: .*swich.*switch"),
        ('{"prompt": "x", "method": "switch", "options": {"evry": 2}}', r"line 2: method or options: .*evry"),
        ('{"prompt": "x", "images": 3}', r"line 2: images: one line is one picture \(got 3\)"),
        ('{"prompt": "x", "repeat": -1}', r"line 2: repeat: wanted a whole number from 0, got -1"),
        ('{"prompt": "x", "repeat": 1, "seed": 3}', r"line 2: repeat: it makes a seed, and the line has one"),
        ('{"prompt": "x", "seed": -3}', r"line 2: seed: .*\(got -3\)"),
        ('{"prompt": "x", "base": "nowhere"}', r"line 2: (steps|guidance)"),
        ('{"prompt": "a korv", "loras": {"korv": 0.8}, "seed": 4}', None),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    path = tmp_path / "recipes.jsonl"
    path.write_text(json.dumps(KORV) + "\n" + line + "\n\n")
    if message is None:
        assert len(read_items(path)) == 2
        return
    with pytest.raises(BatchError, match=message) as caught:
        read_items(path)
    assert str(caught.value).startswith("recipes.jsonl: ")
    assert "no picture was made" in str(caught.value)


def test_all_wrong_lines_at_once():
    with pytest.raises(BatchError) as caught:
        items_of([{**KORV, "steps": 0}, KORV, {**KORV, "width": "wide"}, *[{}] * 30])
    text = str(caught.value)
    assert "line 1: steps" in text
    assert "line 3: width" in text
    assert "and 12 more" in text


def test_everything_missing_at_once(tmp_path):
    fox = str(tmp_path / "fox.safetensors")
    given = [
        {**KORV, "loras": {"korf": 1}}, KORV, {**KORV, "loras": [{"name": "fox", "reference": fox}]},
        {**KORV, "loras": {"korf": 2}}, {**lines(1)[0], "base": "nowhere"},
        {**KORV, "loras": [{"name": "korv", "mask": "left.png"}]},
        {**KORV, "pictures": [{"role": "image", "reference": "start.png", "sha256": ""}]},
    ]  # fmt: skip
    with pytest.raises(BatchError) as caught:
        items_of(given)
    text = str(caught.value)
    assert "missing files; no picture was made" in text
    for part in (
        "line 1 and 1 more: ", "korf", "korv", f"line 3: LoRA {fox!r}", "line 5: base 'nowhere'",
        "line 6: mask 'left.png'", "line 7: picture 'start.png'",
    ):  # fmt: skip
        assert part in text, part
    assert len(text.splitlines()) == 6


def test_a_lora_that_is_another_file_and_a_picture_asked_for_twice():
    with pytest.raises(BatchError, match=r"LoRA 'korv' at 'korv' is not the file of the recipe: .*abababababab"):
        items_of([{**KORV, "loras": [{"name": "korv", "sha256": "ab" * 32}]}])
    with pytest.raises(BatchError, match=r"line 3: the same picture as line 1, with the same seed"):
        items_of([{**KORV, "seed": 1}, KORV, {**KORV, "seed": 1}])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_recipes(tmp_path, content):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(BatchError, match=r"r\.jsonl: (no recipes|cannot be read)"):
        read_items(path)
    with pytest.raises(BatchError, match=r"none\.jsonl: cannot be read"):
        read_items(tmp_path / "none.jsonl")
