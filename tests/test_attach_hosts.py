"""Models that other libraries have a hand in: PEFT layers, compiled graphs, offloading, a real U-Net."""

import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from multilora.attach import attached, loaded
from multilora.lora import Lora, LowRank

FORMS = ("side", "rebuilt", "bank")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 6), nn.Conv2d(4, 6, 3, stride=2)
        self.e = nn.Embedding(9, 8)

    def forward(self, ids, x):
        return self.b(torch.tanh(self.a(self.e(ids)))).sum((1, 2)) + self.c(x).sum((1, 2, 3))


def _net():
    torch.manual_seed(0)
    return Net().eval()


def _lora(seed, rank=3):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: 0.3 * torch.randn(*s, generator=g)  # noqa: E731
    return Lora({
        "a": LowRank.from_factors(rand(rank, 8), rand(12, rank)),
        "b": LowRank.from_factors(rand(rank, 12), rand(6, rank), alpha=2 * rank),
        "c": LowRank.from_factors(rand(rank, 4, 3, 3), rand(6, rank)),
        "e": LowRank.from_factors(rand(rank, 9), rand(8, rank), kind="embedding"),
    })  # fmt: skip


LORAS = [_lora(1, 2), _lora(2, 3)]
INPUTS = (torch.arange(12).reshape(4, 3) % 9, torch.randn(4, 4, 7, 7, generator=torch.Generator().manual_seed(3)))
SAMPLES = [[1.0, 0.0], [1.0, 0.0], [0.0, 0.7], [0.0, 0.7]]


def _want(row):
    net = _net()
    with torch.no_grad():
        for weight, lora in zip(row, LORAS, strict=True):
            for path, part in lora.items():
                net.get_submodule(path).weight += weight * part.delta()
        return net(*INPUTS)


WANT = {(0.5, -1.0): _want((0.5, -1.0)), (1.0, 0.0): _want((1.0, 0.0)), (0.0, 0.7): _want((0.0, 0.7))}
BASE = _want((0.0, 0.0))


def _check(bank, call):
    """Every kind of row in turn, and back to the base."""
    for row, want in WANT.items():
        bank.row = row
        torch.testing.assert_close(call(*INPUTS), want, rtol=1e-5, atol=1e-5)
        bank.row = [0.0, 0.0]
        torch.testing.assert_close(call(*INPUTS), BASE)
    bank.row = SAMPLES
    want = torch.cat([WANT[1.0, 0.0][:2], WANT[0.0, 0.7][2:]])
    torch.testing.assert_close(call(*INPUTS), want, rtol=1e-5, atol=1e-5)
    bank.gate = lambda path, x: torch.tensor([0.5, -1.0])
    torch.testing.assert_close(call(*INPUTS), WANT[0.5, -1.0], rtol=1e-5, atol=1e-5)
    bank.gate = None
    bank.row = (0.5, -1.0)
    torch.testing.assert_close(call(*INPUTS), WANT[0.5, -1.0], rtol=1e-5, atol=1e-5)
    bank.check_called()


# -- torch.compile ---------------------------------------------------------------------------------------------------


def _whole(net):
    net.compile(backend="eager")
    return net


def _blocks(net):
    for block in (net.a, net.c):
        block.compile(backend="eager")
    return net


def _forward(net):
    net.forward = torch.compile(net.forward, backend="eager")
    return net


COMPILED = {"in place": _whole, "blocks": _blocks, "forward": _forward,
            "wrapper": lambda net: torch.compile(net, backend="eager")}  # fmt: skip


@pytest.mark.parametrize("warm", [True, False], ids=["compiled before", "compiled inside"])
@pytest.mark.parametrize("form", ["auto", "side", "bank"])
@pytest.mark.parametrize("how", COMPILED)
@torch.no_grad()
def test_compiled_models(how, form, warm):
    torch._dynamo.reset()
    net = COMPILED[how](_net())
    if warm:
        torch.testing.assert_close(net(*INPUTS), BASE)
    for _ in range(2):
        with attached(net, LORAS, form=form) as bank:
            assert bank.form == ("rebuilt" if form == "auto" else form)
            _check(bank, net)
        torch.testing.assert_close(net(*INPUTS), BASE, rtol=0, atol=0)  # nothing of us is left in a graph


@torch.no_grad()
def test_a_compiled_graph_is_kept_while_rows_change():
    torch._dynamo.reset()
    graphs = []
    net = _net()
    net.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    net(*INPUTS)
    count = len(graphs)
    assert count > 0
    with attached(net, LORAS) as bank:
        for i in range(12):
            bank.row = [0.1 * i, 0.3]
            net(*INPUTS)
    net(*INPUTS)
    assert len(graphs) == count


# -- PEFT ------------------------------------------------------------------------------------------------------------


def _peft():
    from peft import LoraConfig, inject_adapter_in_model

    net = _net()
    for i, (name, lora) in enumerate(zip(("fox", "robe"), LORAS, strict=True)):
        rank = lora["a"].rank
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["a", "b", "c", "e"], use_rslora=i == 1)
        inject_adapter_in_model(config, net, adapter_name=name)
        for path, part in lora.items():
            layer = net.get_submodule(path)
            scale = layer.scaling[name]
            if path == "e":
                layer.lora_embedding_A[name].data, layer.lora_embedding_B[name].data = part.down, part.up / scale
            else:
                up = part.up / scale
                layer.lora_A[name].weight.data = part.down
                layer.lora_B[name].weight.data = up[..., None, None] if path == "c" else up
    for layer in (net.a, net.b, net.c, net.e):
        layer.set_adapter(["robe"])
        layer.set_scale("robe", 0.7)
    return net.eval()


