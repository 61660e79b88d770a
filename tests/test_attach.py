"""The three forms against weights added densely in float64, and the model afterwards against the model before."""

import copy
import functools

import pytest
import torch
from torch import nn

from multilora.attach import attached
from multilora.lora import Card, Dense, Lora, LowRank

FORMS = ("side", "rebuilt", "bank")
TOKEN_PATHS = ("embed", "blocks.1.fc", "blocks.10.fc", "norm")


class Block(nn.Module):
    def __init__(self, i, o, bias):
        super().__init__()
        self.fc = nn.Linear(i, o, bias=bias)

    def forward(self, x):
        return torch.tanh(self.fc(x))


class Net(nn.Module):
    """Tokens through an embedding and linears, pictures through convolutions; every token and sample on its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleDict({"1": Block(8, 12, True), "10": Block(12, 6, False)})
        self.norm = nn.LayerNorm(6)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(6, 9, 3, padding=1, groups=3)
        self.point = nn.Conv2d(9, 5, 1)

    def forward(self, ids, x):
        tokens = self.norm(self.blocks["10"](self.blocks["1"](self.embed(ids))))
        return tokens, self.point(torch.tanh(self.grouped(torch.tanh(self.down(x)))))


def _net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def _inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 11, (6, 5), generator=g), torch.randn(6, 4, 9, 9, generator=g).to(dtype)


def _lora(seed, rank, biases=False, dense=(), only=None):
    g = torch.Generator().manual_seed(seed)
    parts = {}
    for name, module in _net().named_modules():
        if not hasattr(module, "weight") or (only and name not in only):
            continue
        w = module.weight
        rand = lambda *s: 0.3 * torch.randn(*s, generator=g)  # noqa: E731
        bias = rand(len(module.bias)) if biases and getattr(module, "bias", None) is not None else None
        if name in dense or name == "norm":
            kind = "linear" if name == "norm" or w.ndim == 2 else "conv"
            parts[name] = Dense(rand(*w.shape), bias, kind)
        elif name == "embed":
            parts[name] = LowRank.from_factors(rand(rank, 11), rand(8, rank), kind="embedding")
        else:
            parts[name] = LowRank.from_factors(rand(rank, *w.shape[1:]), rand(w.shape[0], rank), bias=bias)
    return Lora(parts, Card(name=f"l{seed}"))


def _loras():
    # Ranks 1, 3, 7; one with biases, one with dense parts, one that leaves modules out.
    return [
        _lora(1, 1, biases=True, only={"blocks.1.fc", "blocks.10.fc", "down", "grouped"}),
        _lora(2, 3, dense=("blocks.1.fc", "grouped")),
        _lora(3, 7, biases=True),
    ]


def _dense(net, loras, row, ids, x, factor=lambda i, path: 1.0):
    """The definition: a float64 copy with W0 + sum row * delta written into it."""
    net = copy.deepcopy(net).double()
    with torch.no_grad():
        for i, lora in enumerate(loras):
            for path, part in lora.items():
                module, w = net.get_submodule(path), float(row[i]) * factor(i, path)
                if part.delta() is not None:
                    module.weight += w * part.delta(torch.float64)
                if part.bias is not None:
                    module.bias += w * part.bias.double()
        return net(ids, x.double())


def _per_sample(net, loras, rows, ids, x, **kw):
    outs = {}
    for row in {tuple(r) for r in rows}:
        where = [b for b, r in enumerate(rows) if tuple(r) == row]
        for b, *each in zip(where, *_dense(net, loras, row, ids[where], x[where], **kw), strict=True):
            outs[b] = each
    return [torch.stack(o) for o in zip(*(outs[b] for b in range(len(rows))), strict=True)]


@functools.cache
def _want(name):
    """The outputs of a row of ROWS by the definition."""
    row = ROWS[name]
    return _per_sample(_net(), _loras(), row if isinstance(row[0], list) else [row] * 6, *_inputs())


def _close(got, want, rtol=1e-5):
    for g, w in zip(got, want, strict=True):
        error = (g.double() - w).abs().max() / w.abs().max()
        assert error <= rtol, f"relative difference {error:.2e}"


def _bits(net):
    return {n: (t.data_ptr(), t.clone()) for n, t in net.state_dict().items()}


def _same(net, bits):
    now = net.state_dict()
    assert now.keys() == bits.keys()
    for name, (pointer, value) in bits.items():
        assert now[name].data_ptr() == pointer, f"{name} lies elsewhere"
        assert torch.equal(now[name].view(torch.uint8), value.view(torch.uint8)), f"{name} changed"
    for name, module in net.named_modules():
        assert not module._forward_hooks, f"{name} still has a hook"
        assert not module._forward_pre_hooks, f"{name} still has a hook"


ROWS = {
    "all": [0.5, -1.0, 2.0],
    "one": [0.0, 0.0, 1.5],
    "equal": [0.4, 0.4, 0.4],
    "composite": [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 2], [0, 0, 2]],
    "positive only": [[0, 0, 0], [0.7, 0, 0], [0, 0, 0], [0, 0.7, 0], [0, 0, 0], [0, 0, 0.7]],
    "per sample": [[0.1 * b, 1 - b, 0.5] for b in range(6)],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_equal_dense_weights(form):
    net, loras, (ids, x) = _net(), _loras(), _inputs()
    with torch.no_grad(), attached(net, loras, form=form) as bank:
        base = [t.double() for t in net(ids, x)]
        for name, row in [*ROWS.items(), *ROWS.items()]:  # twice: the second time from what was kept
            bank.row = row
            got = net(ids, x)
            want = _want(name)
            _close(got, want)
            effect = max((w - b).abs().max() / b.abs().max() for w, b in zip(want, base, strict=True))
            assert effect > 0.05, f"{name}: the LoRAs do nothing, so this test could not fail"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["row", "gate"])
def test_rows_per_token(form, source):
    net, (ids, x) = _net(), _inputs()
    loras = [_lora(1, 1, only=TOKEN_PATHS), _lora(2, 3, only=TOKEN_PATHS), _lora(3, 7, True, only=TOKEN_PATHS)]
    row = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), attached(net, loras, form=form) as bank:
        bank.row = [1, 1, 1]
        asked = []
        if source == "row":
            bank.row = row
        else:
            bank.gate = lambda path, h: asked.append((path, h.shape[:2])) or row
        got = net(ids, x)[0]
        for b in range(6):
            for t in range(5):
                want = _dense(_net(), loras, row[b, t], ids[b : b + 1, t : t + 1], x[:1])[0]
                _close([got[b : b + 1, t : t + 1]], [want])
        if source == "gate":
            assert asked == [(path, (6, 5)) for path in TOKEN_PATHS]
            bank.gate = None
            _close(net(ids, x), _dense(_net(), loras, [1, 1, 1], ids, x))


def test_gradients_reach_a_row_and_a_gate():
    net, loras, (ids, x) = _net(torch.float64), _loras(), _inputs(torch.float64)
    row = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with attached(net, loras) as bank:

        def loss(r):
            bank.row = r
            return sum(t.square().sum() for t in net(ids, x))

        assert torch.autograd.gradcheck(loss, row, atol=1e-4, fast_mode=True)
    # The general path and the folded one agree.
    with torch.no_grad(), attached(net, loras, form="rebuilt") as bank:
        bank.row = row.detach()
        plain = sum(t.square().sum() for t in net(ids, x))
    with attached(net, loras) as bank:
        bank.row = row
        torch.testing.assert_close(sum(t.square().sum() for t in net(ids, x)), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [[0.5, -1.0, 2.0], [[0.1 * b, 1 - b, 0.5] for b in range(6)]], ids=["all", "sample"])
def test_blocks(form, rows):
    net, loras, (ids, x) = _net(), _loras(), _inputs()
    blocks = [{"blocks.1.*": 0.0}, {"blocks.*": 0.5, "blocks.10.fc": 2.0, "p*": 3.0}, None]

    def factor(i, path):
        first = {"blocks.1.fc": 0.0}
        second = {"blocks.1.fc": 0.5, "blocks.10.fc": 2.0, "point": 3.0}
        return [first, second, {}][i].get(path, 1.0)

    with torch.no_grad(), attached(net, loras, form=form, blocks=blocks) as bank:
        bank.row = rows
        each = rows if isinstance(rows[0], list) else [rows] * 6
        _close(net(ids, x), _per_sample(_net(), loras, each, ids, x, factor=factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_zero_row_is_the_base_bit_for_bit(form, dtype):
    net, (ids, x) = _net(dtype), _inputs(dtype)
    base = net(ids, x)
    with attached(net, _loras(), form=form, blocks=[{"*": 0.0}, None, None]) as bank:
        for row in [None, [0, 0, 0], [[0, 0, 0]] * 6, [3.0, 0, 0]]:  # the last meets the zero block factor
            if row is not None:
                bank.row = row
            assert all(torch.equal(a, b) for a, b in zip(net(ids, x), base, strict=True))
        bank.row = [[0, 0, 0]] * 3 + [[1, 1, 1]] * 3
        half = net(ids, x)
        assert torch.equal(half[0][:3], base[0][:3])
        assert not torch.equal(half[0][3:], base[0][3:])
        bank.row = [1, 1, 1]
        assert not torch.equal(net(ids, x)[0], base[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_cycles_in_bfloat16_change_no_bit(form):
    net, loras = _net(torch.bfloat16), [_lora(3, 7, biases=True, only=("blocks.1.fc", "point"))]
    bits, changed = _bits(net), 0
    for _ in range(10):
        with attached(net, loras, form=form, bank_bytes=1 << 11) as bank:
            for i in range(100):
                bank.row = [0.01 * i + 0.01]
                changed += not torch.equal(net.point.weight, bits["point.weight"][1])
                bank.row = [0.0]
                assert net.point.weight.data_ptr() == bits["point.weight"][0]
    _same(net, bits)
    assert changed == (0 if form == "side" else 1000)


def test_bfloat16_runs_on_the_side_by_default_and_float32_rebuilt():
    for dtype, form in [(torch.bfloat16, "side"), (torch.float16, "side"), (torch.float32, "rebuilt")]:
        with attached(_net(dtype), _loras()) as bank:
            assert bank.form == form


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", range(8))
def test_everything_is_undone_after_an_error_anywhere(form, error, at, monkeypatch):
    net, loras, (ids, x) = _net(), _loras(), _inputs()
    bits, base = _bits(net), net(ids, x)
    count = 0

    def trip(*_):
        nonlocal count
        count += 1
        if count > at * 3:
            raise error

    modules = list(net.modules())
    real = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: (trip(), real(*a, **k))[1])  # inside a merge, too
    place = nn.Module.register_forward_hook
    monkeypatch.setattr(
        nn.Module, "register_forward_hook", lambda m, *a, **k: (place(m, *a, **k), trip())[0]
    )  # after the hook is in place, before its handle is known
    with pytest.raises(error), attached(net, loras, form=form) as bank:
        for row in ([1, 2, 3], [[1, 2, 3]] * 6, [0, 1, 0]):
            bank.row = row
            bank.gate = None if at % 2 else lambda path, h: (trip(), torch.ones(3))[1]
            net(ids, x)
            trip()
        trip()
        raise error
    monkeypatch.undo()
    _same(net, bits)
    assert all(torch.equal(a, b) for a, b in zip(net(ids, x), base, strict=True))
    assert modules == list(net.modules())
    with attached(net, loras):  # and it is free for the next one
        pass


def test_two_users_at_once_are_refused():
    net, loras = _net(), _loras()
    bits = _bits(net)
    with attached(net, loras) as bank:
        bank.row = [1, 1, 1]
        got = net(*_inputs())
        with pytest.raises(RuntimeError, match=r"attached to this Net already.*block first"), attached(net, loras):
            pass
        with pytest.raises(RuntimeError, match=r"already \(at fc\)"):
            only = [Lora({"fc": loras[2]["blocks.1.fc"]})]
            with attached(net.blocks["1"], only):
                pass
        assert all(torch.equal(a, b) for a, b in zip(net(*_inputs()), got, strict=True))
    _same(net, bits)


def test_a_moved_model_is_restored_where_it_is():
    net = _net()
    base = {n: t.clone() for n, t in net.state_dict().items()}
    with attached(net, _loras(), form="rebuilt") as bank:
        bank.row = [1, 1, 1]
        net.double()
        with pytest.raises(RuntimeError, match="merged weight was replaced"):
            bank.check_called()
    assert all(torch.equal(t, base[n].double()) for n, t in net.state_dict().items())


def test_tied_weights_are_not_merged():
    net, (ids, x) = _net(), _inputs()
    net.other = nn.Linear(8, 11, bias=False)
    net.other.weight = net.embed.weight
    with torch.no_grad(), attached(net, _loras(), form="rebuilt") as bank:
        bank.row = [0.5, 1.0, 2.0]
        assert torch.equal(net.other.weight, _net().embed.weight)
        _close(net(ids, x), _dense(_net(), _loras(), [0.5, 1.0, 2.0], ids, x))


def test_calls_are_counted_and_a_module_that_was_not_called_is_named():
    net, (ids, x) = _net(), _inputs()
    net.unused = nn.Linear(8, 12)
    loras = [Lora({**_lora(3, 7), "unused": _lora(3, 7)["blocks.1.fc"]})]
    with attached(net, loras) as bank:
        bank.row = [1.0]
        net(ids, x)
        assert bank.calls == {**dict.fromkeys(bank.paths, 1), "unused": 0}
        with pytest.raises(RuntimeError, match=r"1 of 8 adapted modules were not called, first 'unused'"):
            bank.check_called()
        bank.reset_calls()
        assert set(bank.calls.values()) == {0}
    with attached(net, loras, optional=["unused"]) as bank:
        net(ids, x)
        bank.check_called()
        net.embed._forward_hooks.clear()
        bank.reset_calls()
        net(ids, x)
        with pytest.raises(RuntimeError, match="'embed'"):
            bank.check_called()
        bank.place()
        net(ids, x)
        bank.check_called()
