"""Fisher-weighted merges of LoRAs: against the published formula in numpy, and where they matter."""

import json

import pytest
import torch
from torch import nn

import multilora as ml
from multilora.fishers import Fisher, load_fisher, save_fisher
from multilora.lab.train.fisher import estimate
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.method import methods
from tests.fisher_formula import published, random
from tests.handfisher import relative

SHAPES = {"unet.a.to_q": (7, 5), "unet.b.to_k": (6, 9), "unet.c.conv": (5, 3, 3, 3)}
RANKS = (2, 3, 1)


def lora(m, shapes=SHAPES, dtype=torch.float64):
    parts = {}
    for i, (key, shape) in enumerate(shapes.items()):
        rank, seed = RANKS[m], 100 * m + i
        down = random(rank, *shape[1:], seed=seed, dtype=dtype)
        up = random(shape[0], rank, seed=seed + 50, dtype=dtype)
        parts[key] = LowRank.from_factors(down, up, alpha=1.7 + m)
    return Lora(parts, Card(name=f"lora{m}"))


def squares(m, shapes=SHAPES, scale=1.0):
    """A Fisher with entries over several orders of magnitude and some zeros, one of them in every model."""
    found = {}
    for i, (key, shape) in enumerate(shapes.items()):
        x = random(*shape, seed=1000 + 10 * m + i)
        found[f"{key}.weight"] = scale * (10.0 ** (3 * random(*shape, seed=2000 + 10 * m + i) - 4)) * (x > -1)
        found[f"{key}.weight"].view(-1)[3] = 0.0  # for every model
    return found


LORAS = [lora(m) for m in range(3)]
FISHERS = [squares(m, scale=10.0**m) for m in range(3)]
WEIGHTS = [0.7, 1.3, 0.4]


def deltas(lora):
    return {key: part.delta(torch.float64) for key, part in lora.items()}


def fisher(loras=LORAS, weights=WEIGHTS, fishers=FISHERS, **options):
    return ml.merge(loras, weights, method="fisher", fishers=fishers, dense=True, **options)


# -- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("floor", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("favor_target", [True, False])
def test_the_published_formula(normalize, floor, favor_target):
    merged = fisher(normalize=normalize, floor=floor, favor_target=favor_target)
    expected = published(
        [[d.numpy() for d in deltas(x).values()] for x in LORAS], [[f.numpy() for f in x.values()] for x in FISHERS],
        WEIGHTS, normalize, floor, favor_target,
    )  # fmt: skip
    total = sum(WEIGHTS)
    for key, want in zip(SHAPES, expected, strict=True):
        mean = sum(w * x[key].delta(torch.float64) for w, x in zip(WEIGHTS, LORAS, strict=True)) / total
        want = torch.from_numpy(want)
        assert floor or want.isnan().any()  # all Fishers zero somewhere: the published code divides 0 by 0
        want = torch.where(want.isnan(), mean, want)
        assert relative(merged[key].delta(), want) < 1e-12
        assert relative(merged[key].delta(), mean) > 0.05
    about = merged.card.provenance["merge"]
    assert (about["normalize"], about["floor"], about["favor_target"]) == (normalize, floor, favor_target)
    json.dumps(about)


def test_float32_agrees():
    merged = fisher([lora(m, dtype=torch.float32) for m in range(3)])
    assert merged["unet.a.to_q"].dtype == torch.float32
    for key in SHAPES:
        assert relative(merged[key].delta(), fisher()[key].delta()) < 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_fishers_give_the_weighted_mean(normalize):
    merged = fisher(fishers=[FISHERS[0]] * 3, normalize=normalize, floor=1e-6)
    for key in SHAPES:
        mean = sum(w * x[key].delta() for w, x in zip(WEIGHTS, LORAS, strict=True)) / sum(WEIGHTS)
        assert relative(merged[key].delta(), mean) < 1e-12


