"""Keys and values of a prompt once per LoRA, siblings' first matmul as one: counts, bits, and when it must not be."""

import gc
import weakref

import pytest
import torch
from torch import nn

from multilora.attach import attached
from multilora.lora import Lora, LowRank
from multilora.pipelines.composing import composing
from multilora.pipelines.steady import Steady
from multilora.remembered import remembering, text_projections
from multilora.stacked import stacking
from tests import tiny
from tests.test_attach_hosts import Leaves, _attention_lora, _unet


@pytest.fixture(scope="module")
def unet():
    return _unet()


def rows_of(k, weights, halves=2):
    return [[w if i == j else 0.0 for i in range(k)] for j, w in enumerate(weights) for _ in range(halves)]


@torch.no_grad()
def test_batched_composite_of_five_adds_at_most_22_percent_operations(unet):
    loras = [_attention_lora(unet, seed) for seed in range(5)]
    x, text = torch.randn(10, 4, 8, 8), torch.randn(10, 77, 77)
    with Leaves() as base:
        plain = unet(x, 7, text).sample
    rows = rows_of(5, [0.2, 0.4, 0.6, 0.8, 1.0])
    with attached(unet, loras, component="unet", form="side") as bank:
        bank.row = rows
        alone = unet(x, 7, text).sample
        with remembering(bank, text_projections(unet, bank.paths)) as memory:
            first = unet(x, 7, text).sample
            with Leaves() as leaves:
                again = unet(x, 7, text).sample
    print(f"\n{leaves.count} operations, {base.count} of the base: {leaves.count / base.count:.3f}")
    assert leaves.count <= 1.22 * base.count
    assert (memory.misses, memory.hits) == (32, 32)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)
    assert (alone - plain).abs().max() > 0.05 * plain.abs().max()
    assert not any("forward" in vars(m) for m in unet.modules())


@torch.no_grad()
def test_what_is_remembered_follows_the_row_the_text_and_its_changes_in_place():
    pipe = tiny.sd15(torch.float64)
    unet, loras = pipe.unet, [tiny.lora_for(pipe, seed=s, rank=3 + s) for s in range(2)]
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    texts = [torch.randn(2, 5, 32, dtype=torch.float64) for _ in range(2)]
    calls = [([0.5, 0.0], 0), ([0.0, 0.7], 0), ([0.5, 0.0], 1), ([[0.5, 0.0], [0.0, 0.7]], 1), ([0.0, 0.0], 0),
             ([0.5, 0.0], 0)]  # fmt: skip
    for form in ("side", "rebuilt", "bank"):
        with attached(unet, loras, component="unet", form=form) as bank:
            want = []
            for row, n in calls:
                bank.row = row
                want.append(unet(x, 7, texts[n]).sample)
            with remembering(bank, text_projections(unet, bank.paths)) as memory:
                for _ in range(2):
                    for (row, n), wanted in zip(calls, want, strict=True):
                        bank.row = row
                        torch.testing.assert_close(unet(x, 7, texts[n]).sample, wanted, rtol=1e-11, atol=1e-11)
                paths = len(text_projections(unet, bank.paths))
                assert memory.hits == paths * 7  # the last call of the first round is its first
                bank.reset_calls()
                unet(x, 7, texts[0])
                bank.check_called()
                kept, changed = texts[0].clone(), 2 * texts[0]
                texts[0].copy_(changed)
                got = unet(x, 7, texts[0]).sample
                bank.gate = lambda path, x: torch.tensor([0.5, 0.0], dtype=x.dtype)
                torch.testing.assert_close(unet(x, 7, texts[0]).sample, got, rtol=1e-9, atol=1e-9)
                assert memory.hits == paths * 8
                bank.gate = None
                texts[0].copy_(kept)
            torch.testing.assert_close(unet(x, 7, changed).sample, got, rtol=1e-11, atol=1e-11)
            assert (got - want[-1]).norm() > 1e-3 * got.norm()


