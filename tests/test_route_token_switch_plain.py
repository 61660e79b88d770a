"""LoRA-Switch's un-merged decoding: no wait for the device, few operations, and layers left with their own forward."""

import contextlib
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from multilora.attach import attached
from multilora.gate_token_switch import TokenSwitchGate
from multilora.kernels import routed as kernels
from multilora.lora import Lora
from multilora.token_route import _Inside
from tests import handloop, tiny_text
from tests.token_gates import HEAD, IDS, _gate, _same, _token_by_token

LAST = "model.layers.1.mlp.down_proj"


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device or copies to it; notes operations and shapes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, device = str(func), lambda t: getattr(t, "device", torch.device("cpu")).type
        if any(word in name for word in ("_local_scalar_dense", "item", "nonzero", "is_nonzero")):
            raise AssertionError(f"{name} waits for the device")
        if "copy" in name and args and device(args[0]) != device(out):
            raise AssertionError(f"{name} copies from {device(args[0])} to {device(out)}")
        self.seen.append((name, tuple(getattr(out, "shape", ()))))
        return out


@pytest.mark.parametrize("rows", [1, 3])
def test_unmerged_decoding_never_waits_for_the_device_and_has_fixed_shapes(rows):
    """On the meta device, where there are no numbers to read; two tokens run the same operations."""
    model = copy.deepcopy(tiny_text.model("llama")).to("meta")
    loras = [lora.to(device="meta") for lora in tiny_text.loras("llama", 4)]
    gate, ids = _gate(), torch.zeros(rows, 1, dtype=torch.long, device="meta")
    mask = torch.zeros(rows, 1, 1, 1, device="meta")  # without one, transformers reads the positions on the host
    gate = TokenSwitchGate(gate.heads, {n: t.to("meta") for n, t in gate.tensors.items()}, 4)

    def step(mode, bank=None):
        if bank is not None:
            bank.gate = gate.asked([1.0, 0.5, 2.0, 1.0])
        with mode:
            model(ids, attention_mask=mask, use_cache=False)
        return getattr(mode, "seen", [])

    with torch.no_grad():
        base = step(NoSync())
        with attached(model, loras, form="side") as bank:
            step(contextlib.nullcontext(), bank)  # makes what stays: stacked factors, weights on the device
            first, second = step(NoSync(), bank), step(NoSync(), bank)
    assert first == second
    matmuls = [sum("mm" in name for name, _ in seen) for seen in (base, first)]
    # A layer: queries, keys and values share a first matmul, gate and up another; the router has one.
    assert matmuls[1] - matmuls[0] == 2 * (1 + 3 + 2 + 1 + 2 + 2) + 1
    with torch.no_grad(), pytest.raises(AssertionError, match="waits"), NoSync():
        torch.ones(3).sum().item()


# -- plain layers without hooks -----------------------------------------------------------------------------------


def _forwards(model):
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


def _untouched(model):
    return not _forwards(model) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _rerun(bank, gate, token, **more):
    bank.gate = gate.asked()
    return bank.model(torch.tensor([[token]]), use_cache=False, **more).logits


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_picked_token_costs_two_operations_a_lora_for_layers_that_read_one_input(family):
    model = copy.deepcopy(tiny_text.model(family))
    loras, gate = tiny_text.loras(family, 4), _gate()
    mask = {"attention_mask": torch.zeros(1, 1, 1, 1)}  # without one, transformers reads the positions on the host
    with torch.no_grad(), attached(model, loras, form="side") as bank:
        with NoSync() as base:
            model(torch.tensor([[9]]), use_cache=False, **mask)
        for token in (9, 21):
            _rerun(bank, gate, token, **mask)
        with NoSync() as routed:
            _rerun(bank, gate, 9, **mask)

    def more(word):
        return sum(word in name for name, _ in routed.seen) - sum(word in name for name, _ in base.seen)

    biases = sum(m.bias is not None for n, m in model.named_modules() if n in bank.paths and n != HEAD)
    assert more("mm") == 2 * 4 * 2 * 2 + 1  # layers, runs of siblings, picks; the router
    assert more("aten.add_.") == 1 + biases  # the head knows its route when its own matmul is done


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_with_biases_other_widths_hooks_and_missing_loras_decode_as_they_read(family, mode):
    """Biases of their own (Qwen), keys narrower than queries, a hook of somebody else, LoRAs that lack a layer."""
    model, gate, seen = copy.deepcopy(tiny_text.model(family)), _gate(), []
    last = "model.layers.1.mlp.up_proj"
    loras = [Lora({p: part for p, part in lora.items() if i == 3 or p != last})
             for i, lora in enumerate(tiny_text.loras(family, 4))]  # fmt: skip
    hooked = model.get_submodule(LAST)
    handle = hooked.register_forward_hook(lambda *_: seen.append(1))
    with mode(), attached(model, loras, form="side") as bank:
        base = model(IDS[:1]).logits
        bank.gate = gate.asked()
        side = model(IDS[:1]).logits
        bank.reset_calls()
        seen.clear()
        got, _ = _token_by_token(model, bank, gate, IDS[:1])
        assert set(bank.calls.values()) == {6} == {len(seen)}
        assert _forwards(model) == set(bank.paths) - {LAST}
        bank.gate = None
        assert not _forwards(model)
        assert torch.equal(model(IDS[:1]).logits, base)
    handle.remove()
    _same(got, side)
    assert handloop.relative(side, base) > 0.1
    assert _untouched(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["placing", "token"])
def test_layers_have_their_own_forward_again_after_an_error_anywhere(at, error, monkeypatch):
    model, loras, gate = copy.deepcopy(tiny_text.model("llama")), tiny_text.loras("llama", 4), _gate()
    with torch.no_grad():
        base = model(IDS[:1], use_cache=False).logits
        calls, own = [], _Inside.__init__

        def placed(self, *arguments):
            own(self, *arguments)
            calls.append(self)
            if at == "placing" and len(calls) == 5:
                raise error

        monkeypatch.setattr(_Inside, "__init__", placed)
        with pytest.raises(error), attached(model, loras, form="side") as bank:
            _rerun(bank, gate, 9)
            assert len(_forwards(model)) == len(bank.paths) == len(calls)
            monkeypatch.setattr(kernels, "routed_picked", lambda *_: (_ for _ in ()).throw(error))
            _rerun(bank, gate, 21)
        monkeypatch.undo()
        assert _untouched(model)
        assert torch.equal(model(IDS[:1], use_cache=False).logits, base)


def test_a_model_that_comes_back_to_the_cpu_decodes_there():
    """The meta device in a GPU's place: what was made there for a layer is not used after the move."""
    ours = copy.deepcopy(tiny_text.model("llama"))
    numbers, loras, gate = copy.deepcopy(ours.state_dict()), tiny_text.loras("llama", 4), _gate()
    token = IDS[:1, :1]
    with torch.no_grad(), attached(copy.deepcopy(ours), loras, form="side") as bank:
        bank.gate = gate.asked()
        want = bank.model(token, use_cache=False).logits
    with torch.no_grad(), attached(ours.to("meta"), loras, form="side") as bank:
        bank.gate = gate.asked()
        ours(token.to("meta"), attention_mask=torch.zeros(1, 1, 1, 1, device="meta"), use_cache=False)
        ours.to_empty(device="cpu").load_state_dict(numbers)
        for _ in range(2):
            bank.gate = gate.asked()
            got = ours(token, attention_mask=torch.zeros(1, 1, 1, 1), use_cache=False).logits
            _same(got, want)
