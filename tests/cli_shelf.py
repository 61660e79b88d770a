"""A shelf of LoRA files of several layouts, commands called on them, and the updates and bytes that files hold."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from multilora import files
from multilora.cli import main
from multilora.lora import Card
from multilora.pipelines import load
from tests import tiny


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd15()


@pytest.fixture(scope="module")
def shelf(pipe, tmp_path_factory):
    """fox (kohya), robe (peft), hat with more kinds of layers, twin of fox's rank, xl for another base; their base."""
    folder = tmp_path_factory.mktemp("shelf")
    made = {
        "fox": (tiny.lora_for(pipe, rank=3, seed=0, name="fox"), {"format": "kohya"}),
        "robe": (tiny.lora_for(pipe, rank=2, seed=1, name="robe"), {"format": "peft"}),
        "hat": (tiny.lora_for(pipe, rank=4, seed=2, name="hat", conv=True, text_encoder=True), {"dtype": "fp16"}),
    }
    for name, (lora, how) in made.items():
        card = Card(name, "thing", (f"{name}o",), "sd15")
        file = name if how.get("format") == "peft" else f"{name}.safetensors"
        files.save(lora.replace(card=card), folder / file, **how)
    files.save(tiny.lora_for(pipe, rank=3, seed=3, name="twin"), folder / "twin.safetensors")
    other = tiny.lora_for(tiny.sdxl(), name="xl")
    files.save(other.replace(card=Card("xl", family="sdxl")), folder / "xl.safetensors")
    pipe.save_pretrained(folder / "base")
    return folder


@pytest.fixture(autouse=True)
def _here(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {n: shelf / (n if n == "robe" else f"{n}.safetensors") for n in ("fox", "robe", "hat")}
    entries = {n: {"name": n, "category": "thing", "trigger": f"{n}o", "path": path} for n, path in paths.items()}
    monkeypatch.setattr(load, "library", lambda: entries)


def call(capsys, *words):
    """(exit status, stdout, stderr) of one command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(w) for w in words])
    said = capsys.readouterr()
    return exit_.value.code or 0, said.out, said.err


def told(capsys, *words):
    """The JSON of a command that must go well."""
    status, out, err = call(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def loras(shelf, *names):
    return [files.load(load.library()[name]["path"]) for name in names]


def deltas(lora):
    return {k: p.delta(torch.float64) for k, p in lora.items()}


def apart(a, b):
    """Relative distance of two Loras, by whole float64 matrices."""
    a, b = deltas(a), deltas(b)
    assert set(a) == set(b)
    gone = sum(float((a[k] - b[k]).square().sum()) for k in a)
    return (gone / sum(float(d.square().sum()) for d in b.values())) ** 0.5


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tree(folder="."):
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
