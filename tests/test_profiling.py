"""`--profile`: parts against what is known to run, and nothing left behind."""

import json

import pytest
import torch
from torch import nn

from multilora import attach, files
from multilora.pipelines.image import Composer
from multilora.pipelines.profiling import profiled
from tests import tiny
from tests.test_cli import call

STEPS = 2


@pytest.fixture(scope="module")
def composer():
    pipe = tiny.sd15()
    made = Composer(pipe)
    for seed in (1, 2):
        made.add(tiny.lora_for(pipe, seed=seed, name=f"l{seed}"))
    return made


def drawn(composer, **more):
    return composer("a fox", seed=3, num_inference_steps=STEPS, guidance_scale=3.0, height=16, width=16, **more)


def test_parts_and_runs_are_those_of_the_picture_and_the_picture_is_the_same(composer):
    call_of_hook, globally = attach._Hook.__call__, dict(nn.modules.module._global_forward_hooks)
    plain = drawn(composer, method="composite", form="side", passes_per_call=1).images[0]
    with profiled() as found:
        again = drawn(composer, method="composite", form="side", passes_per_call=1).images[0]
    assert again.tobytes() == plain.tobytes()
    parts = {part.name: part for part in found.parts}
    assert set(parts) == {"denoiser", "LoRAs", "VAE", "text encoders", "the rest"}
    assert parts["the rest"].runs == 1
    assert parts["denoiser"].runs == 2 * STEPS  # two LoRAs in turn
    assert parts["LoRAs"].runs > 2 * STEPS
    assert sum(part.seconds for part in found.parts) == pytest.approx(found.seconds, rel=0.05)
    names = {name: {operation for operation, _, _ in part.operations} for name, part in parts.items()}
    assert any("addmm" in name for name in names["LoRAs"] | names["denoiser"])
    assert attach._Hook.__call__ is call_of_hook
    assert nn.modules.module._global_forward_hooks == globally
    with pytest.raises(ValueError, match="method"), profiled():
        drawn(composer, method="no such method")
    assert attach._Hook.__call__ is call_of_hook


def test_the_command_prints_the_parts_after_the_paths(composer, tmp_path, monkeypatch, capsys):
    composer.pipe.save_pretrained(tmp_path / "base")
    files.save(tiny.lora_for(composer.pipe, seed=1, name="fox"), tmp_path / "fox.safetensors")
    monkeypatch.chdir(tmp_path)
    words = (
        "compose",
        "a fox",
        "--lora",
        "fox.safetensors",
        "--base",
        "base",
        "--steps",
        "1",
        "--seed",
        "5",
        "--profile",
    )
    status, out, err = call(capsys, *words)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].endswith(".png")
    assert lines[1].split()[:2] == ["part", "share"]
    assert {line.split("  ")[0] for line in lines[2:-1]} >= {"denoiser", "VAE", "text encoders", "the rest"}
    assert sum(float(line.split("%")[0].split()[-1]) for line in lines[2:-1]) == pytest.approx(100, abs=4)
    status, out, err = call(capsys, *words, "--json")
    assert status == 0, err
    found = json.loads(out)["profile"]
    assert found["seconds"] > 0
    assert "denoiser" in [part["name"] for part in found["parts"]]
    assert torch.is_grad_enabled()