@pytest.mark.parametrize("normalize", [True, False])
def test_one_model_with_a_fisher_wins_where_there_is_no_floor(normalize):
    zeros = {n: torch.zeros_like(t) for n, t in FISHERS[0].items()}
    some = {n: t + 1e-3 for n, t in FISHERS[1].items()}
    merged = fisher(fishers=[zeros, some, zeros], normalize=normalize, floor=0.0)
    for key in SHAPES:
        assert relative(merged[key].delta(), LORAS[1][key].delta()) < 1e-12


def test_the_floor_favours_the_target_where_donors_know_nothing():
    """Published semantics: donors with a Fisher of zero leave the target's value; with a floor for all, the mean."""
    zeros = {n: torch.zeros_like(t) for n, t in FISHERS[0].items()}
    alone = fisher(fishers=[zeros] * 3, normalize=False, favor_target=True)
    shared = fisher(fishers=[zeros] * 3, normalize=False, favor_target=False)
    for key in SHAPES:
        mean = sum(w * x[key].delta() for w, x in zip(WEIGHTS, LORAS, strict=True)) / sum(WEIGHTS)
        assert relative(alone[key].delta(), LORAS[0][key].delta()) < 1e-12
        assert relative(shared[key].delta(), mean) < 1e-12
    assert relative(fisher(fishers=[zeros] * 3, floor=0.0)["unet.a.to_q"].delta(),
                    shared["unet.a.to_q"].delta()) < 1e-12  # fmt: skip


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1e-7, 1e5])
def test_a_common_scale_changes_nothing(normalize, scale):
    scaled = [{n: t * scale for n, t in f.items()} for f in FISHERS]
    one, other = fisher(normalize=normalize, floor=0.0), fisher(fishers=scaled, normalize=normalize, floor=0.0)
    own = [FISHERS[0], scaled[1], FISHERS[2]]
    third = fisher(fishers=own, normalize=normalize, floor=0.0)
    for key in SHAPES:
        assert relative(other[key].delta(), one[key].delta()) < 1e-12
        # one model's scale alone matters unless it is divided by its norm
        assert (relative(third[key].delta(), one[key].delta()) < 1e-12) == normalize


def test_weights_are_shares_and_order_does_not_matter():
    one, other = fisher(), fisher(weights=[3 * w for w in WEIGHTS])
    back = fisher(LORAS[::-1], WEIGHTS[::-1], FISHERS[::-1])
    alone = fisher(LORAS[:1], [0.3], FISHERS[:1])
    without = fisher(weights=[0.7, 0.0, 0.4])
    two = fisher([LORAS[0], LORAS[2]], [0.7, 0.4], [FISHERS[0], FISHERS[2]])
    for key in SHAPES:
        assert relative(other[key].delta(), one[key].delta()) < 1e-12
        assert relative(back[key].delta(), one[key].delta()) < 1e-12
        assert relative(alone[key].delta(), LORAS[0][key].delta()) < 1e-12
        assert relative(without[key].delta(), two[key].delta()) < 1e-12


def test_gauge_invariance():
    turned = []
    for m, x in enumerate(LORAS):
        g = random(RANKS[m], RANKS[m], seed=m) + 2 * torch.eye(RANKS[m], dtype=torch.float64)
        turned.append(Lora({
            k: LowRank(torch.einsum("ab,b...->a...", g, p.down), p.up @ torch.linalg.inv(g), kind=p.kind)
            for k, p in x.items()}, x.card))  # fmt: skip
    one, other = fisher(), fisher(turned)
    assert all(relative(other[k].delta(), one[k].delta()) < 1e-9 for k in SHAPES)


def test_block_weights_and_rank():
    merged, all_three = fisher(weights=[{"*.a.*": 0.0}, 1.0, 1.0]), fisher(weights=[1.0, 1.0, 1.0])
    two = fisher(LORAS[1:], [1.0, 1.0], FISHERS[1:])
    assert relative(merged["unet.a.to_q"].delta(), two["unet.a.to_q"].delta()) < 1e-12
    assert relative(merged["unet.b.to_k"].delta(), all_three["unet.b.to_k"].delta()) < 1e-12
    assert relative(merged["unet.b.to_k"].delta(), two["unet.b.to_k"].delta()) > 1e-3
    small = ml.merge(LORAS, WEIGHTS, method="fisher", fishers=FISHERS, rank=2)
    best = fisher()
    for key in SHAPES:
        _u, s, _v = torch.linalg.svd(best[key].delta().flatten(1), full_matrices=False)
        left = float(s[2:].square().sum() / s.square().sum())
        assert small[key].rank == 2
        assert small.card.provenance["merge"]["energy_lost_by_module"][key] == pytest.approx(left, abs=2e-3)


