"""Names and weights of LoRAs that mean harm: refused before anything runs, or kept as plain text."""

import pytest
import torch

import multilora as ml
from multilora.pipelines.image import Composer
from tests import bad_files, scene, tiny

NAMES = (".", "..", "/", "v1.5", "keys", "lora_A", "<img src=x onerror=1>", "x" * 10_000, "\u202ea", "a\nb", "fox:1")


@pytest.fixture(scope="module")
def world():
    pipe = tiny.sd15()
    return pipe, scene.loras(pipe, 1)[0], scene.Witness(pipe)


@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n)[:20])
def test_a_name_is_only_a_name(world, name):
    """It is a key of a dict and part of no module path: the picture is that of any other name, and nothing stays."""
    pipe, lora, witness = world
    pictures = []
    for given in ("fox", name):
        composer = Composer(pipe)
        composer.add(lora, name=given)
        assert list(composer.loras) == [given]
        pictures.append(composer("a", num_inference_steps=1, seed=0, width=32, height=32).images[0])
        with pytest.raises(ValueError) as caught:
            composer.add(lora, name=given)
        assert str(caught.value).isprintable()
        assert "is in the composition already" in str(caught.value)
    assert pictures[0].tobytes() == pictures[1].tobytes()
    witness.check()


@pytest.mark.parametrize("weight", [1e30, -1e30, "1e30", "0@0,1e30@1", 1.1e6, float("inf"), "x", [[1]], {}, True])
def test_a_weight_that_no_picture_survives(world, weight):
    pipe, lora, witness = world
    composer = Composer(pipe)
    with pytest.raises(ValueError, match="weight of LoRA 'robe'"):
        composer.add(lora, name="robe", weight=weight)
    assert not composer.loras
    witness.check()


@pytest.mark.parametrize("name", NAMES, ids=lambda n: repr(n)[:20])
def test_what_a_file_calls_itself_is_one_line(name, tmp_path):
    """The name, category and triggers in a file's metadata, which commands print and pages show."""
    lora = tiny.lora_for(tiny.sd15(), modules=[".to_q"])
    lora = lora.replace(card=ml.lora.Card(name, name, (name, "fx"), "sd15"))
    back = ml.load(ml.save(lora, tmp_path / "a.safetensors"))
    for text in (back.card.name, back.card.category, *back.card.triggers):
        assert text.isprintable()
        assert 0 < len(text) <= 100
        assert not set(text) & set('<>"')
    assert torch.equal(back[next(iter(back))].down, lora[next(iter(lora))].down)
    assert set(bad_files.PLACES) >= set(back.components)
