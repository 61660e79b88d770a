"""Commands on LoRA files: inspect, resize, convert, extract and compare print and write the numbers of the files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from multilora import files
from tests import tiny
from tests.cli_shelf import _here, apart, call, deltas, digest, loras, pipe, shelf, told

__all__ = ["_here", "pipe", "shelf"]  # fixtures


# -- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_is(capsys, shelf):
    (found,) = told(capsys, "inspect", shelf / "hat.safetensors", "--base", shelf / "base")
    lora = files.load(shelf / "hat.safetensors")
    assert [found[n] for n in ("name", "base", "format", "trainer")] == ["hat", "SD 1.5", "diffusers", "multilora"]
    assert found["ranks"] == {"4": len(lora)}
    assert (found["triggers"], found["category"], found["dtypes"]) == (["hato"], "thing", ["float16"])
    file = shelf / "hat.safetensors"
    assert (found["bytes"], found["sha256"]) == (file.stat().st_size, digest(file))
    energy = {k: float(d.square().sum()) for k, d in deltas(lora).items()}
    assert found["norm"] == pytest.approx(sum(energy.values()) ** 0.5, rel=1e-6)
    mid = sum(e for k, e in energy.items() if k.startswith("unet.mid_block"))
    assert found["energy_by_block"]["unet.mid_block"] == pytest.approx(mid, rel=1e-6)
    assert sum(found["energy_by_block"].values()) == pytest.approx(sum(energy.values()), rel=1e-6)
    assert found["energy_by_rank"][-1] == pytest.approx(1.0)
    assert len(found["energy_by_rank"]) == 4


def test_inspect_for_people_of_several_with_one_refused(capsys, shelf):
    Path("bad.safetensors").write_bytes(b"PK\x03\x04 and so on, long enough for a header")
    status, out, err = call(capsys, "inspect", "fox", "bad.safetensors", "robe", "nobody")
    assert status == 2
    for words in ("SD 1.5", "kohya", "rank      3", "alpha     3", "foxo", "unet.mid_block", "█", "energy by rank"):
        assert words in out, out
    assert out.count("sha256") == 2
    assert "bad.safetensors" in err
    assert "zip" in err
    assert "unknown LoRA 'nobody'" in err
    status, out, err = call(capsys, "inspect", "fox", "bad.safetensors", "--json")
    found = json.loads(out)
    assert (status, found[0]["name"], "zip" in found[1]["refused"]) == (2, "fox", True)


def test_inspect_draws(capsys, shelf):
    status, _, err = call(capsys, "inspect", "hat", "--plot", "plots/hat.png")
    assert status == 0, err
    with Image.open("plots/hat.png") as picture:
        assert picture.width <= 800, "readable on a phone"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    for words, message in (
        (["fox", "--plot", "plots/hat.png"], "exists already"),
        (["fox", "hat", "--plot", "b.png"], "draws one file"),
        (["fox", "--plot", "b.jpg"], "wanted a .png"),
    ):
        status, _, err = call(capsys, "inspect", *words)
        assert (status, message in err) == (2, True), err


def test_inspect_warns(capsys):
    save_file(
        {
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(2, 8),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.randn(8, 2),
            "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(-1.0),
        },
        "odd.safetensors",
        {"ss_network_module": "networks.lora", "ss_output_name": "odd\x1b[31m one"},
    )
    (found,) = told(capsys, "inspect", "odd.safetensors")
    assert any("alpha is -1" in text for text in found["warnings"])
    status, out, _ = call(capsys, "inspect", "odd.safetensors")
    assert (status, "kohya sd-scripts" in out, "\x1b" in out) == (0, True, False)


# -- resize, convert, extract, compare --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [["--rank", "1"], ["--energy", "0.7"], ["--rank", "3", "--energy", "0.99"]])
def test_resize(capsys, shelf, cut):
    found = told(capsys, "resize", "hat", *cut, "-o", "small.safetensors", "--dtype", "fp32")
    before, after = files.load(shelf / "hat.safetensors"), files.load("small.safetensors")
    a, b = deltas(before), deltas(after)
    lost = {k: float((a[k] - b[k]).square().sum()) for k in a}
    own = {k: float(a[k].square().sum()) for k in a}
    assert found["energy_kept"] == pytest.approx(1 - sum(lost.values()) / sum(own.values()), abs=1e-6)
    for key, said in found["modules"].items():
        assert said["energy_kept"] == pytest.approx(1 - lost[key] / own[key], abs=1e-6)
        assert (said["rank_before"], said["rank"]) == (before[key].rank, after[key].rank)
        squares = torch.linalg.svdvals(a[key].flatten(1)).square()
        best = squares[: after[key].rank].sum() / squares.sum()
        assert said["energy_kept"] == pytest.approx(float(best), abs=1e-6), "the best of its rank"
    assert 0.1 < found["energy_kept"] < 1.0


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_convert(capsys, shelf, format, dtype, limit):
    out = "folder" if format == "peft" else "new.safetensors"
    found = told(capsys, "convert", "fox", "-o", out, "--format", format, "--dtype", dtype)
    lora = files.load(out)
    assert apart(lora, files.load(shelf / "fox.safetensors")) < limit
    stored = torch.float32 if dtype == "fp32" else torch.float16 if dtype == "fp16" else torch.bfloat16
    assert {p.up.dtype for p in lora.values()} == {stored}
    assert {Path(f["path"]).name for f in found["result"]["files"]} == (
        {"adapter_model.safetensors", "adapter_config.json"} if format == "peft" else {out}
    )
    assert all(f["sha256"] == digest(f["path"]) for f in found["result"]["files"])


def test_block_weights_are_baked(capsys, shelf):
    words = ["--block", "unet.down_blocks.*=0.5", "--block", "*attn2*=-2"]
    told(capsys, "convert", "fox:0.5", *words, "-o", "baked.safetensors")
    got, fox = deltas(files.load("baked.safetensors")), deltas(files.load(shelf / "fox.safetensors"))
    for key, delta in fox.items():
        by = 0.5 * (-2.0 if "attn2" in key else 0.5 if key.startswith("unet.down_blocks") else 1.0)
        assert float((got[key] - by * delta).norm() / delta.norm()) < 1e-6, key


def test_extract(capsys, shelf, pipe):
    want = tiny.lora_for(pipe, rank=2, seed=5)
    base = {f"{k}.weight": v for k, v in _weights(pipe).items()}
    save_file(base, "base.safetensors")
    changes = deltas(want)
    tuned = {k: v + changes.get(k.removesuffix(".weight"), torch.zeros(())).float() for k, v in base.items()}
    save_file(tuned, "t.safetensors")
    found = told(capsys, "extract", "t.safetensors", "base.safetensors", "--rank", 2, "-o", "lora.safetensors")
    assert apart(files.load("lora.safetensors"), want) < 1e-5
    assert found["energy_kept"] == pytest.approx(1.0, abs=1e-9)
    assert set(found["modules"]) == set(want)
    with safe_open("lora.safetensors", "pt") as stream:
        recipe = json.loads(stream.metadata()["multilora"])
    assert recipe["merge"]["tuned"] == {"name": "t", "sha256": digest("t.safetensors")}
    status, _, err = call(capsys, "extract", "t.safetensors", "base.safetensors", "--vectors", "-o", "b.safetensors")
    assert (status, "--format kohya" in err) == (2, True)


def _weights(pipe):
    found = {}
    for path, layer in pipe.unet.named_modules():
        if isinstance(layer, torch.nn.Linear):
            found[f"unet.{path}"] = layer.weight.detach().clone()
    return found


def test_compare(capsys, shelf):
    found = told(capsys, "compare", "fox", "robe", "other=hat", "--plot", "c.png")
    fox, robe, hat = (deltas(x) for x in loras(shelf, "fox", "robe", "hat"))
    dot = sum(float((fox[k] * hat[k]).sum()) for k in fox)
    sizes = [sum(float(d.square().sum()) for d in x.values()) ** 0.5 for x in (fox, hat)]
    assert found["names"] == ["fox", "robe", "other"]
    assert found["cosine"][0][2] == pytest.approx(dot / (sizes[0] * sizes[1]), abs=1e-6)
    assert found["modules"] == [len(fox), len(robe), len(hat)]
    with Image.open("c.png") as picture:
        assert picture.width <= 800
    status, out, err = call(capsys, "compare", "fox", "robe")
    assert (status, "fox and robe: cosine" in out, "by chance" in out) == (0, True, True), err
