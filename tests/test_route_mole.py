"""MoLE against layers written out by hand in float64, and the identities that it promises."""

import math

import pytest
import torch
from torch import nn

from multilora.attach import attached
from multilora.gate_mole import PER, MoleGate, group_of, masked
from multilora.gates import Gate, named, write_gate
from multilora.lora import Card, Lora, LowRank
from multilora.method import UnknownName
from multilora.pipelines.composing import composing
from multilora.pipelines.text import composing_text
from multilora.routing import Asked, Uniform, balance_loss, mean_shares, top
from tests import handgate, handloop, tiny, tiny_text

TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Tokens [B, T, 5] through two linears, the second without LoRA 1."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
        for i, p in enumerate(self.parameters()):
            p.data = _normal(*p.shape, seed=i)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def _loras(k=3, zero=False):
    """Ranks 1, 2, ...; with `zero` their updates are zero."""
    found = []
    for i in range(k):
        parts = {}
        for name, (out, width) in {"a": (7, 5), **({} if i == 1 else {"b": (3, 7)})}.items():
            up = _normal(out, 1 + i, seed=i + 50)
            parts[name] = LowRank(_normal(1 + i, width, seed=10 * i), torch.zeros_like(up) if zero else up)
        found.append(Lora(parts, Card(name=f"lora{i}")))
    return found


def _gate(heads, k, seed=3, **settings):
    gate = MoleGate.fresh(heads, k, dtype=torch.float64, **settings)
    for i, tensor in enumerate(gate.tensors.values()):
        tensor.copy_(0.6 * _normal(*tensor.shape, seed=seed + i) if tensor.ndim else torch.tensor(0.3 + 0.1 * i))
    return gate


X = _normal(4, 6, 5, seed=77)
LINEAR = {"a": ("a", 7), "b": ("b", 3)}
TIMES = torch.tensor([3.0, 250.0, 600.0, 999.0])


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("token", [False, True])
def test_a_layer_is_the_loop_by_hand(token, time):
    net, loras = Net(), _loras()
    gate = _gate(LINEAR, 3, per="linear", token=token, time_scale=1000.0 if time else None)
    given = {}

    def share(path, x, parts):
        times = TIMES if time else None
        given[path] = handgate.softmax(handgate.mole_logits(gate.tensors, path, parts, times, 1000.0, token))
        return given[path]

    want = handgate.gated_copy(net, [handloop.factors(lora) for lora in loras], share)(X)
    with torch.no_grad(), attached(net, loras, form="side") as bank:
        bank.gate = asked = gate.asked(time=TIMES if time else None)
        got = net(X)
    torch.testing.assert_close(got, want, **TIGHT)
    for path in "ab":
        torch.testing.assert_close(asked.shares[path], given[path], **TIGHT)
        assert asked.shares[path].shape == ((4, 6, 3) if token else (4, 3))
        torch.testing.assert_close(asked.shares[path].sum(-1), torch.ones(asked.shares[path].shape[:-1]).double())
        assert asked.shares[path].std(0).max() > 1e-3  # samples differ, so a constant row would fail
    assert handloop.relative(want, net(X)) > 0.1


def _unet_case(per):
    pipe = tiny.sd15(torch.float64)
    loras = [tiny.lora_for(pipe, rank=r, seed=i, strength=2.0, conv=i != 1) for i, r in enumerate((2, 3))]
    loras = [lora.to(torch.float64) for lora in loras]
    widths = {}
    for lora in loras:
        widths |= {key.removeprefix("unet."): part.shape[0] for key, part in lora.items()}
    if per == "linear":
        heads = {path: (path, width) for path, width in widths.items()}
    else:
        heads = {"network": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 16)}
    return pipe, loras, _gate(heads, 2, per=per, time_scale=1000.0)


