"""ties, dare, magnitude_prune and della against loops in numpy, PEFT, and what mergekit's formulas give."""

import weakref

import numpy as np
import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import nn

import multilora as ml
from multilora import consensus
from multilora.elementwise import echoing, elementwise, low_rank
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.method import methods

NAMES = ("ties", "dare", "magnitude_prune", "della")
SHAPES = {"lin": (11, 7), "wide": (5, 17), "conv": (6, 5, 3, 2), "point": (9, 4, 1, 1), "emb": (23, 6)}
WEIGHTS = (0.8, 1.3, 0.6)


def lora(seed, rank, skip=(), dtype=torch.float64, alpha=None):
    """Random factors of one rank and an alpha that is not the rank; also a norm, a lone bias and a dense layer."""
    g = torch.Generator().manual_seed(seed)
    alpha = rank + 1.5 if alpha is None else alpha

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    parts = {}
    for name, shape in SHAPES.items():
        kind = {"emb": "embedding", "lin": "linear", "wide": "linear"}.get(name, "conv")
        out, rest = (shape[1], shape[:1]) if kind == "embedding" else (shape[0], shape[1:])
        bias = r(out) if name in ("lin", "conv") else None
        parts[f"unet.{name}"] = LowRank.from_factors(r(rank, *rest), r(out, rank), alpha=alpha, bias=bias, kind=kind)
    parts |= {"unet.norm": Dense(r(10), r(10)), "unet.only": Dense(bias=r(8)), "unet.full": Dense(r(6, 5))}
    kept = {k: p for k, p in parts.items() if k.split(".")[1] not in skip}
    return Lora(kept, Card(name=f"l{seed}", family="sd15", sha256=f"{seed:064x}"))


@pytest.fixture(scope="module")
def loras():
    """Ranks 3, 5 and 2; each lacks a layer that others have."""
    return [lora(1, 3, ("wide",)), lora(2, 5, ("conv", "norm")), lora(3, 2, ("emb", "full", "wide"))]


def tensors(x):
    """{key: float64 array} of weights, and of biases under "<key>.bias"."""
    found = {k: p.delta(torch.float64).numpy() for k, p in x.items() if p.shape is not None}
    return found | {f"{k}.bias": p.bias.double().numpy() for k, p in x.items() if p.bias is not None}


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


# -- laws -----------------------------------------------------------------------------------------------------------


def relative(a, b):
    x, y = tensors(a), tensors(b)
    assert set(x) == set(y)
    return sum(np.sum((x[k] - y[k]) ** 2) for k in y) ** 0.5 / sum(np.sum(v**2) for v in y.values()) ** 0.5


