"""The code of docs/guider.md runs as it stands, with a small pipeline's folder in the place of the hub id."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from multilora import files
from tests import scene, tiny

GUIDE = Path(__file__).parents[1] / "docs" / "guider.md"
HUB = "stabilityai/stable-diffusion-xl-base-1.0"


def test_the_guides_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny.sdxl()
    pipe.save_pretrained("small")
    for i, name in enumerate(("fox", "robe")):
        files.save(tiny.lora_for(pipe, seed=i, name=name, text_encoder=True), f"{name}.safetensors")
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert code.count(HUB) == 1
    space: dict = {}
    with pytest.warns(UserWarning, match="text encoders"):
        exec(compile(code.replace(HUB, "small"), str(GUIDE), "exec"), space)
    switch, composite = (scene.pixels(Image.open(f"{name}.png")) for name in ("switch", "composite"))
    assert switch.shape == composite.shape
    assert not torch.equal(switch, composite)
    assert space["pipe"].guider.bound.record.name == "composite"  # the one from before the block
    assert (tmp_path / "my-guider" / "guider_config.json").is_file()