@pytest.mark.parametrize("per", ["linear", "network"])
def test_a_unet_in_its_pipeline_is_the_loop_by_hand(per, tmp_path):
    """Guidance, two steps: composing with the gate's file against the pipeline with hand-made layers in its U-Net."""
    pipe, loras, gate = _unet_case(per)
    file = write_gate(Gate("mole", named(loras), gate.tensors, gate.settings()), tmp_path / "gate.safetensors")
    now, held = {}, {}

    def share(path, x, parts):
        times = [now["t"]] * len(x)
        group = path if per == "linear" else "network"
        head = gate.heads[group][0]
        if path == head:
            held[group] = handgate.softmax(handgate.mole_logits(gate.tensors, group, parts, times, 1000.0))
        elif group not in held:  # before the head: bias and time alone
            blind = gate.tensors[f"bias.{group}"] + gate.tensors[f"time.{group}"] @ handgate.phi(now["t"], 1000.0)
            return handgate.softmax(blind / math.exp(float(gate.tensors[f"temperature.{group}"]))).expand(len(x), -1)
        return held[group]

    hand = handgate.gated_copy(pipe.unet, [handloop.factors(lora) for lora in loras], share, "unet.")

    def starts(module, args, kwargs):
        now["t"] = float(args[1] if len(args) > 1 else kwargs["timestep"])
        held.clear()

    hand.register_forward_pre_hook(starts, with_kwargs=True)

    def draw(used):
        used.scheduler = type(used.scheduler).from_config(used.scheduler.config)
        used.set_progress_bar_config(disable=True)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).double()
        return used("a fox", guidance_scale=3.0, num_inference_steps=2, height=32, width=32, latents=latents,
                    output_type="latent").images  # fmt: skip

    components = {**pipe.components, "unet": hand}
    want = draw(type(pipe)(**components, requires_safety_checker=False))
    plain = draw(pipe)
    with composing(pipe, loras, "mole", gate=str(file)):
        got = draw(pipe)
    torch.testing.assert_close(got, want, **TIGHT)
    assert handloop.relative(want, plain) > 0.02
    with composing(pipe, loras, "mole"):
        assert handloop.relative(draw(pipe), want) > 1e-4  # equal shares are something else


