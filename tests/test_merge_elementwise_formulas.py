"""ties, dare, magnitude_prune and della against loops in numpy, PEFT, and what mergekit's formulas give."""

import numpy as np
import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import nn

import multilora as ml
from multilora import consensus
from multilora.lora import Dense, Lora, LowRank
from multilora.method import methods
from tests.unequal_loras import WEIGHTS, lora, loras, tensors

__all__ = ["loras"]  # a fixture


# -- the methods, written again from their descriptions ---------------------------------------------------------------


def np_trim(x, density):
    flat = x.flatten()
    out = np.zeros_like(flat)
    order = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
    out[order] = flat[order]
    return out.reshape(x.shape)


def np_uniform(x, seed, key, index):
    return torch.rand(x.shape, generator=consensus.generator_of(seed, key, index)).double().numpy()


def np_l1(x, kept):
    return kept * (np.abs(x).sum() / np.abs(kept).sum()) if kept.any() else kept


def np_drop(x, density, l1, *where):
    kept = np.where(np_uniform(x, *where) < density, x, 0.0)
    return np_l1(x, kept) if l1 else kept / density


def np_della(x, density, epsilon, l1, *where):
    rows = x.reshape(1, -1) if x.ndim == 1 else x.reshape(len(x), -1)
    ranks = np.abs(rows).argsort(axis=1).argsort(axis=1)
    last = max(rows.shape[1] - 1, 1)
    chance = density + (epsilon * (2 * ranks / last - 1) if rows.shape[1] > 1 else 0.0 * ranks)
    kept = np.where(np_uniform(rows, *where) < chance, rows, 0.0)
    return (np_l1(rows, kept) if l1 else kept / chance).reshape(x.shape)


def np_consensus(xs, weights, vote, divide, majority="total"):
    out = np.zeros(xs[0].shape)
    for at in np.ndindex(out.shape):
        values = [float(x[at]) for x in xs]
        votes = [w * v for v, w in zip(values, weights, strict=True)] if vote == "weighted" else values
        tally = sum(votes) if majority == "total" else sum(np.sign(votes))
        agree = [i for i, v in enumerate(votes) if v != 0 and (v > 0) == (tally >= 0)]
        divisor = {"count": len(agree), "weights": sum(weights[i] for i in agree), "none": 1}[divide] or 1
        out[at] = sum(weights[i] * values[i] for i in agree) / divisor
    return out


def np_sum(xs, weights):
    return sum(w * x for x, w in zip(xs, weights, strict=True))


def each(sparse, settle):
    return lambda key, xs, ws: settle([sparse(x, key, i) for i, x in enumerate(xs)], ws)


def agree(vote, divide, majority="total"):
    return lambda xs, ws: np_consensus(xs, ws, vote, divide, majority)


CASES = {
    "ties": ("ties", {}, each(lambda x, k, i: np_trim(x, 0.2), agree("delta", "count"))),
    "ties frequency": (
        "ties", {"density": 0.55, "majority": "frequency"},
        each(lambda x, k, i: np_trim(x, 0.55), agree("delta", "count", "frequency")),
    ),
    "ties mergekit": (
        "ties", {"density": 0.4, "convention": "mergekit"},
        each(lambda x, k, i: np_trim(x, 0.4), agree("weighted", "weights")),
    ),
    "dare": ("dare", {}, each(lambda x, k, i: np_drop(x, 0.5, False, 0, k, i), np_sum)),
    "dare ties": (
        "dare", {"consensus": "ties", "density": 0.7, "seed": 9},
        each(lambda x, k, i: np_drop(x, 0.7, False, 9, k, i), agree("delta", "count")),
    ),
    "dare mergekit": (
        "dare", {"convention": "mergekit", "density": 0.3},
        each(lambda x, k, i: np_drop(x, 0.3, True, 0, k, i), np_sum),
    ),
    "dare ties mergekit": (
        "dare", {"convention": "mergekit", "consensus": "ties", "seed": 2},
        each(lambda x, k, i: np_drop(x, 0.5, True, 2, k, i), agree("weighted", "none")),
    ),
    "magnitude_prune": ("magnitude_prune", {}, each(lambda x, k, i: np_trim(x, 0.5), np_sum)),
    "della": ("della", {}, each(lambda x, k, i: np_della(x, 0.5, 0.15, False, 0, k, i), agree("delta", "count"))),
    "della linear": (
        "della", {"density": 0.6, "epsilon": 0.4, "consensus": "linear", "seed": 4},
        each(lambda x, k, i: np_della(x, 0.6, 0.4, False, 4, k, i), np_sum),
    ),
    "della mergekit": (
        "della", {"density": 0.3, "epsilon": 0.1, "convention": "mergekit"},
        each(lambda x, k, i: np_della(x, 0.3, 0.1, True, 0, k, i), agree("weighted", "none")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, 1)])
