"""The laws of DESIGN section 10, for every method in merge/; a file dropped there is tested.

A law is a distance between weight updates that is 0 where it holds. Each promised law must hold with the method's
default options, and one that holds on both toys although it was not promised is an error too. In float64, so that
"holds" and "does not" lie many orders of magnitude apart. NEEDS has what some methods cannot do without.
"""

import math
import sys
import textwrap

import pytest
import torch

import multilora.merge
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.method import LAWS, methods

HOLDS = 1e-9  # relative, float64
WEIGHTS = (0.9, 0.6, 1.1)
RANKS, ALPHAS = (2, 4, 3), (1.0, 4.0, 7.5)


def lora(seed, rank, alpha, toy="three kinds of layer"):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = {"unet.linear": LowRank.from_factors(draw(rank, 23), draw(19, rank), alpha=alpha, bias=draw(19))}
    if toy != "one linear":
        parts["unet.conv"] = LowRank.from_factors(draw(rank, 5, 3, 2), draw(17, rank), alpha=alpha)
        words = LowRank.from_factors(draw(rank, 31), draw(18, rank), alpha=alpha, kind="embedding")
        parts["text_encoder.words"] = words
        parts["unet.only" if seed == 1 else "unet.norm"] = Dense(draw(6))
    return Lora(parts, Card(name=f"l{seed}"))


def factor_loras(toy):
    """Factors are summed: equal ranks, and no whole matrices."""
    loras = [lora(i, 3, ALPHAS[i], toy) for i in range(3)]
    return [Lora({k: p for k, p in one.items() if p.rank}, one.card) for one in loras]


def positive(loras, seed, form):
    """Per LoRA (known by its name) a tensor for each of its modules, and biases, made by `form`."""
    found = []
    for one in loras:
        generator = torch.Generator().manual_seed(seed + int(one.card.name[1:]))
        found.append(form(one, lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)))  # noqa: B023
    return found


def gram(one, draw):
    def matrix(part):
        size = part.shape[0] if part.kind == "embedding" else math.prod(part.shape[1:])
        x = draw(2 * size, size)
        return x.T @ x

    return {key: matrix(part) for key, part in one.items() if len(part.shape) > 1}


def fisher(one, draw):
    weights = {f"{key}.weight": draw(*part.shape) for key, part in one.items()}
    return {**weights, **{f"{key}.bias": draw(*p.bias.shape) for key, p in one.items() if p.bias is not None}}


# name -> (the toy's LoRAs, options that depend on the LoRAs)
NEEDS = {
    "factor": (factor_loras, lambda loras: {}),
    "fisher": (None, lambda loras: {"fishers": positive(loras, 60, fisher)}),
    "regmean": (None, lambda loras: {"grams": positive(loras, 70, gram)}),
}


class Case:
    def __init__(self, record, toy):
        self.record = record
        own, self.options = NEEDS.get(record.name, (None, lambda loras: {}))
        self.loras = own(toy) if own else [lora(i, RANKS[i], ALPHAS[i], toy) for i in range(3)]

    def __call__(self, loras, weights):
        return self.record(loras, weights, **self.options(loras))


def apart(a, b):
    """Relative Frobenius distance of two Loras, biases included; a missing module is zero."""
    squares = norm = 0.0
    for key in {*a, *b}:
        for take in (lambda p: p.delta(torch.float64), lambda p: p.bias):
            x, y = (None if key not in one else take(one[key]) for one in (a, b))
            x, y = (torch.zeros(()) if t is None else t.double() for t in (x, y))
            squares += float((x - y).square().sum())
            norm += float(y.square().sum())
    return math.sqrt(squares) / math.sqrt(norm) if norm else math.sqrt(squares)


# -- the laws ---------------------------------------------------------------------------------------------------------


def single(case):
    """One LoRA at weight w equals that LoRA at w."""
    return apart(case(case.loras[:1], [0.7]), case.loras[0] * 0.7)


def zero(case):
    """An empty set, and one in which every weight is 0, changes nothing."""
    return max(apart(case([], []), Lora({})), apart(case(case.loras, [0.0] * 3), Lora({})))


def gauge(case):
    """(up inv(G), G down) changes nothing."""
    generator = torch.Generator().manual_seed(5)

    def part(p):
        if not p.rank:
            return p
        g = torch.eye(p.rank).double() + 0.5 * torch.randn(p.rank, p.rank, generator=generator).double() / p.rank**0.5
        return LowRank((g @ p.down.flatten(1)).reshape(p.down.shape), p.up @ torch.linalg.inv(g), p.bias, p.kind)

    other = [Lora({key: part(p) for key, p in one.items()}, one.card) for one in case.loras]
    return apart(case(other, WEIGHTS), case(case.loras, WEIGHTS))


def permutation(case):
    """Reordering LoRAs together with their weights changes nothing."""
    order = (2, 0, 1)
    found = case([case.loras[i] for i in order], [WEIGHTS[i] for i in order])
    return apart(found, case(case.loras, WEIGHTS))


def mean_of_equals(case):
    """k equal LoRAs at 1 / k equal one at 1."""
    return apart(case(case.loras[:1] * 3, [1 / 3] * 3), case(case.loras[:1], [1.0]))


def linear(case):
    """The sum of the updates at their weights, or at weights / k."""
    found = case(case.loras, WEIGHTS)
    total = sum((one * w for one, w in zip(case.loras[1:], WEIGHTS[1:], strict=True)), case.loras[0] * WEIGHTS[0])
    return min(apart(found, total * (1 / k)) for k in (1, 3))


