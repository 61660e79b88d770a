"""`multilora train gate`, `gates show`, `gates list`, `compose --gate`: files in, files out, errors in words."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from multilora import files
from multilora.recipe import Recipe
from tests import tiny
from tests.test_cli import call


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, three LoRAs and two reference pictures."""
    folder = tmp_path_factory.mktemp("world")
    pipe = tiny.sd15()
    pipe.save_pretrained(folder / "base")
    for seed, name in enumerate(("fox", "robe", "hat")):
        files.save(tiny.lora_for(pipe, seed=seed, name=name, strength=2.0), folder / f"{name}.safetensors")
    (folder / "data").mkdir()
    for i in range(2):
        Image.effect_noise((32, 32), 40 + 40 * i).convert("RGB").save(folder / "data" / f"{i}.png")
        (folder / "data" / f"{i}.txt").write_text("a fox in a robe")
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_from_training_to_a_picture_and_a_map(capsys, world, tmp_path):
    loras = ["--lora", f"{world}/fox.safetensors", "--lora", f"{world}/robe.safetensors"]
    base = ["--base", world / "base"]
    status, out, err = call(
        capsys, "train", "gate", *loras, "--out", "g.safetensors", "--data", world / "data", "--steps", "4", "--draws",
        "2", "--lr", "0.1", "--per", "block", "--json", *base,
    )  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["path"] == "g.safetensors"
    draw = ["--seed", "3", "--steps", "2", *base]
    mole = ["compose", "a fox", *loras, "--method", "mole", *draw]
    status, _, err = call(capsys, *mole, "--gate", "g.safetensors", "--out", "a.png")
    assert status == 0, err
    assert Recipe.from_png("a.png").options == {"gate": "g.safetensors", "mask": "", "boost": 0.0}
    assert call(capsys, *mole, "--out", "b.png")[0] == 0
    assert Image.open("a.png").tobytes() != Image.open("b.png").tobytes()
    assert call(capsys, "compose", "--from", "a.png", "--out", "c.png")[0] == 0
    assert Image.open("a.png").tobytes() == Image.open("c.png").tobytes()

    status, out, err = call(
        capsys, "gates", "show", "g.safetensors", "a fox", *loras, "--out", "map.png", "--steps", "3", "--json", *base
    )
    assert status == 0, err
    said = json.loads(out)
    assert [lora["name"] for lora in said["loras"]] == ["fox", "robe"]
    assert sum(said["shares"].values()) == pytest.approx(1.0, abs=1e-4)
    assert 0.5 <= said["strongest"] <= said["sharpest"] <= 1.0
    picture = Image.open("map.png")
    assert picture.width == 760
    assert len(picture.getcolors(2**20)) > 20

    for words, message in (
        (["compose", "a fox", *loras, "--lora", f"{world}/hat.safetensors", "--method", "mole", "--gate",
          "g.safetensors", "--out", "d.png", *draw], "made for fox, robe; LoRA 'hat' is none of them"),
        (["compose", "a fox", *loras, "--method", "merge", "--gate", "g.safetensors", "--out", "d.png", *draw],
         "unknown option of merge"),
        (["gates", "show", "g.safetensors", "a fox", *base], "LoRA 'fox' is not in the library"),
        (["gates", "show", "g.safetensors", "a fox", *loras, "--out", "map.png", *base], "exists already"),
        (["gates", "show", "nothing", "a fox"], "unknown gate"),
        (["train", "gate", *loras, "--out", "g.safetensors", *base], "exists already; --force"),
        (["train", "gate", "--lora", "fox:0.5", "--out", "h.safetensors"], "a gate finds the weights"),
        (["train", "gate", *loras, "--out", "h.safetensors", "--kind", "switch"],
         "unknown --kind 'switch'. Nearest: token_switch. Known: loramoe, mole, token_switch."),
        (["train", "gate", *loras, "--out", "h.safetensors", "--head", "q"], "--head: a gate of kind mole has no"),
        (["train", "gate", *loras, "--out", "h.safetensors", "--data", "none", *base], "there is no such file"),
    ):  # fmt: skip
        status, _, err = call(capsys, *words)
        assert status == 2, err
        assert message in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.png", "g.safetensors", "map.png"]


def test_the_embedded_gates_are_listed(capsys):
    from multilora.gates import embedded_gates

    status, out, err = call(capsys, "gates", "list", "--json")
    assert status == 0, err
    assert [one["name"] for one in json.loads(out)] == list(embedded_gates())


def test_a_text_gate_finds_the_embedded_model_and_its_loras(capsys):
    Path("data.jsonl").write_text(json.dumps({"prompt": "sort cab =", "completion": " abc"}))
    loras = ["--lora", "sort", "--lora", "reverse"]
    status, _, err = call(capsys, "train", "gate", *loras, "--data", "data.jsonl", "--steps", "1", "--out",
                          "g.safetensors")  # fmt: skip
    assert status == 0, err
    status, out, err = call(capsys, "gates", "show", "g.safetensors", "sort cab =", "--tokens", "2", "--json")
    assert status == 0, err
    assert list(json.loads(out)["shares"]) == ["sort", "reverse"]
    status, _, err = call(capsys, "gates", "show", "g.safetensors", "--out", "h.png")
    assert (status, "PROMPT is missing" in err) == (2, True)
