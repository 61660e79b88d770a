"""A merge made here, written to a file, is in plain diffusers and in plain PEFT what our own attach says it is."""

import math

import peft
import pytest
import torch

import multilora as ml
from multilora.attach import attached
from multilora.method import methods
from multilora.writing import save
from tests import tiny

CLOSE = 1e-5  # relative, float32
WEIGHT = 0.8


def loras_for(name):
    """Two LoRAs of unequal ranks over attention, convolutions and the text encoder."""
    pipe = tiny.sd15()
    ranks = (3, 3) if name == "factor" else (2, 5)
    more = {"text_encoder": True, "conv": True}
    loras = [tiny.lora_for(pipe, rank=r, seed=i, strength=1.5, **more) for i, r in enumerate(ranks)]
    return pipe, loras


def needed(name, loras):
    """What some methods cannot do without, random."""
    generator = torch.Generator().manual_seed(9)

    def gram(part):
        x = torch.randn(60, math.prod(part.shape[1:]), generator=generator)
        return x.T @ x

    if name == "fisher":
        return {"fishers": [{f"{k}.weight": torch.rand(p.shape, generator=generator) for k, p in one.items()}
                            for one in loras]}  # fmt: skip
    return {"grams": [{k: gram(p) for k, p in one.items()} for one in loras]} if name == "regmean" else {}


@torch.no_grad()
def answers(pipe):
    """(a prediction of the U-Net, the text encoder's states), for fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, 32, generator=generator)
    ids = pipe.tokenizer("a fox in a robe", return_tensors="pt").input_ids
    return pipe.unet(latents, torch.tensor(300), text).sample, pipe.text_encoder(ids).last_hidden_state


@torch.no_grad()
def ours(pipe, lora, weight):
    with (
        attached(pipe.unet, [lora], component="unet") as unet,
        attached(pipe.text_encoder, [lora], component="text_encoder") as text,
    ):
        unet.row = text.row = [weight]
        return answers(pipe)


def apart(a, b):
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", sorted(methods("merge")))
def test_a_merged_file_acts_in_plain_diffusers_and_peft_as_here(name, tmp_path):
    pipe, loras = loras_for(name)
    merged = ml.merge(loras, [0.9, 0.5], method=name, **needed(name, loras))
    base, want, full = answers(pipe), ours(pipe, merged, WEIGHT), ours(pipe, merged, 1.0)
    assert all(float((x - y).norm()) > 0.002 * float(y.norm()) for x, y in zip(want, base, strict=True))

    host = tiny.sd15()
    file = save(merged, tmp_path / "merged.safetensors")
    host.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="merged")
    host.set_adapters(["merged"], [WEIGHT])
    assert apart(answers(host), want) < CLOSE

    host = tiny.sd15()
    folder = save(merged, tmp_path / "merged", format="peft", base=host)
    for component in ("unet", "text_encoder"):
        setattr(host, component, peft.PeftModel.from_pretrained(getattr(host, component), str(folder / component)))
    assert apart(answers(host), full) < CLOSE
    assert apart(full, want) > 10 * CLOSE