@pytest.mark.parametrize("case", CASES)
def test_every_method_entry_by_entry(loras, case, signs):
    name, options, reference = CASES[case]
    weights = [w * s for w, s in zip(WEIGHTS, signs, strict=True)]
    got = tensors(ml.merge(loras, weights, method=name, dense=True, **options))
    inputs = [tensors(x) for x in loras]
    shapes = {k: v.shape for x in inputs for k, v in x.items()}
    assert set(got) == set(shapes)
    for key, shape in shapes.items():
        want = reference(key, [x.get(key, np.zeros(shape)) for x in inputs], weights)
        np.testing.assert_allclose(got[key], want, rtol=1e-9, atol=1e-12, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_inputs_are_computed_in_float32_and_left_as_they_were(dtype):
    narrow = [lora(s, r, dtype=dtype) for s, r in ((1, 3), (2, 5))]
    before = [{k: v.copy() for k, v in tensors(x).items()} for x in narrow]
    # The reference sees what float32 products of the factors are; a trim of float64 products may order two otherwise.
    deltas = [
        {k: p.delta(torch.float32).double().numpy() for k, p in x.items() if p.shape is not None} for x in narrow
    ]
    merged = ml.merge(narrow, [1.0, 0.7], method="ties", dense=True)
    for key in deltas[0]:
        want = np_consensus([np_trim(x[key], 0.2) for x in deltas], [1.0, 0.7], "delta", "count")
        np.testing.assert_allclose(tensors(merged)[key], want, rtol=1e-5, atol=1e-7)
        assert merged[key].dtype == torch.float32
    for x, old in zip(narrow, before, strict=True):
        assert all(np.array_equal(v, old[k]) for k, v in tensors(x).items())


# -- PEFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["ties", "ties frequency", "dare", "dare ties", "magnitude_prune"])
def test_pefts_functions_on_the_same_deltas_and_masks_give_the_same(loras, case, monkeypatch):
    """Positive and negative weights; masks are handed to PEFT where it would draw its own."""
    name, options, _ = CASES[case]
    weights = [0.8, -1.3, 0.6]
    merged = tensors(ml.merge(loras, weights, method=name, dense=True, **options))
    density = methods("merge")[name].check(options)["density"]
    drawn = iter(())
    monkeypatch.setattr(torch, "bernoulli", lambda *a, **k: next(drawn))
    names = {"dare": "dare_linear", "dare ties": "dare_ties"}
    function = getattr(merge_utils, names.get(case, name))
    for key in ("unet.lin", "unet.conv", "unet.point", "unet.emb"):
        have = [i for i, x in enumerate(loras) if key in x]  # PEFT leaves out what lacks the module
        deltas = [loras[i][key].delta() for i in have]
        seed = options.get("seed", 0)
        chances = [np_uniform(d, seed, key, i) for d, i in zip(deltas, have, strict=True)]
        drawn = iter([torch.from_numpy(c < density).double() for c in chances])
        more = {"majority_sign_method": options["majority"]} if "majority" in options else {}
        want = function(deltas, torch.tensor([weights[i] for i in have], dtype=torch.float64), density=density, **more)
        np.testing.assert_allclose(merged[key], want.numpy(), rtol=1e-9, atol=1e-12, err_msg=key)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.wide = nn.Linear(13, 11), nn.Linear(17, 5)
        self.conv, self.point = nn.Conv2d(5, 7, 3), nn.Conv2d(7, 6, 1)


@pytest.mark.parametrize(("ours", "theirs"), [("ties", "ties_svd"), ("magnitude_prune", "magnitude_prune_svd")])
def test_pefts_own_merge_of_loaded_adapters_gives_the_same_update(ours, theirs):
    """End to end, through add_weighted_adapter: unequal ranks and alphas, rsLoRA, convolutions, truncated."""
    targets = ["lin", "wide", "conv", "point"]
    configs = [
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets),
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_rslora=True),
    ]
    model = peft.get_peft_model(Toy(), configs[0], adapter_name="a")
    model.add_adapter("b", configs[1])
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        nn.init.normal_(parameter)
    weights = [0.7, 1.2]
    model.add_weighted_adapter(["a", "b"], weights, "m", combination_type=theirs, svd_rank=4, density=0.35)
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A") and n in targets}
    assert len(layers) == 4
    sets = []
    for adapter, config in zip("ab", configs, strict=True):
        sets.append(Lora({
            n: LowRank.from_factors(
                m.lora_A[adapter].weight.detach(), m.lora_B[adapter].weight.detach(), alpha=config.lora_alpha,
                rslora=config.use_rslora,
            )
            for n, m in layers.items()
        }))  # fmt: skip
    merged = ml.merge(sets, weights, method=ours, density=0.35, rank=4)
    for n, layer in layers.items():
        torch.testing.assert_close(merged[n].delta(), layer.get_delta_weight("m").detach(), rtol=1e-4, atol=1e-5)


