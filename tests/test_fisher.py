"""Fisher estimates of small models: plain autograd, analytic values, full Jacobians; resume, files, settings."""

import functools
import math
import threading

import pytest
import torch
from torch import nn

import multilora as ml
from multilora.fishers import Fisher, load_fisher, save_fisher
from multilora.lab.train.fisher import estimate
from multilora.lab.train.squares import Squares, Tap
from multilora.lora import Dense, Lora, LowRank
from multilora.pipelines.denoise import Cancelled
from tests import tiny
from tests.handfisher import autograd_squares, random, relative

# -- squares per example --------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear with tokens": (lambda: nn.Linear(7, 5), (6, 7)),
    "linear with two more dimensions": (lambda: nn.Linear(7, 5, bias=False), (2, 3, 7)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 9, 7)),
    "conv, strided, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=2), (4, 11, 9)),
    "conv, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (4, 9, 8)),
    "conv, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 5)),
    "conv, reflected": (lambda: nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="reflect"), (4, 7, 6)),
    "conv, same": (lambda: nn.Conv2d(4, 3, (4, 3), padding="same"), (4, 7, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_hooks_give_what_a_loop_over_examples_gives(name, batch):
    make, shape = LAYERS[name]
    layer = make().double().requires_grad_(False)
    x = random(batch, *shape, dtype=torch.float64)
    scale = random(*layer(x[:1]).shape[1:], seed=1, dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0, 1.5])[:batch]

    def objective(x):  # not linear in the output, so the gradient depends on the example in every factor
        return (layer(x).sin() * scale).flatten(1).sum(1)

    bias = "layer.bias" if layer.bias is not None else None
    squares = Squares([Tap("layer", layer, "layer.weight", bias)], {}, torch.float64)
    with squares.watching():
        squares.add(objective(x), weights)
    for own, p in (("layer.weight", layer.weight), (bias, layer.bias)):
        if own is not None:
            loop = [autograd_squares(layer, lambda b=b: objective(x[b : b + 1]).sum(), [p])[0] for b in range(batch)]
            expected = sum(w * g for w, g in zip(weights.double(), loop, strict=True))
            assert relative(squares.sums[own], expected) < 1e-12
            summed = autograd_squares(layer, lambda: objective(x).sum(), [p])[0]
            assert batch == 1 or relative(squares.sums[own], summed) > 0.1  # what a batch-summed gradient would give
    assert not layer.weight.requires_grad
    assert layer.weight.grad is None
    assert not layer._forward_hooks


def test_a_layer_called_twice_has_one_gradient():
    """Calls of one layer add up before they are squared; one that the answer does not use counts as zero."""
    layer, x = nn.Linear(5, 5).double().requires_grad_(False), random(2, 5, dtype=torch.float64)

    def objective(x):
        layer(x + 7)
        return layer(layer(x).tanh()).sum(1)

    squares = Squares([Tap("layer", layer, "w")], {}, torch.float64)
    with squares.watching():
        squares.add(objective(x))
    loop = [autograd_squares(layer, lambda b=b: objective(x[b : b + 1]).sum(), [layer.weight])[0] for b in (0, 1)]
    assert relative(squares.sums["w"], sum(loop)) < 1e-12


def test_loose_parameters_tied_and_of_any_kind():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.out = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x):
            return self.out(self.norm(self.table(x)))

    model = Tied().double().requires_grad_(False)
    data = [{"x": torch.tensor([[1, 2, 2]])}, {"x": torch.tensor([[8, 3]])}]
    found = estimate(model, data=data, estimator="exact", examples=2, dtype="float64")
    assert sorted(found) == ["norm.bias", "norm.weight", "table.weight"]
    names = dict(model.named_parameters())
    expected = {n: torch.zeros_like(p) for n, p in names.items()}
    for example in data:
        log = model(**example).log_softmax(-1).detach()
        for t in range(log.shape[1]):
            for c in range(9):
                run = functools.partial(lambda e, t, c: model(**e).log_softmax(-1)[0, t, c], example, t, c)
                for n, square in zip(names, autograd_squares(model, run, list(names.values())), strict=True):
                    expected[n] += log[0, t, c].exp() * square / 2
    for n in names:
        assert relative(found[n], expected[n]) < 1e-12, n


def test_what_cannot_be_seen_is_refused():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.aside, self.quiet = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                x = self.quiet(x)
            return self.used(x) + nn.functional.linear(x, self.aside.weight)

    model = Aside()
    for path in ("aside", "quiet"):
        with pytest.raises(ValueError, match=f"{path}: the model's answer was computed without calling"):
            estimate(model, data=random(3, 4), modules=[path], examples=2)
    found = estimate(model, data=random(3, 4), modules="all", examples=2, estimator="exact")
    assert found["aside.weight"].any()
    assert not found["quiet.weight"].any()
    with pytest.raises(ValueError, match="batch=1"):
        estimate(model, data=random(3, 4), modules="all", examples=2, batch=2)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.places = nn.Linear(4, 3)

        def forward(self, x):
            return x.sum(-1, keepdim=True) + self.places(torch.ones(1, 4))

    with pytest.raises(ValueError, match="does not show the 2 examples"):
        estimate(Shared(), data=random(4, 4), modules=["places"], examples=4, batch=2)