def test_modules_that_a_lora_lacks():
    """Its Fisher gives it a say there (for no change), and without one it has none."""
    part = Lora({"unet.a.to_q": LORAS[1]["unet.a.to_q"]}, LORAS[1].card)
    with_say = fisher([LORAS[0], part], [1.0, 1.0], FISHERS[:2], normalize=False, floor=0.0)
    none = {"unet.a.to_q.weight": FISHERS[1]["unet.a.to_q.weight"]}
    without = fisher([LORAS[0], part], [1.0, 1.0], [FISHERS[0], none], normalize=False, floor=0.0)
    key = "unet.b.to_k"
    f0, f1, d = FISHERS[0][f"{key}.weight"], FISHERS[1][f"{key}.weight"], LORAS[0][key].delta()
    both = f0 + f1
    want = torch.where(both > 0, f0 * d / both.clamp(min=1e-300), d / 2)
    assert relative(with_say[key].delta(), want) < 1e-12
    assert relative(without[key].delta(), d) < 1e-12


def test_biases_have_their_own_fisher():
    loras = [Lora({"x": Dense(random(4, 3, seed=m), random(4, seed=m + 9))}) for m in (0, 1)]
    fishers = [{"x.weight": random(4, 3, seed=m + 20).square(), "x.bias": random(4, seed=m + 30).square()}
               for m in (0, 1)]  # fmt: skip
    merged = fisher(loras, [1, 1], fishers, floor=0.0, normalize=False)
    f = [x["x.bias"] for x in fishers]
    want = (f[0] * loras[0]["x"].bias + f[1] * loras[1]["x"].bias) / (f[0] + f[1])
    assert relative(merged["x"].bias, want) < 1e-12
    with pytest.raises(ValueError, match=r"no 'x\.bias'"):
        fisher(loras, [1, 1], [fishers[0], {"x.weight": fishers[1]["x.weight"]}])


# -- how Fishers are given ------------------------------------------------------------------------------------------


def files(tmp_path, **about):
    return [save_fisher(Fisher(f, {"lora": f"lora{m}", **about}), tmp_path / f"{m}.safetensors")
            for m, f in enumerate(FISHERS)]  # fmt: skip


def test_paths_texts_fishers_and_bare_keys(tmp_path):
    paths = files(tmp_path)
    want = fisher()
    bare = [{n.removesuffix(".weight"): t for n, t in f.items()} for f in FISHERS]
    for given in (paths, ", ".join(map(str, paths)), [load_fisher(p) for p in paths], bare,
                  [FISHERS[0], str(paths[1]), Fisher(FISHERS[2])]):  # fmt: skip
        found = fisher(fishers=given)
        assert all(torch.equal(found[k].delta(), want[k].delta()) for k in SHAPES)
    assert fisher(fishers=paths).card.provenance["merge"]["fishers"][2] == {"name": "2.safetensors", "lora": "lora2"}
    option = {o.name: o for o in methods("merge")["fisher"].options}["fishers"]
    assert (option.type, option.default) == (str, None)