CHECKS = {f.__name__: f for f in (single, zero, gauge, permutation, mean_of_equals, linear)}
TOYS = ("three kinds of layer", "one linear")


def check(record, law):
    """Fail when the record's promise about this law is not the truth."""
    far = max(CHECKS[law](Case(record, toy)) for toy in TOYS)
    promised = law in record.laws
    assert far <= HOLDS or not promised, f"{record.name} promises {law!r}, but is {far:.1e} away from it"
    assert far > HOLDS or promised, f"{record.name} satisfies {law!r} ({far:.1e}) and does not promise it"


def cases():
    return [(name, law) for name in methods("merge") for law in LAWS]


@pytest.mark.parametrize(("name", "law"), cases())
def test_law(name, law):
    check(methods("merge")[name], law)


def test_every_law_has_a_check_and_every_method_promises_zero():
    assert set(CHECKS) == set(LAWS)
    for record in methods("merge").values():
        assert "zero" in record.laws, record.name


# -- what holds for every merge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(methods("merge")))
def test_inputs_are_untouched_and_one_call_is_like_the_next(name):
    for toy in TOYS:
        case = Case(methods("merge")[name], toy)
        before = {(i, k): (p.delta().clone(), p.bias) for i, one in enumerate(case.loras) for k, p in one.items()}
        first = case(case.loras, WEIGHTS)
        random = torch.get_rng_state()
        assert apart(case(case.loras, WEIGHTS), first) == 0.0
        assert torch.equal(torch.get_rng_state(), random)
        for (i, key), (delta, bias) in before.items():
            assert torch.equal(case.loras[i][key].delta(), delta)
            assert case.loras[i][key].bias is bias


@pytest.mark.parametrize("name", sorted(methods("merge")))
def test_block_weights_are_the_weights_of_their_blocks(name):
    """A module under a glob is what a plain call with the glob's weight gives there."""
    case = Case(methods("merge")[name], "three kinds of layer")
    mixed = case(case.loras, [{"linear": 0.3, "text_encoder.*": 0.0}, 0.6, {"*": 0.5, "*conv": 1.1}])
    plain = {
        "unet.linear": case(case.loras, [0.3, 0.6, 0.5]),
        "unet.conv": case(case.loras, [1.0, 0.6, 1.1]),
        "text_encoder.words": case(case.loras, [0.0, 0.6, 0.5]),
    }
    for key, wanted in plain.items():
        assert apart(Lora({key: mixed[key]}), Lora({key: wanted[key]})) < HOLDS, key
    assert apart(mixed, case(case.loras, [0.3, 0.6, 0.5])) > 1e-3


@pytest.mark.parametrize("name", sorted(methods("merge")))
def test_bad_weights_are_refused_by_name(name):
    case = Case(methods("merge")[name], "one linear")
    for weights, words in (
        ([1.0], ["1 weights for 3 LoRAs"]),
        ([1.0, math.nan, 1.0], ["l1", "nan"]),
        ([1.0, 1.0, {"unet.lineal": 0.5}], ["l2", "unet.lineal", "matches none"]),
        ([1.0, {"*": math.inf}, 1.0], ["l1", "finite number"]),
        ([1.0, "0.5", 1.0], ["l1", "'0.5'"]),
    ):
        with pytest.raises(ValueError) as error:
            case(case.loras, weights)
        assert all(word in str(error.value) for word in [name, *words]), str(error.value)


@pytest.mark.parametrize("name", sorted(methods("merge")))
def test_different_layers_under_one_key_are_refused_by_name(name):
    case = Case(methods("merge")[name], "one linear")
    p = case.loras[1]["unet.linear"]
    case.loras[1] = Lora({"unet.linear": LowRank(p.down[:, :-1], p.up)}, case.loras[1].card)
    with pytest.raises(ValueError, match=r"unet\.linear") as error:
        case(case.loras, WEIGHTS)
    assert all(word in str(error.value) for word in (name, "l1"))


# -- a file dropped into the folder -----------------------------------------------------------------------------------

DROPPED = """
    from multilora.lora import Lora
    from multilora.method import method

    @method(title="The strongest LoRA only", paper="none", cost="1", laws={laws})
    def strongest(loras, weights):
        best = max(range(len(loras)), key=lambda i: weights[i], default=None)
        return Lora({{}}) if best is None else loras[best] * weights[best]
"""
TRUE_LAWS = ("single", "zero", "gauge", "permutation")


@pytest.fixture
def drop(tmp_path, monkeypatch):
    def dropped(laws):
        (tmp_path / "strongest.py").write_text(textwrap.dedent(DROPPED.format(laws=laws)))
        monkeypatch.setattr(multilora.merge, "__path__", [*multilora.merge.__path__, str(tmp_path)])
        return methods("merge")["strongest"]

    yield dropped
    sys.modules.pop("multilora.merge.strongest", None)
    vars(multilora.merge).pop("strongest", None)


def test_a_dropped_file_is_tested(drop):
    record = drop(TRUE_LAWS)
    assert [law for name, law in cases() if name == "strongest"] == list(LAWS)
    for law in LAWS:
        check(record, law)


def test_wrong_and_missing_promises_are_caught(drop):
    record = drop(("single", "zero", "gauge", "linear"))
    with pytest.raises(AssertionError, match="promises 'linear', but"):
        check(record, "linear")
    with pytest.raises(AssertionError, match="satisfies 'permutation'"):
        check(record, "permutation")
