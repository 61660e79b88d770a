"""Objectives: what they say is what a model with merged weights says; and what they refuse."""

import threading

import numpy as np
import pytest
import torch

import multilora as ml
from multilora.attach import attached
from multilora.chosen import Enough
from multilora.lab.objectives import Watched, each, function_of
from multilora.lab.objectives_denoising import own_predictions
from multilora.lab.objectives_pictures import PictureScore, presence_score
from multilora.lab.objectives_text import AnswerLoss, AnswerScore
from multilora.method import resolve
from multilora.pipelines.text import TextComposer
from tests import tiny, tiny_text

DATA = [
    {"prompt": "ab+", "completion": "cd"},
    {"prompt": "b", "completion": "abcd e"},
    {"prompt": "c 1", "completion": "3"},
]
ROWS = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.7, -0.4, 0.5]]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_few_shot_loss_is_the_models_own_under_a_merge(family):
    """Against transformers' loss of each example alone, with the LoRAs as one merged LoRA, weighted by its tokens."""
    model, tokenizer, loras = tiny_text.model(family), tiny_text.tokenizer(family == "t5"), tiny_text.loras(family, 3)
    objective = AnswerLoss(model, tokenizer, DATA, batch=4)
    got = objective(loras, ROWS)
    for row, loss in zip(ROWS, got, strict=True):
        total = counted = 0.0
        with attached(model, [ml.merge(loras, row)], form="side") if any(row) else torch.no_grad() as bank:
            if any(row):
                bank.row = [1.0]
            for one in objective.tokens:
                ids, labels = torch.tensor([one.ids]), torch.tensor([one.labels])
                with torch.no_grad():
                    found = model(input_ids=ids, labels=labels).loss.item()
                total, counted = total + found * one.counted, counted + one.counted
        assert loss == pytest.approx(total / counted, rel=1e-4)
    assert abs(got[1] - got[0]) > 1e-2
    assert AnswerLoss(model, tokenizer, DATA, batch=1)(loras, ROWS) == pytest.approx(got, rel=1e-5)
    tensor = torch.tensor(ROWS[2], requires_grad=True)
    learning = objective(loras, [tensor])[0]
    assert learning.item() == pytest.approx(got[2], rel=1e-5)
    (slope,) = torch.autograd.grad(learning, [tensor])
    for i in range(3):
        ends = objective(loras, [[w + by * (j == i) for j, w in enumerate(ROWS[2])] for by in (0.01, -0.01)])
        assert slope[i].item() == pytest.approx((ends[0] - ends[1]) / 0.02, rel=0.02, abs=2e-3)
    assert all(p.grad is None for p in model.parameters())


def test_weights_for_texts_lower_the_loss():
    model, tokenizer, loras = tiny_text.model("llama"), tiny_text.tokenizer(), tiny_text.loras("llama", 2)
    objective = AnswerLoss(model, tokenizer, DATA)
    base = objective(loras, [[0.0, 0.0]])[0]
    for found in (
        resolve("weigh", "lorahub", budget=20)(loras, objective),
        resolve("weigh", "learned", form="free", scope="global", steps=15)(loras, objective),
    ):
        assert objective(loras, [list(found)])[0] == pytest.approx(found.best.loss, rel=1e-5)
        assert found.best.total < base
    paper = resolve("weigh", "lorahub", budget=8, form="factor")(tiny_text.loras("llama", 1) * 2, objective)
    assert paper.trials[0].loss == pytest.approx(base, rel=1e-5)


def test_a_score_of_answers():
    composer = TextComposer(tiny_text.model("llama"), tiny_text.tokenizer())
    composer.add(tiny_text.loras("llama", 3)[2], name="kept")
    loras, seen = tiny_text.loras("llama", 2), []

    def score(answers, prompts, completions):
        seen.append(answers)
        assert (prompts, completions) == ([d["prompt"] for d in DATA], [d["completion"] for d in DATA])
        return [len(set(a)) / 8 for a in answers]

    objective = AnswerScore(composer, DATA, score, max_new_tokens=6)
    got = objective(loras, [[1.0, 0.0], [0.3, 0.9]])
    assert list(composer.loras) == ["kept"]
    assert seen[0] != seen[1]
    single = TextComposer(tiny_text.model("llama"), tiny_text.tokenizer())
    single.add(loras[0], name="one")
    assert single([d["prompt"] for d in DATA], max_new_tokens=6, do_sample=False) == seen[0]
    assert got[0] == pytest.approx(-sum(len(set(a)) / 8 for a in seen[0]) / 3)