# -- analytic values ------------------------------------------------------------------------------------------------


def logistic(n=4000):
    """(two-class logistic model, inputs, E[p (1 - p) x^2] of those inputs per class and input)."""
    model = nn.Linear(6, 2).requires_grad_(False)
    model.weight.copy_(random(2, 6, seed=3))
    x = random(n, 6, seed=4) * torch.tensor([1.0, 2.0, 0.5, 1.0, 1.5, 0.1]) + 0.3
    p = model(x).double().softmax(-1)
    return model, x, ((p[:, 0] * p[:, 1])[:, None] * x.double().square()).mean(0).expand(2, -1)


def test_logistic_fisher_lies_in_the_interval():
    """E[p (1 - p) x^2]: exact labels give it; the sampled estimate's error is what its own spread predicts."""
    model, x, analytic = logistic()
    wanted = ["*"]
    exact = estimate(nn.Sequential(model), data=x, modules=wanted, estimator="exact", examples=len(x), batch=500)
    assert relative(exact["0.weight"], analytic) < 1e-6
    inside, widths = [], []
    for seed in range(3):
        n = 2000
        found = estimate(
            nn.Sequential(model), data=x, modules=wanted, estimator="sampled", examples=n, batch=200, seed=seed
        )["0.weight"].double()
        # Per example the estimate is ((y - p) x)^2: its variance, from the same model, gives the 95% interval.
        p = model(x).double().softmax(-1)[:, :1]
        fourth = (p * (1 - p) * ((1 - p) ** 3 + p**3)) * x.double() ** 4
        half = 1.96 * ((fourth.mean(0) - analytic[0] ** 2) / n).sqrt()
        inside += ((found - analytic).abs() <= half).flatten().tolist()
        widths.append(float((half / analytic[0]).max()))
    assert sum(inside) >= 0.85 * len(inside), inside
    assert max(widths) < 0.2


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 11)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_one_probe_estimate_is_within_five_percent_of_the_exact_diagonal():
    """2,000 probes at one input against diag(J^T J) by the full Jacobian, for every seed that is tried.

    The expected error is sqrt(2 / 2000), 3.2%, whatever the layer; many outputs keep the error near its expectation.
    """
    model, x = tiny.seeded(nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 50)), 1), random(1, 6, seed=2)
    options = {"data": x, "modules": ["*"], "estimator": "probe"}
    found = [estimate(model, examples=2000, batch=200, seed=s, **options) for s in range(3)]
    few = estimate(model, examples=20, **options)
    for name in ("0.weight", "2.weight"):

        def answer(w, name=name):
            return torch.func.functional_call(model, {name: w}, (x[0],))

        exact = torch.func.jacrev(answer)(model.get_parameter(name)).square().sum(0)
        errors = [relative(f[name], exact) for f in found]
        assert max(errors) < 0.05, errors
        assert relative(sum(f[name] for f in found) / 3, exact) < 0.03  # and unbiased
        assert relative(few[name], exact) > 0.1


def test_batches_change_rounding_only():
    model, x = tiny.seeded(Small(), 1), random(9, 6, seed=2)
    for estimator in ("probe", "sampled", "exact", "topk"):
        one, many = (
            estimate(model, data=x, modules=["*"], estimator=estimator, examples=14, batch=b, topk=3) for b in (1, 4)
        )
        assert all(relative(one[n], many[n]) < 1e-5 for n in one), estimator


# -- gauge, resume, files -------------------------------------------------------------------------------------------


def test_gauge_invariance():
    """(up G^-1, G down) is the same update: the same Fisher to 1e-9 in float64."""
    model, x = tiny.seeded(Small(), 1).double(), random(7, 6, seed=2, dtype=torch.float64)
    down, up, g = (random(*s, seed=i, dtype=torch.float64) for i, s in enumerate([(3, 6), (5, 3), (3, 3)]))
    one = Lora({"first": LowRank(down, up)})
    other = Lora({"first": LowRank(g @ down, up @ torch.linalg.inv(g))})
    a, b = (estimate(model, lora, x, estimator="exact", examples=7, dtype="float64") for lora in (one, other))
    assert a["first.weight"].dtype == torch.float64
    assert relative(a["first.weight"], b["first.weight"]) < 1e-9


