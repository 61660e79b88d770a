"""svd, analogy, knots, np, regmean against numpy on whole float64 matrices; block weights; Gram matrices."""

import json
import math

import numpy
import pytest
import torch

import multilora as ml
from multilora.blocks import weights_of
from multilora.lab.train.gram import Grams, grams
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.pipelines.composing import composing
from multilora.stored import Stored
from tests import tiny

WEIGHTS = (0.8, -0.5, 1.3)
# (kind, rank and alpha of each LoRA); odd sizes, one rank above the layer's smaller side, one of 1, alpha absent once
RANKS = ((2, 3.0), (9, 4.0), (1, None))
SIZES = {"linear": (11, 7), "conv": (8, 3, 3, 2), "point": (6, 9, 1, 1), "embedding": (13, 5)}


def raw(kind, rank, seed):
    """Numbers as a file has them: down, up, in float64."""
    random = numpy.random.default_rng([seed, rank, len(kind)])
    out, *rest = reversed(SIZES[kind]) if kind == "embedding" else SIZES[kind]
    return random.standard_normal((rank, *rest)), random.standard_normal((out, rank))


def delta_of(kind, down, up, alpha):
    """The update as a numpy matrix [out, in * kernel] (an embedding's is [dim, entries])."""
    scale = (alpha if alpha is not None else len(down)) / len(down)
    return scale * up @ down.reshape(len(down), -1)


def drawn(dtype=torch.float64):
    """Three LoRAs of unequal ranks and alphas over all kinds, the last without "point"; and numpy's view of them."""
    loras, matrices = [], []
    for i, (rank, alpha) in enumerate(RANKS):
        parts, own = {}, {}
        for kind in SIZES:
            if kind == "point" and i == 2:
                continue
            down, up = (torch.tensor(a).to(dtype).double().numpy() for a in raw(kind, rank, i))
            named = "embedding" if kind == "embedding" else None
            bias = torch.full((len(up),), i + 1.0, dtype=dtype) if kind == "linear" and i else None
            pair = torch.tensor(down).to(dtype), torch.tensor(up).to(dtype)
            parts[f"unet.{kind}"] = LowRank.from_factors(*pair, alpha=alpha, kind=named, bias=bias)
            own[f"unet.{kind}"] = delta_of(kind, down, up, alpha)
        loras.append(Lora(parts, Card(name=f"l{i}")))
        matrices.append(own)
    return loras, matrices


def matrix(part):
    delta = part.delta(torch.float64)
    return (delta.T if part.kind == "embedding" else delta.flatten(1)).numpy()


def close(lora, wanted, tolerance=1e-12):
    assert set(lora) == set(wanted)
    for key, want in wanted.items():
        far = numpy.linalg.norm(matrix(lora[key]) - want) / max(numpy.linalg.norm(want), 1e-300)
        assert far <= tolerance, (key, far)


def total(matrices, weights):
    keys = dict.fromkeys(k for m in matrices for k in m)
    return {k: sum(w * m[k] for m, w in zip(matrices, weights, strict=True) if k in m) for k in keys}


