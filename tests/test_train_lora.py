"""The LoRA trainer: a falling loss, the order of samples, exact resume, families, precisions, file and card."""

import json
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image

from multilora import files
from multilora.lab.train import adapt, checkpoint, loss
from multilora.lab.train.loop import Order, lr_at
from multilora.lab.train.lora import EMBEDDED_SETTINGS, OTHER_SETTINGS, train
from tests import tiny
from tests.small_training import _pipe, folder, small

__all__ = ["folder"]  # a fixture


def test_rate_warms_up_and_ends_low():
    rates = [lr_at(s, 100, 10) for s in range(100)]
    assert rates[0] < rates[5] < rates[10] == 1.0
    assert rates[99] < 0.001
    assert math.isclose(rates[55], 0.5)


def test_order_is_a_permutation_an_epoch_and_the_same_from_anywhere():
    order, again = Order(7, 0, "data"), Order(7, 0, "data")
    first = [order[g] for g in range(21)]
    assert [sorted(first[e : e + 7]) for e in (0, 7, 14)] == [list(range(7))] * 3
    assert first[:7] != first[7:14]
    assert [again[g] for g in range(13, 21)] == first[13:]


def test_training_lowers_the_loss_and_the_file_changes_the_prediction(folder):
    pipe = tiny.sd15()
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    lines, steps = [], []
    done = small(
        folder, pipe, folder.parent / "zib.safetensors", trigger="zib alien", category="character", steps=30, batch=4,
        caption_dropout=0.0, rank=4, echo=lines.append, progress=lambda *a: steps.append(a),
    )  # fmt: skip
    assert sum(done.losses[-8:]) < 0.9 * sum(done.losses[:8])
    assert [s[0] for s in steps] == list(range(1, 31))
    assert steps[-1][1] == 30
    assert steps[-1][2]["loss"] == done.losses[-1]
    assert any("6 pictures" in line for line in lines)
    # the pipeline is as it was
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert list(pipe.unet.state_dict()) == list(before)
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert not (folder.parent / "zib.checkpoint").exists()
    # the file
    lora = files.load(done.path, base=pipe)
    assert len(lora) == done.modules
    assert lora.card.triggers == ("zib alien",)
    assert lora.card.name == "zib"
    assert lora.card.category == "character"
    assert lora.card.family == "sd15"
    assert lora.norm() > 0
    from safetensors import safe_open

    with safe_open(done.path, "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe["settings"]["rank"] == 4
    assert recipe["settings"]["steps"] == 30
    assert recipe["pictures"] == 6
    assert len(recipe["data_sha256"]) == 64
    from multilora.attach import attached

    x, text = torch.randn(1, 4, 8, 8), loss.FAMILIES["sd15"].text(pipe, ["zib alien number 1"])
    with torch.no_grad():
        plain = loss.FAMILIES["sd15"].predict(pipe, x, torch.tensor([500]), text)
        with attached(pipe.unet, [lora], component="unet") as bank:
            bank.row = [1.0]
            changed = loss.FAMILIES["sd15"].predict(pipe, x, torch.tensor([500]), text)
    assert float((changed - plain).norm() / plain.norm()) > 1e-3


def test_the_file_is_what_was_trained(folder, monkeypatch):
    """PEFT's own forward, right before its layers are taken off, equals the written file attached by us."""
    from multilora.attach import attached

    pipe, family, seen = tiny.sd15(), loss.FAMILIES["sd15"], {}
    x, text = torch.randn(1, 4, 8, 8), family.text(pipe, ["a fox"])
    real = adapt.read_out

    def read_out(components, alpha):
        with torch.no_grad():
            seen["trained"] = family.predict(pipe, x, torch.tensor([300]), text)
        return real(components, alpha)

    monkeypatch.setattr("multilora.lab.train.lora.adapt.read_out", read_out)
    done = small(folder, pipe, folder.parent / "a.safetensors", modules="all", alpha=1.0, dtype=torch.float32)
    with torch.no_grad(), attached(pipe.unet, [files.load(done.path, base=pipe)], component="unet") as bank:
        bank.row = [1.0]
        torch.testing.assert_close(
            family.predict(pipe, x, torch.tensor([300]), text), seen["trained"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_formats_hold_the_same_weights(folder, format):
    out = folder.parent / ("made" if format == "peft" else "made.safetensors")
    pipe = _pipe()
    done = small(folder, pipe, out, format=format, text_encoder=True, dtype=torch.float32)
    lora = files.load(done.path, base=pipe)
    assert set(lora.components) == {"unet", "text_encoder"}
    assert len(lora) == done.modules
    reference = small(folder, pipe, folder.parent / "ref.safetensors", text_encoder=True, dtype=torch.float32)
    want = files.load(reference.path, base=pipe)
    for key, part in want.items():
        torch.testing.assert_close(lora[key].delta(), part.delta(), rtol=0, atol=1e-7)


def test_resumed_is_bit_equal_to_uninterrupted(folder):
    pipe = _pipe()
    whole = small(folder, pipe, folder.parent / "whole.safetensors", steps=6, dtype=torch.float32, dropout=0.3)
    stop = threading.Event()
    from multilora.pipelines.denoise import Cancelled

    def after_three(step, steps, info):
        if step == 3:
            stop.set()

    settings = {"steps": 6, "dtype": torch.float32, "dropout": 0.3}
    with pytest.raises(Cancelled, match="after step 3"):
        small(folder, pipe, folder.parent / "cut.safetensors", **settings, progress=after_three, cancel=stop)
    assert not (folder.parent / "cut.safetensors").exists()
    assert (folder.parent / "cut.checkpoint").is_file()
    lines = []
    resumed = small(folder, pipe, folder.parent / "cut.safetensors", **settings, echo=lines.append)
    assert any("resumed after step 3" in line for line in lines)
    assert resumed.losses == whole.losses[3:]
    a, b = files.load(whole.path), files.load(resumed.path)
    assert set(a) == set(b)
    for key in a:
        assert torch.equal(a[key].down, b[key].down)
        assert torch.equal(a[key].up, b[key].up)


def test_checkpoint_of_other_settings_is_refused(folder):
    pipe, out = _pipe(), folder.parent / "x.safetensors"

    def fail(step, steps, info):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(folder, pipe, out, progress=fail)
    with pytest.raises(ValueError, match=r"other settings.*lr: 0.01 -> 0.02"):
        small(folder, pipe, out, lr=2e-2)
    (folder / "0.txt").write_text("another caption")
    with pytest.raises(ValueError, match="data: "):
        small(folder, pipe, out)
    assert small(folder, pipe, out, resume=False).path == out


def test_an_interrupted_checkpoint_leaves_the_old_one(folder, tmp_path, monkeypatch):
    p = [torch.nn.Parameter(torch.ones(3))]
    optimiser = torch.optim.AdamW(p)
    p[0].grad = torch.ones(3)
    optimiser.step()
    checkpoint.save(tmp_path / "c", 1, p, optimiser, {"a": 1}, None)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        checkpoint.save(tmp_path / "c", 2, p, optimiser, {"a": 1}, None)
    assert checkpoint.restore(tmp_path / "c", p, optimiser, {"a": 1}, None) == 1


def test_accumulation_and_batch_see_the_same_samples(folder):
    """Two halves accumulated are one batch: the same pictures, noise and times."""
    pipe = _pipe()
    settings = {"steps": 2, "dtype": torch.float32}
    one = small(folder, pipe, folder.parent / "one.safetensors", batch=4, **settings)
    two = small(folder, pipe, folder.parent / "two.safetensors", batch=2, accumulate=2, **settings)
    assert one.losses == pytest.approx(two.losses, rel=1e-5)


@pytest.mark.parametrize("make", [tiny.sdxl, tiny.sd3, tiny.flux])
def test_other_families_train(folder, make):
    pipe = make()
    done = small(folder, pipe, folder.parent / "a.safetensors", steps=2)
    lora = files.load(done.path, base=pipe)
    assert len(lora) == done.modules > 0
    assert all(math.isfinite(x) for x in done.losses)


def test_prior_pictures_are_generated_once_and_count(folder):
    pipe, out, lines = _pipe(), folder.parent / "p.safetensors", []
    settings = {"prior": "generate", "prior_count": 2, "trigger": "zib alien", "steps": 1}
    first = small(folder, pipe, out, **settings)
    assert (folder.parent / "p.prior" / "0000.txt").read_text() == "alien number 0"
    second = small(folder, pipe, out, **settings, echo=lines.append)
    assert not [line for line in lines if "prior pictures" in line]
    assert first.losses == second.losses
    assert small(folder, pipe, out, steps=1, trigger="zib alien").losses[0] < first.losses[0]
    with pytest.raises(ValueError, match="trigger"):
        small(folder, pipe, out, prior="generate")


def test_samples_are_drawn_while_training(folder):
    done = small(folder, _pipe(), folder.parent / "s.safetensors", steps=2, sample_every=1, sample_prompts=["a fox"])
    assert [p.name for p in done.samples] == ["step-000001-0.png", "step-000002-0.png"]
    assert Image.open(done.samples[0]).size == (32, 32)


def test_two_precisions_in_one_process(folder):
    pipe = _pipe()
    a = small(folder, pipe, folder.parent / "a.safetensors", steps=1, mixed_precision="bf16")
    b = small(folder, pipe, folder.parent / "b.safetensors", steps=1)
    assert a.losses == pytest.approx(b.losses, rel=0.05)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rank": 0}, "rank=0"), ({"lr": 2.0}, "lr=2.0"), ({"format": "ckpt"}, "format"),
        ({"modules": "atention"}, "attention"), ({"modules": ["nothing"]}, "match none"),
        ({"mixed_precision": "fp8"}, "fp8"), ({"caption_dropout": float("nan")}, "caption_dropout"),
    ],
)  # fmt: skip
def test_bad_settings(folder, setting, words):
    with pytest.raises(ValueError, match=words):
        small(folder, _pipe(), folder.parent / "x.safetensors", **setting)


def test_a_base_with_a_lora_on_it_is_refused(folder):
    from peft import LoraConfig

    pipe = tiny.sd15()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="unload"):
        small(folder, pipe, folder.parent / "x.safetensors")