@torch.no_grad()
def test_batched_composite_in_the_bank_form_adds_no_operation(unet):
    loras = [_attention_lora(unet, seed) for seed in range(5)]
    x, text = torch.randn(10, 4, 8, 8), torch.randn(10, 77, 77)
    with Leaves() as base:
        plain = unet(x, 7, text).sample
    positive = [[v * (n % 2) for v in row] for n, row in enumerate(rows_of(5, [0.2, 0.4, 0.6, 0.8, 1.0]))]
    for rows in (rows_of(5, [0.2, 0.4, 0.6, 0.8, 1.0]), positive):
        with attached(unet, loras, component="unet", form="side") as bank:
            bank.row = rows
            want = unet(x, 7, text).sample
        with attached(unet, loras, component="unet", form="bank") as bank, stacking(bank) as stacked:
            bank.row = rows
            unet(x, 7, text)
            with Leaves() as leaves:
                got = unet(x, 7, text).sample
            size = sum(m.weight.nbytes for n, m in unet.named_modules() if n in bank.paths)
            assert stacked.nbytes == size * (5 if rows is not positive else 10)
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
            assert (got - plain).norm() > 0.05 * plain.norm()
            bank.row = rows[2]  # the same for all: merged in place, as ever
            one = unet(x, 7, text).sample
            bank.row = rows
            with remembering(bank, text_projections(unet, bank.paths)) as memory:
                unet(x, 7, text)
                with Leaves() as fewer:
                    again = unet(x, 7, text).sample
                assert torch.equal(again, got)
            assert memory.hits == 32
        assert leaves.count == base.count
        assert fewer.count == base.count - 32
        with attached(unet, loras, component="unet", form="rebuilt") as bank:
            bank.row = rows[2]
            torch.testing.assert_close(unet(x, 7, text).sample, one)
        with attached(unet, loras, component="unet", form="bank", bank_bytes=size * 2) as bank, stacking(bank) as few:
            bank.row = rows
            torch.testing.assert_close(unet(x, 7, text).sample, got, rtol=1e-3, atol=1e-3)
            assert 0 < few.nbytes <= 2 * size
    assert not any("forward" in vars(m) for m in unet.modules())
    assert torch.equal(unet(x, 7, text).sample, plain)


@torch.no_grad()
@pytest.mark.parametrize("method", ["merge", "switch", "composite"])
def test_a_composition_projects_each_prompt_once_per_lora(method):
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, seed=s, text_encoder=True) for s in range(2)]
    layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    runs = []

    class Counted(nn.Linear):
        def forward(self, x):
            runs.append(len(x))
            return super().forward(x)

    layer.__class__ = Counted
    options = {"every": 2} if method == "switch" else {}
    for text_encoder in ("per_row", "none"):
        for passes_per_call in (1, None):
            runs.clear()
            with composing(pipe, loras, method, text_encoder=text_encoder, form="side",
                           passes_per_call=passes_per_call, **options):  # fmt: skip
                pipe("a fox", negative_prompt="blurry", num_inference_steps=6, output_type="latent")
            batched = method == "composite" and passes_per_call is None
            assert runs == {"merge": [2], "switch": [2, 2], "composite": [4] if batched else [2, 2]}[method]


def test_an_unknown_path_is_refused():
    pipe = tiny.sd15()
    refused = pytest.raises(ValueError, match=r"'conv_in' is no linear module")
    with attached(pipe.unet, [tiny.lora_for(pipe)], component="unet") as bank, refused, remembering(bank, ["conv_in"]):
        pass


