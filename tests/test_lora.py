"""The algebra of Loras against dense float64 arithmetic and against PEFT's own layers."""

import copy
import pickle

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import multilora as ml
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.merge.linear import linear
from multilora.method import methods

SHAPES = {"linear": (7, 5), "conv": (6, 3, 3, 2), "conv1": (5, 3, 1, 1), "embedding": (11, 4), "square": (3, 3)}
few = settings(max_examples=25, deadline=None)
ranks = st.integers(1, 9)
numbers = st.floats(-3, 3, width=32)
seeds = st.integers(0, 10_000)


def part(kind: str, rank: int, seed: int, dtype=torch.float64, bias: bool = False) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    shape = SHAPES[kind]
    if kind == "embedding":
        down, up = torch.randn(rank, shape[0], generator=g), torch.randn(shape[1], rank, generator=g)
    else:
        down, up = torch.randn(rank, *shape[1:], generator=g), torch.randn(shape[0], rank, generator=g)
    b = torch.randn(up.shape[0], generator=g).to(dtype) if bias else None
    kind = {"conv1": "conv", "square": "linear"}.get(kind, kind)
    return LowRank.from_factors(down.to(dtype), up.to(dtype), bias=b, kind=kind)


def lora(seed: int, rank: int, skip: str = "", dtype=torch.float64) -> Lora:
    kinds = [(i, k) for i, k in enumerate(SHAPES) if k != skip]
    return Lora({f"unet.{k}": part(k, rank, seed + i, dtype, bias=k == "linear") for i, k in kinds})


def deltas(x: Lora) -> dict:
    return {k: p.delta(torch.float64) for k, p in x.items()} | {
        k + ".bias": p.bias.double() for k, p in x.items() if p.bias is not None
    }


def close(a: Lora, want: dict, tolerance: float = 1e-12) -> None:
    got = deltas(a)
    for key, expected in want.items():
        size = max(1.0, float(expected.norm()))
        found = got.get(key, torch.zeros_like(expected))
        assert float((found - expected).norm()) <= tolerance * size, key


@few
@given(ranks, ranks, numbers, numbers, seeds)
def test_a_weighted_sum_is_the_sum_of_the_dense_updates_for_any_ranks_and_module_sets(r1, r2, w1, w2, seed):
    a, b = lora(seed, r1, skip="conv"), lora(seed + 100, r2, skip="embedding")
    da, db = deltas(a), deltas(b)
    want = {k: w1 * da.get(k, 0) + w2 * db.get(k, 0) for k in {*da, *db}}
    close(w1 * a + w2 * b, want)
    assert all(p.rank in (r1, r2, r1 + r2) for p in (w1 * a + w2 * b).values())


@few
@given(ranks, ranks, ranks, numbers, seeds)
def test_sums_are_associative_commutative_and_distributive(r1, r2, r3, w, seed):
    a, b, c = lora(seed, r1), lora(seed + 100, r2), lora(seed + 200, r3)
    close((a + b) + c, deltas(a + (b + c)))
    close(a + b, deltas(b + a))
    close(w * (a + b), deltas(w * a + w * b))
    close(a - b, deltas(a + (-b)))


@few
@given(ranks, seeds)
def test_a_lora_minus_itself_is_zero_and_its_norm_says_so(rank, seed):
    a = lora(seed, rank)
    assert (a - a).norm() <= 1e-13 * a.norm()
    assert a.norm() > 1
    close(-a, {k: -d for k, d in deltas(a).items()}, 0.0)


@few
@given(ranks, seeds)
def test_gauge_the_same_product_in_other_factors_changes_no_sum_and_no_truncation(rank, seed):
    g = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)).double())[0] * 2
    a, b = lora(seed, rank), lora(seed + 1, 3)
    turned = {
        k: LowRank((g @ p.down.flatten(1)).reshape(p.down.shape), p.up @ torch.linalg.inv(g), p.bias, p.kind)
        for k, p in a.items()
    }
    close(Lora(turned) + 0.5 * b, deltas(a + 0.5 * b), 1e-10)
    close(Lora(turned).truncate(rank=1), deltas(a.truncate(rank=1)), 1e-9)


@few
@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 12), st.integers(1, 6), seeds)
def test_truncate_is_the_best_approximation_by_the_dense_svd_in_float64(kind, rank, keep, seed):
    p = part(kind, rank, seed)
    matrix = p.delta(torch.float64)
    matrix = matrix.T if kind == "embedding" else matrix.flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    best = (u[:, :keep] * s[:keep]) @ vh[:keep]
    for form in (p, p.dense()):
        got = Lora({"x": form}).truncate(rank=keep)["x"]
        assert got.rank <= keep if isinstance(got, LowRank) else False
        dense = got.delta(torch.float64)
        dense = dense.T if kind == "embedding" else dense.flatten(1)
        # Compared through the error, which is unique even where two singular values are equal.
        error = float((matrix - dense).norm())
        assert abs(error - float((matrix - best).norm())) <= 1e-10 * float(s[0])
        assert got.shape == p.shape


