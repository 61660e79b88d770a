"""ZipLoRA: the merged update is the formula's, its loss falls, and each LoRA's own prediction is kept better than by a
sum; whatever is refused, nothing is written."""

import json
import threading

import pytest
import torch
from safetensors import safe_open

from multilora import files
from multilora.cli import main
from multilora.lab.objectives_denoising import own_predictions
from multilora.lab.train import ziplora
from multilora.lab.train.ziplora import columns_of, in_common, train, weighted, zipped
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.pipelines.denoise import Cancelled
from tests import tiny

PROMPTS = [["a fox", "fox in a wood"], ["a robe", "red robe"]]


def _set(pipe, k=2, strength=3.0):
    return [tiny.lora_for(pipe, rank=2 + i, seed=i, strength=strength, text_encoder=i == 0) for i in range(k)]


def _odd():
    """A linear, a convolution, an embedding, a whole difference and a norm, of odd sizes."""
    g = torch.Generator().manual_seed(4)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    return [
        Lora({
            "linear": LowRank(rand(r, 5), rand(7, r)),
            "conv": LowRank(rand(r, 3, 3, 1), rand(5, r), rand(5), kind="conv"),
            "embedding": LowRank(rand(r, 9), rand(4, r), kind="embedding"),
            "whole": Dense(rand(3, 4)),
        })
        for r in (1, 3)
    ]  # fmt: skip


def test_the_update_is_the_sum_of_weighted_columns_in_float64():
    loras, g = _odd(), torch.Generator().manual_seed(5)
    columns = [{k: torch.rand(m.shape, generator=g, dtype=torch.float64) for k, m in one.items()}
               for one in columns_of(loras)]  # fmt: skip
    assert columns[0].keys() == {"linear", "conv"}
    got = zipped(loras, columns)
    for key, part in got.items():
        want = torch.zeros(part.shape, dtype=torch.float64)
        for lora, own in zip(loras, columns, strict=True):
            delta = lora[key].delta(torch.float64)
            want += delta * own[key].reshape(1, -1, *[1] * (delta.ndim - 2)) if key in own else delta
        torch.testing.assert_close(part.delta(torch.float64), want, rtol=1e-12, atol=1e-12)
    assert got["linear"].rank == 4
    torch.testing.assert_close(got["conv"].bias, loras[0]["conv"].bias + loras[1]["conv"].bias)


def test_what_columns_have_in_common_by_hand():
    a = {"x": torch.tensor([1.0, -2.0, 3.0]), "y": torch.tensor([2.0])}
    b = {"x": torch.tensor([1.0, 1.0, -1.0]), "z": torch.tensor([9.0])}
    c = {"x": torch.tensor([0.0, 3.0, 0.0]), "y": torch.tensor([0.5])}
    assert float(in_common([a, b])) == pytest.approx(4 / 3)
    assert float(in_common([a, b, c])) == pytest.approx((4 / 3 + 2 + 1 + 1) / 4)
    assert float(in_common([{"x": torch.ones(3)}, {"z": torch.ones(3)}])) == 0.0


def test_the_gradient_is_that_of_finite_differences():
    pipe = tiny.sd15()
    loras = _set(pipe)
    loss, columns = own_predictions(pipe, loras, PROMPTS, draws=1, steps=2), columns_of(loras)
    key = max((k for k in columns[0] if k in columns[1]), key=lambda k: columns[0][k].numel())

    def value(step):
        moved = [{**one} for one in columns]
        moved[1][key] = columns[1][key] + step
        return loss([weighted(lora, own) for lora, own in zip(loras, moved, strict=True)], [torch.ones(2)])[0]

    own = torch.zeros(columns[1][key].shape, requires_grad=True)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(value(own), own)
    at = int(grad.abs().argmax())
    with torch.no_grad():
        h = torch.zeros_like(own)
        h[at] = 0.05
        slope = float(value(h) - value(-h)) / 0.1
    assert abs(slope) > 1e-6
    assert float(grad[at]) == pytest.approx(slope, rel=0.05)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_each_lora_keeps_more_of_itself_than_in_the_sum(family, tmp_path):
    pipe = tiny.sd15() if family == "sd15" else tiny.flux()
    loras = _set(pipe)
    model = getattr(pipe, "unet", None) or pipe.transformer
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    held = [{k: p.down.clone() for k, p in lora.items()} for lora in loras]
    seen = []
    done = train(loras, pipe, tmp_path / "z.safetensors", prompts=PROMPTS, steps=25, lr=0.05, draws=2, size=32,
                 progress=lambda step, of, info: seen.append((step, of, info)))  # fmt: skip
    assert len(done.losses) == len(seen) == 25
    assert seen[-1][2]["error"] < 0.8 * seen[0][2]["error"]
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert all(torch.equal(p.down, held[i][k]) for i, lora in enumerate(loras) for k, p in lora.items())
    both = files.load(done.path, base=pipe)
    loss = own_predictions(pipe, loras, PROMPTS, draws=2, size=32)
    ((whole,), (summed,)) = loss([both], [[1.0]]), loss([loras[0] + loras[1]], [[1.0]])
    assert summed == pytest.approx(seen[0][2]["error"], rel=1e-3)
    assert whole < 0.8 * summed
    assert whole == pytest.approx(seen[-1][2]["error"], rel=0.1)