@torch.no_grad()
def test_loaded_adapters_are_read_as_loras():
    found = loaded(_peft(), "unet")
    assert {name: weight for name, (_, weight) in found.items()} == pytest.approx({"fox": 1.0, "robe": 0.7})
    for name, lora in zip(("fox", "robe"), LORAS, strict=True):
        assert set(found[name][0]) == {f"unet.{path}" for path in lora}
        for path, part in lora.items():
            torch.testing.assert_close(found[name][0][f"unet.{path}"].delta(), part.delta(), rtol=1e-5, atol=1e-6)
    assert loaded(_net(), "unet") == {}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_loaded_adapters_are_taken_over_and_given_back(form):
    net = _peft()
    before = net(*INPUTS)
    torch.testing.assert_close(before, WANT[0.0, 0.7], rtol=1e-5, atol=1e-5)
    net.a._disable_adapters = True
    mixed = net(*INPUTS)
    found = [lora for lora, _ in loaded(net, "unet").values()]
    with attached(net, found, component="unet", form=form) as bank:
        torch.testing.assert_close(net(*INPUTS), BASE)
        _check(bank, net)
    assert torch.equal(net(*INPUTS), mixed)
    assert [layer.disable_adapters for layer in (net.a, net.b, net.c, net.e)] == [True, False, False, False]
    net.a._disable_adapters = False
    assert torch.equal(net(*INPUTS), before)
    assert net.b.active_adapters == ["robe"]


# -- offloading ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_that_come_and_go_are_left_alone():
    from accelerate import cpu_offload

    net = _net()
    cpu_offload(net, torch.device("cpu"))
    assert net.a.weight.device.type == "meta"
    with attached(net, LORAS) as bank:
        assert bank.form == "side"
        _check(bank, net)
    refused = pytest.raises(ValueError, match=r"offloaded or dispatched by accelerate.*form='side'")
    with refused, attached(net, LORAS, form="rebuilt"):
        pass
    assert torch.equal(net(*INPUTS), BASE)


def test_text_encoder_paths_with_and_without_their_old_level():
    inner = nn.Module()
    inner.layer = nn.Linear(8, 12)
    old = nn.Module()
    old.text_model = inner
    part = LORAS[0]["a"]
    for model in (inner, old):
        for path in ("layer", "text_model.layer"):
            with attached(model, [Lora({f"text_encoder.{path}": part})], component="text_encoder") as bank:
                assert bank.paths == ("layer",)


# -- the budget of a step --------------------------------------------------------------------------------------------

# Operations that launch nothing: they give an existing tensor another shape.
VIEWS = frozenset(
    ["view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split",
     "chunk", "alias", "detach", "as_strided", "unbind", "_reshape_alias", "split_with_sizes", "lift_fresh"]
)  # fmt: skip


class Leaves(TorchDispatchMode):
    """Counts dispatched aten operations that are no views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def _unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 77, "norm_num_groups": 8}
    return UNet2DConditionModel(sample_size=8, **sizes).eval()


def _attention_lora(unet, seed):
    g = torch.Generator().manual_seed(seed)
    linears = {n: m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
    assert len(linears) == 128
    return Lora({
        f"unet.{n}": LowRank.from_factors(
            torch.randn(16, m.in_features, generator=g), 0.05 * torch.randn(m.out_features, 16, generator=g)
        )
        for n, m in linears.items()
    })  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    return _unet()


@torch.no_grad()
def test_batched_composite_of_five_adds_at_most_36_percent_operations(unet):
    loras = [_attention_lora(unet, seed) for seed in range(5)]
    x, text = torch.randn(10, 4, 8, 8), torch.randn(10, 77, 77)
    with Leaves() as base:
        plain = unet(x, 7, text).sample
    composite = [[0.8 if i == j else 0.0 for i in range(5)] for j in range(5) for _ in range(2)]
    weighted = [[0.2 * (i + 1) * v for i, v in enumerate(row)] for row in composite]
    positive = [[v * (n % 2) for v in row] for n, row in enumerate(weighted)]
    with attached(unet, loras, component="unet") as bank:
        for rows in (composite, weighted, positive):
            bank.row = rows
            unet(x, 7, text)  # stacks and folds the factors, once per row
            with Leaves() as leaves:
                got = unet(x, 7, text).sample
            assert leaves.count / base.count <= 1.36
            assert (got - plain).abs().max() > 0.05 * plain.abs().max()
        # A weight that moves with the step costs one multiplication per layer on top.
        bank.row = [[v * 0.9 for v in row] for row in weighted]
        with Leaves() as leaves:
            unet(x, 7, text)
        assert leaves.count <= 1.36 * base.count + 128 + 10


def _calls(run):
    """Python and C functions called by run(): the work of a flip, the same on every machine; benchmarks/flip.py has
    the seconds."""
    count = 0

    def seen(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("form", ["side", "bank"])
@torch.no_grad()
def test_flipping_costs_at_most_a_twentieth_of_set_adapters(unet, form):
    from peft import LoraConfig

    other = _unet()
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    for name in "ab":
        other.add_adapter(config, adapter_name=name)
    rows = [[1.0, 0.0], [0.0, 1.0]]
    with attached(unet, [_attention_lora(unet, 1), _attention_lora(unet, 2)], component="unet", form=form) as bank:
        for row in rows:  # the bank merges a row when it first meets it
            bank.row = row
        flips = _calls(lambda: setattr(bank, "row", rows[0]))
    assert 0 < flips <= _calls(lambda: other.set_adapters("a")) / 20