@few
@given(st.integers(2, 9), st.floats(0.05, 1.0), seeds)
def test_truncate_by_energy_keeps_the_smallest_rank_that_holds_it(rank, energy, seed):
    p = part("linear", rank, seed)
    s = torch.linalg.svdvals(p.delta()).square()
    share = (s.cumsum(0) / s.sum()).tolist()
    want = next(i + 1 for i, held in enumerate(share) if held >= energy - 1e-13)
    got = Lora({"x": p}).truncate(energy=energy)["x"]
    assert got.rank == want
    assert Lora({"x": p}).truncate(rank=1, energy=energy)["x"].rank == 1


def test_truncate_takes_noise_off_a_sum_that_has_a_lower_rank_and_keeps_biases():
    a = lora(3, 2)
    doubled = (0.5 * a + 0.5 * a).truncate(energy=1.0)
    assert {p.rank for p in doubled.values()} == {2}
    close(doubled, deltas(a))
    zero = (a - a).truncate(energy=0.9)
    assert zero.norm() < 1e-12
    norm_layer = Lora({"unet.n": Dense(torch.randn(5)), "unet.b": Dense(bias=torch.randn(3))})
    assert norm_layer.truncate(rank=1)["unet.n"] is norm_layer["unet.n"]


def test_low_rank_and_dense_promote_to_dense_exactly():
    a = lora(1, 3)
    b = Lora({k: p.dense() for k, p in lora(50, 2).items()})
    want = {k: deltas(a)[k] - 2 * deltas(b)[k] for k in deltas(a)}
    close(a - 2 * b, want)
    close(-(2 * b - a), want)
    assert isinstance((a + b)["unet.conv"], Dense)
    only_bias = Lora({"unet.linear": Dense(bias=torch.ones(7))})
    summed = a + only_bias
    assert torch.equal(summed["unet.linear"].bias, a["unet.linear"].bias + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_dtypes_stay_until_algebra_which_computes_in_float32(dtype):
    a, b = lora(1, 3, dtype=dtype), lora(2, 2, dtype=dtype)
    assert all(p.down.dtype == p.up.dtype == dtype for p in a.values())
    both = 0.7 * a + b
    assert all(p.up.dtype == torch.float32 for p in both.values())
    want = {k: 0.7 * deltas(a)[k] + deltas(b)[k] for k in deltas(a)}
    close(both, want, 1e-6)
    close(both.truncate(rank=50), want, 1e-6)
    wide = both.truncate(energy=1.0)
    assert all(p.up.dtype == torch.float32 for p in wide.values())
    assert a.to(torch.float64)["unet.conv"].delta().dtype == torch.float64


@pytest.mark.parametrize(("alpha", "exact"), [(2.0, True), (4.0, True), (3.0, False)])
def test_folding_alpha_keeps_the_dtype_where_it_is_exact(alpha, exact):
    down, up = torch.randn(4, 5).bfloat16(), torch.randn(7, 4).bfloat16()
    p = LowRank.from_factors(down, up, alpha=alpha)
    assert p.dtype == (torch.bfloat16 if exact else torch.float32)
    want = alpha / 4 * (up.double() @ down.double())
    assert float((p.delta(torch.float64) - want).norm() / want.norm()) < 1e-6


# -- against PEFT --------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(7, 11)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.point = nn.Conv2d(5, 6, 1)
        self.tokens = nn.Embedding(13, 7)

    def forward(self, ids, x):
        return self.lin(self.tokens(ids)), self.point(self.conv(x))


def randomised(model: nn.Module, adapter: str = "default") -> nn.Module:
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return model


def from_peft(layer) -> LowRank:
    n = "default"
    alpha = layer.lora_alpha[n]
    rslora = layer.scaling[n] != alpha / layer.r[n]
    if n in layer.lora_embedding_A:
        down, up, kind = layer.lora_embedding_A[n], layer.lora_embedding_B[n], "embedding"
        bias = None
    else:
        down, up, kind = layer.lora_A[n].weight, layer.lora_B[n].weight, None
        bias = layer.lora_B[n].bias
    bias = None if bias is None else bias.detach()
    return LowRank.from_factors(down.detach(), up.detach(), alpha=alpha, rslora=rslora, up_bias=bias, kind=kind)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_deltas_equal_the_weights_that_peft_merges(rslora, lora_bias):
    torch.manual_seed(0)
    base = Toy().double()
    targets = ["lin", "conv", "point"] + ([] if lora_bias else ["tokens"])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, rank_pattern={"conv": 3}, alpha_pattern={"point": 5},
        use_rslora=rslora, lora_bias=lora_bias,
    )  # fmt: skip
    model = randomised(peft.get_peft_model(copy.deepcopy(base), config).double())
    parts = {t: from_peft(getattr(model.base_model.model, t)) for t in targets}
    merged = model.merge_and_unload()
    for name, p in parts.items():
        before, after = getattr(base, name), getattr(merged, name)
        torch.testing.assert_close(p.delta(), after.weight - before.weight, rtol=1e-10, atol=1e-12)
        assert p.shape == tuple(before.weight.shape)
        if lora_bias:
            torch.testing.assert_close(p.bias, after.bias - before.bias, rtol=1e-10, atol=1e-12)