@pytest.mark.parametrize(
    ("fishers", "message"),
    [
        (None, "LoRA 'lora0' has no Fisher: 0 given for 3"),
        (FISHERS[:2], "LoRA 'lora2' has no Fisher: 2 given for 3"),
        ([FISHERS[0], None, FISHERS[2]], "LoRA 'lora1' has no Fisher"),
        ([*FISHERS, FISHERS[0]], "4 Fishers for 3"),
        (FISHERS[0], "one mapping"),
        ([FISHERS[0], 3, FISHERS[2]], "LoRA 'lora1'.*wanted a Fisher file"),
        ("nowhere.safetensors,b,c", "nowhere.safetensors: no such file"),
        ([FISHERS[0], {k: v for k, v in FISHERS[1].items() if "b" not in k}, FISHERS[2]],
         r"LoRA 'lora1' has no 'unet\.b\.to_k\.weight'"),
        ([FISHERS[0], FISHERS[1], {**FISHERS[2], "unet.a.to_q.weight": torch.ones(7, 6)}],
         r"LoRA 'lora2' is \[7, 6\] at 'unet\.a\.to_q\.weight', the layer's weight is \[7, 5\]"),
        ([FISHERS[0], FISHERS[1], {**FISHERS[2], "unet.a.to_q.weight": -torch.ones(7, 5)}], "unet.a.to_q.*negative"),
    ],
)  # fmt: skip
def test_fishers_that_do_not_fit(fishers, message):
    with pytest.raises(ValueError, match=message):
        fisher(fishers=fishers)


def test_a_fisher_of_another_lora_or_family_is_refused():
    known = [x.replace(card=x.card.replace(sha256=f"{m}" * 64, family="sd15")) for m, x in enumerate(LORAS)]
    right = [Fisher(f, {"lora_sha256": f"{m}" * 64, "lora": f"lora{m}"}, f"{m}.st") for m, f in enumerate(FISHERS)]
    fisher(known, fishers=right)
    with pytest.raises(ValueError, match=r"0\.st was estimated for another LoRA \('lora0'\) than LoRA 'lora1'"):
        fisher(known, fishers=[right[0], right[0], right[2]])
    with pytest.raises(ValueError, match=r"another family \(sdxl\)"):
        fisher(known, fishers=[right[0], right[1], Fisher(FISHERS[2], {"family": "sdxl"}, "2.st")])


@pytest.mark.parametrize("weights", [[1.0, -0.5, 1.0], [1.0, float("nan"), 1.0], [1.0, 1.0], [1.0, "x", 1.0]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match=r"fisher.*weight"):
        fisher(weights=weights)


def test_no_loras_and_zero_weights():
    assert len(fisher([], [], [])) == 0
    assert len(fisher(weights=[0.0, 0.0, 0.0])) == 0


# -- where it matters -----------------------------------------------------------------------------------------------


def test_two_models_on_disjoint_inputs_keep_both_skills():
    """Each LoRA is right on the inputs that it saw and noise elsewhere. The mean halves both skills; weighted by the
    Fisher each entry goes to the LoRA that knows about it. Deterministic."""
    base = nn.Linear(8, 3, bias=False).double()
    base.weight.data.copy_(0.1 * random(3, 8))
    target = random(3, 8, seed=1)
    halves = [torch.cat([torch.ones(4), torch.zeros(4)]).double(), torch.cat([torch.zeros(4), torch.ones(4)]).double()]
    data = [random(200, 8, seed=10 + m) * half for m, half in enumerate(halves)]
    loras, fishers = [], []
    for m, half in enumerate(halves):
        delta = (target - base.weight.detach()) * half + 0.5 * random(3, 8, seed=20 + m) * (1 - half)
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        loras.append(Lora({"0": LowRank(v, u * s)}, Card(name=f"half{m}")))
        fishers.append(estimate(nn.Sequential(base), loras[m], data[m], estimator="exact", examples=200, batch=50))
    plain = ml.merge(loras, [0.5, 0.5], method="linear")
    weighted = ml.merge(loras, [0.5, 0.5], method="fisher", fishers=fishers)

    def loss(lora, x):
        there = (x @ target.T).log_softmax(-1)
        here = (x @ (base.weight + lora["0"].delta()).T).log_softmax(-1)
        return float((there.exp() * (there - here)).sum(-1).mean())

    for x in data:
        assert loss(weighted, x) < 0.02 * loss(plain, x)
    assert loss(weighted, data[0] + data[1]) < 0.02 * loss(plain, data[0] + data[1])
