"""Pages for a reviewer hide the prompts, and the counts are those of a hand count."""

import json

import pytest
from PIL import Image

from multilora.lab.journal import Journal
from multilora.lab.world import review, tables
from multilora.pipelines.load import assets


@pytest.fixture
def drawn(monkeypatch):
    """Plain pictures in place of generated ones; records what was asked of the model."""
    asked = []

    def pictures(pipe, prompts, seeds, loras=(), *rest, **more):
        asked.append((list(prompts), list(seeds), list(loras)))
        return [Image.new("RGB", (128, 128), (10 * i % 255, 80, 120)) for i in range(len(prompts))]

    monkeypatch.setattr(review, "pictures", pictures)
    return asked


def test_pages_number_every_picture_and_keep_the_prompts_apart(drawn, tmp_path):
    review.pages(None, assets(), tmp_path, 13, echo=lambda text: None)
    sealed = json.loads((tmp_path / "sealed.json").read_text())
    loras = [entry["lora"] for entry in sealed.values() if entry["lora"]]
    assert len(sealed) == 13 + len(loras)
    assert len(loras) == review.CONTEXTS * len(set(loras)) >= review.CONTEXTS * 16
    assert len(list(tmp_path.glob("page*.png"))) == -(-len(sealed) // review.PAGE)
    for entry in sealed.values():
        assert entry["named"].get("garment", "") in entry["prompt"]
        assert all(label in review.choices()[head] for head, label in entry["b"].items())
    # Every LoRA is asked for with its own file, in its own prompts.
    for prompts, _, files in drawn:
        if files:
            assert all(files[0].stem in prompt or files[0].name in prompt for prompt in prompts)


def test_agreement_is_counted_as_by_hand(tmp_path):
    sealed = {
        "1": {"named": {"character": "fox", "style": "neon"}, "b": {"character": "fox", "style": "flat"}},
        "2": {"named": {"character": "cat"}, "b": {"character": "cat", "style": "flat"}},
        "3": {"named": {"character": "bear"}, "b": {"character": "fox", "style": "flat"}},
    }
    answers = {
        "1": {"character": "fox", "style": "flat"},  # B right twice, the prompt once
        "2": {"character": "?", "style": "pixel"},  # unreadable: against the prompt, not against B; B wrong in style
        "3": {"character": "bear"},  # B wrong, the prompt right
    }
    (tmp_path / "sealed.json").write_text(json.dumps(sealed))
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    journal = Journal(tmp_path / "report.jsonl")
    facts = review.count(tmp_path / "sealed.json", tmp_path / "answers.json", journal)
    assert facts["heads"]["character"] == [1, 2]
    assert facts["heads"]["style"] == [1, 2]
    assert facts["named"]["character"] == [2, 3]
    assert facts["named"]["style"] == [0, 1]
    assert "2 of 3" in tables.review_table(Journal(tmp_path / "report.jsonl"))

    (tmp_path / "answers.json").write_text(json.dumps({"1": {"character": "dragon"}}))
    with pytest.raises(ValueError, match=r"answers\.json: picture 1, character is 'dragon', wanted .*fox"):
        review.count(tmp_path / "sealed.json", tmp_path / "answers.json", journal)


def test_a_second_look_is_counted_by_what_was_drawn(tmp_path):
    journal = Journal(tmp_path / "report.jsonl")
    labels = [[True, True], [False, True], [False, False], [True, True], [False, False], [True, False]]
    journal.add("looked/corno", name="corno", labels=labels)
    told = tables.alone_table(journal)
    assert "1 of 3; with it in" in told
    assert told.endswith("2 of 3.")
