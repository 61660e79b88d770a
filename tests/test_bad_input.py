"""Bad input: a message that names the argument, its value and what is allowed; and nothing has changed."""

import dataclasses

import numpy as np
import pytest
import torch

import multilora as ml
from multilora.lora import Lora
from multilora.pipelines.composing import composing
from multilora.pipelines.image import Composer
from multilora.pipelines.load import load_pipeline
from tests import scene, tiny


@pytest.fixture(scope="module")
def world():
    """A composer with one LoRA, and its witness."""
    pipe = tiny.sd15()
    composer = Composer(pipe)
    composer.add(scene.loras(pipe, 1)[0])
    return composer, scene.Witness(pipe)


def unchanged(world, picture=False):
    composer, witness = world
    assert list(composer.loras) == ["fox"]
    assert composer.loras["fox"].weight.constant == 1.0
    witness.check(picture)


def refused(world, call, *words):
    """`call` raises a ValueError whose text holds all the words, and is returned; nothing ran and nothing changed."""
    composer, _ = world
    with scene.listening(composer.denoiser) as runs, pytest.raises(ValueError) as caught:
        call(composer)
    assert not runs
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    unchanged(world)
    return str(caught.value)


RUN = {
    "method": ({"method": "composit"}, ["method", "'composit'", "composite", "merge"]),
    "method far away": ({"method": "zzz"}, ["method", "'zzz'", "merge", "switch"]),
    "no method": ({"method": 3}, ["method", "3"]),
    "option": ({"method": "switch", "evry": 2}, ["evry", "switch", "every"]),
    "option in a dict": ({"method": "switch", "options": {"evry": 2}}, ["evry", "switch", "every"]),
    "option of another method": ({"method": "merge", "every": 2}, ["every", "merge"]),
    "every 0": ({"method": "switch", "every": 0}, ["every=0", "switch", "at least 1"]),
    "every -3": ({"method": "switch", "every": -3}, ["every=-3", "at least 1"]),
    "every 1.5": ({"method": "switch", "every": 1.5}, ["every=1.5", "int"]),
    "every nan": ({"method": "switch", "every": float("nan")}, ["every=nan", "int"]),
    "every a word": ({"method": "switch", "every": "often"}, ["every='often'", "int"]),
    "schedule": ({"method": "switch", "schedule": "papr"}, ["schedule='papr'", "'paper'", "'reference'"]),
    "strength": ({"method": "sum_of_differences", "strength": float("inf")}, ["strength=inf", "finite"]),
    "strength too big": ({"method": "sum_of_differences", "strength": 9}, ["strength=9", "0.0 to 4.0"]),
    "width": ({"width": 33}, ["width=33", "multiple of 4", "32", "36"]),
    "height": ({"height": 30}, ["height=30", "multiple of 4", "28", "32"]),
    "width 0": ({"width": 0}, ["width=0", "multiple of 4"]),
    "width negative": ({"width": -32}, ["width=-32", "multiple of 4"]),
    "width a word": ({"width": "wide"}, ["width='wide'", "multiple of 4"]),
    "width not whole": ({"width": 32.0}, ["width=32.0", "multiple of 4"]),
    "steps 0": ({"num_inference_steps": 0}, ["num_inference_steps=0", "at least 1"]),
    "steps negative": ({"num_inference_steps": -1}, ["num_inference_steps=-1", "at least 1"]),
    "steps not whole": ({"num_inference_steps": 2.5}, ["num_inference_steps=2.5", "whole"]),
    "steps true": ({"num_inference_steps": True}, ["num_inference_steps=True", "whole"]),
    "guidance nan": ({"guidance_scale": float("nan")}, ["guidance_scale=nan", "finite"]),
    "guidance a word": ({"guidance_scale": "much"}, ["guidance_scale='much'", "finite"]),
    "passes 0": ({"passes_per_call": 0}, ["passes_per_call=0", "at least 1"]),
    "passes 1.5": ({"passes_per_call": 1.5}, ["passes_per_call=1.5", "whole"]),
    "passes a word": ({"passes_per_call": "all"}, ["passes_per_call='all'", "whole"]),
    "scale nan": ({"scale": float("nan")}, ["scale=nan", "finite"]),
    "scale a word": ({"scale": "big"}, ["scale='big'", "finite"]),
    "scale true": ({"scale": True}, ["scale=True", "finite"]),
    "seed negative": ({"seed": -1}, ["seed=-1", "0 to"]),
    "seed not whole": ({"seed": 1.5}, ["seed=1.5", "whole"]),
    "seed a word": ({"seed": "lucky"}, ["seed='lucky'", "whole"]),
    "seed too big": ({"seed": 2**63}, [f"seed={2**63}", "2**63"]),
    "images 0": ({"num_images_per_prompt": 0}, ["num_images_per_prompt=0", "at least 1"]),
    "images not whole": ({"num_images_per_prompt": 1.5}, ["num_images_per_prompt=1.5", "whole"]),
    "seeds run over": ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, ["seed="]),
    "text encoder": ({"text_encoder": "per-row"}, ["text_encoder", "'per-row'", "per_row"]),
    "form": ({"form": "rebuild"}, ["form", "'rebuild'", "rebuilt"]),
    "scheduler": ({"scheduler": "EulerDiscrete"}, ["scheduler", "'EulerDiscrete'", "EulerDiscreteScheduler"]),
    "scheduler of another kind": ({"scheduler": "Transformer2DModel"}, ["scheduler", "'Transformer2DModel'"]),
    "prompt": ({"prompt": 3}, ["prompt", "3"]),
    "prompt None": ({"prompt": None}, ["prompt", "None"]),
    "negative prompt": ({"negative_prompt": 3}, ["negative_prompt", "3"]),
    "tag of an unknown LoRA": ({"prompt": "a <lora:fxo:1>"}, ["'fxo'"]),
    "tag with a bad weight": ({"prompt": "a <lora:fox:nan>"}, ["<lora:fox:nan>", "finite"]),
    "open tag": ({"prompt": "a <lora:fox"}, ["<lora:fox"]),
}


