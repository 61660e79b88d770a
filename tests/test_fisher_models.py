"""Fisher estimates of language models and of diffusion: each is what a loop by hand gives, with the LoRA in place."""

import copy
import functools

import pytest
import torch
from PIL import Image

import multilora as ml
from multilora.lab.train.fisher import estimate
from multilora.lab.train.loop import Order
from multilora.lab.train.loss import family_of_pipeline
from multilora.lab.train.observed import generator_of
from multilora.lora import Card, Lora, LowRank
from tests import tiny
from tests.handfisher import autograd_squares, random, relative

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
