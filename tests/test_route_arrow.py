"""Arrow against PEFT's own layer, against loops by hand, and what it does where PEFT's does not go."""

import pytest
import torch
from torch import nn

from multilora.attach import attached
from multilora.gate_arrow import ArrowRouter, direction
from multilora.lora import Dense, Lora, LowRank
from multilora.method import resolve
from multilora.pipelines.text import composing_text
from multilora.routing import Asked
from tests import handloop, tiny_text

TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _part(out, *shape, rank, seed, kind="linear"):
    return LowRank(_normal(rank, *shape, seed=seed), _normal(out, rank, seed=seed + 100), kind=kind)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_linear_layer_is_pefts(top_k):
    """PEFT's ArrowLoraLinearLayer on the same factors: its router and sum, here in float32 as it has it."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer
    from peft.tuners.lora.config import ArrowConfig

    k, width, out, rank = 4, 11, 7, 3
    layer = nn.Linear(width, out)
    loras = [Lora({"0": _part(out, width, rank=rank, seed=i)}).to(torch.float32) for i in range(k)]
    names = [f"task_{i}" for i in range(k)]
    config = ArrowConfig(top_k=top_k, router_temperature=0.7, rng_seed=1)
    config.task_adapter_names = names
    theirs = ArrowLoraLinearLayer(width, config)
    downs, ups = nn.ModuleDict(), nn.ModuleDict()
    for name, lora in zip(names, loras, strict=True):
        downs[name], ups[name] = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)
        downs[name].weight.data, ups[name].weight.data = lora["0"].down, lora["0"].up
    # Its power iteration stops after 15 steps; ours is the exact vector, which more of them reach.
    theirs.top_right_singular_vec_from_BA = lambda A, B: ArrowLoraLinearLayer.top_right_singular_vec_from_BA(
        theirs, A, B, iters=3000
    )
    theirs.build_prototypes(downs, ups)
    x = _normal(3, 5, width, seed=9).float()
    with torch.no_grad():
        want = layer(x) + theirs(x, downs, ups, nn.Identity(), dict.fromkeys(names, 1.0))
        model = nn.Sequential(layer)
        with attached(model, loras, form="side") as bank:
            bank.gate = asked = Asked(ArrowRouter(top_k, 0.7))
            got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert handloop.relative(want, layer(x).detach()) > 0.1
    share = asked.shares["0"]
    torch.testing.assert_close(share.sum(-1), torch.ones(3, 5))
    assert ((share > 0).sum(-1) == top_k).all()


def test_a_convolution_an_embedding_and_parts_that_are_missing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1).double()
            self.words = nn.Embedding(6, 5).double()
            self.norm = nn.LayerNorm(5).double()

        def forward(self, x, ids):
            return self.conv(x), self.norm(self.words(ids))

    net = Net()
    words = [_part(5, 6, rank=r, seed=s, kind="embedding") for r, s in ((3, 2), (1, 6))]
    loras = [
        Lora({"conv": _part(4, 2, 3, 3, rank=2, seed=1, kind="conv"), "words": words[0],
              "norm": Dense(_normal(5, seed=3))}),
        Lora({"conv": Dense(_normal(4, 2, 3, 3, seed=4), kind="conv"), "norm": Dense(_normal(5, seed=5))}),
        Lora({"words": words[1]}),
    ]  # fmt: skip
    x, ids = _normal(2, 2, 5, 7, seed=7), torch.tensor([[0, 3, 5], [1, 1, 4]])
    with torch.no_grad(), attached(net, loras, form="side") as bank:
        bank.gate = asked = Asked(ArrowRouter())
        net(x, ids)
    patches = nn.functional.unfold(x, 3, padding=1, stride=2)  # [B, 18, places]
    first = torch.linalg.svd(loras[0]["conv"].up @ loras[0]["conv"].down.flatten(1)).Vh[0]
    second = torch.linalg.svd(loras[1]["conv"].weight.flatten(1)).Vh[0]
    scores = torch.stack([(patches.mT @ v).abs().mean(1) for v in (first, second)], -1)
    torch.testing.assert_close(asked.shares["conv"][:, :2], scores.softmax(-1), **TIGHT)
    assert (asked.shares["conv"][:, 2] == 0).all()
    rows = []
    for i in (0, 2):
        v = torch.linalg.svd(loras[i]["words"].up @ loras[i]["words"].down).Vh[0]
        rows.append(v[ids].abs())
    torch.testing.assert_close(asked.shares["words"][..., [0, 2]], torch.stack(rows, -1).softmax(-1), **TIGHT)
    torch.testing.assert_close(asked.shares["norm"], torch.tensor([0.5, 0.5, 0]).double())  # vectors have no direction


def test_directions_of_equal_updates_are_equal_up_to_the_sign():
    part = _part(7, 5, rank=3, seed=1)
    turn = _normal(3, 3, seed=2)
    other = LowRank(turn @ part.down, part.up @ torch.linalg.inv(turn))
    want = torch.linalg.svd(part.up @ part.down).Vh[0]
    for one in (part, other, part * -2.0, part.dense()):
        assert abs(float(direction(one) @ want)) == pytest.approx(1.0, abs=1e-9)
    assert direction(LowRank(part.down, torch.zeros(7, 3).double())) is None
    assert direction(None) is None


def test_a_cold_router_takes_one_lora_and_weights_scale_it():
    """At a tiny temperature each token runs the LoRA it lies along, at its weight."""
    net = nn.Sequential(nn.Linear(5, 7).double())
    loras = [Lora({"0": _part(7, 5, rank=2, seed=i)}) for i in range(2)]
    x = _normal(4, 6, 5, seed=3)
    along = torch.stack([(x @ torch.linalg.svd(lo["0"].up @ lo["0"].down).Vh[0]).abs() for lo in loras], -1).argmax(-1)
    assert 0 < along.sum() < 24
    want = net(x).detach().clone()
    for b in range(4):
        for t in range(6):
            i = int(along[b, t])
            want[b, t] += (0.5, 2.0)[i] * loras[i]["0"].up @ (loras[i]["0"].down @ x[b, t])
    with torch.no_grad(), attached(net, loras, form="side") as bank:
        bank.gate = Asked(ArrowRouter(temperature=1e-6), [0.5, 2.0])
        torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-7)


def test_a_language_model_decodes_as_it_reads():
    """Greedy tokens with a KV cache against whole passes without one, both under Arrow."""
    model, loras = tiny_text.model("llama"), tiny_text.loras("llama", 3)
    ids = tiny_text.tokenizer()("abc 12", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tokens = ids
        with attached(model, loras, form="side") as bank:
            for _ in range(5):
                bank.gate = Asked(ArrowRouter(2))
                tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            bank.gate = Asked(ArrowRouter(2))
            arrow = model(ids).logits
        with composing_text(model, loras, resolve("route", "arrow", top_k=2)):
            made = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert made.tolist() == tokens.tolist()
        assert handloop.relative(arrow, model(ids).logits) > 0.05
