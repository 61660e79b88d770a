"""The worker's engine on the embedded base, in this process: pictures as lone ones, faults, what is left."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

import multilora
from multilora.lora import Card, Lora, LowRank
from multilora.pipelines.image import Composer
from multilora.pipelines.load import find_lora
from multilora.recipe import LoraUse, Recipe
from multilora.web.service.spec import Compare, Compose, Inspect, Merge, Score, Share
from multilora.web.service.state import State
from multilora.web.service.worker import Task
from tests.service_engine import faulty


class Flag:
    """A cancel that says yes from its nth question on."""

    def __init__(self, after: int | None = None):
        self.after, self.asked = after, 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.after is not None and self.asked > self.after


@pytest.fixture(scope="module")
def engine():
    return faulty()("embedded", "cpu")


def recipe(*names: str, **more) -> Recipe:
    loras = [LoraUse(name=n, reference=n, weight=0.8) for n in names]
    fields = {"prompt": "zib alien and korv fox", "base": "embedded", "steps": 2, "guidance_scale": 3.0}
    return Recipe(**{**fields, "width": 64, "height": 64, "seed": 5, "loras": loras, **more})


def run(engine, request, cancel=None, folder="", **places):
    """(answer, events) of a request; references are library names unless `places` has them."""
    events = []
    places = {reference: places.get(reference, reference) for reference in request.references()}
    return engine.run(Task(1, request, places, str(folder)), events.append, cancel or Flag()), events


def lone(asked: Recipe, **more) -> np.ndarray:
    """The picture of a recipe by a Composer with a pipeline of its own."""
    return np.asarray(Composer.from_pretrained("embedded", device="cpu").compose(asked, **more).images[0])


def pixels(answer, i: int = 0) -> np.ndarray:
    assert answer.kind == "done", answer.message
    assert answer.drift == []
    return np.asarray(answer.result.pictures[i].image)


@pytest.mark.parametrize("method", ["merge", "composite"])
def test_a_picture_is_bit_equal_to_a_lone_one_and_can_be_made_again_from_its_png(
    engine, method, tmp_path, monkeypatch
):
    monkeypatch.setattr("multilora.web.service.engine.PREVIEW_SECONDS", 0.0)
    asked = recipe("zib", "korv", method=method)
    answer, events = run(engine, Compose(recipe=asked))
    assert np.array_equal(pixels(answer), lone(asked))
    assert [e.step for e in events if e.kind == "progress"] == [1, 2]
    assert [e.image.size for e in events if e.kind == "preview"] == [(8, 8)] * 2
    (tmp_path / "x.png").write_bytes(answer.result.pictures[0].png)
    read = Recipe.from_png(tmp_path / "x.png")
    assert [u.reference for u in read.loras] == ["zib", "korv"]
    monkeypatch.setattr("multilora.web.service.engine.PREVIEW_SECONDS", 3600.0)
    other, events = run(engine, Compose(recipe=recipe("gorm", method="switch", seed=9)))
    assert [e.kind for e in events].count("preview") == 1
    assert not np.array_equal(pixels(other), pixels(answer))
    assert np.array_equal(pixels(run(engine, Compose(recipe=read, preview=False))[0]), pixels(answer))


def test_several_pictures_each_with_its_own_recipe(engine):
    answer, _ = run(engine, Compose(recipe=recipe("zib", images=2)))
    assert [p.recipe.index for p in answer.result.pictures] == [0, 1]
    second = answer.result.pictures[1]
    again, _ = run(engine, Compose(recipe=second.recipe))
    assert len(again.result.pictures) == 1
    assert np.array_equal(pixels(again), np.asarray(second.image))
    alone, _ = run(engine, Compose(recipe=recipe("zib", seed=6)))
    assert np.abs(pixels(alone).astype(int) - np.asarray(second.image)).max() <= 1


def test_a_mask_travels_in_the_recipe(engine):
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    stream = io.BytesIO()
    half.save(stream, format="PNG")
    asked = Compose(recipe=recipe("zib", "korv"), masks={"zib": stream.getvalue()})
    answer, _ = run(engine, asked)
    assert not np.array_equal(pixels(answer), pixels(run(engine, Compose(recipe=asked.recipe))[0]))
    again, _ = run(engine, Compose(recipe=answer.result.pictures[0].recipe))
    assert np.array_equal(pixels(again), pixels(answer))


def test_compare_sends_each_picture_when_it_is_there(engine):
    recipes = (recipe("zib", "korv"), recipe("zib", "korv", method="composite"))
    answer, events = run(engine, Compare(recipes=recipes, score=True))
    assert [(e.number, e.of) for e in events if e.kind == "picture"] == [(0, 2), (1, 2)]
    assert [p.recipe.method for p in answer.result.pictures] == ["merge", "composite"]
    scores = answer.result.pictures[1].scores
    assert set(scores["presence"]) == {"zib", "korv"}
    assert "embedded" in scores["clip_model"]
    scored, _ = run(engine, Score(images=[p.png for p in answer.result.pictures], prompt=recipes[0].prompt,
                                  loras=("zib", "korv")))  # fmt: skip
    assert [s["clip"] for s in scored.result.facts["scores"]] == pytest.approx(
        [p.scores["clip"] for p in answer.result.pictures], abs=1e-3
    )


def after(engine) -> None:
    """The next request works, on a model that is as it was."""
    asked = recipe("zib")
    assert np.array_equal(pixels(run(engine, Compose(recipe=asked))[0]), lone(asked))


def test_an_exception_at_a_step_is_said_and_leaves_nothing(engine):
    answer, _ = run(engine, Compose(recipe=recipe("zib", "korv", extra={"fault": "raise", "at": 1})))
    assert (answer.kind, answer.code, answer.drift) == ("failed", "failed", [])
    assert "on purpose" in answer.message
    after(engine)


def test_nan_names_step_and_lora(engine):
    uses = [LoraUse(name="zib", reference="zib", weight=0.1), LoraUse(name="korv", reference="korv", weight=2.0)]
    answer, _ = run(engine, Compose(recipe=recipe(loras=uses, extra={"fault": "nan", "at": 1})))
    assert (answer.kind, answer.code, answer.drift) == ("failed", "nan", [])
    assert "step 2" in answer.message
    assert "'korv'" in answer.message
    after(engine)


def test_out_of_memory_takes_fewer_passes_and_the_recipe_says_so(engine):
    asked = recipe("zib", "korv", "gorm", method="composite", extra={"fault": "memory", "room": 1})
    answer, events = run(engine, Compose(recipe=asked))
    said = answer.result.pictures[0].recipe
    assert said.resolved.passes_per_call == 1
    assert said.extra["notes"] == ["out of memory with 3 model runs in one call; drawn with 1 in one call"]
    assert [e.message for e in events if e.kind == "note"] == said.extra["notes"]
    alone = Recipe(**{**asked.model_dump(), "resolved": said.resolved.model_dump()})
    assert np.array_equal(pixels(answer), lone(alone))


def test_out_of_memory_with_one_pass_is_an_error_and_a_new_worker(engine):
    answer, _ = run(engine, Compose(recipe=recipe("zib", "korv", extra={"fault": "memory", "room": 0})))
    assert (answer.kind, answer.code, answer.spent) == ("failed", "memory", True)
    assert "64 x 64 with 2 LoRAs" in answer.message
    assert "smaller size" in answer.message
    after(engine)


def test_a_cancel_in_mid_run_gives_no_picture(engine):
    answer, events = run(engine, Compose(recipe=recipe("zib", steps=4)), Flag(after=3))
    assert (answer.kind, answer.result, answer.drift) == ("cancelled", None, [])
    assert 0 < max(e.step for e in events if e.kind == "progress") < 4
    after(engine)


@pytest.mark.parametrize(
    ("fault", "words"), [("drift", "weights: 1 not"), ("hook", "modules: 1 not as before, first unet.")]
)
def test_a_model_that_is_not_as_before_is_found(engine, fault, words):
    weights = next(engine.denoiser.parameters()).data
    kept, hooks = weights.clone(), dict(engine.denoiser._forward_hooks)
    try:
        answer, _ = run(engine, Compose(recipe=recipe("zib", extra={"fault": fault, "at": 1})))
        assert answer.drift
        assert words in "; ".join(answer.drift)
    finally:
        weights.copy_(kept)
        engine.denoiser._forward_hooks.clear()
        engine.denoiser._forward_hooks.update(hooks)
    after(engine)


def test_every_tensor_is_sampled(engine):
    before = State.of(engine.pipe)
    tensors = sum(len(list(m.parameters())) + len(list(m.buffers())) for m in engine.pipe.components.values()
                  if isinstance(m, torch.nn.Module))  # fmt: skip
    assert len(before.samples) == tensors > 200
    layer = engine.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    kept = layer.data.clone()
    layer.data += 1e-6 * torch.randn(4).repeat(layer.numel() // 4).view_as(layer)
    assert before.differences(State.of(engine.pipe)) == [
        "weights: 1 not as before, first unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ]
    layer.data.copy_(kept)
    assert before.differences(State.of(engine.pipe)) == []


def test_bad_requests_change_nothing_and_are_said(engine):
    for asked, words in (
        (recipe("zib", method="mrege"), "merge"),
        (recipe("zib", options={"nothing": 1}), "nothing"),
        (recipe("zib", width=65), "65"),
        (recipe("zib", scheduler="NoScheduler"), "NoScheduler"),
        (recipe(loras=[LoraUse(name="zib", reference="zib", sha256="0" * 64)]), "sha256"),
    ):
        answer, _ = run(engine, Compose(recipe=asked))
        assert (answer.kind, answer.code, answer.drift) == ("failed", "request", [])
        assert words in answer.message
    after(engine)


def test_a_base_that_cannot_be_loaded_spends_the_worker(tmp_path):
    own = faulty()("embedded", "cpu")
    answer, _ = run(own, Inspect(reference="zib", base=str(tmp_path)))
    assert (answer.kind, answer.code, answer.spent) == ("failed", "request", True)
    assert "model_index.json" in answer.message


def test_merge_is_the_library_s_and_its_file_is_read_again(engine, tmp_path):
    asked = Merge(loras=(Share(reference="zib", weight=0.7), Share(reference="korv", weight=-0.4)), name="both")
    answer, _ = run(engine, asked, folder=tmp_path)
    assert answer.kind == "done", answer.message
    files = [find_lora(n)[0] for n in ("zib", "korv")]
    wanted = multilora.merge([multilora.load(f, base=engine.pipe) for f in files], [0.7, -0.4])
    found = multilora.load(answer.result.files[0].path, base=engine.pipe)
    assert found.card.name == "both"
    for key in wanted:
        a, b = wanted[key], found[key]
        got, due = (p.up.double() @ p.down.flatten(1).double() for p in (b, a))
        torch.testing.assert_close(got, due, rtol=2e-3, atol=1e-5)
    assert answer.result.facts["ranks"] == [8]
    small, _ = run(engine, asked.model_copy(update={"rank": 2, "format": "kohya"}), folder=tmp_path / "2")
    assert small.result.facts["ranks"] == [2]
    assert 0.2 < small.result.facts["energy_kept"] < 0.999
    folder, _ = run(engine, asked.model_copy(update={"format": "peft"}), folder=tmp_path / "3")
    assert folder.result.files[0].name == "both.zip"


def test_an_option_of_a_merge_is_no_path(engine, tmp_path):
    asked = Merge(
        loras=(Share(reference="zib"), Share(reference="korv")), method="fisher", options={"fishers": "/etc/passwd,x"}
    )
    answer, _ = run(engine, asked, folder=tmp_path)
    assert answer.code == "request"
    assert "not by a path" in answer.message


def test_an_upload_is_used_by_its_path_and_named_by_its_reference(engine, tmp_path):
    shape = engine.pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.shape
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    part = LowRank(torch.randn(2, shape[1]), torch.randn(shape[0], 2))
    multilora.save(Lora({key: part}, Card(name="mine", family="sd15")), tmp_path / "mine.safetensors")
    uses = [LoraUse(name="mine", reference="upload:abc", weight=1.0)]
    answer, _ = run(engine, Compose(recipe=recipe(loras=uses)), **{"upload:abc": str(tmp_path / "mine.safetensors")})
    assert answer.result.pictures[0].recipe.loras[0].reference == "upload:abc"
    assert str(tmp_path) not in answer.result.pictures[0].recipe.json
    assert not np.array_equal(pixels(answer), pixels(run(engine, Compose(recipe=recipe()))[0]))
    facts, _ = run(engine, Inspect(reference="upload:abc"), **{"upload:abc": str(tmp_path / "mine.safetensors")})
    assert facts.result.facts["ranks"] == {2: 1}


def test_answers_can_be_pickled(engine):
    import pickle

    answer, events = run(engine, Compose(recipe=recipe("zib"), score=True))
    again = pickle.loads(pickle.dumps((answer, events)))
    assert dataclasses.asdict(again[0].result)["pictures"][0]["png"] == answer.result.pictures[0].png