def test_a_language_model_is_the_loop_by_hand_and_decodes_as_it_reads():
    import copy

    model, tokenizer = copy.deepcopy(tiny_text.model("llama")).double(), tiny_text.tokenizer()
    loras = [lora.to(torch.float64) for lora in tiny_text.loras("llama", 3)]
    shape = {key: part.shape[0] for lora in loras for key, part in lora.items()}
    gate = _gate({group_of(k, "layer"): (k, w) for k, w in reversed(shape.items())}, 3, per="layer", token=True)
    held = {}

    def share(path, x, parts):
        group = group_of(path, "layer")
        if path == gate.heads[group][0]:
            held[group] = handgate.softmax(handgate.mole_logits(gate.tensors, group, parts, token=True))
        return held[group]

    hand = handgate.gated_copy(model, [handloop.factors(lora) for lora in loras], share)
    ids = tokenizer("abc 12", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want, plain = hand(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        with attached(model, loras, form="side") as bank:
            bank.gate = gate.asked()
            torch.testing.assert_close(model(ids, use_cache=False).logits, want, **TIGHT)
        assert handloop.relative(want, plain) > 0.05
        # Greedy tokens with a KV cache against whole passes without one.
        tokens = ids
        for _ in range(5):
            tokens = torch.cat([tokens, hand(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "multilora.gates.read_gate", lambda name: Gate("mole", named(loras), gate.tensors, gate.settings())
            )
            with composing_text(model, loras, "mole", gate="kept"):
                made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert made.tolist() == tokens.tolist()


# -- identities -----------------------------------------------------------------------------------------------------


def _run(net, loras, gate):
    with torch.no_grad(), attached(net, loras, form="side") as bank:
        bank.gate = gate
        return net(X)


def test_one_lora_is_that_lora_and_zeros_are_the_base():
    net, loras = Net(), _loras()
    gate = _gate(LINEAR, 1, per="linear", token=True)
    for weight in (1.0, 0.7):
        with torch.no_grad(), attached(net, loras[:1], form="side") as bank:
            bank.row = [weight]
            want = net(X)
        torch.testing.assert_close(_run(net, loras[:1], gate.asked([weight])), want, **TIGHT)
    nothing = _run(net, _loras(zero=True), _gate(LINEAR, 3, per="linear").asked())
    assert torch.equal(nothing, net(X))


@pytest.mark.parametrize("per", ["linear", "network"])
def test_a_masked_subset_is_the_model_built_with_it_and_the_same_logits(per):
    """The same logits: a gate whose features have no weight, and for the others the unmasked ones cut and renewed."""
    net, loras = Net(), _loras()
    heads = LINEAR if per == "linear" else {"network": ("a", 7)}
    three, two = _gate(heads, 3, per=per), _gate(heads, 2, per=per)
    kept, live = [0, 2], [True, False, True]
    for name in three.tensors:
        if name.startswith("weight."):
            three.tensors[name].zero_()
            two.tensors[name].zero_()
        elif name.startswith("bias."):
            two.tensors[name].copy_(three.tensors[name][kept])
        else:
            two.tensors[name].copy_(three.tensors[name])
    subset = _run(net, [loras[i] for i in kept], two.asked())
    masked_out = _run(net, loras, three.asked(live=live))
    absent = Gate("mole", named(loras), three.tensors, three.settings())
    left_out = _run(net, [loras[i] for i in kept], MoleGate.of(absent, [loras[i] for i in kept]).asked())
    torch.testing.assert_close(masked_out, subset, **TIGHT)
    torch.testing.assert_close(left_out, subset, **TIGHT)
    assert handloop.relative(_run(net, loras, three.asked()), subset) > 1e-2
    with_features = _gate(heads, 3, per=per)
    whole, cut = with_features.asked(), with_features.asked(live=live)
    _run(net, loras, whole)
    _run(net, loras, cut)
    first = "a" if per == "linear" else "network"
    want = whole.shares[first][..., kept] / whole.shares[first][..., kept].sum(-1, keepdim=True)
    torch.testing.assert_close(cut.shares[first][..., kept], want, **TIGHT)
    assert (cut.shares[first][..., 1] == 0).all()


def test_the_sets_order_and_the_users_weights():
    net, loras = Net(), _loras()
    gate = _gate(LINEAR, 3, per="linear")
    file = Gate("mole", named(loras), gate.tensors, gate.settings())
    want = _run(net, loras, gate.asked([0.9, 0.5, 1.1]))
    turned = [loras[i] for i in (2, 0, 1)]
    torch.testing.assert_close(_run(net, turned, MoleGate.of(file, turned).asked([1.1, 0.9, 0.5])), want, **TIGHT)
    counted = _gate(LINEAR, 3, per="linear", sums="count")
    torch.testing.assert_close(
        _run(net, loras, counted.asked([0.3, 0.5 / 3, 1.1 / 3])), want, **TIGHT
    )  # three times the shares


def test_temperature_goes_from_the_best_to_the_mean():
    net, loras, sharp, flat = Net(), _loras(), _gate(LINEAR, 3, per="linear"), _gate(LINEAR, 3, per="linear")
    for name in sharp.tensors:
        if name.startswith("temperature."):
            sharp.tensors[name].fill_(math.log(1e-7))
            flat.tensors[name].fill_(math.log(1e9))
    asked = sharp.asked(), flat.asked(), _gate(LINEAR, 3, per="linear").asked()
    _, mean, _ = (_run(net, loras, a) for a in asked)
    assert torch.equal(asked[0].shares["a"].max(-1).values, torch.ones(4).double())
    assert torch.equal(asked[0].shares["a"].argmax(-1), asked[2].shares["a"].argmax(-1))
    torch.testing.assert_close(mean, _run(net, loras, Asked(Uniform())), rtol=1e-6, atol=1e-7)


def test_the_timestep_changes_the_gate():
    net, loras, gate = Net(), _loras(), _gate(LINEAR, 3, per="linear", time_scale=1000.0)
    found = [gate.asked(time=t) for t in (10.0, 990.0)]
    a, b = (_run(net, loras, asked) for asked in found)
    assert (found[0].shares["a"] - found[1].shares["a"]).abs().max() > 0.05
    assert handloop.relative(a, b) > 1e-2
    with pytest.raises(ValueError, match="sees the timestep"):
        _run(net, loras, gate.asked())


def test_balance_is_least_and_k_log_k_where_means_are_uniform():
    for seed, k in enumerate((2, 3, 5)):
        shares = {str(i): _normal(4, 6, k, seed=seed + i).softmax(-1) for i in range(3)}
        q = [
            sum(float(s[b, t, i]) for s in shares.values() for b in range(4) for t in range(6)) / 72 for i in range(k)
        ]
        assert float(balance_loss(shares)) == pytest.approx(-sum(map(math.log, q)), rel=1e-9)
        assert float(balance_loss(shares)) > k * math.log(k) + 1e-4
        # Uniform on the whole, however sure in each place.
        sure = {str(i): torch.eye(k).double()[(i + torch.arange(k)) % k] for i in range(2)}
        assert float(balance_loss(sure)) == pytest.approx(k * math.log(k), rel=1e-9)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    share = torch.tensor([[[1.0, 0], [0, 1], [0, 1]], [[0.5, 0.5], [0, 1], [0, 1]]])
    torch.testing.assert_close(mean_shares({"": share}, mask), torch.tensor([[0.5, 0.5]]))


def test_top_k_shares_of_a_token_sum_to_one_whatever_other_tokens_have():
    """The published X-LoRA divided by the sum over all tokens (huggingface/peft #2786)."""
    shares = _normal(2, 5, 4, seed=1).mul(3).softmax(-1)
    kept = top(shares, 2)
    torch.testing.assert_close(kept.sum(-1), torch.ones(2, 5).double())
    assert ((kept > 0).sum(-1) == 2).all()
    for b in range(2):
        for t in range(5):
            torch.testing.assert_close(kept[b, t], top(shares[b, t], 2))


INNER = "down_blocks.1.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    ("path", "layer", "block"),
    [
        (f"{INNER}.attn1.to_q", f"{INNER}.attn1", INNER),
        (f"{INNER}.attn1.to_out.0", f"{INNER}.attn1", INNER),
        (f"{INNER}.ff.net.0.proj", f"{INNER}.ff", INNER),
        ("mid_block.resnets.1.conv1", "mid_block.resnets.1", "mid_block.resnets.1"),
        ("mid_block.attentions.0.proj_in", "mid_block.attentions.0", "mid_block.attentions.0"),
        ("time_embedding.linear_1", "time_embedding", "time_embedding"),
        ("single_transformer_blocks.4.proj_mlp", "single_transformer_blocks.4", "single_transformer_blocks.4"),
        ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn", "model.layers.3"),
        ("decoder.block.2.layer.1.EncDecAttention.q", "decoder.block.2.layer.1", "decoder.block.2"),
    ],
)
def test_modules_that_share_a_gate(path, layer, block):
    assert [group_of(path, per) for per in PER] == [path, layer, block, "network"]


def test_masks_and_the_negative_half_under_a_gate():
    """Equal shares are Merge at w / k, whatever options the LoRAs have."""
    pipe = tiny.sd15(torch.float64)
    loras = [tiny.lora_for(pipe, seed=i, strength=2.0) for i in range(3)]

    def draw(method, weights, options=None):
        from multilora.pipelines.composing import member

        members = [member(pipe, lora, weight=w, **(options or {}).get(i, {})) for i, (lora, w) in
                   enumerate(zip(loras, weights, strict=True))]  # fmt: skip
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).double()
        with composing(pipe, members, method):
            return pipe("a fox", guidance_scale=3.0, num_inference_steps=2, height=32, width=32, latents=latents,
                        output_type="latent").images  # fmt: skip

    w = [0.9, 0.6, 1.2]
    third = [v / 3 for v in w]
    half = torch.zeros(32, 32)
    half[:, :16] = 1.0
    for options in ({1: {"mask": torch.zeros(32, 32)}}, {1: {"mask": half}}, {0: {"positive_only": True}},
                    {0: {"positive_only": True}, 2: {"mask": half}}):  # fmt: skip
        got, want = draw("mole", w, options), draw("merge", third, options)
        torch.testing.assert_close(got, want, **TIGHT)
        assert handloop.relative(got, draw("mole", w)) > 1e-4


def test_a_mask_names_loras_of_the_set():
    assert masked(["fox", "robe"], "") is None
    assert masked(["fox", "robe", "hat"], "robe, hat") == [True, False, False]
    with pytest.raises(UnknownName, match=r"LoRA in mask 'robo'.*robe"):
        masked(["fox", "robe"], "robo")
    with pytest.raises(ValueError, match="every LoRA masked out"):
        Asked(Uniform(), live=[False, False])
    with pytest.raises(ValueError, match="temperature=0"):
        MoleGate.fresh({}, 2, temperature=0)
