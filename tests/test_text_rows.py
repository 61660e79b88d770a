"""The prompt's encoding under each row of LoRAs, and LoRAs that diffusers loaded into a pipeline."""

import pytest
import torch

from multilora import files
from multilora.lora import Lora
from multilora.pipelines.composing import composing
from multilora.pipelines.image import Composer
from tests import scene, tiny

ONE = 1e-5


@pytest.fixture(scope="module")
def pipes():
    return {family: getattr(tiny, family)() for family in scene.FAMILIES}


# -- the text of each row -------------------------------------------------------------------------------------------

TEXTS = {
    "sd15": {"encoder_hidden_states"},
    "sd3": {"encoder_hidden_states", "pooled_projections"},
    "flux": {"encoder_hidden_states", "pooled_projections"},
}


@pytest.mark.parametrize("family", scene.FAMILIES)
def test_text_of_each_row_equals_its_own_encoding(pipes, family):
    """Composite with text-encoder parts: each pass gets what a pipeline with that LoRA alone gives its denoiser."""
    pipe = pipes[family]
    sets = scene.loras(pipe, 3, text=True, strength=3.0)
    weights = [1.0, 0.7, -0.5]
    with scene.listening(scene.denoiser(pipe)) as runs, composing(pipe, sets, "composite", weights=weights) as c:
        c.passes_per_call = 1
        scene.draw(pipe, steps=1)
    calls = 2 if family == "flux" else 1
    assert len(runs) == 3 * calls
    for i in range(3):
        alone = scene.baked(pipe, [sets[i]], [weights[i]])
        with scene.listening(scene.denoiser(alone)) as wanted:
            scene.draw(alone, steps=1)
        for call in range(calls):
            ours = runs[3 * call + i]
            for name in TEXTS[family]:
                assert scene.apart(ours[name], wanted[call][name]) < ONE, (i, name)
            assert scene.apart(ours["out"], wanted[call]["out"]) < ONE
        other = runs[(i + 1) % 3]
        for name in TEXTS[family]:
            assert scene.apart(runs[i][name], other[name]) > 1e-3


@pytest.mark.parametrize("family", scene.FAMILIES)
def test_text_per_row_is_the_same_batched_and_in_turn(pipes, family):
    pipe = pipes[family]
    sets = scene.loras(pipe, 2, text=True)
    pictures = []
    for size in (None, 1):
        with composing(pipe, sets, "composite", passes_per_call=size):
            pictures.append(scene.draw(pipe, num_images_per_prompt=2, steps=2))
    assert scene.apart(*pictures) < ONE


@pytest.mark.parametrize("mode", ["all", "first", "none"])
def test_one_text_for_all_rows(pipes, mode):
    pipe = pipes["sd15"]
    sets = scene.loras(pipe, 2, text=True, strength=2.0)
    weights = {"all": [1.0, 1.0], "first": [1.0, 0.0], "none": [0.0, 0.0]}[mode]
    with scene.listening(pipe.unet) as runs, composing(pipe, sets, "switch", every=1, text_encoder=mode):
        scene.draw(pipe, steps=2)
    wanted = scene.baked(pipe, sets, weights)
    with scene.listening(wanted.unet) as theirs:
        scene.draw(wanted, steps=1)
    for run in runs:
        assert scene.apart(run["encoder_hidden_states"], theirs[0]["encoder_hidden_states"]) < ONE


def test_given_embeddings_warn_and_are_used(pipes):
    pipe = pipes["sd15"]
    sets = scene.loras(pipe, 2, text=True)
    embeds, negative = pipe.encode_prompt(scene.PROMPT, "cpu", 1, True, scene.NEGATIVE)
    given = {"prompt": None, "negative_prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    with pytest.warns(UserWarning, match="embeddings") as warned, composing(pipe, sets, "composite"):
        ours = scene.draw(pipe, steps=2, **given)
    assert len([w for w in warned if "embeddings" in str(w.message)]) == 1
    with composing(pipe, [Lora({k: p for k, p in s.items() if k.startswith("unet.")}) for s in sets], "composite"):
        assert scene.apart(ours, scene.draw(pipe, steps=2, **given)) < ONE


# -- adapters that diffusers loaded ---------------------------------------------------------------------------------


def adapters(pipe) -> dict:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {"active": pipe.get_active_adapters(), "listed": pipe.get_list_adapters()}
    for component, module in scene.modules(pipe).items():
        for path, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                found[component, path] = (dict(layer.scaling), layer.disable_adapters, layer.active_adapters)
    return found


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_taking_over_adapters_equals_plain_diffusers(family):
    pipe = getattr(tiny, family)()
    bare = scene.draw(pipe)
    # diffusers loads no LoRA into SD3's T5
    sets = [Lora({k: p for k, p in s.items() if "text_encoder_3" not in k}) for s in scene.loras(pipe, 2, text=True)]
    for name, lora in zip(("fox", "robe"), sets, strict=True):
        pipe.load_lora_weights(files.state(lora, "diffusers"), adapter_name=name)
    pipe.set_adapters(["fox", "robe"], [0.8, 0.5])
    plain, before, bytes_before = scene.draw(pipe), adapters(pipe), scene.digest(pipe)
    assert scene.apart(plain, scene.draw(scene.baked(getattr(tiny, family)(), sets, [0.8, 0.5]))) < ONE
    assert scene.apart(plain, bare) > 0.02
    with composing(pipe, None, "merge"):
        taken = scene.draw(pipe)
        assert scene.apart(taken, plain) < ONE
    assert adapters(pipe) == before
    assert scene.digest(pipe) == bytes_before
    assert torch.equal(scene.draw(pipe), plain)
    with composing(pipe, ["fox"], "merge", weights=[1.0]):
        ours = scene.draw(pipe)
    assert scene.apart(ours, scene.draw(scene.baked(getattr(tiny, family)(), sets[:1], [1.0]))) < ONE
    pipe.unload_lora_weights()
    assert torch.equal(scene.draw(pipe), bare)


def test_a_composer_around_a_pipeline_with_adapters_has_them():
    pipe = tiny.sd15()
    sets = scene.loras(pipe, 2)
    for name, lora in zip(("fox", "robe"), sets, strict=True):
        pipe.load_lora_weights(files.state(lora, "diffusers"), adapter_name=name)
    pipe.set_adapters(["fox", "robe"], [0.8, 0.5])
    composer = Composer(pipe)
    assert [(n, m.weight.constant) for n, m in composer.loras.items()] == [
        ("fox", pytest.approx(0.8)),
        ("robe", pytest.approx(0.5)),
    ]