# -- svd --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
@pytest.mark.parametrize("limits", [{"rank": 1}, {"rank": 4}, {"energy": 0.9}, {"energy": 0.97, "rank": 3}, {}])
def test_svd_is_the_nearest_and_says_what_it_lost(limits, dtype, tolerance):
    loras, matrices = drawn(dtype)
    found = ml.merge(loras, WEIGHTS, method="svd", **limits)
    lost, whole = {}, 0.0
    for key, want in total(matrices, WEIGHTS).items():
        u, s, vh = numpy.linalg.svd(want)
        keep = limits.get("rank", len(s))
        if "energy" in limits:
            held = numpy.cumsum(s**2) / numpy.sum(s**2)
            keep = min(keep, int(numpy.argmax(held >= limits["energy"])) + 1)
        if not limits:
            keep = max(lora[key].rank for lora in loras if key in lora)
        keep = min(keep, len(s))
        assert keep <= found[key].rank <= max(keep, 0 if limits else 9)
        near = (u[:, :keep] * s[:keep]) @ vh[:keep]
        assert numpy.linalg.norm(matrix(found[key]) - near) <= tolerance * numpy.linalg.norm(want), key
        lost[key] = numpy.linalg.norm(matrix(found[key]) - want) ** 2, numpy.linalg.norm(want) ** 2
        whole += lost[key][1]
    made = found.card.provenance["merge"]
    for key, (gone, energy) in lost.items():
        assert abs(made["energy_lost_by_module"][key] - gone / energy) < 1e-6
    assert abs(made["energy_lost"] - sum(gone for gone, _ in lost.values()) / whole) < 1e-6
    if limits:
        assert made["energy_lost"] > 1e-3
    json.dumps(dict(found.card.provenance))
    assert [t["weight"] for t in found.card.terms()] == list(WEIGHTS)
    numpy.testing.assert_allclose(found["unet.linear"].bias.double(), numpy.full(11, 1.3 * 3 - 0.5 * 2), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncation_of_deficient_sums(dtype):
    """Equal LoRAs, a LoRA of zeros and a zero sum have fewer directions than ranks."""
    loras, matrices = drawn(dtype)
    a = loras[0]
    nothing = a * 0.0
    found = ml.merge([a, a, nothing + nothing], [0.5, 0.5, 1.0], method="svd", energy=1.0)
    assert {key: p.rank for key, p in found.items()} == {key: min(2, min(matrix(p).shape)) for key, p in a.items()}
    close(found, matrices[0], 1e-12 if dtype == torch.float64 else 2e-7)
    gone = ml.merge([a, a], [1.0, -1.0], method="svd", rank=1)
    assert gone.norm() < 1e-6 * a.norm()
    assert all(torch.isfinite(t).all() for p in gone.values() for t in (p.up, p.down))
    null = nothing.truncate(rank=1)
    assert null.norm() == 0.0
    assert null.card.provenance["truncated"]["energy_lost"] == 0.0


def test_float32_truncation_keeps_to_a_thousandth_of_a_thousandth_over_a_wide_spectrum():
    """Gram matrices square the condition: singular values over 7 decades, against float64."""
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(90, 20, generator=g).double())[0]
    v = torch.linalg.qr(torch.randn(70, 20, generator=g).double())[0]
    s = torch.logspace(0, -7, 20).double()
    skew = torch.diag(torch.logspace(-3, 3, 20).double())
    part = LowRank((torch.linalg.inv(skew) @ v.T).float(), (u * s @ skew).float())
    exact = LowRank(part.down.double(), part.up.double())
    for rank in (1, 7, 19, 20):
        near, gone, energy = part.truncated(rank=rank)
        far = (near.delta(torch.float64) - exact.truncate(rank=rank).delta()).norm()
        assert float(far) < 2e-7 * float(exact.delta().norm())
        left = exact.singular_values()[rank:].square().sum()
        assert gone == pytest.approx(float(left), abs=1e-14)
        assert energy == pytest.approx(float(exact.energy()), rel=1e-6)


def test_resize_reports_what_it_measures():
    for dtype in (torch.float32, torch.float64):
        loras, _ = drawn(dtype)
        whole = loras[1]
        whole = Lora({**whole, "unet.dense": Dense(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)))})
        small = whole.truncate(rank=3)
        lost = small.card.provenance["truncated"]
        measured = {k: (matrix(p) - matrix(small[k])) for k, p in whole.items()}
        for key, gap in measured.items():
            share = (gap**2).sum() / (matrix(whole[key]) ** 2).sum()
            assert abs(lost["energy_lost_by_module"][key] - share) < 1e-6
        share = sum((gap**2).sum() for gap in measured.values()) / sum((matrix(p) ** 2).sum() for p in whole.values())
        assert abs(lost["energy_lost"] - share) < 1e-6
        assert lost["energy_lost"] > 0.01


# -- analogy ----------------------------------------------------------------------------------------------------------


