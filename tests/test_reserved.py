"""Room for LoRAs under one compiled graph: values against dense weights in float64, compilations counted."""

import pytest
import torch
from torch import nn

from multilora.attach import attached
from multilora.lora import Lora, LowRank
from multilora.reserved import reserved

SHAPES = {"a": (9, 7), "b": (5, 9)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm = nn.Linear(7, 9), nn.Linear(9, 5, bias=False), nn.LayerNorm(5)
        self.double()

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def lora(seed, rank, names=("a", "b")):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)  # noqa: E731
    return Lora({n: LowRank.from_factors(draw(rank, SHAPES[n][1]), draw(SHAPES[n][0], rank)) for n in names})


def dense(net, loras, row, x):
    """The network with W + sum_i row_i up_i down_i."""
    weight = {
        n: getattr(net, n).weight
        + sum(v * each[n].up @ each[n].down for v, each in zip(row, loras, strict=True) if n in each)
        for n in SHAPES
    }
    return torch.tanh(x @ weight["a"].T + net.a.bias) @ weight["b"].T


X = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LORAS = [lora(1, 3), lora(2, 1, ("b",)), lora(3, 4)]


@pytest.fixture
def counted():
    """(backend, list of the graphs that it was given)"""
    torch._dynamo.reset()
    graphs = []
    yield lambda graph, inputs: graphs.append(graph) or graph.forward, graphs
    torch._dynamo.reset()


@torch.no_grad()
def test_one_row_for_all_a_row_per_sample_and_other_loras_are_the_dense_weights():
    net = Net()
    for samples in (1, 3):
        with reserved(net, ["a", "b"], max_loras=4, max_rank=5, samples=samples) as room:
            assert torch.equal(net(X), Net()(X))
            room.load(LORAS)
            room.row = [0.7, -0.4, 1.3]
            torch.testing.assert_close(net(X), dense(net, LORAS, [0.7, -0.4, 1.3], X))
            if samples == 3:
                rows = [[1.0, 0.0, 0.0], [0.0, 0.5, -1.0], [0.0, 0.0, 0.0]]
                room.row = rows
                assert room.row == rows
                want = torch.stack([dense(net, LORAS, row, x) for row, x in zip(rows, X, strict=True)])
                torch.testing.assert_close(net(X), want)
            room.load(LORAS[2:])  # what was there before leaves no trace
            assert torch.equal(net(X), Net()(X))
            room.row = [2.0]
            torch.testing.assert_close(net(X), dense(net, LORAS[2:], [2.0], X))
        assert torch.equal(net(X), Net()(X))
        assert not net.a._forward_hooks


@pytest.mark.filterwarnings("error")
@torch.no_grad()
def test_within_the_room_one_graph_serves_all_and_beyond_it_one_more_is_announced(counted):
    backend, graphs = counted
    net = Net()
    with reserved(net, ["a", "b"], max_loras=3, max_rank=4, samples=3) as room:
        net.compile(backend=backend, fullgraph=True)
        for turn in range(6):
            loras = [lora(10 + turn, 1 + turn % 4), lora(20 + turn, 2)][: 1 + turn % 2]
            room.load(loras)
            for weight in (0.5, -0.1 * turn):
                row = [weight] * len(loras)
                room.row = row
                torch.testing.assert_close(net(X), dense(net, loras, row, X))
        assert len(graphs) == 1
        five = [lora(30 + i, 2 + i) for i in range(5)]
        with pytest.warns(UserWarning, match=r"do not fit into the room for 3 of rank 4; it now holds 5 of rank 6"):
            room.load(five)
        for row in ([1.0] * 5, [0.3, 0.0, -1.0, 0.5, 0.1]):
            room.row = row
            torch.testing.assert_close(net(X), dense(net, five, row, X))
        room.load(LORAS)
        room.row = [1.0, 1.0, 1.0]
        torch.testing.assert_close(net(X), dense(net, LORAS, [1.0] * 3, X))
        assert (len(graphs), room.grown) == (2, 1)
    assert torch.equal(net(X), Net()(X))  # the graph that holds the LoRAs is not used any more


@torch.no_grad()
def test_what_does_not_fit_is_refused_and_changes_nothing():
    net = Net()
    convolution = Lora({"a": LowRank.from_factors(torch.zeros(1, 7, 3, 3), torch.zeros(9, 1))})
    with reserved(net, ["b", "a"], max_loras=2, max_rank=4) as room:
        room.load(LORAS[:2])
        room.row = [0.5, 1.0]
        before = net(X)
        for bad, message in (
            ([lora(1, 9), Lora({"norm": LORAS[0]["a"]})], "LoRA number 2: norm is not among the 2 reserved modules"),
            ([Lora({"a": LORAS[0]["b"]})], r"LoRA number 1: a has down \[3, 9\] and up \[5, 3\], wanted \[r, 7\]"),
            ([convolution], r"a has down \[1, 7, 3, 3\]"),
        ):
            with pytest.raises(ValueError, match=message):
                room.load(bad)
        for row in ([1.0], [[1.0, 0.0]] * 2, [1.0, float("nan")]):
            with pytest.raises(ValueError, match=r"wanted finite numbers, \[2\] or \[1, 2\]"):
                room.row = row
        assert torch.equal(net(X), before)
        assert (room.grown, room.max_rank) == (0, 4)
        with pytest.raises(RuntimeError, match="attached to this Net already"), attached(net, LORAS):
            pass
    for paths, options, message in (
        (["c"], {}, "'c' is no module of the Net"),
        (["norm"], {}, r"norm is a LayerNorm \(norm\), wanted a plain nn.Linear"),
        (["a"], {"max_rank": 0}, "max_rank=0, wanted a whole number of at least 1"),
        ([], {}, "wanted at least one"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            reserved(net, paths, **{"max_loras": 1, "max_rank": 1, **options}),
        ):
            pass
    net.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled already"), reserved(net, ["a"], max_loras=1, max_rank=1):
        pass