def test_divergence_is_an_error_and_the_model_comes_back(folder):
    pipe = tiny.sd15()
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="lower lr"):
        small(folder, pipe, folder.parent / "x.safetensors")
    assert list(pipe.unet.state_dict()) == list(before)


def test_defaults_depend_on_the_base():
    assert EMBEDDED_SETTINGS["lr"] > OTHER_SETTINGS["lr"]


@pytest.mark.long
def test_two_processes_see_the_samples_of_one(folder):
    """Two processes with batch 2 are one process with batch 4, to rounding."""
    script = folder.parent / "two.py"
    script.write_text(
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "import tiny, torch\nfrom multilora.lab.train.lora import train\n"
        "pipe = tiny.sd15()\n"
        f"done = train({str(folder)!r}, pipe, {str(folder.parent / 'two.safetensors')!r}, rank=2, steps=2, batch=2,\n"
        "    lr=1e-2, size=32, modules='attention', dtype=torch.float32)\n"
        "print('losses', *done.losses)\n"
    )
    one = train(folder, _pipe(), folder.parent / "one.safetensors", rank=2, steps=2, batch=4, lr=1e-2, size=32,
                modules="attention", dtype=torch.float32)  # fmt: skip
    ran = subprocess.run(
        # `accelerate launch --cpu --num_processes 2` starts one process where there is no MPI; torchrun starts two.
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True, text=True, timeout=280, env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(ran.stdout.split("losses")) == 3, "two processes print two lines"
    a, b = files.load(one.path), files.load(folder.parent / "two.safetensors")
    for key in a:
        torch.testing.assert_close(a[key].delta(), b[key].delta(), rtol=1e-3, atol=1e-6)