@pytest.mark.parametrize("estimator", ["sampled", "topk", "probe"])
def test_interrupted_and_resumed_equals_uninterrupted(estimator, tmp_path):
    model, x = tiny.seeded(Small(), 1), random(9, 6, seed=2)
    settings = {"modules": ["*"], "estimator": estimator, "batch": 2, "checkpoint_every": 4, "topk": 2}
    whole = estimate(model, data=x, examples=21, out=tmp_path / "whole.safetensors", **settings)
    out, cancel = tmp_path / "parts.safetensors", threading.Event()

    def stop(done, examples, facts):
        if done == 14:
            cancel.set()

    with pytest.raises(Cancelled, match="after example 14 of 21"):
        estimate(model, data=x, examples=21, out=out, progress=stop, cancel=cancel, **settings)
    assert not out.exists()
    assert (tmp_path / "parts.checkpoint.safetensors").is_file()
    with pytest.raises(ValueError, match=r"another estimate \(seed\)"):
        estimate(model, data=x, examples=21, out=out, seed=5, **settings)

    def broken(done, examples, facts):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        estimate(model, data=x, examples=21, out=out, progress=broken, **settings)
    said, seen = [], []
    resumed = estimate(model, data=x, examples=21, out=out, echo=said.append,
                       progress=lambda done, *_: seen.append(done), **settings)  # fmt: skip
    assert said[0].startswith("resumed after example 14")
    assert seen == [16, 18, 20, 21]
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert not (tmp_path / "parts.checkpoint.safetensors").exists()
    stored = load_fisher(out)
    assert all(torch.equal(stored[n], whole[n]) for n in whole)
    assert stored.about["examples"] == 21
    assert stored.about.get("probability_covered") == whole.about.get("probability_covered")


def test_files_are_checked(tmp_path):
    good = Fisher({"a.weight": torch.rand(3, 2), "b.bias": torch.rand(4, dtype=torch.float64)}, {"examples": 2})
    path = save_fisher(good, tmp_path / "f.safetensors")
    back = load_fisher(path)
    assert back.shape("a.weight") == (3, 2)
    assert back.about["examples"] == 2
    assert back.of("a") == "a.weight"
    assert all(torch.equal(back[n], good[n]) and back[n].dtype == good[n].dtype for n in good)
    for values, message in ((torch.tensor([-1.0]), "negative"), (torch.tensor([math.nan]), "not finite"),
                            (torch.tensor([1]), "floating-point")):  # fmt: skip
        bad = Fisher({"x.weight": values}, name="bad")
        with pytest.raises(ValueError, match=f"bad, 'x.weight'.*{message}"):
            bad["x.weight"]
        with pytest.raises(ValueError, match=r"x\.weight"):
            save_fisher(bad, tmp_path / "bad.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.safetensors"]
    ml.save(Lora({"unet.x": LowRank(torch.rand(2, 3), torch.rand(4, 2))}), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora.safetensors: no Fisher file"):
        load_fisher(tmp_path / "lora.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"text.safetensors: not valid safetensors"):
        load_fisher(tmp_path / "text.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "probes"}, "unknown Fisher estimator for a model 'probes'"),
        ({"estimator": "empirical"}, "Known: exact, probe, sampled, topk"),
        ({"examples": 0}, "examples=0"),
        ({"draws": True}, "draws=True"),
        ({"weight": math.inf}, "weight=inf"),
        ({"dtype": "float16"}, "float16"),
        ({"out": "fisher.pt"}, "is a .safetensors file"),
        ({"modules": ["frist"]}, "Nearest: first"),
        ({"data": None}, "needs examples"),
        ({"lora": Lora({"third": LowRank(torch.ones(1, 6), torch.ones(5, 1))})}, "third"),
        ({"lora": Lora({"first": LowRank(torch.ones(1, 7), torch.ones(5, 1))})}, "first"),
    ],
)
def test_bad_settings(settings, message):
    model = tiny.seeded(Small(), 1).train()
    with pytest.raises(ValueError, match=message):
        estimate(model, **{"data": random(3, 6), **settings})
    assert model.training
    assert model.first.training
    assert not model.first._forward_hooks


@pytest.mark.parametrize("form", [torch.float32, torch.bfloat16])
def test_all_parameters_with_a_lora_in_place(form):
    """The loose way and the hooks agree, whether the LoRA is in the weights (float32) or runs beside them."""
    model, x = tiny.seeded(Small(), 1).to(form), random(4, 6, seed=2).to(form)
    lora = Lora({"first": LowRank(random(2, 6, seed=3), random(5, 2, seed=4))})
    taps = estimate(model, lora, x, examples=4, estimator="exact")
    loose = estimate(model, lora, x, examples=4, estimator="exact", modules="all")
    assert set(loose) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    tolerance = 1e-5 if form == torch.float32 else 2e-2
    assert relative(taps["first.weight"], loose["first.weight"]) < tolerance
    plain = estimate(model, None, x, examples=4, estimator="exact")
    assert relative(plain["first.weight"], loose["first.weight"]) > 10 * tolerance
    assert taps["first.weight"].dtype == torch.float32


def test_biases_and_embeddings_of_a_lora():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.table(x).mean(1))

    model = Words()
    lora = Lora({
        "table": LowRank(random(2, 9), random(4, 2), kind="embedding"),
        "out": Dense(random(3, 4), random(3)),
    })  # fmt: skip
    found = estimate(model, lora, [{"x": torch.tensor([[1, 2]])}], estimator="exact", examples=1)
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        "table.weight": (9, 4), "out.weight": (3, 4), "out.bias": (3,)}  # fmt: skip
    assert found["table.weight"][1].any()
    assert not found["table.weight"][3].any()