class Attention(nn.Module):
    """Four linears as diffusers names them; to_k may get an input of its own, or q's after a change in place."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, n, dtype=torch.float64) for n in (4, 5, 7))

    def forward(self, x, other=None, change=False):
        q = self.to_q(x)
        if change:
            x.mul_(3.0)
        return torch.cat([q, self.to_k(x if other is None else other), self.to_v(x)], -1)


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def test_siblings_equal_each_layer_alone():
    host = tiny.seeded(Host(), 1)
    g = torch.Generator().manual_seed(3)
    loras, ranks = [], (2, 1, 3)
    for rank in ranks:
        loras.append(Lora({
            f"attn.{n}": LowRank.from_factors(
                torch.randn(rank, 6, generator=g, dtype=torch.float64),
                torch.randn(getattr(host.attn, n).out_features, rank, generator=g, dtype=torch.float64),
            )
            for n in ("to_q", "to_k", "to_v")
        }))  # fmt: skip
    x, other = (torch.randn(6, 3, 6, generator=g, dtype=torch.float64) for _ in range(2))

    def want(rows, inputs):
        parts = []
        for n, given in zip(("to_q", "to_k", "to_v"), inputs, strict=True):
            layer = getattr(host.attn, n)
            for b, row in enumerate(rows):
                factors = [lora[f"attn.{n}"] for lora in loras]
                delta = sum(w * f.up @ f.down for w, f in zip(row, factors, strict=True))
                parts.append(given[b] @ (layer.weight + delta).T + layer.bias)
        k = len(rows)
        return torch.cat([torch.stack(parts[i * k : (i + 1) * k]) for i in range(3)], -1)

    rows = {"one": [[0.5, 0.0, -1.0]] * 6, "each": rows_of(3, [0.5, 0.7, -1.0]),
            "mixed": [[0.5, 0.3, 0.2]] * 3 + [[0.0, 1.0, 0.0]] * 3}  # fmt: skip
    with torch.no_grad(), attached(host, loras, form="side") as bank:
        for each in rows.values():
            bank.row = each if len({tuple(r) for r in each}) > 1 else each[0]
            for _ in range(2):
                torch.testing.assert_close(host(x), want(each, [x] * 3))
                torch.testing.assert_close(host(x, other), want(each, [x, other, x]))
                moved = x.clone()
                torch.testing.assert_close(host(moved, change=True), want(each, [x, 3 * x, 3 * x]))
        with torch.inference_mode():
            torch.testing.assert_close(host(x + 0), want(each, [x] * 3))
        with Leaves() as leaves:
            host(x)
        assert leaves.count == 3 + 1 + 3 + 1  # base, one shrink, expands, the cat
    grown = x.clone().requires_grad_()
    with attached(host, loras, form="side") as bank:
        bank.row = rows["one"][0]
        host(grown).square().sum().backward()
    again = x.clone().requires_grad_()
    want(rows["one"], [again] * 3).square().sum().backward()
    torch.testing.assert_close(grown.grad, again.grad)


def test_a_text_is_made_once_from_the_same_unchanged_tensors():
    steady, a, b = Steady(), torch.ones(2), torch.zeros(2)
    made = steady.same("k", [a, b], lambda: torch.cat([a, b]))
    assert steady.same("k", [a, b], lambda: None) is made
    assert steady.same("other", [a, b], lambda: a + b) is not made
    assert steady.same("k", [a, a], lambda: torch.cat([a, a])) is not made
    a.add_(1)
    assert torch.equal(steady.same("k", [a, b], lambda: torch.cat([a, b])), torch.tensor([2.0, 2.0, 0.0, 0.0]))
    assert steady.same("k", [None], lambda: "made") == "made"
    with torch.inference_mode():
        c = torch.ones(2)
    assert steady.same("k", [c], lambda: c + 1) is not steady.same("k", [c], lambda: c + 1)


@torch.no_grad()
def test_loras_are_freed_without_the_garbage_collector():
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, seed=s) for s in range(2)]
    alive = [weakref.ref(part.down) for lora in loras for part in lora.values()]
    gc.collect()
    gc.disable()
    try:
        for form in ("side", "bank"):
            with composing(pipe, loras, "composite", form=form, cache=2):
                pipe("a fox", num_inference_steps=3, output_type="latent")
        del loras
        assert not [r for r in alive if r() is not None]
    finally:
        gc.enable()
