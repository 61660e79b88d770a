"""The embedded text gates: what they learned from, and that cards and page say what was measured."""

import pytest

from multilora.gates import embedded_gates, read_gate
from multilora.lab.world import language_gates as lg
from multilora.lab.world.language import split_of
from multilora.lab.world.settings import TEXT_FULL
from multilora.pipelines.load import assets

FOLDER = assets() / "gates"


def test_gates_learn_from_training_prompts_of_every_skill_alone():
    found = lg.training_texts(5)
    assert [one["prompt"].split()[0] for one in found][::5] == [e.split()[0] for e in _firsts(5)]
    assert len(found) == 5 * len(lg.SKILLS)
    assert {split_of(one["prompt"]) for one in found} == {"train"}
    assert found != lg.training_texts(5, seed=1)


def _firsts(count):
    return [lg.examples(skill, count, lg.GATE_SEED)[0].prompt for skill in lg.SKILLS]


def test_cards_and_page_say_what_was_measured():
    assert {*lg.GATES} <= {*embedded_gates()}
    for name, (kind, _, own) in lg.GATES.items():
        gate = read_gate(name)
        assert (gate.kind, tuple(gate.names), gate.recipe["base"]) == (kind, lg.SKILLS, "embedded")
        assert {key: gate.recipe["settings"][key] for key in own} == own
        assert gate.recipe["learned_from"] == f"{lg.EACH * len(lg.SKILLS)} examples"
        for way in (lg.OWN, lg.EVEN, lg.GATED):
            assert {skill: pair[1] for skill, pair in gate.recipe["held_out"][way].items()} == dict.fromkeys(
                lg.SKILLS, TEXT_FULL.asked
            )
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == lg.page(FOLDER)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2 * 2**20


@pytest.mark.long
@pytest.mark.parametrize("name", [*lg.GATES])
def test_a_gates_counts_are_found_again(name):
    from multilora.pipelines.text_load import load_text, text_lora

    base, card = load_text("embedded", device="cpu"), read_gate(name)
    loras = [text_lora(base[0], skill) for skill in lg.SKILLS]
    found = lg.right(base, loras, card.kind, TEXT_FULL.asked, gate=name)
    for skill, (right, asked) in card.recipe["held_out"][lg.GATED].items():
        assert abs(found[skill][0] - right) <= 2, (skill, found[skill])
        assert found[skill][1] == asked


@pytest.mark.long
def test_the_stage_makes_the_gates_once(tmp_path):
    import shutil

    from multilora.lab.world.settings import TEXT_SMOKE

    shutil.copytree(assets() / "text", tmp_path / "assets" / "text")
    lg.stage(tmp_path, TEXT_SMOKE, lambda line: None)
    made = {path.name: path.read_bytes() for path in (tmp_path / "assets" / "gates").iterdir()}
    assert {*made} == {"README.md", *(f"{name}.safetensors" for name in lg.GATES)}
    lg.stage(tmp_path, TEXT_SMOKE, lambda line: None)
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "assets" / "gates").iterdir()}
