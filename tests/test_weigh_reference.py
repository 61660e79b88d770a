"""The training loss on reference pictures as an objective: its cases and its losses, against both done by hand."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import multilora as ml
from multilora.lab.objectives_denoising import reference_loss
from multilora.lab.train.data import BadData
from multilora.method import resolve
from tests import tiny

CAPTIONS = ("a cat", "bc")
DRAWS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures of 32 x 32 in few colours, with captions beside them."""
    made = tmp_path_factory.mktemp("references")
    for i, caption in enumerate(CAPTIONS):
        blocks = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(made / f"{i}.png")
        (made / f"{i}.txt").write_text(caption)
    return made


def _encoded(pipe, folder):
    """[2, c, h, w] the pictures' latents, by the autoencoder alone."""
    x = [np.asarray(Image.open(folder / f"{i}.png"), dtype=np.float32) / 127.5 - 1 for i in range(2)]
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    with torch.no_grad():
        mean = pipe.vae.encode(torch.tensor(np.stack(x)).permute(0, 3, 1, 2)).latent_dist.mean
    return (mean - shift) * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_case_is_a_reference_picture_under_its_noise(family, folder):
    """From noisy latents, target and time alone the picture's latents come back: x = (n - sqrt(1-a) e) / sqrt(a)."""
    pipe = getattr(tiny, family)()
    found = reference_loss(pipe, folder, draws=DRAWS)
    wanted = _encoded(pipe, folder)
    assert [case.caption for case in found.cases] == [c for c in CAPTIONS for _ in range(DRAWS)]
    for i, case in enumerate(found.cases):
        if family == "sd15":
            a = pipe.scheduler.alphas_cumprod[int(case.time)]
            back = (case.noisy - (1 - a).sqrt() * case.target) / a.sqrt()
            spread = case.target.std()  # epsilon: standard normal
        else:
            sigma = case.time / 1000
            back = case.noisy - sigma * case.target
            spread = (case.target + back).std()
        torch.testing.assert_close(back, wanted[i // DRAWS], rtol=1e-3, atol=2e-3)
        assert 0.8 < spread < 1.2
    times = [float(case.time) for case in found.cases[:DRAWS]]
    assert sorted(times) == times, "one level in each stretch, from little noise to much"
    assert len(set(times)) == DRAWS
    again = reference_loss(pipe, folder, draws=DRAWS).cases
    assert all(torch.equal(a.noisy, b.noisy) for a, b in zip(found.cases, again, strict=True))
    other = reference_loss(pipe, folder, draws=DRAWS, seed=1).cases
    assert not any(torch.equal(a.noisy, b.noisy) for a, b in zip(found.cases, other, strict=True))


def test_the_loss_is_that_of_merged_weights(folder):
    """Rows against a U-Net whose weights have the updates added, one case at a time; slopes against differences."""
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, 2, seed=i, strength=2.0) for i in range(2)]
    objective = reference_loss(pipe, folder, draws=DRAWS, batch=4)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    rows = [[0.0, 0.0], [1.0, 0.0], [0.6, -0.8]]
    got = objective(loras, rows)
    for row, loss in zip(rows, got, strict=True):
        unet, total = copy.deepcopy(pipe.unet), 0.0
        with torch.no_grad():
            for w, lora in zip(row, loras, strict=True):
                for path, part in lora.part("unet").items():
                    weight = unet.get_submodule(path).weight
                    weight += w * part.delta().reshape(weight.shape)
            for case in objective.cases:
                states = pipe.encode_prompt(case.caption, "cpu", 1, False)[0]
                said = unet(case.noisy[None], case.time, encoder_hidden_states=states).sample[0]
                total += (said.double() - case.target.double()).square().mean().item()
        assert loss == pytest.approx(total / len(objective.cases), rel=1e-4)
    assert max(got) > 1.001 * min(got)
    tensor = torch.tensor(rows[2], requires_grad=True)
    layers = {key: torch.tensor(rows[2], requires_grad=True) for key in loras[0]}
    whole, each = objective(loras, [tensor]), objective(loras, [layers])
    assert whole[0].item() == pytest.approx(got[2], rel=1e-4)
    assert each[0].item() == pytest.approx(got[2], rel=1e-4)
    (slope,) = torch.autograd.grad(whole[0], [tensor])
    by_layer = torch.autograd.grad(each[0], list(layers.values()))
    torch.testing.assert_close(sum(by_layer), slope, rtol=1e-3, atol=1e-5)
    for i in range(2):
        ends = objective(loras, [[w + by * (j == i) for j, w in enumerate(rows[2])] for by in (0.02, -0.02)])
        assert slope[i].item() == pytest.approx((ends[0] - ends[1]) / 0.04, rel=0.05, abs=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_learning_on_references_lowers_their_loss(folder):
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, 2, seed=i, strength=2.0) for i in range(2)]
    objective = reference_loss(pipe, folder, draws=2)
    found = resolve("weigh", "learned", scope="global", form="free", steps=8, lr=0.1)(loras, objective)
    assert objective(loras, [list(found)])[0] == pytest.approx(found.best.loss, rel=1e-4)
    assert found.best.loss < found.trials[0].loss
    assert objective([ml.merge(loras, list(found))], [[1.0]])[0] == pytest.approx(found.best.loss, rel=1e-4)


def test_bad_references_are_named(folder, tmp_path):
    with pytest.raises(BadData, match="no such folder"):
        reference_loss(tiny.sd15(), tmp_path / "none")
    (tmp_path / "lonely.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(BadData, match=r"lonely\.png"):
        reference_loss(tiny.sd15(), tmp_path)
