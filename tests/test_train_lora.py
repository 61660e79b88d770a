"""The LoRA trainer: data folders, losses against their formulas, training, exact resume, families, file and card."""

import functools
import json
import math
import os
import subprocess
import sys
import threading

import pytest
import tiny
import torch
from PIL import Image

from multilora import files
from multilora.lab.train import adapt, checkpoint, loss
from multilora.lab.train.data import BadData, class_caption, pixels, read_folder, with_trigger
from multilora.lab.train.loop import Order, lr_at
from multilora.lab.train.lora import EMBEDDED_SETTINGS, OTHER_SETTINGS, train


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


# -- data ------------------------------------------------------------------------------------------------------------


def test_reads_captions_beside_pictures_in_order(folder):
    found = read_folder(folder)
    assert [e.picture.name for e in found] == [f"{i}.png" for i in range(6)]
    assert found[3].caption == "zib alien number 3"


def test_reads_metadata_jsonl(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    lines = [{"file_name": "b.png", "text": "second"}, {"file_name": "a.jpg", "caption": "first"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(e.picture.name, e.caption) for e in read_folder(tmp_path)] == [("b.png", "second"), ("a.jpg", "first")]


def break_nothing_there(d):
    for path in d.iterdir():
        path.unlink()


def break_truncated(d):
    (d / "1.png").write_bytes((d / "1.png").read_bytes()[:60])


def break_wrong_ending(d):
    Image.new("RGB", (32, 32)).save(d / "6.jpg", "PNG")
    (d / "6.txt").write_text("x")


BROKEN = {
    "no pictures": (break_nothing_there, ("no pictures", ".png")),
    "no caption": (lambda d: (d / "2.txt").unlink(), ("2.png", "no caption", "2.txt")),
    "empty caption": (lambda d: (d / "2.txt").write_text(" \n"), ("2.txt", "empty")),
    "caption not text": (lambda d: (d / "2.txt").write_bytes(b"\xff\xfe\x00a"), ("2.txt", "UTF-8")),
    "caption alone": (lambda d: (d / "9.txt").write_text("x"), ("9.txt", "without a picture")),
    "truncated": (break_truncated, ("1.png", "unreadable")),
    "empty picture": (lambda d: (d / "1.png").write_bytes(b""), ("1.png", "empty")),
    "no picture inside": (lambda d: (d / "1.png").write_text("hello"), ("1.png", "unreadable")),
    "wrong ending": (break_wrong_ending, ("6.jpg", "holds a PNG")),
    "unknown ending": (lambda d: Image.new("RGB", (32, 32)).save(d / "7.gif"), ("7.gif", ".gif is not read")),
    "two of a name": (lambda d: Image.new("RGB", (32, 32)).save(d / "1.jpg"), ("1.jpg", "share this name")),
    "too small": (lambda d: Image.new("RGB", (40, 15)).save(d / "1.png"), ("1.png", "40 x 15", "too small", "16")),
    "listed, missing": (
        lambda d: (d / "metadata.jsonl").write_text('{"file_name": "q.png", "text": "x"}'), ("q.png", "no such"),
    ),
    "listed, no caption": (
        lambda d: (d / "metadata.jsonl").write_text('{"file_name": "1.png"}'), ("line 1", "no caption"),
    ),
    "listed outside": (
        lambda d: (d / "metadata.jsonl").write_text('{"file_name": "../x.png", "text": "x"}'), ("outside",),
    ),
    "not JSON": (lambda d: (d / "metadata.jsonl").write_text("{nope"), ("line 1", "not JSON")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_bad_folder_is_refused_with_file_and_reason_and_nothing_is_written(folder, case):
    change, words = BROKEN[case]
    change(folder)
    out = folder.parent / "out" / "lora.safetensors"
    with pytest.raises(BadData) as refused:
        small(folder, _pipe(), out)
    for word in (str(folder), *words):
        assert word in str(refused.value)
    assert not out.parent.exists()


def test_missing_folder(tmp_path):
    with pytest.raises(BadData, match="no such folder"):
        read_folder(tmp_path / "nowhere")


def test_many_problems_are_counted(folder):
    for i in range(6):
        (folder / f"{i}.txt").unlink()
    with pytest.raises(BadData, match=r"6 problems.*and 1 more"):
        read_folder(folder)


def test_pixels_are_upright_flattened_and_square(tmp_path):
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert torch.equal(pixels(tmp_path / "clear.png", 4), torch.ones(3, 4, 4))
    turned = Image.new("RGB", (4, 4), (255, 255, 255))
    turned.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    found = pixels(tmp_path / "turned.png", 4)
    assert found[0, 3, 3] < -0.9
    assert found[0, 0, 0] > 0.9


def test_trigger_and_class_captions(folder):
    assert with_trigger(read_folder(folder), "zib alien")[0].caption == "zib alien number 0"
    assert with_trigger(read_folder(folder), "korv fox")[0].caption == "korv fox, zib alien number 0"
    assert class_caption("a ZIB alien in a hat", "zib alien") == "a alien in a hat"
    with pytest.raises(ValueError, match="class word"):
        class_caption("a zib", "zib")


# -- losses ----------------------------------------------------------------------------------------------------------


def test_min_snr_weights_are_the_formula():
    a = torch.linspace(0.999, 0.001, 50)
    t = torch.arange(50)
    snr = a.double() / (1 - a.double())
    for gamma in (1.0, 5.0, 20.0):
        low = torch.minimum(snr, torch.full_like(snr, gamma))
        for kind, want in (("epsilon", low / snr), ("v_prediction", low / (snr + 1)), ("sample", low)):
            got = loss.min_snr_weights(a, t, gamma, kind)
            torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0)


def test_min_snr_at_zero_terminal_snr_is_finite():
    a = torch.tensor([0.5, 0.0])
    assert loss.min_snr_weights(a, torch.tensor([1]), 5.0, "epsilon").tolist() == [1.0]
    assert loss.min_snr_weights(a, torch.tensor([1]), 5.0, "v_prediction").tolist() == [0.0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_diffusers(prediction):
    from diffusers import DDPMScheduler

    known = DDPMScheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2")
    ours = loss.Noise.of(known)
    x, noise, t = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.tensor([0, 400, 999])
    torch.testing.assert_close(ours.noisy(x, noise, t), known.add_noise(x, noise, t))
    want = {"epsilon": noise, "v_prediction": known.get_velocity(x, noise, t), "sample": x}[prediction]
    torch.testing.assert_close(ours.target(x, noise, t), want)


def test_high_noise_share_and_range():
    ours = loss.Noise(torch.linspace(1, 0, 1000), "epsilon")
    u = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    t = ours.draw(u, 0.5)
    assert 0 <= int(t.min()) <= int(t.max()) <= 999
    assert abs(float((t >= 800).float().mean()) - (0.5 + 0.5 * 0.2)) < 0.02


@pytest.mark.parametrize(("make", "scale"), [(tiny.sd3, 1000.0), (tiny.flux, 1.0)])
def test_flow_target_and_path_are_the_formula(make, scale):
    pipe = make()
    flow = loss.family_of_pipeline(pipe).loss(pipe)
    x, noise, s = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([0.25, 0.75])
    for i in range(2):
        torch.testing.assert_close(flow.noisy(x, noise, s)[i], (1 - s[i]) * x[i] + s[i] * noise[i])
    torch.testing.assert_close(flow.target(x, noise, s), noise - x)
    torch.testing.assert_close(flow.time(s), s * scale)
    # a perfect velocity leads from any point of the path to both ends
    torch.testing.assert_close(flow.noisy(x, noise, s) - s.view(-1, 1, 1, 1) * flow.target(x, noise, s), x)
    u = torch.rand(50_000, 2, generator=torch.Generator().manual_seed(1))
    shift = flow.shift
    median = flow.draw(u, 0.0).median()
    assert abs(float(median) - shift / (1 + shift)) < 0.02  # logit-normal has its median at one half, then the shift
    with pytest.raises(ValueError, match="flow"):
        flow.weights(s, 5.0)


@pytest.mark.parametrize("make", [tiny.sd15, tiny.sdxl, tiny.sd3, tiny.flux])
def test_a_prediction_is_the_pipelines_own(make):
    """The first model call of the pipeline and ours, on the same latents, time and prompt."""
    pipe = make()
    family = loss.family_of_pipeline(pipe)
    denoiser = getattr(pipe, family.denoiser)
    seen = {}

    def watch(module, args, kwargs, output):
        if not seen:
            seen.update(x=kwargs.get("hidden_states", args[0] if args else None), out=output[0])
            seen["t"] = kwargs.get("timestep", args[1] if len(args) > 1 else None)

    handle = denoiser.register_forward_hook(watch, with_kwargs=True)
    more = {"max_sequence_length": 512} if family.name == "flux" else {}
    pipe("a fox", num_inference_steps=2, height=32, width=32, output_type="latent", guidance_scale=1.0, **more)
    handle.remove()
    x = seen["x"]
    if family.name == "flux":
        n, _, packed = x.shape
        side = 32 // pipe.vae_scale_factor
        x = x.view(n, side // 2, side // 2, packed // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(n, packed // 4, side, side)
    with torch.no_grad():
        time = torch.as_tensor(seen["t"]).reshape(-1).expand(len(x))
        got = family.predict(pipe, x, time, family.text(pipe, ["a fox"]))
    want = seen["out"]
    if family.name == "flux":
        n, channels = want.shape[0], want.shape[2] // 4
        want = want.view(n, side // 2, side // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(got.shape)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- the loop --------------------------------------------------------------------------------------------------------


@functools.cache
def _pipe():
    return tiny.sd15()


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
