"""LoRA-Switch for language models: the route by hand in float64; un-merged, merged and side decoding agree."""

import copy

import pytest
import torch

from multilora.attach import attached
from multilora.gate_mole import group_of
from multilora.gate_token_switch import TokenSwitchGate
from multilora.gates import Gate, named, read_gate, write_gate
from multilora.kernels import choice, plain
from multilora.kernels import routed as kernels
from multilora.lora import Lora
from multilora.method import resolve
from multilora.pipelines.text import composing_text
from multilora.side import Branch
from multilora.token_route import Merge
from tests import handgate, handloop, tiny_text
from tests.token_gates import HEAD, IDS, _gate, _same, _token_by_token


def _by_hand(weight, bias, x, top_k, live=None):
    """[B, T, k] token by token: softmax, the largest, over their sum."""
    rows = torch.zeros(*x.shape[:2], len(bias), dtype=x.dtype)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            p = handgate.softmax(weight @ x[b, t] + bias, live)
            best = sorted(range(len(p)), key=lambda i: -float(p[i]))[:top_k]
            for i in best:
                rows[b, t, i] = p[i] / sum(p[j] for j in best)
    return rows


@pytest.mark.parametrize(("top_k", "mask"), [(1, None), (2, None), (2, [True, False, True, True]), (9, None)])
def test_every_layer_has_the_first_ones_route_as_by_hand(top_k, mask):
    model = copy.deepcopy(tiny_text.model("llama")).double()
    loras = [lora.to(torch.float64) for lora in tiny_text.loras("llama", 4)]
    gate = _gate(top_k=top_k, dtype=torch.float64)
    held, weights = {}, [1.0, 0.5, 2.0, -1.0]

    def share(path, x, parts):
        if path == HEAD:
            held["row"] = _by_hand(*gate.tensors.values(), x, top_k, mask)
        return held["row"] * torch.tensor(weights).double()

    with torch.no_grad():
        want = handgate.gated_copy(model, [handloop.factors(lora) for lora in loras], share)(IDS).logits
        with attached(model, loras, form="side") as bank:
            bank.gate = asked = gate.asked(weights, live=mask)
            got = model(IDS).logits
        plain_logits = model(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(asked.shares["network"], held["row"], rtol=1e-9, atol=1e-12)
    assert handloop.relative(want, plain_logits) > 0.1
    share = asked.shares["network"]
    torch.testing.assert_close(share.sum(-1), torch.ones(IDS.shape).double())
    assert ((share > 0).sum(-1) == min(top_k, 4 - (mask is not None))).all()
    assert len({tuple(r.nonzero().flatten().tolist()) for r in share.flatten(0, 1)}) > (top_k < 4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0, 0.25]])
def test_merged_unmerged_and_side_agree_token_by_token(rows, weights, monkeypatch):
    """One token is read or merged, several are scaled by routes of their own; all are as the whole text."""
    model, loras, gate, ids = tiny_text.model("llama"), tiny_text.loras("llama", 4), _gate(), IDS[:rows]
    blocks = [{"model.layers.1.*": 0.5}, None, None, {"*down_proj": 1.5}]
    general, merges = [], []
    own_tensor, own_put = Branch.tensor, Merge.put
    monkeypatch.setattr(Branch, "tensor", lambda self, *a: general.append(self.site.path) or own_tensor(self, *a))
    monkeypatch.setattr(Merge, "put", lambda self, row: merges.append(row) or own_put(self, row))
    with torch.no_grad():
        with attached(model, loras, form="side", blocks=blocks) as bank:
            bank.gate = gate.asked(weights)
            side = model(ids).logits
            assert len(general) == len(bank.paths)
            general.clear()
            unmerged, asked = _token_by_token(model, bank, gate, ids, weights)
            assert not general
            assert not merges
        base = model(ids).logits
        with attached(model, loras, form="rebuilt", blocks=blocks) as bank:
            merged, _ = _token_by_token(model, bank, gate, ids, weights)
            assert len(merges) == (ids.shape[1] if rows == 1 else 0)
    _same(unmerged, side)
    _same(merged, side)
    assert handloop.relative(side, base) > 0.1
    routes = torch.cat([a.shares["network"] for a in asked], 1)
    assert len({tuple(r) for r in (routes > 0).flatten(0, 1).tolist()}) > 2
    assert rows == 1 or not torch.equal(routes[0], routes[1])