def test_a_grouped_convolutions_update_acts_in_every_group():
    conv = nn.Conv2d(6, 4, 3, groups=2, bias=False).double()
    p = LowRank.from_factors(torch.randn(2, 3, 3, 3).double(), torch.randn(4, 2).double())
    assert p.shape == tuple(conv.weight.shape)
    x = torch.randn(1, 6, 5, 5).double()
    low = nn.functional.conv2d(x, p.down.repeat(2, 1, 1, 1), groups=2)
    halves = [slice(0, 2), slice(2, 4)]
    want = torch.cat([torch.einsum("or,nrhw->nohw", p.up[g], low[:, g]) for g in halves], 1)
    torch.testing.assert_close(nn.functional.conv2d(x, p.delta(), groups=2), want)


# -- the object --------------------------------------------------------------------


def test_a_lora_cannot_be_changed_and_survives_copies():
    a = lora(0, 2)
    with pytest.raises(TypeError):
        a["unet.linear"] = a["unet.conv"]
    with pytest.raises(AttributeError, match="immutable"):
        a.card = Card("x")
    with pytest.raises(AttributeError):
        a["unet.linear"].up = torch.zeros(1)
    source = {"unet.x": part("linear", 2, 0)}
    made = Lora(source)
    source.clear()
    assert len(made) == 1
    for copied in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        close(copied, deltas(a), 0.0)
    assert len({a, a}) == 1
    assert a * 1.0 is a


def test_components_and_parts():
    a = Lora({"unet.a.b": part("linear", 1, 0), "text_encoder.c": part("linear", 1, 0)})
    assert a.components == ("text_encoder", "unet")
    assert list(a.part("unet")) == ["a.b"]
    assert list(a.part(None)) == list(a)
    assert Lora({"layers.0.q": part("linear", 1, 0)}).components == ("",)


def test_cards_keep_the_terms_of_a_sum():
    a = lora(0, 1).replace(card=Card("fox", "character", ("fx",), "sd15", "aa"))
    b = lora(1, 1).replace(card=Card("robe", "clothing", ("rb",), "sd15", "bb"))
    card = (0.5 * a - b).card
    assert card.provenance["terms"] == [
        {"name": "fox", "sha256": "aa", "weight": 0.5},
        {"name": "robe", "sha256": "bb", "weight": -1.0},
    ]
    assert (card.name, card.family, card.sha256, card.triggers) == ("fox + robe", "sd15", "", ("fx", "rb"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LowRank(torch.zeros(2, 3), torch.zeros(4, 5)), "ranks differ.*2.*5"),
        (lambda: LowRank(torch.zeros(0, 3), torch.zeros(4, 0)), "rank at least 1"),
        (lambda: LowRank(torch.zeros(2, 3, 1, 1), torch.zeros(4, 2)), "linear update wants"),
        (lambda: LowRank(torch.zeros(2, 3), torch.zeros(4, 2), torch.zeros(3)), "bias"),
        (lambda: LowRank(torch.zeros(2, 3), torch.zeros(4, 2), None, "dense"), "kind.*'dense'"),
        (lambda: LowRank.from_factors(torch.zeros(2, 3), torch.zeros(4, 2), alpha=float("nan")), "alpha.*nan"),
        (lambda: LowRank.from_factors(torch.zeros(2, 3), torch.zeros(4, 2, 3, 3)), "1 x 1"),
        (lambda: Dense(), "neither"),
        (lambda: Lora({"x": torch.zeros(2)}), "'x': Tensor"),
        (lambda: lora(0, 1) * float("inf"), "finite.*inf"),
        (lambda: lora(0, 1) * True, "finite number, got True"),
        (lambda: lora(0, 1).truncate(), "rank=, energy="),
        (lambda: lora(0, 1).truncate(rank=0), "rank=0"),
        (lambda: lora(0, 1).truncate(energy=1.5), "energy=1.5"),
        (lambda: Lora({"q": part("linear", 1, 0)}) + Lora({"q": part("square", 1, 0)}), r"q: .*\[7, 5\].*\[3, 3\]"),
    ],
)
def test_bad_input_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# -- the linear merge --------------------------------------------------------------------


def test_linear_merge_is_the_exact_sum_and_is_registered():
    a, b, c = lora(0, 2), lora(10, 3), lora(20, 4)
    want = {k: 0.8 * deltas(a)[k] - 0.5 * deltas(b)[k] for k in deltas(a)}
    close(linear([a, b, c], [0.8, -0.5, 0.0]), want)
    close(ml.merge([a, b, c], [0.8, -0.5, 0.0]), want)
    assert len(linear([a], [0.0])) == 0
    assert "linear" in methods("merge")
    with pytest.raises(ValueError, match="2 weights for 1"):
        linear([a], [1.0, 2.0])
    with pytest.raises(ValueError, match="linear"):
        ml.merge([a], method="linaer")