def test_pictures_share_their_noise_and_rows_are_merges():
    from multilora.lab.world.loras import pictures

    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, 2, seed=i) for i in range(2)]

    def score(images, prompts):
        assert prompts == ["a", "a", "bc", "bc"]
        return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]

    objective = PictureScore(pipe, ["a", "bc"], [3, 4], score, steps=2, batch=3)
    rows = [[0.0, 0.0], [1.0, 0.5], [0.0, 0.0]]
    got = objective(loras, rows)
    assert got[0] == got[2] != got[1]
    merged = ml.merge(loras, rows[1])
    images = [pictures(pipe, [p], [s], [merged], steps=2)[0] for p in ("a", "bc") for s in (3, 4)]
    assert got[1] == pytest.approx(-np.mean([np.asarray(i, dtype=np.float64).mean() for i in images]), abs=0.05)
    bad = PictureScore(pipe, ["a"], [3], lambda images, prompts: "fine", name="beauty", steps=1)
    with pytest.raises(ValueError, match="score 'beauty' returned no number but 'fine'"):
        resolve("weigh", "lorahub")(loras, bad)
    with pytest.raises(ValueError, match="wanted 1 of each"):
        PictureScore(pipe, [], [3], score)


def test_own_predictions_are_matched_by_the_lora_alone():
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, 2, seed=i) for i in range(2)]
    alone = own_predictions(pipe, loras[:1], [["a"]], draws=2, steps=1)
    losses = alone(loras[:1], [[1.0], [0.5], [0.0]])
    assert losses[0] < 1e-10 < 1e-6 < losses[1] < losses[2]
    both = own_predictions(pipe, loras, [["a"], ["b"]], draws=2, steps=1)
    assert min(both(loras, [[1.0, 0.0], [0.0, 1.0]])) > 1e-6
    found = resolve("weigh", "learned", scope="layer", form="free", steps=4)(loras, both)
    assert found.best.loss < found.trials[0].loss
    assert all(p.grad is None for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()))
    again = own_predictions(pipe, loras, [["a"], ["b"]], draws=2, steps=1)
    assert again(loras, [[0.4, 0.4]]) == both(loras, [[0.4, 0.4]])
    with pytest.raises(ValueError, match="prompts for 1 of 2 LoRAs"):
        own_predictions(pipe, loras, [["a"], []])


def test_recogniser_b_is_not_for_searches():
    with pytest.raises(ValueError, match="for tables only"):
        presence_score({"character": "zib"}, "b")


def test_watched_counts_and_stops():
    stop, seen = threading.Event(), []
    watched = Watched(each(lambda loras, row: sum(row), "sum"), lambda *said: seen.append(said), stop)
    assert watched.name == "sum"
    assert watched([], [(3.0,), (1.0,)]) == [3.0, 1.0]
    assert watched([], [(2.0,)]) == [2.0]
    assert seen == [(2, 1.0), (3, 1.0)]
    stop.set()
    with pytest.raises(Enough, match="after 3 candidates"):
        watched([], [(2.0,)])


def test_a_users_function(tmp_path):
    (tmp_path / "mine.py").write_text("def bright(images, prompts):\n    return [1.0] * len(images)\nsize = 3\n")
    assert function_of(f"{tmp_path}/mine.py:bright")([1, 2], []) == [1.0, 1.0]
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    for text, said in {
        "mine": "wanted file.py:function",
        f"{tmp_path}/none.py:bright": "there is no file",
        f"{tmp_path}/mine.py:size": "has no function 'size'",
        f"{tmp_path}/broken.py:x": "fails with ModuleNotFoundError",
    }.items():
        with pytest.raises(ValueError, match=said):
            function_of(text)