def turned(x):
    """The same updates in other factors."""
    out = {}
    for i, (k, p) in enumerate(x.items()):
        if isinstance(p, LowRank):
            g = torch.randn(p.rank, p.rank, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            g += 3 * torch.eye(p.rank)
            down = (torch.linalg.inv(g) @ p.down.flatten(1)).reshape(p.down.shape)
            p = LowRank(down, p.up @ g, p.bias, p.kind)
        out[k] = p
    return Lora(out, x.card)


def law_distances(name, loras):
    def run(ls, ws):
        return ml.merge(ls, ws, method=name, dense=True)

    usual = run(loras, WEIGHTS)
    return {
        "single": relative(run(loras[:1], [0.7]), loras[0] * 0.7),
        "zero": float(len(run([], [])) + len(run(loras, [0.0] * 3))),
        "gauge": relative(run([turned(x) for x in loras], WEIGHTS), usual),
        "permutation": relative(run(loras[::-1], WEIGHTS[::-1]), usual),
        "mean_of_equals": relative(run(loras[:1] * 3, [1 / 3] * 3), loras[0]),
        "linear": relative(usual, ml.merge(loras, WEIGHTS, method="linear")),
    }


@pytest.mark.parametrize("name", NAMES)
def test_promised_laws_hold_and_the_others_do_not(loras, name):
    promised = methods("merge")[name].laws
    for law, distance in law_distances(name, loras).items():
        assert (distance < 1e-9) == (law in promised), (law, distance)


@pytest.mark.parametrize("name", NAMES)
def test_at_density_one_the_linear_forms_are_the_exact_sum_and_one_lora_is_itself(loras, name):
    whole = {"density": 1.0, **({"epsilon": 0.0} if name == "della" else {})}
    linear = {"consensus": "linear"} if name in ("dare", "della") else {}
    assert relative(ml.merge(loras[:1], [0.7], method=name, **whole), loras[0] * 0.7) < 1e-9
    if name != "ties":
        got = ml.merge(loras, WEIGHTS, method=name, **whole, **linear)
        assert relative(got, ml.merge(loras, WEIGHTS, method="linear")) < 1e-9
        assert got["unet.lin"].rank == 7  # 3 + 5 + 2, capped by the layer
        assert isinstance(got["unet.full"], Dense)
        assert got.card.provenance["merge"]["energy_lost"] < 1e-12


def test_weights_of_zero_and_block_weights_leave_a_lora_out_there(loras):
    a, b, c = loras
    assert relative(ml.merge(loras, [1.0, 0.0, 0.5], method="ties"), ml.merge([a, c], [1.0, 0.5], method="ties")) == 0
    got = tensors(ml.merge([a, b], [1.0, {"*.lin": 0.0, "*.emb": 0.5}], method="dare", dense=True))
    alone, half = (tensors(ml.merge([a, b], [1.0, w], method="dare", dense=True)) for w in (0.0, 0.5))
    assert np.array_equal(got["unet.lin"], alone["unet.lin"])
    assert np.array_equal(got["unet.emb"], half["unet.emb"])


# -- the cut to a rank ------------------------------------------------------------------------------------------------


def best(matrix, rank):
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


def as_matrix(weight, kind):
    return weight.T if kind == "embedding" else weight.flatten(1)


TRUNCATED = {
    "square": ((321, 321), "linear"), "tall": ((500, 150), "linear"), "wide": ((150, 500), "linear"),
    "conv": ((170, 37, 3, 3), "conv"), "embedding": ((700, 140), "embedding"), "small": ((40, 30), "linear"),
}  # fmt: skip


@pytest.mark.parametrize("rank", [1, 8, 12, 24])
@pytest.mark.parametrize("shape", TRUNCATED)
def test_the_residual_is_within_a_thousandth_of_the_best_and_the_energy_lost_is_the_measured_one(shape, rank):
    """On trimmed updates: a spectrum of 12 leading values and a flat rest; a cut inside either and at their border."""
    size, kind = TRUNCATED[shape]
    rows, columns = as_matrix(torch.empty(size), kind).shape
    g = torch.Generator().manual_seed(0)
    product = torch.randn(rows, 12, generator=g) @ torch.randn(12, columns, generator=g)
    trimmed = consensus.keep_largest_(product, 0.2)
    weight = (trimmed.T.contiguous() if kind == "embedding" else trimmed).reshape(size)
    exact = as_matrix(weight.double(), kind)
    part, lost = low_rank(weight.clone(), rank, kind)
    again, _ = low_rank(weight.clone(), rank, kind)
    assert torch.equal(part.up, again.up)
    assert torch.equal(part.down, again.down)
    assert (part.shape, part.kind, part.rank) == (tuple(size), kind, rank)
    residual = float((exact - as_matrix(part.delta(torch.float64), kind)).norm())
    assert residual <= 1.001 * best(exact, rank)
    assert abs(lost - residual**2) <= 1e-6 * float(exact.norm()) ** 2
    assert abs(lost / residual**2 - 1) < 1e-4


def test_the_card_says_what_was_lost_by_module_and_in_all(loras):
    options = {"density": 0.3, "consensus": "ties", "seed": 3}
    whole = tensors(ml.merge(loras, WEIGHTS, method="dare", dense=True, **options))
    cut = ml.merge(loras, WEIGHTS, method="dare", rank=2, **options)
    said = cut.card.provenance["merge"]
    assert {k: said[k] for k in ("method", "rank", "dense", *options)} == {
        "method": "dare", "rank": 2, "dense": False, **options,
    }  # fmt: skip
    lost = {k: float(np.sum((whole[k] - tensors(cut)[k]) ** 2)) for k in whole if not k.endswith(".bias")}
    energy = {k: float(np.sum(whole[k] ** 2)) for k in lost}
    assert set(said["energy_lost_by_module"]) == set(lost) - {"unet.norm"}  # a norm's weight is never cut
    for key, share in said["energy_lost_by_module"].items():
        assert abs(share - lost[key] / energy[key]) < 1e-6, key
    assert abs(said["energy_lost"] - sum(lost.values()) / sum(energy.values())) < 1e-6
    assert said["energy_lost"] > 0.1
    assert [t["weight"] for t in cut.card.terms()] == list(WEIGHTS)
    assert (cut.card.family, cut.card.sha256) == ("sd15", "")
    assert all(p.rank == 2 for k, p in cut.items() if k not in ("unet.norm", "unet.only"))


def test_ranks_follow_the_loras_that_act_and_never_exceed_the_layer():
    a, b = lora(1, 2, ("wide",)), lora(2, 3)
    got = ml.merge([a, b], [1.0, 0.5], method="ties", density=0.6)
    assert {k: p.rank for k, p in got.items()} == {
        "unet.lin": 5, "unet.wide": 3, "unet.conv": 5, "unet.point": 4, "unet.emb": 5,
        "unet.norm": None, "unet.only": None, "unet.full": None,
    }  # fmt: skip
    assert ml.merge([a, b], [1.0, 0.5], method="ties", rank=99)["unet.full"].rank == 5
    over = Lora({"x": LowRank(torch.randn(9, 4), torch.randn(3, 9))})
    merged = ml.merge([over], [1.0], method="magnitude_prune", density=1.0)
    assert merged["x"].rank == 3
    torch.testing.assert_close(merged["x"].delta(), over["x"].delta(), rtol=1e-5, atol=1e-5)


def test_zero_and_low_rank_results_have_no_spurious_components():
    a = lora(1, 2, ("norm", "only", "full"))
    zero = ml.merge([a, -a], [1.0, 1.0], method="magnitude_prune")
    assert (zero.norm(), {p.rank for p in zero.values()}) == (0, {1})
    assert zero.card.provenance["merge"]["energy_lost"] == 0
    twice = ml.merge([a, a], [0.5, 0.5], method="magnitude_prune", density=1.0)
    assert {p.rank for p in twice.values()} == {2}
    assert relative(twice, a) < 1e-9


# -- streaming --------------------------------------------------------------------------------------------------------


def test_one_modules_updates_at_a_time_in_any_order_with_progress(loras):
    alive, seen = [], []

    def combine(key, deltas, weights):
        assert not [r for r in alive if r() is not None], "updates of another module are still in memory"
        alive[:] = [weakref.ref(d) for d in deltas]
        assert all(d.is_contiguous() and d.dtype == torch.float64 for d in deltas)
        for d in deltas[1:]:
            deltas[0].add_(d)
        return deltas[0].clone()

    before = [{k: v.copy() for k, v in tensors(x).items()} for x in loras]
    elementwise(loras, WEIGHTS, combine, name="sum", echo=lambda *a: seen.append(a))
    assert [(done, total) for _, done, total in seen] == [(i + 1, 8) for i in range(8)]
    assert {k for k, _, _ in seen} == {k for x in loras for k in x}
    for x, old in zip(loras, before, strict=True):  # combine overwrote what it got, dense inputs among it
        assert all(np.array_equal(v, old[k]) for k, v in tensors(x).items())
    told = []
    with echoing(lambda *a: told.append(a)):
        ml.merge(loras, WEIGHTS, method="ties")
    ml.merge(loras, WEIGHTS, method="ties")
    assert told == seen


@pytest.mark.parametrize("name", ["dare", "della"])
def test_random_merges_depend_on_their_seed_alone(loras, name):
    state = torch.get_rng_state()
    first = ml.merge(loras, WEIGHTS, method=name)
    torch.rand(3)
    shuffled = [Lora({k: x[k] for k in sorted(x, reverse=True)}, x.card) for x in loras]
    again = ml.merge(shuffled, WEIGHTS, method=name)
    torch.set_rng_state(state)
    assert relative(again, first) == 0
    assert relative(ml.merge(loras, WEIGHTS, method=name, seed=1), first) > 0.1
    some = [Lora({"unet.conv": x["unet.conv"]}) for x in loras if "unet.conv" in x]
    alone = ml.merge([loras[0], Lora({}), loras[2]], [1.0, 1.0, 1.0], method=name)["unet.conv"].delta()
    assert torch.equal(ml.merge([some[0], Lora({}), some[1]], [1, 1, 1], method=name)["unet.conv"].delta(), alone)


# -- errors -----------------------------------------------------------------------------------------------------------

BAD = [
    ("ties", {"density": 0.0}, ["ties", "density=0.0", "0.001 to 1"]),
    ("ties", {"density": 1.5}, ["ties", "density=1.5"]),
    ("dare", {"density": "half"}, ["dare", "density='half'", "float"]),
    ("dare", {"density": float("nan")}, ["dare", "density=nan", "finite"]),
    ("magnitude_prune", {"density": -0.1}, ["magnitude_prune", "density=-0.1"]),
    ("magnitude_prune", {"rank": 0}, ["magnitude_prune", "rank=0", "at least 1"]),
    ("ties", {"rank": 2.5}, ["ties", "rank=2.5", "int"]),
    ("ties", {"rank": 4, "dense": True}, ["ties", "rank=4", "dense=True"]),
    ("ties", {"convention": "paper"}, ["ties", "convention='paper'", "'peft'", "'mergekit'"]),
    ("della", {"convention": "peft"}, ["della", "convention='peft'", "'paper'"]),
    ("ties", {"majority": "most"}, ["ties", "majority='most'", "'frequency'"]),
    ("dare", {"consensus": "della"}, ["dare", "consensus='della'", "'linear'"]),
    ("dare", {"seed": 1.5}, ["dare", "seed=1.5"]),
    ("della", {"epsilon": 0.5}, ["della", "epsilon=0.5", "density=0.5", "below 0.5"]),
    ("della", {"density": 0.9}, ["della", "epsilon=0.15", "density=0.9", "0.75 to 1.05"]),
    ("della", {"density": 0.1}, ["della", "epsilon=0.15", "density=0.1"]),
    ("ties", {"densty": 0.5}, ["ties", "densty", "Nearest: density"]),
    ("magnitude_prune", {"seed": 1}, ["magnitude_prune", "seed", "density"]),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD)
def test_bad_options_are_refused_by_name_and_value(loras, name, options, words):
    with pytest.raises(ValueError) as error:
        ml.merge(loras, WEIGHTS, method=name, **options)
    assert all(w in str(error.value) for w in words), str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_loras_that_do_not_fit_and_results_that_are_not_finite_are_refused(name):
    a, b = (Lora({"unet.q": LowRank(torch.randn(2, n), torch.randn(4, 2))}, Card(name=f"f{n}")) for n in (5, 6))
    with pytest.raises(ValueError, match=rf"{name}: 'unet.q' is linear \[4, 5\] in LoRA 'f5' and linear \[4, 6\]"):
        ml.merge([a, b], [1, 1], method=name)
    biased = [Lora({"unet.q": Dense(bias=torch.randn(n))}) for n in (4, 5)]
    with pytest.raises(ValueError, match=rf"{name}: 'unet.q' is a layer with bias \[4\] in LoRA number 1 and a layer"):
        ml.merge(biased, [1, 1], method=name)
    bad = Lora({"unet.q": LowRank(torch.full((2, 5), 1e30), torch.full((4, 2), 1e30))})
    with pytest.raises(ValueError, match=rf"{name}: the result for 'unet.q' is not finite"):
        ml.merge([bad], [1.0], method=name)
    with pytest.raises(ValueError, match=rf"{name}: 2 weights for 1 LoRAs"):
        ml.merge([a], [1, 1], method=name)
