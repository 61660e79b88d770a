"""Commands on LoRA files: what they refuse, that inputs are never written over, that nothing is left half done."""

import os
from pathlib import Path

import pytest
import torch

from multilora import files
from multilora.lora import Dense, Lora, LowRank
from tests.cli_shelf import _here, call, pipe, shelf, told, tree

__all__ = ["_here", "pipe", "shelf"]  # fixtures

OUT = ["-o", "out.safetensors"]
BAD = {
    "method": (["merge", "fox", "--method", "tie", *OUT], "unknown method 'tie'. Nearest: ties"),
    "option": (["merge", "fox", "--method", "ties", "--option", "densty=1", *OUT], "Nearest: density"),
    "option range": (["merge", "fox", "--method", "ties", "--option", "density=2", *OUT], "density='2' of ties"),
    "option of another": (["merge", "fox", "--option", "density=0.5", *OUT], "unknown option of linear"),
    "weights count": (["merge", "fox", "robe", "--weights", "1", *OUT], "1 numbers for 2 LoRAs"),
    "weights text": (["merge", "fox", "--weights", "much", *OUT], "--weights 'much': wanted numbers"),
    "weights nan": (["merge", "fox", "--weights", "nan", *OUT], "finite number"),
    "weights twice": (["merge", "fox:0.5", "--weights", "1", *OUT], "a weight of its own"),
    "schedule": (["merge", "fox:0@0,1@1", *OUT], "schedules belong to compose"),
    "block": (["merge", "fox", "--block", "fox:*atn9*=1", *OUT], "*atn9*"),
    "block of nobody": (["merge", "fox", "--block", "fix:*=1", *OUT], "'fix'. Nearest: fox"),
    "block text": (["merge", "fox", "--block", "fox:*=x", *OUT], "wanted a number"),
    "rank": (["merge", "fox", "--rank", "0", *OUT], "--rank 0: wanted at least 1"),
    "rank twice": (["merge", "fox", "--method", "svd", "--option", "rank=2", "--rank", "3", *OUT], "give one of them"),
    "energy": (["resize", "fox", "--energy", "1.5", *OUT], "--energy 1.5"),
    "no limit": (["resize", "fox", *OUT], "--rank N or --energy SHARE is missing"),
    "nothing left": (["merge", "fox:0", *OUT], "every weight is 0"),
    "two bases": (["merge", "fox", "XL", *OUT], "xl was made for SDXL, fox for SD 1.5"),
    "not of the base": (["merge", "XL", "--base", "BASE", *OUT], "made for SDXL, this is SD 1.5"),
    "lora": (["merge", "fux", *OUT], "unknown LoRA 'fux'. Nearest: fox"),
    "no file": (["convert", "gone/a.safetensors", *OUT], "no such file"),
    "pickle": (["convert", "pickle.ckpt", *OUT], "pickle"),
    "format": (["convert", "fox", "--format", "kohja", *OUT], "unknown --format 'kohja'. Nearest: kohya"),
    "dtype": (["convert", "fox", "--dtype", "fp8", *OUT], "unknown --dtype 'fp8'"),
    "folder for a file": (["convert", "fox", "-o", "out", "--format", "kohya"], "ends with .safetensors"),
    "file for a folder": (["convert", "fox", *OUT, "--format", "peft"], "wanted a folder's name"),
    "blocks": (["convert", "fox", "--block", "*attn2*", *OUT], "--block '*attn2*': wanted GLOB=FACTOR"),
    "one checkpoint": (["extract", "XL", "gone.safetensors", *OUT], "no such file or folder"),
    "plot": (["compare", "fox", "robe", "--plot", "a.jpg"], "--plot 'a.jpg': wanted a .png"),
    "fisher out": (["fisher", "fox", "-o", "f.bin"], "is a .safetensors file"),
    "fisher both": (["fisher", "fox", "--all", "--module", "*", "-o", "f.safetensors"], "--all and --module"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_in_words_and_nothing_is_written(capsys, shelf, case):
    words, message = BAD[case]
    Path("pickle.ckpt").write_bytes(b"\x80\x04pickle")
    before = tree()
    names = {"XL": shelf / "xl.safetensors", "BASE": shelf / "base"}
    status, out, err = call(capsys, *[names.get(w, w) for w in words])
    assert message in err, err
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert tree() == before


def test_inputs_are_never_written_over(capsys, shelf):
    import shutil

    shutil.copy(shelf / "fox.safetensors", "mine.safetensors")
    shutil.copytree(shelf / "robe", "folder")
    os.symlink("mine.safetensors", "link.safetensors")
    before = tree()
    cases = [
        ["merge", "mine.safetensors", "robe", "-o", "mine.safetensors"],
        ["merge", "mine.safetensors", "robe", "-o", "link.safetensors"],
        ["merge", "fox", "robe", "-o", "mine.safetensors"],  # another copy of an input
        ["resize", "folder", "--rank", "1", "-o", "folder"],
        ["convert", "folder", "-o", "folder/x.safetensors"],
        ["convert", "mine.safetensors", "-o", "./mine.safetensors"],
        ["extract", "mine.safetensors", shelf / "fox.safetensors", "-o", "mine.safetensors"],
        ["fisher", "mine.safetensors", "-o", "mine.safetensors"],
    ]
    for words in cases:
        status, out, err = call(capsys, *words, "--force")
        assert (status, out) == (2, ""), words
        assert "input" in err, err
        assert tree() == before


def test_existing_files_stay_without_force(capsys, shelf):
    Path("out.safetensors").write_bytes(b"old")
    Path("free.md").write_bytes(b"old")
    Path("full").mkdir()
    Path("full/x").write_bytes(b"old")
    before = tree()
    for words in (OUT, ["-o", "free.safetensors", "--card"], ["-o", "full"]):
        status, _, err = call(capsys, "merge", "fox", "robe", *words)
        assert (status, "exists already; --force" in err) == (2, True), err
        assert tree() == before
    told(capsys, "merge", "fox", "robe", *OUT, "--force")
    assert files.load("out.safetensors")


@pytest.mark.parametrize("out", ["out.safetensors", "folder"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [False, True])
def test_a_file_appears_whole_or_not_at_all(capsys, shelf, monkeypatch, out, step, old):
    if old:
        told(capsys, "convert", "hat", "-o", out)
    before = tree()
    calls, real = [0], getattr(os, step)

    def full(*words):
        calls[0] += 1
        if calls[0] == (2 if out == "folder" and not old else 1):
            raise OSError(28, "No space left on device")
        return real(*words)

    monkeypatch.setattr(os, step, full)
    status, said, err = call(capsys, "merge", "fox", "robe", "-o", out, "--force")
    assert (status, said) == (1, ""), err
    assert "No space left on device" in err
    assert tree() == before
    assert sorted(p.name for p in Path().iterdir()) == ([out] if old else []), "no temporary file is left"


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(capsys):
    conv = LowRank(torch.ones(1, 4, 3, 3), torch.ones(16, 1), kind="conv")
    norm = Lora({"unet.conv_norm_out": Dense(torch.ones(16)), "unet.conv_in": conv})
    files.save(norm, "norm.safetensors", format="kohya")
    big = Lora({"unet.mid_block.attentions.0.proj_in": LowRank(torch.full((1, 8), 0.1), torch.full((8, 1), 7e3))})
    files.save(big, "big.safetensors")
    before = tree()
    for words, message in (
        (["norm.safetensors", *OUT], "cannot hold"),
        (["norm.safetensors", "-o", "folder"], "cannot hold"),
        (["big.safetensors:10", *OUT, "--dtype", "fp16"], "do not fit torch.float16"),
    ):
        status, _, err = call(capsys, "convert", *words)
        assert (status, message in err) == (2, True), err
        assert tree() == before