@pytest.mark.parametrize("per", ["linear", "layer"])
@pytest.mark.parametrize("rows", [1, 3])
def test_routers_of_their_own_decode_as_they_read(per, rows):
    """Queries, keys and values with a route each share no matmul; nothing is merged."""
    model, loras, ids = tiny_text.model("llama"), tiny_text.loras("llama", 4), IDS[:rows]
    heads = {}
    for path, part in loras[0].items():
        heads.setdefault(group_of(path, per), (path, part.shape[1]))
    gate = _gate(per=per, heads=heads)
    for form in ("side", "rebuilt"):
        with torch.no_grad(), attached(model, loras, form=form) as bank:
            bank.gate = asked = gate.asked()
            side = model(ids).logits
            got, _ = _token_by_token(model, bank, gate, ids)
            assert not isinstance(bank._in_weights, Merge)
        _same(got, side)
    assert len(asked.shares) == len(heads) == (14 if per == "linear" else 4)


def test_rows_of_a_batch_are_single_runs_and_inference_mode_changes_nothing():
    model, loras, gate = tiny_text.model("llama"), tiny_text.loras("llama", 4), _gate()
    with attached(model, loras, form="side") as bank:
        with torch.no_grad():
            together, _ = _token_by_token(model, bank, gate, IDS)
        with torch.inference_mode():
            alone = [_token_by_token(model, bank, gate, IDS[b : b + 1])[0] for b in range(3)]
    _same(together, torch.cat(alone))


def test_tokens_back_and_forth_leave_the_weights_bit_for_bit():
    """Routes of token 1, token 2, token 1: the merged weights are the first ones again, in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(tiny_text.model("llama")).to(dtype)
        pristine = {n: p.detach().clone() for n, p in model.named_parameters()}
        seen = []
        with torch.no_grad(), attached(model, tiny_text.loras("llama", 4), form="rebuilt") as bank:
            for token in (9, 21, 9):
                bank.gate = _gate().asked()
                model(torch.tensor([[token]]), use_cache=False)
                seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            changed = {n for n in pristine if not torch.equal(seen[0][n], pristine[n])}
            assert changed == {f"{path}.weight" for path in bank.paths if path != HEAD}
            bank.gate = None
            assert all(torch.equal(p, pristine[n]) for n, p in model.named_parameters())
        assert all(torch.equal(seen[0][n], seen[2][n]) for n in pristine)
        assert not all(torch.equal(seen[0][n], seen[1][n]) for n in pristine)
        assert all(torch.equal(p, pristine[n]) for n, p in model.named_parameters())


def test_one_gate_for_two_calls_and_a_prompt_after_a_token():
    """The merged weights of one call are not those of the next, also when the caller sets no new gate."""
    model, loras, gate = tiny_text.model("llama"), tiny_text.loras("llama", 4), _gate()
    with torch.no_grad(), attached(model, loras, form="side") as bank:
        bank.gate = gate.asked()
        want = [model(IDS[:1, :n], use_cache=False).logits for n in (1, 6)]
    with torch.no_grad(), attached(model, loras, form="rebuilt") as bank:
        bank.gate = gate.asked()
        for n in (1, 6, 1):
            _same(model(IDS[:1, :n], use_cache=False).logits, want[n > 1])
        bank.row = [0.0] * 4
        bank.gate = None
        base = model(IDS[:1], use_cache=False).logits
    assert torch.equal(base, model(IDS[:1], use_cache=False).logits)


def test_one_lora_is_that_lora_and_a_missing_one_is_never_picked():
    model, loras = tiny_text.model("llama"), tiny_text.loras("llama", 4)
    with torch.no_grad(), attached(model, loras[2:3], form="side") as bank:
        bank.row = [0.7]
        want = model(IDS[:1]).logits
        got, _ = _token_by_token(model, bank, _gate(order=[2]), IDS[:1], [0.7])
    _same(got, want)
    with torch.no_grad(), attached(model, [loras[3], loras[1]], form="side") as bank:
        two, _ = _token_by_token(model, bank, _gate(order=[3, 1]), IDS[:1])
    with torch.no_grad(), attached(model, loras, form="side") as bank:
        bank.gate = _gate().asked(live=[False, True, False, True])
        masked = model(IDS[:1]).logits
    _same(two, masked)


def test_triton_reads_the_picked_loras_by_index(monkeypatch):
    """The operation's plain form stands in for its kernel, which tests/triton_kernels.py runs."""
    model, loras, gate, calls = tiny_text.model("llama"), tiny_text.loras("llama", 4), _gate(), []

    def by_index(y, x, down, up, index, weight):
        calls.append((tuple(down.shape[:2]), index.shape[-1]))
        return plain.add_by_index_(y, x, down, up, index, weight)

    with torch.no_grad(), attached(model, loras, form="side", blocks=[None, {"*": 0.5}, None, None]) as bank:
        bank.gate = gate.asked()
        want = model(IDS, use_cache=False).logits
        monkeypatch.setattr(choice, "asked", lambda: "triton")
        monkeypatch.setattr(kernels, "add_by_index_", by_index)
        got, _ = _token_by_token(model, bank, gate, IDS)
    _same(got, want)
    assert set(calls) == {((4, 6), 2)}