def test_analogy_is_the_signed_sum():
    loras, matrices = drawn()
    a, b, c = (abs(w) for w in WEIGHTS)
    close(ml.merge(loras, [a, b, c], method="analogy"), total(matrices, [a, -b, c]))
    close(ml.merge(loras, [a, b, c], method="analogy", signs="- + +"), total(matrices, [-a, b, c]))
    close(ml.merge(loras[:2], [a, b], method="analogy"), total(matrices[:2], [a, -b]))
    close(ml.merge(loras[:1], [a], method="analogy", signs="-"), total(matrices[:1], [-a]))
    same = ml.merge([loras[1], loras[1]], [0.7, 0.7], method="analogy")
    assert same.norm() < 1e-13 * loras[1].norm()
    blocks = ml.merge(loras[:2], [1.0, {"conv": 0.5}], method="analogy")
    for key, want in total(matrices[:2], [1.0, -1.0]).items():
        want = want if key != "unet.conv" else matrices[0][key] - 0.5 * matrices[1][key]
        numpy.testing.assert_allclose(matrix(blocks[key]), want, atol=1e-12)


# -- knots ------------------------------------------------------------------------------------------------------------


def ties_of(blocks, weights, density):
    """TIES by its definition, entry by entry (arXiv 2306.01708), on numpy matrices."""
    kept = []
    for v in blocks:
        limit = numpy.sort(numpy.abs(v).ravel())[::-1][max(1, int(density * v.size)) - 1]
        kept.append(numpy.where(numpy.abs(v) >= limit, v, 0.0))
    result = numpy.zeros_like(kept[0])
    for index in numpy.ndindex(*result.shape):
        values = [v[index] for v in kept]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        result[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_knots_against_the_svd_of_the_matrices_side_by_side(density):
    loras, matrices = drawn()
    found = ml.merge(loras, WEIGHTS, method="knots", density=density)
    for key in found:
        own = [(m[key], w) for m, w in zip(matrices, WEIGHTS, strict=True) if key in m]
        u, s, vh = numpy.linalg.svd(numpy.concatenate([m for m, _ in own], axis=1), full_matrices=False)
        n = int((s > 1e-10 * s[0]).sum())
        blocks = numpy.split(vh[:n], len(own), axis=1)
        want = (u[:, :n] * s[:n]) @ ties_of(blocks, [w for _, w in own], density)
        assert numpy.linalg.norm(matrix(found[key]) - want) < 1e-10 * numpy.linalg.norm(want), key
        assert found[key].rank <= min(sum(lora[key].rank for lora in loras if key in lora), u.shape[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_knots_with_a_plain_mean_is_the_mean_of_the_updates(dtype, tolerance):
    loras, matrices = drawn(dtype)
    close(ml.merge(loras, [1 / 3] * 3, method="knots", combine="sum"), total(matrices, [1 / 3] * 3), tolerance)


def test_knots_of_equal_loras_has_no_noise_in_its_election():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        loras, matrices = drawn(dtype)
        twice = ml.merge([loras[0]] * 2, [1.0, 1.0], method="knots", density=1.0)
        close(twice, matrices[0], tolerance)
        assert all(p.rank <= 2 for p in twice.values())


def test_knots_takes_whole_matrices():
    loras, _ = drawn()
    whole = Lora({k: p.dense() for k, p in loras[1].items()}, loras[1].card)
    a = ml.merge(loras, WEIGHTS, method="knots", density=0.5)
    b = ml.merge([loras[0], whole, loras[2]], WEIGHTS, method="knots", density=0.5)
    close(b, {k: matrix(p) for k, p in a.items()}, 1e-10)


# -- np ---------------------------------------------------------------------------------------------------------------


def span(m):
    _, s, vh = numpy.linalg.svd(m, full_matrices=False)
    return vh[s > 1e-10 * s[0]].T


@pytest.mark.parametrize("options", [{}, {"mu": 3.0}, {"hard": True}, {"protect": 3}, {"protect": 2, "mu": 0.1}])
def test_np_is_its_formula(options):
    loras, matrices = drawn()
    found = ml.merge(loras, WEIGHTS, method="np", **options)
    p, mu = options.get("protect", 1) - 1, options.get("mu", 0.5)
    share = 1.0 if options.get("hard") else mu / (1 + mu)
    wanted = {}
    for key in found:
        q = span(matrices[p][key]) if key in matrices[p] else None
        wanted[key] = 0.0
        for i, (m, w) in enumerate(zip(matrices, WEIGHTS, strict=True)):
            if key in m:
                keep = m[key] if i == p or q is None else m[key] - share * m[key] @ q @ q.T
                wanted[key] = wanted[key] + w * keep
    close(found, wanted, 1e-11)
    assert all(part.rank == sum(lora[key].rank for lora in loras if key in lora) for key, part in found.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_np_leaves_the_protected_loras_output_on_its_own_row_span_unchanged(dtype):
    loras, matrices = drawn(dtype)
    hard = ml.merge(loras, WEIGHTS, method="np", hard=True)
    plain = ml.merge(loras, WEIGHTS, method="linear")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for key, own in matrices[0].items():
        q = span(own)
        x = q @ numpy.random.default_rng(0).standard_normal((q.shape[1], 20))
        want = WEIGHTS[0] * own @ x
        assert numpy.linalg.norm(matrix(hard[key]) @ x - want) < tolerance * numpy.linalg.norm(want) * 10
        assert numpy.linalg.norm(matrix(plain[key]) @ x - want) > 0.1 * numpy.linalg.norm(want)


def test_np_in_order_keeps_every_lora_on_what_is_new_of_it():
    loras, matrices = drawn()
    found = ml.merge(loras, WEIGHTS, method="np", hard=True, protect=3, against="earlier")
    for key in ("unet.linear", "unet.conv", "unet.embedding"):
        third, first, second = matrices[2][key], matrices[0][key], matrices[1][key]
        q = span(third)
        q2 = span(numpy.concatenate([third, first]))
        want = WEIGHTS[2] * third + WEIGHTS[0] * (first - first @ q @ q.T) + WEIGHTS[1] * (second - second @ q2 @ q2.T)
        numpy.testing.assert_allclose(matrix(found[key]), want, atol=1e-11)


def test_np_projects_by_the_row_space_of_the_update_not_of_its_factors():
    """A factor row that `up` ignores protects nothing."""
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 8, generator=g).double(), torch.randn(6, 3, generator=g).double()
    up[:, 2] = 0
    protected, short = Lora({"q": LowRank(down, up)}), Lora({"q": LowRank(down[:2], up[:, :2])})
    other = Lora({"q": LowRank(torch.randn(2, 8, generator=g).double(), torch.randn(6, 2, generator=g).double())})
    a, b = (ml.merge([p, other], [1, 1], method="np", hard=True) for p in (protected, short))
    torch.testing.assert_close(a["q"].delta(), b["q"].delta(), rtol=1e-12, atol=1e-12)


def test_np_on_whole_matrices():
    loras, _ = drawn()
    whole = Lora({k: p.dense() for k, p in loras[1].items()}, loras[1].card)
    a = ml.merge(loras[:2], WEIGHTS[:2], method="np")
    b = ml.merge([loras[0], whole], WEIGHTS[:2], method="np")
    close(b, {k: matrix(p) for k, p in a.items()}, 1e-12)
    with pytest.raises(ValueError, match=r"np: LoRA 'l1', unet.linear: a whole matrix leaves no null space"):
        ml.merge([whole, loras[0]], [1, 1], method="np")


# -- regmean ----------------------------------------------------------------------------------------------------------


def grams_for(loras, keys, rows=40, seed=0):
    random = numpy.random.default_rng(seed)
    found = []
    for _ in loras:
        own = {}
        for key in keys:
            kind = key.removeprefix("unet.")
            size = SIZES[kind][0] if kind == "embedding" else math.prod(SIZES[kind][1:])
            x = random.standard_normal((rows, size)) * numpy.exp(random.standard_normal(size))
            own[key] = torch.tensor(x.T @ x)
        found.append(own)
    return found


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


# -- what they refuse -------------------------------------------------------------------------------------------------


def refusals():
    loras, _ = drawn()
    given = grams_for(loras, loras[0])
    lacking = [{k: g for k, g in m.items() if k != "unet.conv"} if i == 1 else m for i, m in enumerate(given)]
    small = [{**m, "unet.linear": torch.eye(6)} if i == 2 else m for i, m in enumerate(given)]
    broken = [{**m, "unet.linear": torch.full((7, 7), math.nan)} if i == 0 else m for i, m in enumerate(given)]
    return {
        "rank 0": ("svd", {"rank": 0}, "option rank=0 of svd: allowed is at least 1"),
        "energy 0": ("svd", {"energy": 0}, "svd: energy=0.0, wanted a share above 0"),
        "energy above 1": ("svd", {"energy": 1.5}, "option energy=1.5 of svd"),
        "two signs": ("analogy", {"signs": "+-"}, r"analogy: signs='\+-', wanted one \+ or - for each of 3 LoRAs"),
        "letters": ("analogy", {"signs": "abc"}, "analogy: signs='abc'"),
        "density 0": ("knots", {"density": 0}, "knots: density=0.0 keeps nothing"),
        "combine": ("knots", {"combine": "mean"}, "option combine='mean' of knots: allowed are 'ties', 'sum'"),
        "protect 4": ("np", {"protect": 4}, "np: protect=4, wanted the number of one of 3 LoRAs"),
        "mu below 0": ("np", {"mu": -0.1}, "option mu=-0.1 of np"),
        "no grams": ("regmean", {}, "regmean: 0 sets of Gram matrices for 3 LoRAs"),
        "two grams": ("regmean", {"grams": given[:2]}, "regmean: 2 sets of Gram matrices for 3 LoRAs"),
        "gram missing": ("regmean", {"grams": lacking}, "regmean: .* of LoRA 'l1' for 'unet.conv' is missing"),
        "gram size": ("regmean", {"grams": small}, r"LoRA 'l2' for 'unet.linear' is \[6, 6\], wanted \[7, 7\]"),
        "gram nan": ("regmean", {"grams": broken}, "LoRA 'l0' for 'unet.linear' is none: an entry is not finite"),
        "gram number": ("regmean", {"grams": [1, 2, 3]}, "Gram matrices of LoRA 'l0': wanted a file or a mapping"),
        "gram file": ("regmean", {"grams": "a.safetensors,b,c"}, "a.safetensors: no such file"),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(refusals()))
def test_bad_options_are_refused(case):
    method, options, message = refusals()[case]
    with pytest.raises(ValueError, match=message):
        ml.merge(drawn()[0], [1.0, 1.0, 1.0], method=method, **options)


def test_analogy_of_four_wants_its_signs():
    with pytest.raises(ValueError, match="analogy: signs are wanted for 4 LoRAs"):
        ml.merge([drawn()[0][0]] * 4, [1.0] * 4, method="analogy")


# -- block weights ----------------------------------------------------------------------------------------------------


def test_block_weights_by_exact_key_glob_and_component():
    loras, matrices = drawn()
    weights = [{"*": 0.5, "unet.conv": 2.0, "*.po*": 3.0}, 1.0, {"linear": -1.0, "unet.*g": 0.25}]
    at = weights_of(loras, weights, name="linear")
    assert [at(f"unet.{k}") for k in SIZES] == [[0.5, 1.0, -1.0], [2.0, 1.0, 1.0], [3.0, 1.0, 1.0], [0.5, 1.0, 0.25]]
    found = ml.merge(loras, weights)
    for key in found:
        want = sum(w * m[key] for w, m in zip(at(key), matrices, strict=True) if key in m)
        numpy.testing.assert_allclose(matrix(found[key]), want, atol=1e-12)
    terms = found.card.terms()
    assert [t.get("blocks") for t in terms] == [[weights[0]], None, [weights[2]]]
    again = ml.merge([found], [{"conv": 0.5}]).card.terms()
    assert again[0]["blocks"] == [weights[0], {"conv": 0.5}]
    json.dumps(dict(found.card.provenance))


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