def test_a_high_price_drives_the_columns_apart(tmp_path):
    pipe, seen = tiny.sd15(), []
    train(_set(pipe), pipe, tmp_path / "z.safetensors", prompts=PROMPTS, steps=15, lr=0.05, draws=1, similarity=100.0,
          progress=lambda step, of, info: seen.append(info["common"]))  # fmt: skip
    assert seen[0] == 1.0
    assert seen[-1] < 0.3


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"loras": 1}, "ziplora: 1 LoRAs, wanted at least two"), ({"lr": float("nan")}, "lr=nan: wanted 0 to 1"),
        ({"steps": 0}, "steps=0"), ({"similarity": -1.0}, "similarity=-1.0"), ({"out": "z.bin"}, "z.bin"),
        ({"prompts": [["a"], []]}, "wanted all"), ({"prompts": [["a"], [" "]]}, "wanted all"),
        ({"prompts": ["a fox", "a robe"]}, "wanted a list of prompts for each LoRA, got the text 'a fox'"),
        ({"steps": 2.5}, "steps=2.5: wanted a whole number"), ({"prompts": None}, "no trigger words on its card"),
        ({"draws": 0}, "draws=0"),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(asked, said, tmp_path):
    pipe = tiny.sd15()
    loras = [lora.replace(card=Card(name=f"one{i}")) for i, lora in enumerate(_set(pipe))]
    out = tmp_path / asked.pop("out", "z.safetensors")
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        train(loras[: asked.pop("loras", 2)], pipe, out, **{"prompts": PROMPTS, "draws": 1, **asked})
    assert not list(tmp_path.iterdir())


def _also(lora, key, part):
    return Lora({**lora, key: part}, lora.card)


@pytest.mark.parametrize("what", ["norm", "bias"])
def test_what_has_no_columns_is_kept_as_it_is(what, tmp_path):
    pipe = tiny.sd15()
    loras, g = _set(pipe), torch.Generator().manual_seed(8)
    if what == "norm":
        key, module = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("norm1"))
        part = Dense(torch.randn(module.weight.shape, generator=g))
    else:
        key, module = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("conv1"))
        conv = [torch.randn(s, generator=g) for s in ((2, *module.weight.shape[1:]), (len(module.weight), 2))]
        part = LowRank(*conv, torch.randn(len(module.weight), generator=g), kind="conv")
    loras[0] = _also(loras[0], f"unet.{key}", part)
    done = train(loras, pipe, tmp_path / "z.safetensors", prompts=PROMPTS, steps=2, draws=1)
    kept = files.load(done.path, base=pipe)[f"unet.{key}"]
    torch.testing.assert_close(*((kept.weight, part.weight) if what == "norm" else (kept.bias, part.bias)))


def test_what_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    pipe, out = tiny.sd15(), tmp_path / "z.safetensors"
    monkeypatch.setattr(ziplora, "own_predictions", lambda *a, **k: pytest.fail("drawn"))
    loras = _set(pipe)
    rows = LowRank(torch.ones(1, 514), torch.ones(32, 1), kind="embedding")
    with pytest.raises(ValueError, match="cannot hold an embedding"):
        train([loras[0], _also(loras[1], "text_encoder.embeddings.token_embedding", rows)], pipe, out, prompts=PROMPTS)
    files.save(loras[0], out)
    first = files.load(out)
    with pytest.raises(ValueError, match="an input of the LoRA, never written over"):
        train([first, loras[1]], pipe, out, prompts=PROMPTS)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"a LoRA is a \.safetensors file"):
        train(loras, pipe, tmp_path / "folder.safetensors", prompts=PROMPTS)


def test_batches_and_inference_mode_change_nothing(tmp_path):
    pipe, found = tiny.sd15(), []
    learning = [p.requires_grad for p in pipe.unet.parameters()]
    for batch in (1, 3, 8):
        with torch.inference_mode(batch == 3):
            done = train(_set(pipe), pipe, tmp_path / f"{batch}.safetensors", prompts=PROMPTS, steps=4, lr=0.05,
                         draws=2, batch=batch)  # fmt: skip
        found.append(done.losses)
    assert found[0][0] > found[0][-1]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)
    assert [p.requires_grad for p in pipe.unet.parameters()] == learning


def test_a_loss_that_is_not_finite_and_a_cancel_write_nothing(tmp_path):
    pipe = tiny.sd15()
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 0 with lr=0\.01: try a tenth"):
        train(_set(pipe, strength=1e30), pipe, tmp_path / "z.safetensors", prompts=PROMPTS, draws=1, steps=2)
    stop = threading.Event()
    with pytest.raises(Cancelled, match="cancelled after 1 of 3 steps"):
        train(_set(pipe), pipe, tmp_path / "z.safetensors", prompts=PROMPTS, draws=1, steps=3, cancel=stop,
              progress=lambda *_: stop.set())  # fmt: skip
    assert not list(tmp_path.iterdir())


def _run(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main(["train", "ziplora", *map(str, words)])
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def test_the_command(capsys, tmp_path):
    out = tmp_path / "both.safetensors"
    code, said, _ = _run(capsys, "zib", "inka", "-o", out, "--steps", 1, "--draws", 1, "--json")
    assert code == 0
    assert json.loads(said)["path"] == str(out)
    card = files.load(out).card
    assert (card.name, len(card.triggers)) == ("zib + inka", 2)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["ziplora"])["steps"] == 1
    for words, wanted in (
        (("-o", out), "exists already; --force replaces it"),
        (("-o", tmp_path / "n.safetensors", "--prompt", "3=a fox"), "wanted the number of a LoRA, 1 to 2"),
        (("-o", tmp_path / "n.safetensors", "--prompt", "1=a fox"), "none for LoRA 2"),
    ):
        code, _, err = _run(capsys, "zib", "inka", *words)
        assert code == 2
        assert wanted in err
    assert [p.name for p in tmp_path.iterdir()] == ["both.safetensors"]
