"""regmean against least squares in numpy, and the Gram matrices that it wants, as they are collected from layers."""

import json

import numpy
import pytest
import torch

import multilora as ml
from multilora.lab.train.gram import Grams, grams
from multilora.lora import Lora
from multilora.pipelines.composing import composing
from multilora.stored import Stored
from tests import tiny
from tests.matrices import WEIGHTS, close, drawn, grams_for, matrix, total

# -- regmean ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", [0.9, 1.0, 0.0])
def test_regmean_is_the_least_squares_solution(shrink):
    loras, matrices = drawn()
    given = grams_for(loras, loras[0])
    weights = [0.2, 0.5, 0.3]
    found = ml.merge(loras, weights, method="regmean", grams=given, shrink=shrink)
    for key in found:
        g = [m[key].numpy() for m in given]
        g = [shrink * m + (1 - shrink) * numpy.diag(numpy.diag(m)) for m in g]
        own = [m.get(key, numpy.zeros_like(matrices[0][key])) for m in matrices]
        left = sum(w * d @ m for w, d, m in zip(weights, own, g, strict=True))
        want = left @ numpy.linalg.inv(sum(w * m for w, m in zip(weights, g, strict=True)))
        far = numpy.linalg.norm(matrix(found[key]) - want) / numpy.linalg.norm(want)
        assert far < 3e-7, (key, far)  # the ridge of 1e-8 of the mean diagonal
        apart = numpy.linalg.norm(sum(w * d for w, d in zip(weights, own, strict=True)) - want)
        assert apart > 0.05 * numpy.linalg.norm(want)


def test_regmean_answers_nearest_to_each_lora_on_its_own_inputs():
    """It minimises sum_i |X_i (delta - delta_i)|², so any other update is worse."""
    loras, matrices = drawn()
    random = numpy.random.default_rng(3)
    x = [random.standard_normal((50, 7)) * (1 + 3 * random.random(7)) for _ in loras]
    keep = [Lora({"unet.linear": lora["unet.linear"]}, lora.card) for lora in loras]
    given = [{"unet.linear": torch.tensor(a.T @ a)} for a in x]
    found = matrix(ml.merge(keep, [1 / 3] * 3, method="regmean", grams=given, shrink=1.0)["unet.linear"])

    def error(d):
        pairs = zip(x, matrices, strict=True)
        return sum(numpy.linalg.norm(a @ (d - m["unet.linear"]).T) ** 2 for a, m in pairs)

    others = [sum(m["unet.linear"] for m in matrices) / 3, *(m["unet.linear"] for m in matrices)]
    others += [found + 1e-3 * random.standard_normal(found.shape) for _ in range(5)]
    assert all(error(found) < error(d) for d in others)


def test_regmean_with_equal_grams_is_linear_and_with_a_diagonal_weighs_by_column():
    loras, matrices = drawn()
    given = [grams_for(loras, loras[0])[0]] * 3
    close(ml.merge(loras, WEIGHTS, method="regmean", grams=given), total(matrices, WEIGHTS), 1e-10)
    diagonal = [{k: torch.rand(len(g), generator=torch.Generator().manual_seed(i)).double() for k, g in m.items()}
                for i, m in enumerate(given)]  # fmt: skip
    found = ml.merge(loras[:2], [0.5, 0.5], method="regmean", grams=diagonal[:2])
    for key in found:
        a, b = (m[key].numpy() for m in diagonal[:2])
        want = (matrices[0][key] * a + matrices[1][key] * b) / (a + b)
        numpy.testing.assert_allclose(matrix(found[key]), want, rtol=1e-6, atol=1e-6)


def test_regmean_of_inputs_that_nobody_uses_is_the_plain_mean_there():
    loras, matrices = drawn()
    keep = [Lora({"unet.linear": lora["unet.linear"]}) for lora in loras[:2]]
    g = torch.diag(torch.tensor([1.0, 2.0, 0, 0, 3.0, 4.0, 0]).double())
    found = ml.merge(keep, [0.5, 0.5], method="regmean", grams=[{"unet.linear": g}, {"unet.linear": 3 * g}])
    want = (matrices[0]["unet.linear"] + matrices[1]["unet.linear"]) / 2
    numpy.testing.assert_allclose(matrix(found["unet.linear"])[:, [2, 3, 6]], want[:, [2, 3, 6]], rtol=1e-9)


# -- Gram matrices ----------------------------------------------------------------------------------------------------