# -- negative weights: whose convention ------------------------------------------------------------------------------


def test_the_two_conventions_part_with_negative_weights_by_this_much():
    """One entry at a time: (values, weights) -> what PEFT's rule and mergekit's rule make of them."""
    table = [
        ((3.0, 2.0), (1.0, 1.0), 2.5, 2.5),  # equal weights of 1: one rule
        ((3.0, 2.0), (0.5, 0.5), 1.25, 2.5),  # mergekit's weights are relative
        ((3.0, 2.0), (1.0, -1.0), 0.5, 3.0),  # PEFT: both agree unweighted, mean of 3 and -2; mergekit: 3 outvotes -2
        ((3.0, -2.0), (1.0, -1.0), 3.0, 5.0),  # subtracting what points away: PEFT drops it; divisor 0, undivided
        ((3.0, -2.0), (1.0, -0.9), 3.0, 48.0),  # the divisor is 0.1
        ((1.0, 3.0), (1.0, -0.5), -0.25, 3.0),  # only the negative one agrees: -1.5 / -0.5 turns back
    ]
    for values, weights, peft_rule, mergekit_rule in table:
        pair = [Lora({"unet.x": Dense(torch.tensor([[v]]).double())}) for v in values]
        for convention, want in (("peft", peft_rule), ("mergekit", mergekit_rule)):
            got = ml.merge(pair, weights, method="ties", density=1.0, convention=convention)
            assert float(got["unet.x"].weight) == pytest.approx(want, abs=1e-9), (values, weights, convention)


def test_conventions_on_whole_layers_agree_at_weight_one_and_part_with_a_negative_weight():
    a, b = lora(1, 3), lora(2, 5)

    def apart(weights, *pair):
        x, y = (
            torch.from_numpy(tensors(ml.merge(pair, weights, method="ties", convention=c, dense=True))["unet.lin"])
            for c in ("peft", "mergekit")
        )
        return float((x - y).norm() / x.norm())

    assert apart([1.0, 1.0], a, b) < 1e-12
    assert apart([1.0, 1.0], a, -b) < 1e-12  # a negated LoRA at a positive weight means the same in both
    assert apart([1.0, -0.5], a, b) > 0.5
