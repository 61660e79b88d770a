"""What the guider's tests draw with: of each family a standard and a modular pipeline of the same parts, two LoRAs."""

import pytest
import torch
from diffusers.utils import logging

from tests import modular, tiny
from tests.modular import draw

FAMILIES = ("sdxl", "qwen")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def pipes():
    """(family, dtype) -> (standard pipeline, modular pipeline with the same components, two LoRAs)."""
    made = {}

    def get(family, dtype=torch.float32):
        if (family, dtype) not in made:
            pipe = modular.standard(family, dtype)
            loras = [tiny.lora_for(pipe, seed=i, name=n, strength=1.5) for i, n in enumerate(("fox", "robe"))]
            made[family, dtype] = pipe, modular.modular(pipe, family), loras
            draw(made[family, dtype][1], steps=1)  # models of transformers keep attributes from their first call on
        return made[family, dtype]

    return get
