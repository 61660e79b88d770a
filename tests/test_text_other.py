"""(IA)^3 vectors and full fine-tuning of language models: against PEFT's own layers, and PEM's arithmetic by hand."""

import copy
import hashlib

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import save_file

import multilora as ml
from multilora.attach import attached
from multilora.lab.train.text_other import put, train_ia3, train_whole
from multilora.lora import Dense
from multilora.pipelines.text import composing_text
from multilora.pipelines.text_ia3 import Scale, as_lora, combined
from multilora.pipelines.text_load import text_lora
from tests import tiny_text

PAIRS = [{"prompt": f"{w}=", "completion": w[::-1]} for w in ("abc", "de", "fghij", "kl", "m", "nopq", "rst")]
IDS = torch.tensor([[3, 7, 9, 4, 5], [8, 6, 3, 3, 12]])


def _given(family):
    return tiny_text.model(family), tiny_text.tokenizer(family == "t5")


def _logits(model, family):
    inputs = {"input_ids": IDS}
    if family == "t5":
        inputs["decoder_input_ids"] = torch.tensor([[0, 4], [0, 9]])
    with torch.no_grad():
        return model(**inputs).logits


def _state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def _same(model, before):
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(now[k], before[k]) for k in before)
    assert all(p.grad is None for p in model.parameters())


def _mean_loss(model, pairs, tokenizer):
    total = counted = 0.0
    for pair in pairs:
        start, end = (tokenizer(pair[k])["input_ids"] for k in ("prompt", "completion"))
        ids = torch.tensor([[*start, *end, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[0, : len(start)] = -100
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * (len(end) + 1)
        counted += len(end) + 1
    return total / counted


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_vectors_as_a_lora_are_pefts_own_layers(family):
    """Trained vectors, loaded into PEFT's own IA3 model, give the logits of the same vectors as an update."""
    model, tokenizer = _given(family)
    before, training = _state(model), model.training
    vectors = train_ia3(PAIRS, model, tokenizer, steps=5, lr=0.3, batch=2)
    _same(model, before)
    assert model.training == training
    assert not hasattr(model, "peft_config")
    theirs = get_peft_model(copy.deepcopy(model), IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"] if family == "llama" else ["k", "v", "wo"],
        feedforward_modules=["down_proj"] if family == "llama" else ["wo"],
    ))  # fmt: skip
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "ia3_l")}
    assert sorted(layers) == sorted(vectors)
    for path, layer in layers.items():
        assert layer.is_feedforward == (vectors[path].side == "in")
        layer.ia3_l["default"].data.copy_(vectors[path].vector.reshape(layer.ia3_l["default"].shape))
    lora = as_lora(vectors, model)
    with attached(model, [lora]) as bank:
        bank.row = [1.0]
        ours = _logits(model, family)
    torch.testing.assert_close(ours, _logits(theirs, family), rtol=1e-4, atol=1e-5)
    assert (ours - _logits(model, family)).abs().max() > 1e-2


def test_arithmetic_of_vectors_is_the_papers_and_that_of_updates():
    """PEM: 2 - l negates, λ l1 + (1 - λ) l2 adds; either is the update at the same weights. By hand in float64."""
    model = copy.deepcopy(tiny_text.model("llama")).double()
    generator = torch.Generator().manual_seed(0)
    paths = {"model.layers.0.self_attn.k_proj": "out", "model.layers.1.mlp.down_proj": "in"}
    both = []
    for _ in range(2):
        sizes = {p: model.get_submodule(p) for p in paths}
        both.append({
            p: Scale(torch.randn(m.out_features if paths[p] == "out" else m.in_features, generator=generator).double(),
                     paths[p])
            for p, m in sizes.items()
        })  # fmt: skip
    first, second = both
    for path in paths:
        negated = combined([first], [-1.0])[path].vector
        torch.testing.assert_close(negated, 2.0 - first[path].vector, rtol=1e-12, atol=1e-12)
        mean = combined(both, [0.3, 0.7])[path].vector
        torch.testing.assert_close(mean, 0.3 * first[path].vector + 0.7 * second[path].vector, rtol=1e-12, atol=1e-12)
    whole = as_lora(combined(both, [0.4, -1.3]), model)
    sums = ml.merge([as_lora(one, model) for one in both], [0.4, -1.3])
    for path, side in paths.items():
        weight = model.get_submodule(path).weight.detach()
        change = 0.4 * (first[path].vector - 1) - 1.3 * (second[path].vector - 1)
        by_hand = torch.einsum("oi,o->oi" if side == "out" else "oi,i->oi", weight, change)
        torch.testing.assert_close(whole[path].delta(), by_hand, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sums[path].delta(), by_hand, rtol=1e-5, atol=1e-6)
        assert isinstance(whole[path], Dense)
        assert by_hand.norm() > 0.3 * weight.norm()