@pytest.mark.parametrize("case", RUN)
def test_a_bad_argument_of_a_picture(world, case):
    given, words = RUN[case]
    asked = {"prompt": "a fox", "num_inference_steps": 2, "seed": 1, **given}
    refused(world, lambda composer: composer(**asked), *words)


ADD = {
    "name of no LoRA": (["nothing_like_this"], {}, ["'nothing_like_this'"]),
    "missing file": (["./nothing.safetensors"], {}, ["nothing.safetensors", "no such"]),
    "pickle": (["evil.pt"], {}, ["evil.pt", ".safetensors"]),
    "not a LoRA": ([3], {}, ["3"]),
    "weight nan": ([], {"weight": float("nan")}, ["weight of LoRA 'robe'", "nan", "finite"]),
    "weight inf": ([], {"weight": float("inf")}, ["weight of LoRA 'robe'", "inf", "finite"]),
    "weight nan in words": ([], {"weight": "nan"}, ["weight of LoRA 'robe'", "nan", "finite"]),
    "weight a word": ([], {"weight": "strong"}, ["weight of LoRA 'robe'", "'strong'", "0.8"]),
    "weight true": ([], {"weight": True}, ["weight of LoRA 'robe'", "True", "number"]),
    "weight a dict": ([], {"weight": {}}, ["weight of LoRA 'robe'", "{}"]),
    "weight nan tensor": ([], {"weight": torch.tensor(float("nan"))}, ["weight of LoRA 'robe'", "nan"]),
    "schedule backwards": ([], {"weight": "1@0.5,0@0.2"}, ["weight of LoRA 'robe'", "1@0.5,0@0.2", "order"]),
    "schedule with nan": ([], {"weight": "nan@0,1@1"}, ["weight of LoRA 'robe'", "nan", "finite"]),
    "text weight": ([], {"text_encoder_weight": float("nan")}, ["text_encoder_weight of LoRA 'robe'", "nan"]),
    "text weight a schedule": ([], {"text_encoder_weight": "0@0,1@1"}, ["text_encoder_weight", "number"]),
    "block": ([], {"blocks": {"down_block.*": 0.5}}, ["'down_block.*'", "matches none", "down_blocks"]),
    "block without star": ([], {"blocks": {"down_blocks.0": 0.5}}, ["'down_blocks.0'", "down_blocks.0.*"]),
    "block factor": ([], {"blocks": {"up_blocks.*": float("nan")}}, ["'up_blocks.*'", "nan", "finite"]),
    "block factor a word": ([], {"blocks": {"up_blocks.*": "half"}}, ["'up_blocks.*'", "'half'"]),
    "blocks no dict": ([], {"blocks": "up_blocks.*"}, ["blocks", "'up_blocks.*'"]),
    "mask of three dimensions": ([], {"mask": torch.ones(3, 32, 32)}, ["mask of LoRA 'robe'", "[3, 32, 32]"]),
    "mask out of range": ([], {"mask": np.full((32, 32), 2.0)}, ["mask of LoRA 'robe'", "0 and 1", "2"]),
    "mask missing": ([], {"mask": "no/mask.png"}, ["mask of LoRA 'robe'", "no/mask.png"]),
    "option": ([], {"wieght": 1.0}, ["'wieght'", "weight"]),
    "option of a LoRA": ([], {"positive": True}, ["'positive'", "positive_only"]),
    "same name": ([], {"name": "fox"}, ["'fox'", "already"]),
}


@pytest.mark.parametrize("case", ADD)
def test_a_bad_lora_or_option(world, case):
    args, options, words = ADD[case]
    robe = scene.loras(world[0].pipe, 2)[1]
    refused(world, lambda composer: composer.add(*(args or [robe]), **options), *words)


