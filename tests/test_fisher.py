"""Fisher estimates: against analytic values, full Jacobians, and plain autograd loops written here."""

import copy
import functools
import math
import threading

import pytest
import torch
from PIL import Image
from torch import nn

import multilora as ml
from multilora.fishers import Fisher, load_fisher, save_fisher
from multilora.lab.train.fisher import estimate
from multilora.lab.train.loop import Order
from multilora.lab.train.loss import family_of_pipeline
from multilora.lab.train.observed import generator_of
from multilora.lab.train.squares import Squares, Tap
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.pipelines.denoise import Cancelled
from tests import tiny


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def autograd_squares(model, objective, parameters):
    """Per parameter the square of one example's gradient, by plain autograd."""
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    grads = torch.autograd.grad(objective(), parameters, allow_unused=True)
    for p, flag in zip(parameters, flags, strict=True):
        p.requires_grad_(flag)
    return [torch.zeros_like(p) if g is None else g.square() for p, g in zip(parameters, grads, strict=True)]


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


# -- language models ------------------------------------------------------------------------------------------------


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return tiny.seeded(LlamaForCausalLM(config), 5)


def tokens(*lengths, vocabulary=23):
    g = torch.Generator().manual_seed(8)
    return [{"input_ids": torch.randint(1, vocabulary, (1, n), generator=g)} for n in lengths]


def llm_lora(model, paths, rank=3):
    live = dict(model.named_modules())
    return Lora(
        {p: LowRank(0.2 * random(rank, live[p].in_features, seed=1), 0.2 * random(live[p].out_features, rank, seed=2))
         for p in paths},
        Card(name="words"),
    )  # fmt: skip


def merged_copy(model, lora, weight=1.0):
    other = copy.deepcopy(model)
    for key, part in lora.items():
        other.get_submodule(key).weight.data += weight * part.delta()
    return other


def hand(model, data, paths, answers):
    """sum over examples, positions and answers(log [T, V], p) -> [(t, c, weight)] of weight * gradient ** 2 / n."""
    weights = [model.get_submodule(p).weight for p in paths]
    total = [torch.zeros_like(w) for w in weights]
    for example in data:
        log = model(**example).logits.log_softmax(-1)
        for t, c, share in answers(log[0].detach()):
            run = functools.partial(lambda e, t, c: model(**e).logits.log_softmax(-1)[0, t, c], example, t, c)
            for sum_, square in zip(total, autograd_squares(model, run, weights), strict=True):
                sum_ += share * square / len(data)
    return dict(zip((f"{p}.weight" for p in paths), total, strict=True))


LLAMA_PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def test_language_model_top_k_and_exact_are_the_hand_loop_with_the_lora_in_place():
    model, data = llama(), tokens(4, 3)
    lora = llm_lora(model, LLAMA_PATHS)
    before = {n: p.clone() for n, p in model.named_parameters()}
    there = merged_copy(model, lora, 0.7)
    found = estimate(model, lora, data, estimator="topk", topk=3, examples=2, weight=0.7)
    expected = hand(
        there, data, LLAMA_PATHS,
        lambda log: [(t, int(c), float(log[t, c].exp())) for t in range(len(log)) for c in log[t].topk(3).indices],
    )  # fmt: skip
    assert sorted(found) == sorted(expected)
    for n in expected:
        assert relative(found[n], expected[n]) < 1e-4
    alone = estimate(model, lora, data, estimator="topk", topk=3, examples=2, weight=0.0)
    assert relative(alone[LLAMA_PATHS[0] + ".weight"], expected[LLAMA_PATHS[0] + ".weight"]) > 0.01
    assert 0.1 < found.about["probability_covered"] < 1
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())

    exact = estimate(model, lora, data[1:], estimator="exact", examples=1, weight=0.7)
    everything = hand(
        there, data[1:], LLAMA_PATHS,
        lambda log: [(t, c, float(log[t, c].exp())) for t in range(len(log)) for c in range(23)],
    )  # fmt: skip
    for n in everything:
        assert relative(exact[n], everything[n]) < 1e-4


