"""PEFT's add_weighted_adapter against the sum of the updates: where it is right ours is the same, else it is shown.

The factor merges (PEFT's linear, PEM, LoRAHub) against their published formulas.
"""

import numpy
import peft
import pytest
import torch
from torch import nn

import multilora as ml
from multilora.lora import Card, Lora, LowRank

WEIGHTS = [0.7, -0.4, 1.2]
NAMES = ["one", "two", "three"]
TARGETS = ["lin", "conv", "tokens"]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.lin, self.conv = nn.Embedding(11, 8), nn.Linear(8, 9), nn.Conv2d(4, 6, 3)

    def forward(self, ids, x):
        return self.lin(self.tokens(ids)).sum((1, 2)) + self.conv(x).sum((1, 2, 3))


def adapters(configs, targets=TARGETS, dtype=torch.float64):
    """A PEFT model with adapters a, b, ... of random numbers, and the same as Loras by PEFT's own delta."""
    torch.manual_seed(0)
    model = None
    for name, more in zip(NAMES, configs, strict=False):
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **more})
        if model is None:
            model = peft.get_peft_model(Toy().to(dtype), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model = model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model, [lora_of(model, name, targets) for name in NAMES[: len(configs)]]


def lora_of(model, name, targets=TARGETS):
    parts = {}
    for target in targets:
        layer = getattr(model.base_model.model, target)
        scale = layer.scaling[name] * layer.r[name]  # alpha, or with rsLoRA alpha * sqrt(r): the scale times the rank
        if name in layer.lora_embedding_A:
            down, up, kind = layer.lora_embedding_A[name], layer.lora_embedding_B[name], "embedding"
        else:
            down, up, kind = layer.lora_A[name].weight, layer.lora_B[name].weight, None
        parts[target] = LowRank.from_factors(down.detach(), up.detach(), alpha=scale, kind=kind)
    return Lora(parts, Card(name=name))


def peft_delta(model, name, target):
    return getattr(model.base_model.model, target).get_delta_weight(name).detach()


def far(model, name, lora, targets=TARGETS):
    """The largest relative distance of a merged PEFT adapter from a Lora."""
    gaps = [(peft_delta(model, name, t) - lora[t].delta()).norm() / lora[t].delta().norm() for t in targets]
    return float(max(gaps))


def summed(model, weights, targets=TARGETS):
    """The sum of PEFT's own single updates."""
    return {t: sum(w * peft_delta(model, n, t) for n, w in zip(NAMES, weights, strict=True)) for t in targets}


UNEQUAL = [{"r": 2, "lora_alpha": 3}, {"r": 5, "lora_alpha": 5}, {"r": 3, "lora_alpha": 12}]
EQUAL = [{"lora_alpha": 6}, {"lora_alpha": 2}, {"lora_alpha": 4}]


# -- where PEFT is right ----------------------------------------------------------------------------------------------


def test_linear_is_pefts_cat():
    targets = ["lin", "conv"]  # cat does not know embeddings of unequal ranks well enough to depend on
    model, loras = adapters(UNEQUAL, targets)
    model.add_weighted_adapter(NAMES, [0.7, 0.4, 1.2], "cat", combination_type="cat")
    merged = ml.merge(loras, [0.7, 0.4, 1.2])
    assert far(model, "cat", merged, targets) < 1e-12
    for target, want in summed(model, [0.7, 0.4, 1.2], targets).items():
        torch.testing.assert_close(merged[target].delta(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_svd_is_pefts_svd(rank, dtype, tolerance):
    """To the rounding of PEFT's weights, which are a float32 tensor whatever the model is."""
    model, loras = adapters(UNEQUAL, dtype=dtype)
    model.add_weighted_adapter(NAMES, WEIGHTS, "svd", combination_type="svd", svd_rank=rank)
    assert far(model, "svd", ml.merge(loras, WEIGHTS, method="svd", rank=rank)) < tolerance
    assert far(model, "svd", ml.merge(loras, WEIGHTS)) > 0.01


def test_default_rank_of_svd_is_pefts():
    model, loras = adapters(UNEQUAL)
    model.add_weighted_adapter(NAMES, WEIGHTS, "svd", combination_type="svd")
    merged = ml.merge(loras, WEIGHTS, method="svd")
    assert far(model, "svd", merged) < 1e-7
    assert merged["lin"].rank == 5


# -- where PEFT is not the sum ----------------------------------------------------------------------------------------


def test_pefts_linear_has_cross_terms_and_factor_has_the_same():
    """0.21.2 combines the factors: another update than the sum, by about its whole size."""
    model, loras = adapters([{}] * 3)
    model.add_weighted_adapter(NAMES, WEIGHTS, "linear", combination_type="linear")
    assert far(model, "linear", ml.merge(loras, WEIGHTS)) > 0.3
    assert far(model, "linear", ml.merge(loras, WEIGHTS, method="factor", convention="peft")) < 1e-6
    for target, want in summed(model, WEIGHTS).items():
        torch.testing.assert_close(ml.merge(loras, WEIGHTS)[target].delta(), want, rtol=1e-12, atol=1e-12)


def test_factor_needs_the_scales_only_where_they_differ():
    model, loras = adapters(EQUAL)
    model.add_weighted_adapter(NAMES, WEIGHTS, "linear", combination_type="linear")
    plain = ml.merge(loras, WEIGHTS, method="factor", convention="peft")
    told = ml.merge(loras, WEIGHTS, method="factor", convention="peft", scales="1.5,0.5,1")
    assert far(model, "linear", told) < 1e-6  # PEFT's weights are float32 tensors
    assert far(model, "linear", plain) > 0.01


@pytest.mark.parametrize(
    ("more", "least"), [({"use_rslora": True}, 0.3), ({"use_dora": True}, 0.05), ({"lora_bias": True}, 0.05)]
)
def test_one_adapter_recombined_by_peft_at_weight_1_is_another_with_rslora_dora_and_bias(more, least):
    """Documents the installed release: PEFT makes the new adapter from its defaults and says nothing."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 12)).double()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], **more), "one").double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(30, 10).double()
    model.add_weighted_adapter(["one"], [1.0], "again", combination_type="linear")
    with torch.no_grad(), model.disable_adapter():
        without = model(x)
    outputs = []
    for name in ("one", "again"):
        model.set_adapter(name)
        with torch.no_grad():
            outputs.append(model(x) - without)
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) > least


def test_one_rslora_here_at_weight_1_is_itself():
    model, loras = adapters([{"use_rslora": True}])
    for method in ("linear", "svd", "analogy", "np"):
        merged = ml.merge(loras, [1.0], method=method)
        for target in TARGETS:
            want = peft_delta(model, "one", target)
            torch.testing.assert_close(merged[target].delta(), want, rtol=1e-10, atol=1e-10)


def test_pefts_linear_refuses_unequal_ranks_and_so_does_factor_by_name():
    model, loras = adapters(UNEQUAL)
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(NAMES, WEIGHTS, "linear", combination_type="linear")
    message = r"factor: LoRA 'two', tokens: rank 5, but LoRA 'one' has rank 2 there"
    with pytest.raises(ValueError, match=message):
        ml.merge([Lora({"tokens": one["tokens"]}, one.card) for one in loras], WEIGHTS, method="factor")


# -- the published factor formulas ------------------------------------------------------------------------------------


def numbers(count=3, rank=3, scale=None):
    """(A [r, in], B [out, r]) of each LoRA in numpy, and the Loras with scale alpha / rank = scale_i."""
    random = numpy.random.default_rng(7)
    pairs = [(random.standard_normal((rank, 7)), random.standard_normal((5, rank))) for _ in range(count)]
    scale = scale or [1.0] * count
    loras = [
        Lora({"q": LowRank.from_factors(torch.tensor(a), torch.tensor(b), alpha=s * rank)}, Card(name=f"l{i}"))
        for i, ((a, b), s) in enumerate(zip(pairs, scale, strict=True))
    ]
    return pairs, loras


def test_pem_addition_negation_and_analogy():
    """arXiv 2306.14870: all factors are added, a negated module turns one of its factors."""
    pairs, loras = numbers(scale=[2.0] * 3)
    (a1, b1), (a2, b2), (a3, b3) = pairs
    merged = ml.merge(loras, [0.6, 0.4, -0.4], method="factor")["q"].delta().numpy()
    want = 2.0 * (0.6 * b1 + 0.4 * b2 - 0.4 * b3) @ (0.6 * a1 + 0.4 * a2 + 0.4 * a3)
    numpy.testing.assert_allclose(merged, want, rtol=1e-12)
    added = ml.merge(loras[:2], [3.0, 1.0], method="factor", normalise=True)["q"].delta().numpy()
    numpy.testing.assert_allclose(added, 2.0 * (0.75 * b1 + 0.25 * b2) @ (0.75 * a1 + 0.25 * a2), rtol=1e-12)
    apart = ml.merge(loras[:2], [1.0, -1.0], method="factor")["q"].delta().numpy()
    exact = 2.0 * (b1 @ a1 - b2 @ a2)
    assert numpy.linalg.norm(apart - exact) > 0.5 * numpy.linalg.norm(exact)
    none = ml.merge([loras[0], loras[0]], [0.5, -0.5], method="factor")
    assert none.norm() < 1e-12


def test_lorahub_is_quadratic_and_blind_to_the_sign_of_all_weights():
    """arXiv 2307.13269: get_final_weights sums A and B at the same weights, the first adapter's scale is over all."""
    pairs, loras = numbers(scale=[2.0, 0.5, 1.0])
    w = numpy.array(WEIGHTS)
    a, b = (numpy.stack(side) for side in zip(*pairs, strict=True))
    want = 2.0 * numpy.tensordot(w, b, 1) @ numpy.tensordot(w, a, 1)
    options = {"method": "factor", "convention": "lorahub"}
    merged = ml.merge(loras, WEIGHTS, scales=[2.0, 0.5, 1.0], **options)["q"].delta().numpy()
    numpy.testing.assert_allclose(merged, want, rtol=1e-12)
    turned = ml.merge(loras, [-x for x in WEIGHTS], scales="2, 0.5, 1", **options)["q"].delta().numpy()
    numpy.testing.assert_allclose(turned, want, rtol=1e-12)
    half = ml.merge(loras[:1], [0.5], **options)["q"].delta().numpy()
    numpy.testing.assert_allclose(half, 0.25 * loras[0]["q"].delta().numpy(), rtol=1e-12)
    folded = ml.merge(loras, WEIGHTS, **options)["q"].delta().numpy()
    own = numpy.tensordot(w * [2.0, 0.5, 1.0], b, 1)
    numpy.testing.assert_allclose(folded, own @ numpy.tensordot(w, a, 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("scales", "message"),
    [("1,2", "a positive number for each of 3 LoRAs"), ("1,a,2", "numbers with commas"), ("1,0,2", "positive")],
)
def test_bad_scales(scales, message):
    with pytest.raises(ValueError, match=message):
        ml.merge(numbers()[1], WEIGHTS, method="factor", scales=scales)


def test_factor_refuses_whole_matrices_by_name():
    _, loras = numbers()
    loras[1] = Lora({"q": loras[1]["q"].dense()}, loras[1].card)
    with pytest.raises(ValueError, match="factor: LoRA 'l1', q: a dense update has no factors"):
        ml.merge(loras, WEIGHTS, method="factor")


def test_factor_sums_biases_and_takes_block_weights():
    _, loras = numbers(2)
    loras = [
        Lora({"q": LowRank(one["q"].down, one["q"].up, torch.full((5,), i + 1.0).double())})
        for i, one in enumerate(loras)
    ]
    merged = ml.merge(loras, [{"q": 0.5}, 2.0], method="factor", convention="peft")["q"]
    assert merged.bias.tolist() == [4.5] * 5
    plain = ml.merge(loras, [0.5, 2.0], method="factor", convention="peft")["q"]
    assert torch.equal(merged.delta(), plain.delta())