def test_a_vector_on_another_layer_is_refused():
    model = tiny_text.model("llama")
    with pytest.raises(ValueError, match=r"embed_tokens.*Embedding"):
        as_lora({"model.embed_tokens": Scale(torch.ones(3), "out")}, model)
    with pytest.raises(ValueError, match=r"k_proj: a vector of \[3\]"):
        as_lora({"model.layers.0.self_attn.k_proj": Scale(torch.ones(3), "out")}, model)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_peft_folder_of_vectors_is_read_and_obeys_pems_rules(family, tmp_path):
    """Read as LoRAs: alone, negated, added and as an analogy, each against PEFT's layers with the vector by hand."""
    model = _given(family)[0]
    ends = (["k_proj", "v_proj", "down_proj"], ["down_proj"]) if family == "llama" else (["k", "v", "wo"], ["wo"])
    theirs = get_peft_model(copy.deepcopy(model), IA3Config(target_modules=ends[0], feedforward_modules=ends[1]))
    layers = [m.ia3_l["default"] for m in theirs.modules() if hasattr(m, "ia3_l")]
    vectors, folders, generator = [], [], torch.Generator().manual_seed(1)
    for name in "abc":
        vectors.append([1 + torch.randn(v.shape, generator=generator) / 4 for v in layers])
        for v, new in zip(layers, vectors[-1], strict=True):
            v.data.copy_(new)
        theirs.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    base = _logits(model, family)
    for weights in ([1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.3, 0.7, 0.0], [1.0, 1.0, -1.0]):
        for v, *three in zip(layers, *vectors, strict=True):
            v.data.copy_(1 + sum(w * (one - 1) for w, one in zip(weights, three, strict=True)))
        with composing_text(model, [str(f) for f in folders], weights=weights):
            ours = _logits(model, family)
        torch.testing.assert_close(ours, _logits(theirs, family), rtol=1e-3, atol=1e-4)
        assert (ours - base).abs().max() > 1e-2
    lora = text_lora(model, folders[0])
    digest = hashlib.sha256((folders[0] / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (lora.card.name, lora.card.sha256) == ("a", digest)


def test_a_folder_that_holds_no_vectors_of_this_model_is_refused_by_key(tmp_path):
    model, folder = _given("llama")[0], tmp_path / "ia3"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match=r"ia3: adapter_model\.safetensors is missing"):
        text_lora(model, folder)
    key = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    for tensors, message in (
        ({key: torch.ones(3, 1)}, r"k_proj: a vector of \[3\]"),
        ({key: torch.ones(3, 2)}, r"k_proj\.ia3_l has shape \[3, 2\], wanted \[out, 1\] or \[1, in\]"),
        ({key: torch.full((16, 1), float("nan"))}, "no finite numbers"),
        ({key.replace("layers.0", "layers.9"): torch.ones(16, 1)}, r"layers\.9.*no such layer"),
        ({"base_model.model.lm_head.weight": torch.ones(3, 1)}, r"lm_head\.weight: wanted"),
        ({}, "no \\(IA\\)\\^3 vector"),
    ):
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            text_lora(model, folder)


def test_full_fine_tuning_lowers_the_loss_and_leaves_the_model():
    model, tokenizer = _given("llama")
    before = _state(model)
    rng = torch.random.get_rng_state()
    tuned = train_whole(PAIRS, model, tokenizer, steps=25, lr=1e-2, batch=4, seed=3)
    _same(model, before)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert list(tuned) == [name for name, _ in model.named_parameters()]
    own = copy.deepcopy(model)
    start = _mean_loss(own, PAIRS, tokenizer)
    put(own, tuned)
    assert _mean_loss(own, PAIRS, tokenizer) < 0.7 * start
    again = train_whole(PAIRS, model, tokenizer, steps=25, lr=1e-2, batch=4, seed=3)
    assert all(torch.equal(again[k], tuned[k]) for k in tuned), "a seed gives the same bits"


def test_one_step_is_adamws_on_the_mean_loss():
    """A step by hand: the gradient of transformers' loss over all tokens, its norm cut to 1, AdamW."""
    model, tokenizer = _given("llama")
    lr = 1e-3
    tuned = train_whole(PAIRS[:2], model, tokenizer, steps=1, lr=lr, batch=2, warmup=0)
    own = copy.deepcopy(model).requires_grad_(True)
    total = counted = 0.0
    for pair in PAIRS[:2]:
        start, end = (tokenizer(pair[k])["input_ids"] for k in ("prompt", "completion"))
        ids = torch.tensor([[*start, *end, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[0, : len(start)] = -100
        total = total + own(input_ids=ids, labels=labels).loss * (len(end) + 1)
        counted += len(end) + 1
    (total / counted).backward()
    torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
    torch.optim.AdamW(own.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0).step()
    for name, p in own.named_parameters():
        moved = (tuned[name] - dict(model.named_parameters())[name]).detach()
        clear = p.grad.abs() > 1e-5  # a first step of Adam is lr * sign(g): of g near 0 rounding decides
        assert clear.any()
        torch.testing.assert_close(tuned[name][clear], p.detach()[clear], rtol=1e-4, atol=1e-5)
        assert moved[clear].abs().mean() > 0.5 * lr


def test_bad_data_changes_nothing():
    model, tokenizer = _given("llama")
    before = _state(model)
    for train in (train_whole, train_ia3):
        with pytest.raises(ValueError, match="example 1: no 'completion'"):
            train([{"prompt": "a"}], model, tokenizer)
        with pytest.raises(ValueError, match="diverged"):
            train(PAIRS, model, tokenizer, steps=4, lr=float("inf"))
    _same(model, before)
