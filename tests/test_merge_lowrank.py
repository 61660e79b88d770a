"""svd, analogy, knots and np against numpy on whole float64 matrices; what they and regmean refuse; block weights."""

import json
import math

import numpy
import pytest
import torch

import multilora as ml
from multilora.blocks import weights_of
from multilora.lora import Dense, Lora, LowRank
from tests.matrices import SIZES, WEIGHTS, close, drawn, grams_for, matrix, total

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
