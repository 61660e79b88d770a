"""ties, dare, magnitude_prune and della: laws, the cut to a rank, one module at a time, and what is refused."""

import weakref

import numpy as np
import pytest
import torch

import multilora as ml
from multilora import consensus
from multilora.elementwise import echoing, elementwise, low_rank
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.method import methods
from tests.unequal_loras import WEIGHTS, lora, loras, tensors

__all__ = ["loras"]  # a fixture

NAMES = ("ties", "dare", "magnitude_prune", "della")


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