# -- files and whole texts -----------------------------------------------------------------------------------------


def _file(gate, loras, path, **changed):
    settings = {**gate.settings(), **changed}
    return write_gate(Gate("token_switch", named(loras), gate.tensors, settings), path)


def test_a_file_comes_back_and_bad_ones_are_refused(tmp_path):
    loras, gate = tiny_text.loras("llama", 4), _gate()
    back = TokenSwitchGate.of(read_gate(_file(gate, loras, tmp_path / "g.safetensors")), loras)
    assert back.settings() == gate.settings()
    assert all(torch.equal(back.tensors[n], t) for n, t in gate.tensors.items())
    for changed, message in (
        ({"top_k": 0}, "top_k is 0, wanted at least 1"),
        ({"top_k": True}, "setting top_k is True"),
        ({"per": "word"}, "setting per is 'word'"),
        ({"heads": {"network": [HEAD, 5]}}, r"weight.network is of shape \[4, 16\], wanted \[4, 5\]"),
        ({"heads": {"network": HEAD}}, r"heads\['network'\] is"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenSwitchGate.of(read_gate(_file(gate, loras, tmp_path / "b.safetensors", **changed)), loras)
    with pytest.raises(ValueError, match="a token_switch gate, wanted mole"):
        resolve("route", "mole", gate=str(tmp_path / "g.safetensors"))(loras)
    other = [Lora(dict(loras[0]), loras[0].card), Lora({HEAD: loras[1][HEAD]}, loras[1].card)]
    with pytest.raises(ValueError, match=r"LoRA 'llama1' is none of them \(a LoRA of this name"):
        resolve("route", "token_switch", gate=str(tmp_path / "g.safetensors"))(other)


@pytest.mark.parametrize("form", ["side", "rebuilt", "bank"])
def test_generate_is_greedy_over_whole_texts(form, tmp_path):
    """Greedy tokens with a KV cache in every form, against the hand-made layers run anew on every longer text."""
    model, loras, gate = tiny_text.model("llama"), tiny_text.loras("llama", 4, strength=6.0), _gate()
    file, held = _file(gate, loras, tmp_path / "g.safetensors"), {}

    def share(path, x, parts):
        if path == HEAD:
            held["row"] = _by_hand(*gate.tensors.values(), x, 2)
        return held["row"]

    hand, tokens = handgate.gated_copy(model, [handloop.factors(lora) for lora in loras], share), IDS[:1]
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, hand(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with composing_text(model, loras, resolve("route", "token_switch", gate=str(file)), form=form):
            made = [model.generate(IDS[:1], **wanted) for _ in range(2)]
            assert made[0].tolist() == made[1].tolist() == tokens.tolist()
        plain_tokens = model.generate(IDS[:1], **wanted)
    assert plain_tokens.tolist() != tokens.tolist()
