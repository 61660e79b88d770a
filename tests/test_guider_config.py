"""The guider's config: the same picture bit for bit when saved and reloaded, and bad input refused by name."""

import json

import pytest
import torch
from diffusers import ClassifierFreeGuidance, ComponentsManager, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig

from multilora import files
from multilora.method import UnknownName
from multilora.pipelines.guider import MultiLoraGuider
from tests import modular, scene, tiny
from tests.guided_pipes import FAMILIES, pipes, quiet
from tests.modular import draw, guided

__all__ = ["pipes", "quiet"]  # fixtures


@pytest.fixture
def files_of(tmp_path):
    """Saves LoRAs; gives their paths."""

    def save(loras):
        for lora in loras:
            files.save(lora, tmp_path / f"{lora.card.name}.safetensors", format="diffusers")
        return [str(tmp_path / f"{lora.card.name}.safetensors") for lora in loras]

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_reloaded(pipes, files_of, tmp_path, family):
    """The same picture bit for bit from the saved config, from its component spec, and from a plain JSON round."""
    _, pipe, loras = pipes(family)
    paths = files_of(loras)
    guider = MultiLoraGuider(
        paths,
        "composite",
        weights=["0@0,1@1", 0.7],
        guidance=ClassifierFreeGuidance(5.0, guidance_rescale=0.3),
        scale=1.2,
    )
    with guided(pipe, guider):
        wanted = draw(pipe)
        spec = pipe.get_component_spec("guider")
    guider.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "guider_config.json").read_text())
    assert [entry["reference"] for entry in config["loras"]] == paths
    assert all(len(entry["sha256"]) == 64 for entry in config["loras"])
    assert config["guidance"]["_class_name"] == "ClassifierFreeGuidance"
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    for again in (MultiLoraGuider.from_pretrained(tmp_path / "saved"), spec.create(), MultiLoraGuider(**plain)):
        assert type(again) is MultiLoraGuider
        with guided(pipe, again):
            assert torch.equal(draw(pipe), wanted)
    merged = guider.new(method="merge", weights=[1, 1])
    with guided(pipe, merged):
        assert scene.apart(draw(pipe), wanted) > 0.02
    assert merged.config.guidance == guider.config.guidance


def test_skip_layer_guidance_is_saved(tmp_path, pipes, files_of):
    """Its config holds objects, not only numbers."""
    _, pipe, loras = pipes("sdxl")
    inner = SkipLayerGuidance(
        skip_layer_config=LayerSkipConfig([0], fqn="mid_block.attentions.0.transformer_blocks"),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    )
    guider = MultiLoraGuider(files_of(loras), guidance=inner)
    guider.save_pretrained(tmp_path / "saved")
    again = MultiLoraGuider.from_pretrained(tmp_path / "saved")
    with guided(pipe, guider):
        wanted = draw(pipe, steps=2)
    with guided(pipe, again):
        assert torch.equal(draw(pipe, steps=2), wanted)


def test_relative_paths_and_a_components_manager(pipes, files_of, tmp_path, monkeypatch):
    standard, _, loras = pipes("sdxl")
    files_of(loras)
    monkeypatch.chdir(tmp_path)
    guider = MultiLoraGuider({"a": "fox.safetensors", "b": {"reference": "robe.safetensors", "weight": 0.5}})
    assert [u["name"] for u in guider.config.loras] == ["a", "b"]
    guider.save_pretrained("saved")
    monkeypatch.chdir("/")
    again = MultiLoraGuider.from_pretrained(tmp_path / "saved")
    managed = modular.modular(standard, "sdxl", ComponentsManager())
    with guided(managed, guider):
        wanted = draw(managed)
    with guided(managed, again):
        assert torch.equal(draw(managed), wanted)


def test_refused(pipes, files_of, tmp_path):
    """Bad input, by name; nothing was touched."""
    _, _, loras = pipes("sdxl")
    paths = files_of(loras)
    with pytest.raises(UnknownName, match=r"unknown route method 'compsite'.*composite"):
        MultiLoraGuider(paths, "compsite")
    with pytest.raises(UnknownName, match=r"every_"):
        MultiLoraGuider(paths, "switch", {"every_": 2})
    with pytest.raises(ValueError, match=r"missing\.safetensors.*no such file"):
        MultiLoraGuider([str(tmp_path / "missing.safetensors")])
    with pytest.raises(UnknownName, match=r"unknown guidance 'Nope'"):
        MultiLoraGuider(paths, guidance={"_class_name": "Nope"})
    with pytest.raises(ValueError, match=r"ClassifierFreeGuidance.*guidance_scal"):
        MultiLoraGuider(paths, guidance={"_class_name": "ClassifierFreeGuidance", "guidance_scal": 2})
    with pytest.raises(UnknownName, match=r"field of LoRA .*'wieght'.*weight"):
        MultiLoraGuider([{"reference": paths[0], "wieght": 1}])
    with pytest.raises(ValueError, match=r"weight of LoRA 'fox'.*'a lot'"):
        MultiLoraGuider(paths, weights=["a lot", 1])
    with pytest.raises(ValueError, match=r"3 values for 2 LoRAs"):
        MultiLoraGuider(paths, weights=[1, 1, 1])
    with pytest.raises(UnknownName, match=r"text_encoder mode 'per row'"):
        MultiLoraGuider(paths, text_encoder="per row")
    with pytest.raises(ValueError, match="passes_per_call=0"):
        MultiLoraGuider(paths, passes_per_call=0)
    with pytest.raises(ValueError, match="inside another"):
        MultiLoraGuider(paths, guidance=MultiLoraGuider(paths))
    memory = MultiLoraGuider(loras)
    with pytest.raises(ValueError, match=r"LoRA 'fox' is in memory only"):
        memory.save_pretrained(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
    with pytest.raises(ValueError, match=r"'fox' has no reference"):
        MultiLoraGuider.from_config(dict(memory.config))

    class Own(ClassifierFreeGuidance):
        pass

    with pytest.raises(ValueError, match="guidance Own"):
        MultiLoraGuider(paths, guidance=Own()).save_pretrained(tmp_path / "own")


def test_a_changed_file_is_refused(pipes, files_of, tmp_path):
    """When the config is read, and when the file changes between that and the picture."""
    _, pipe, loras = pipes("sdxl")
    paths = files_of(loras)
    MultiLoraGuider(paths).save_pretrained(tmp_path / "saved")
    early = MultiLoraGuider.from_pretrained(tmp_path / "saved")
    files.save(0.5 * loras[0], paths[0], format="diffusers")
    wanted = (
        r"LoRA 'fox' at .*fox\.safetensors' is not the file of the config: its sha256 begins \w{12}, wanted \w{12}"
    )
    with pytest.raises(ValueError, match=wanted):
        MultiLoraGuider.from_pretrained(tmp_path / "saved")
    before = scene.digest(pipe)
    with guided(pipe, early), pytest.raises(ValueError, match=wanted):
        draw(pipe, steps=1)
    assert scene.digest(pipe) == before
    assert not hasattr(type(pipe.unet), "__multilora_of__")


def test_a_lora_of_another_model_is_refused(pipes, files_of):
    _, pipe, _ = pipes("sdxl")
    other = tiny.lora_for(tiny.sd3(), name="other")
    before = scene.digest(pipe)
    with guided(pipe, MultiLoraGuider([other])), pytest.raises(ValueError, match=r"other"):
        draw(pipe, steps=1)
    assert scene.digest(pipe) == before