def test_collected_grams_are_those_of_the_inputs(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({
        "words": torch.nn.Embedding(9, 4),
        "linear": torch.nn.Linear(4, 3),
        "conv": torch.nn.Conv2d(2, 3, (3, 2), stride=2, padding=1, dilation=(1, 2)),
        "wide": torch.nn.Linear(12, 2),
        "unused": torch.nn.Linear(2, 2),
    }).double()  # fmt: skip
    ids = [torch.tensor([[0, 3, 3], [8, 1, 3]]), torch.tensor([[2, 2, 2]])]
    images = [torch.randn(2, 2, 7, 6).double(), torch.randn(1, 2, 5, 5).double()]
    with grams(model, ["words", "linear", "conv", "wide", "unused"], largest=12) as collected:
        collected.largest = 12
        for i, x in zip(ids, images, strict=True):
            model["linear"](model["words"](i))
            model["conv"](x)
    with grams(model, ["wide"], largest=11) as diagonal:
        x = torch.randn(5, 12).double()
        model["wide"](input=x)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert set(collected) == {"words", "linear", "conv"}
    assert collected["words"].tolist() == pytest.approx([1 / 9, 1 / 9, 3 / 9, 3 / 9, 0, 0, 0, 0, 1 / 9])
    rows = torch.cat([model["words"](i).flatten(0, 1) for i in ids])
    torch.testing.assert_close(collected["linear"], (rows.T @ rows / 9).float())
    torch.testing.assert_close(diagonal["wide"], x.square().mean(0).float())
    # A convolution's matrix gives |conv(x)|² for any kernel.
    kernel = model["conv"].weight.detach().flatten(1)
    outputs = [torch.nn.functional.conv2d(x, model["conv"].weight.detach(), None, 2, 1, (1, 2)) for x in images]
    want = sum(float(o.square().sum()) for o in outputs) / sum(o[:, 0].numel() for o in outputs)
    assert float((kernel @ collected["conv"].double() * kernel).sum()) == pytest.approx(want, rel=1e-6)
    path = collected.save(tmp_path / "fox.grams.safetensors", lora="fox")
    with Stored(path) as stored:
        assert set(stored) == set(collected)
        assert all(torch.equal(stored[k], collected[k]) for k in collected)
        assert json.loads(stored.metadata["multilora_grams"])["rows"]["linear"] == 9


def test_grams_of_a_composed_pipeline_merge_its_loras_from_files(tmp_path):
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, rank=2 + i, seed=i, text_encoder=True, conv=True) for i in range(2)]
    files = []
    for i, lora in enumerate(loras):
        with grams(pipe, lora) as collected, composing(pipe, [lora]):
            prompt = "a fox" if i else "a robe in the rain"
            pipe(prompt, num_inference_steps=1, output_type="latent", height=32, width=32)
        assert set(collected) == set(lora)
        files.append(str(collected.save(tmp_path / f"{i}.safetensors")))
    found = ml.merge(loras, [0.5, 0.5], method="regmean", grams=",".join(files))
    plain = ml.merge(loras, [0.5, 0.5])
    assert set(found) == set(plain)
    assert (found - plain).norm() > 0.01 * plain.norm()
    for key in ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "unet.conv_in"):
        with Stored(files[0]) as first, Stored(files[1]) as second:
            g = [(0.9 * s[key] + 0.1 * s[key].diagonal().diag()).double().numpy() for s in (first, second)]
        want = sum(matrix(one[key]) @ m for one, m in zip(loras, g, strict=True)) @ numpy.linalg.inv(sum(g))
        assert numpy.linalg.norm(matrix(found[key]) - want) < 1e-5 * numpy.linalg.norm(want), key
    one = ml.merge(loras[:1], [0.7], method="regmean", grams=files[0])
    assert (one - loras[0] * 0.7).norm() < 1e-6 * loras[0].norm()


def test_bad_gram_requests():
    pipe = tiny.sd15()
    for keys, message in (
        (["transformer.x"], "no component 'transformer'"),
        (["unet.mid_block.attentions.0.to_qq"], r"no module of UNet2DConditionModel; nearest"),
    ):
        with pytest.raises(ValueError, match=message), grams(pipe, keys):
            pass
    with pytest.raises(ValueError, match="no layer has run yet"):
        Grams({}).save("x.safetensors")
    grouped = torch.nn.ModuleDict({"g": torch.nn.Conv2d(4, 4, 3, groups=2)})
    with pytest.raises(ValueError, match="plain two-dimensional"), grams(grouped, ["g"]):
        grouped["g"](torch.randn(1, 4, 5, 5))