def test_a_lora_for_another_base(world, tmp_path):
    composer, _ = world
    for family, made in (("SDXL", tiny.sdxl()), ("SD 3", tiny.sd3()), ("FLUX", tiny.flux())):
        lora = tiny.lora_for(made, name=family)
        path = ml.save(lora, tmp_path / f"{family.replace(' ', '')}.safetensors")
        for given in (lora, path):
            if family == "SDXL":  # the tiny one shares some layers with the tiny SD 1.5
                words = ["SD 1.5", f"of {len(lora)} modules match"]
            else:
                words = [f"made for {family}", "this is SD 1.5", f"0 of {len(lora)} modules match"]
            refused(world, lambda c, given=given: c.add(given), *words)
    flux = Composer(tiny.flux())
    sd15 = composer.loras["fox"].lora
    with pytest.raises(ValueError, match=rf"made for SD 1.5, this is FLUX.*0 of {len(sd15)} modules match"):
        flux.add(sd15)
    assert flux.loras == {}


def test_a_lora_with_wrong_shapes(world):
    fox = world[0].loras["fox"].lora
    first = next(iter(fox))
    broken = Lora({**fox, first: type(fox[first]).from_factors(torch.ones(2, 3), torch.ones(5, 2))})
    refused(world, lambda c: c.add(broken, name="robe"), first, "[5, 3]")


@pytest.mark.parametrize("shape", [(30, 32), (64, 32), (5, 5), (16, 8)])
def test_a_mask_of_the_wrong_shape(world, shape):
    """Known only with the picture's size: refused before the model runs, with both sizes."""
    composer = Composer(world[0].pipe)
    composer.add(world[0].loras["fox"].lora, mask=torch.ones(shape))
    with scene.listening(composer.denoiser) as runs, pytest.raises(ValueError) as caught:
        composer("a fox", num_inference_steps=2)
    assert not runs
    for word in ("mask of LoRA 'fox'", f"{shape[0]} x {shape[1]}", "8 x 8"):
        assert word in str(caught.value)
    unchanged(world)


def test_a_mask_for_flux_is_checked_against_its_packed_grid():
    composer = Composer(tiny.flux())
    composer.add(scene.loras(composer.pipe, 1)[0], mask=torch.ones(6, 6))
    with scene.listening(composer.denoiser) as runs, pytest.raises(ValueError, match=r"mask of LoRA 'fox'.*6 x 6"):
        composer("a fox", num_inference_steps=2)
    assert not runs


def test_switch_with_fewer_steps_than_loras_proposes_composite(world):
    composer = Composer(world[0].pipe)
    for lora in scene.loras(composer.pipe, 3):
        composer.add(lora)
    with pytest.raises(ValueError, match=r"2 steps for 3 LoRAs.*composite"):
        composer("a fox", method="switch", num_inference_steps=2)
    unchanged(world)


COMPOSING = {
    "no LoRAs": ({"loras": None}, ["no LoRAs"]),
    "weights too few": ({"weights": []}, ["weights: 0 values for 1 LoRAs"]),
    "weights nan": ({"weights": [float("nan")]}, ["weight of LoRA 'fox'", "nan"]),
    "method": ({"method": "compsite"}, ["'compsite'", "composite"]),
    "passes": ({"passes_per_call": True}, ["passes_per_call=True"]),
    "passes a word": ({"passes_per_call": "x"}, ["passes_per_call='x'"]),
    "scale": ({"scale": float("-inf")}, ["scale=-inf"]),
    "text encoder": ({"text_encoder": "no"}, ["'no'", "none"]),
    "form": ({"form": "fast"}, ["form", "'fast'"]),
    "cancel": ({"cancel": True}, ["cancel", "is_set"]),
}


@pytest.mark.parametrize("case", COMPOSING)
def test_a_bad_argument_of_composing(world, case):
    given, words = COMPOSING[case]
    fox = world[0].loras["fox"].lora
    given = {"loras": [fox], **given}

    def call(composer):
        with composing(composer.pipe, **given):
            raise AssertionError("entered")

    refused(world, call, *words)


def test_recipes_that_cannot_be_made_here(world):
    composer, _ = world
    recipe = composer("a fox", seed=1, num_inference_steps=1).recipe
    for changed, words in (
        ({"base": "other/base"}, ["'other/base'"]),
        ({"method": "swtch"}, ["'swtch'", "switch"]),
        ({"scheduler": "Eulr"}, ["'Eulr'"]),
        ({"loras": [recipe.loras[0].model_copy(update={"name": "robe"})]}, ["'robe'"]),
        ({"loras": [recipe.loras[0].model_copy(update={"reference": "gone.safetensors"})]}, ["gone.safetensors"]),
    ):
        refused(world, lambda c, x=changed: c.compose(recipe.model_copy(update=x)), *words)
    unchanged(world, picture=True)


def test_bases_that_do_not_exist(tmp_path):
    for base in ("no_such_folder", str(tmp_path), "./nothing"):
        with pytest.raises(ValueError, match="base") as caught:
            load_pipeline(base)
        assert "hub id" in str(caught.value)


def test_members_cannot_be_changed(world):
    with pytest.raises(dataclasses.FrozenInstanceError):
        world[0].loras["fox"].weight = 2.0
