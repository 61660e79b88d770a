"""The shipped library of LoRAs: manifest, files, triggers, sizes; and the stages that make it, small."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from multilora import files
from multilora.lab.train.data import read_folder
from multilora.lab.world import loras
from multilora.lab.world.designs import CATEGORIES, DESIGNS
from multilora.pipelines.load import assets, library

LISTING = assets() / "loras" / "library.json"
FIELDS = {"name", "file", "format", "category", "trigger", "class_word", "description", "split", "preview", "sha256",
          "rank", "text_encoder"}  # fmt: skip
AT_LEAST = {"character": 4, "garment": 3, "style": 3, "background": 3, "object": 3}


def entries():
    return json.loads(LISTING.read_text())["loras"]


def test_manifest_is_complete_and_split():
    listing = json.loads(LISTING.read_text())
    assert listing["version"] == 1
    assert listing["base"] == "embedded"
    names = [e["name"] for e in listing["loras"]]
    assert len(set(names)) == len(names)
    for e in listing["loras"]:
        assert set(e) == FIELDS
        assert e["trigger"].endswith(e["class_word"])
        assert 4 <= e["rank"] <= 16
    for category, least in AT_LEAST.items():
        mine = [e for e in listing["loras"] if e["category"] == category]
        assert len(mine) >= least
        assert any(e["split"] == "test" for e in mine)
    tests = sum(e["split"] == "test" for e in listing["loras"])
    assert 0.25 <= tests / len(names) <= 0.4
    assert {e["format"] for e in listing["loras"]} == {"diffusers", "kohya", "peft"}
    assert any(e["text_encoder"] for e in listing["loras"])


@pytest.mark.parametrize("entry", entries(), ids=lambda e: e["name"])
def test_each_lora_loads_against_the_base(entry):
    path = assets() / "loras" / entry["file"]
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == entry["sha256"]
    lora = files.load(path, base="embedded")
    assert lora.card.sha256 == entry["sha256"]
    assert lora.card.triggers == (entry["trigger"],)
    assert lora.card.category == entry["category"]
    assert lora.card.provenance["format"] == entry["format"]
    assert ("text_encoder" in lora.components) == entry["text_encoder"]
    assert {p.rank for p in lora.values()} == {entry["rank"]}
    assert all(torch.isfinite(p.down).all() and torch.isfinite(p.up).all() for p in lora.values())
    assert lora.norm() > 0.1
    assert Image.open(assets() / "loras" / entry["preview"]).size == (128, 128)
    assert library()[entry["name"]]["path"] == path


def test_the_whole_library_is_small():
    assert sum(f.stat().st_size for f in (assets() / "loras").rglob("*") if f.is_file()) <= 12e6


def test_every_design_has_a_plan_and_training_data(tmp_path):
    assert set(loras.PLANS) == set(DESIGNS)
    for name in ("zib", "gamo"):
        found = read_folder(loras.draw_data(name, tmp_path / name, count=4), size=128)
        assert len(found) == 4
        assert all(DESIGNS[name].trigger in e.caption for e in found)
    assert {d.category for d in DESIGNS.values()} == set(CATEGORIES)


def test_a_plan_may_say_how_many_pictures_of_each_style_it_trains_on():
    scenes = loras.training_scenes("raio")
    assert Counter(s.style for s in scenes) == dict(loras.PLANS["raio"].styles)
    stream = [loras.stream_scene("raio", "train", i) for i in range(400)]
    assert [s for s in stream if s in scenes] == scenes  # no scene twice, all from the training stream, in its order


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_plan_may_strengthen_what_was_trained(tmp_path, format):
    name = next(n for n, plan in loras.PLANS.items() if plan.format == format)
    shipped = Path(library()[name]["path"])
    path = (shutil.copytree if shipped.is_dir() else shutil.copy)(shipped, tmp_path / f"x{shipped.suffix}")
    weights, own = (p / "adapter_model.safetensors" if p.is_dir() else p for p in (path, shipped))
    before = files.load(path)
    loras.strengthen(path, replace(loras.PLANS[name], strength=1.25))
    after = files.load(path)
    assert after.norm() == pytest.approx(1.25 * before.norm(), rel=1e-3)
    assert (after.card.name, after.card.triggers) == (before.card.name, before.card.triggers)
    with safe_open(weights, "pt") as file, safe_open(own, "pt") as its:
        assert file.metadata()["recipe"] == its.metadata()["recipe"]
    assert {t.dtype for t in load_file(weights).values()} == {torch.float16}
    assert list(tmp_path.iterdir()) == [path]


def test_training_and_judging_scenes_differ():
    a = {loras.stream_scene("zib", "train", i).seed for i in range(100)}
    b = {loras.stream_scene("zib", s, i).seed for i in range(100) for s in ("judge", "report", "calibrate")}
    assert not a & b


@pytest.mark.long
def test_two_loras_trained_again_by_the_public_command_reach_the_shipped_presence(tmp_path):
    from multilora.lab.train.lora import train
    from multilora.pipelines.load import load_pipeline

    pipe = load_pipeline("embedded")
    for name in ("zib", "burgo"):
        data = loras.draw_data(name, tmp_path / name)
        done = train(data, "embedded", tmp_path / f"{name}.safetensors", trigger=DESIGNS[name].trigger)
        again, asked = loras.alone(pipe, name, done.path, "b", 24, stream="report")
        shipped, _ = loras.alone(pipe, name, library()[name]["path"], "b", 24, stream="report")
        assert again >= shipped - 3, (name, again, shipped, asked)


@pytest.mark.long
def test_smoke_run_of_every_stage(tmp_path):
    """`multilora world train --smoke`: every stage from nothing, in minutes; a second run keeps what is there."""
    from multilora.lab.world import stages

    lines = []
    stages.train(tmp_path, smoke=True, echo=lines.append)
    made = tmp_path / "assets"
    assert (made / "base" / "model_index.json").is_file()
    assert (made / "clip" / "model.safetensors").is_file()
    assert {e["name"] for e in json.loads((made / "loras" / "library.json").read_text())["loras"]} == {"pandu", "raio"}
    assert "Composition on the test split" in (made / "README.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in (made / "loras").glob("*.safetensors")}
    stages.train(tmp_path, stages=["eyes", "calibrate", "loras", "report"], smoke=True, echo=lines.append)
    assert {p: p.stat().st_mtime_ns for p in before} == before
