"""Six pictures with captions, a small base, and a training of four steps."""

import functools

import pytest
from PIL import Image

from multilora.lab.train.lora import train
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    """Six plain pictures of one colour each, with captions."""
    made = tmp_path / "data"
    made.mkdir()
    for i in range(6):
        Image.new("RGB", (40, 32), (40 * i, 250 - 40 * i, 90)).save(made / f"{i}.png")
        (made / f"{i}.txt").write_text(f"zib alien number {i}\n")
    return made


def small(folder, pipe, out, **settings):
    given = {"rank": 2, "steps": 4, "batch": 2, "lr": 1e-2, "size": 32, "modules": "attention", "checkpoint_every": 2}
    return train(folder, pipe, out, **{**given, **settings})


@functools.cache
def _pipe():
    return tiny.sd15()