def test_sampled_labels_of_a_language_model_are_unbiased():
    """Labels drawn at all positions at once, one backward pass: its mean is the exact expectation."""
    model, data = llama(), tokens(3)
    path = LLAMA_PATHS[1]
    exact = estimate(model, None, data, modules=[path], estimator="exact", examples=1)[f"{path}.weight"]
    drawn = estimate(model, None, data, modules=[path], estimator="sampled", examples=1, draws=1500)[f"{path}.weight"]
    assert relative(drawn, exact) < 0.12
    once = estimate(model, None, data, modules=[path], estimator="sampled", examples=1)[f"{path}.weight"]
    assert relative(once, exact) > 0.12


def test_positions_are_a_fair_sample():
    model, data = llama(), tokens(6)
    path = LLAMA_PATHS[1]
    exact = estimate(model, None, data, modules=[path], estimator="topk", topk=2, examples=1)[f"{path}.weight"]
    some = estimate(model, None, data, modules=[path], estimator="topk", topk=2, examples=120, positions=2)
    assert relative(some[f"{path}.weight"], exact) < 0.2


def test_texts_of_a_tokenizer_and_padding(tmp_path):
    model = llama()

    def tokenizer(text, truncation, max_length, return_tensors):
        ids = [ord(c) % 22 + 1 for c in text][:max_length]
        pad = 5 - len(ids)
        mask = torch.tensor([[1] * len(ids) + [0] * pad])
        return {"input_ids": torch.tensor([ids + [0] * pad]), "attention_mask": mask}

    (tmp_path / "a.txt").write_text("fox\n\nowls\n")
    file = estimate(model, None, tmp_path / "a.txt", modules=LLAMA_PATHS, estimator="topk", examples=2,
                    tokenizer=tokenizer, topk=2)  # fmt: skip
    plain = [{"input_ids": torch.tensor([[ord(c) % 22 + 1 for c in text]])} for text in ("fox", "owls")]
    bare = estimate(model, None, plain, modules=LLAMA_PATHS, estimator="topk", examples=2, topk=2)
    for n in bare:
        assert relative(file[n], bare[n]) < 1e-4  # the padding has no say
    for bad, message in (
        (["fox"], "no tokenizer"), ([], "needs examples"), (tmp_path / "b.txt", "no such file"), ([3], "example 1"),
        ([{"input_ids": torch.ones(2, 3)}], "batch of 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            estimate(model, None, bad, modules=LLAMA_PATHS, examples=1)


def test_t5_with_given_and_with_its_own_answers():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=17, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = tiny.seeded(T5ForConditionalGeneration(config), 6)
    paths = ["decoder.block.0.layer.1.EncDecAttention.k", "encoder.block.0.layer.0.SelfAttention.q"]
    lora = llm_lora(model, paths)
    inputs = tokens(5, vocabulary=17)[0]
    given = [{**inputs, "labels": torch.tensor([[3, 9, -100]])}]
    found = estimate(model, lora, given, estimator="topk", topk=2, examples=1)
    fed = [{**inputs, "decoder_input_ids": torch.tensor([[0, 3, 9]])}]
    expected = hand(
        merged_copy(model, lora), fed, paths,
        lambda log: [(t, int(c), float(log[t, c].exp())) for t in range(2) for c in log[t].topk(2).indices],
    )  # fmt: skip
    for n in expected:
        assert relative(found[n], expected[n]) < 1e-4
    state = torch.random.get_rng_state()
    own = [estimate(model, lora, [inputs], examples=3, length=4, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    n = f"{paths[0]}.weight"
    assert torch.equal(own[0][n], own[1][n])
    assert not torch.equal(own[0][n], own[2][n])


# -- diffusion ------------------------------------------------------------------------------------------------------


def folder(tmp_path, count=3):
    where = tmp_path / "pictures"
    where.mkdir()
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        pixels = (torch.rand(32, 32, 3, generator=g) * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(where / f"{i}.png")
        (where / f"{i}.txt").write_text(f"a picture of thing {i}")
    return where


def by_hand(pipe, lora, where, estimator, examples, seed=0, weight=1.0):
    """The same estimate with merged weights and plain autograd, one example after the other."""
    from multilora.lab.train.cache import latents_of
    from multilora.lab.train.data import read_folder

    family = family_of_pipeline(pipe)
    denoiser = getattr(pipe, family.denoiser)
    data = read_folder(where)
    latents = latents_of(pipe, family, data, 32)
    pipe.__dict__[family.denoiser] = other = merged_copy(
        denoiser, Lora(lora.part(family.denoiser), Card()), weight
    ).requires_grad_(False)
    loss, order = family.loss(pipe), Order(len(data), seed, "fisher")
    parameters = {k: other.get_submodule(k.partition(".")[2]).weight for k in lora}
    total = {f"{k}.weight": torch.zeros_like(p) for k, p in parameters.items()}
    for g in range(examples):
        generator, i = generator_of(seed, g), order[g]
        shape = latents.mean.shape[1:]
        u, noise = torch.rand(2, generator=generator)[None], torch.randn(shape, generator=generator)[None]
        x = latents.mean[i : i + 1] + latents.deviation[i : i + 1] * torch.randn(shape, generator=generator)
        t = loss.draw(u, 0.0)
        v = torch.randn(shape, generator=generator)
        with torch.no_grad():
            text = family.text(pipe, [data[i].caption])

        def objective(x=x, noise=noise, t=t, v=v, text=text):
            answer = family.predict(pipe, loss.noisy(x, noise, t), loss.time(t), text)
            error = answer - loss.target(x, noise, t)
            return (answer * v).sum() if estimator == "probe" else error.square().sum() / 2

        squares = autograd_squares(other, objective, list(parameters.values()))
        for k, square in zip(total, squares, strict=True):
            total[k] += square / examples
    pipe.__dict__[family.denoiser] = denoiser
    return total


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("estimator", ["probe", "empirical"])
def test_diffusion_estimates_are_the_hand_loop(family, estimator, tmp_path):
    pipe = getattr(tiny, family)()
    lora = tiny.lora_for(pipe, conv=family == "sd15")
    where = folder(tmp_path)
    bytes_before = {n: p.clone() for n, p in getattr(pipe, family_of_pipeline(pipe).denoiser).named_parameters()}
    found = estimate(pipe, lora, where, estimator=estimator, examples=4, weight=0.8)
    expected = by_hand(pipe, lora, where, estimator, 4, weight=0.8)
    assert sorted(found) == sorted(expected)
    worst = max(relative(found[n], expected[n]) for n in expected if expected[n].any())
    assert worst < 2e-3, worst
    batched = estimate(pipe, lora, where, estimator=estimator, examples=4, weight=0.8, batch=2)
    assert max(relative(batched[n], found[n]) for n in found if found[n].any()) < 2e-3
    base = estimate(pipe, lora, where, estimator=estimator, examples=4, weight=0.0)
    assert max(relative(base[n], expected[n]) for n in expected if expected[n].any()) > 0.02
    for n, p in getattr(pipe, family_of_pipeline(pipe).denoiser).named_parameters():
        assert torch.equal(p, bytes_before[n])
        assert p.grad is None
    assert found.about["estimator"] == estimator
    assert found.about["family"] == family


def test_diffusion_without_data_and_the_text_encoder(tmp_path):
    pipe = tiny.sd15()
    lora = tiny.lora_for(pipe, text_encoder=True, name="both")
    lora = lora.replace(card=lora.card.replace(triggers=("zib alien",)))
    said = []
    found, again, other = (
        estimate(pipe, lora, examples=3, pictures=2, steps=2, prompts=p, echo=said.append)
        for p in ((), ["zib alien"], ["a hat"])
    )
    assert set(found) == {f"{k}.weight" for k in lora}
    assert all(torch.equal(found[n], again[n]) for n in found)  # the prompt is the trigger
    n = next(n for n in found if n.startswith("text_encoder"))
    assert found[n].any()
    assert not torch.equal(found[n], other[n])
    assert "the model draws 2 pictures for itself" in said


def test_flux_without_data():
    pipe = tiny.flux(layers=1, single_layers=1)
    found = estimate(pipe, tiny.lora_for(pipe), examples=1, pictures=1, steps=1)
    assert all(t.any() for n, t in found.items() if "add_" not in n)


def test_embedded_base():
    """Only that it runs on the packaged base: its weights may change."""
    name = next(iter(__import__("multilora.pipelines.load", fromlist=["library"]).library().values()))["path"]
    found = estimate("embedded", name, examples=1, pictures=1, steps=1)
    lora = ml.load(name, base="embedded")
    assert set(found) == {f"{k}.weight" for k in lora}
    assert found.about["lora_sha256"] == lora.card.sha256
    assert found.about["base"] == "embedded"
    assert all(found.shape(f"{k}.weight") == p.shape for k, p in lora.items())


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
