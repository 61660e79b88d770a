"""LoRAMoE's routers against layers written out by hand in float64, its identities, and the balancing constraint."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from multilora.attach import attached
from multilora.gate_loramoe import NO_TYPE, LoramoeGate, experts_folder, experts_of, halves, localised_balance
from multilora.gates import CARD, Gate, named, read_gate, write_gate
from multilora.lora import Card, Lora, LowRank
from multilora.pipelines.text import composing_text
from tests import handgate, handloop, tiny_text

TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def _normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gate(model, loras, strength=1.0):
    """Routers of random weights at every linear of the LoRAs."""
    widths = {path: part.shape[1] for lora in loras for path, part in lora.items()}
    gate = LoramoeGate.fresh(widths, len(loras), dtype=torch.float64)
    for i, tensor in enumerate(gate.tensors.values()):
        tensor.copy_(strength * _normal(*tensor.shape, seed=30 + i))
    return gate


@pytest.fixture(scope="module")
def llama():
    """(model, three LoRAs, their routers) in float64."""
    model = copy.deepcopy(tiny_text.model("llama")).double()
    loras = [lora.to(torch.float64) for lora in tiny_text.loras("llama", 3)]
    return model, loras, _gate(model, loras)


def _hand(gate, order):
    def share(path, x, parts):
        return handgate.softmax(torch.stack([x @ gate.tensors[f"weight.{path}"][i] for i in order], -1))

    return share


IDS = torch.tensor([[3, 9, 4, 11, 5, 7], [8, 3, 3, 20, 6, 10]])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0)])
def test_a_model_is_the_loop_by_hand(llama, order, tmp_path):
    """All experts, and some in another order: the softmax is then over these alone."""
    model, loras, gate = llama
    file = write_gate(Gate("loramoe", named(loras), gate.tensors, gate.settings()), tmp_path / "g.safetensors")
    chosen = [loras[i] for i in order]
    hand = handgate.gated_copy(model, [handloop.factors(lora) for lora in chosen], _hand(gate, order))
    with torch.no_grad():
        want, base = hand(IDS).logits, model(IDS).logits
        with composing_text(model, chosen, "loramoe", gate=str(file)):
            got = model(IDS).logits
        with composing_text(model, chosen, "loramoe"):
            mean = model(IDS).logits
    torch.testing.assert_close(got, want, **TIGHT)
    assert handloop.relative(want, base) > 0.1
    assert handloop.relative(want, mean) > 0.05  # the routers matter


def test_every_token_has_its_own_shares_that_sum_to_one(llama):
    model, loras, gate = llama
    with torch.no_grad(), attached(model, loras, form="side") as bank:
        bank.gate = asked = _gate(model, loras, strength=30.0).asked()
        model(IDS)
    assert set(asked.shares) == set(gate.widths)
    for share in asked.shares.values():
        assert share.shape == (2, 6, 3)
        torch.testing.assert_close(share.sum(-1), torch.ones(2, 6).double())
        assert (share >= 0).all()
        assert share.std((0, 1)).max() > 1e-3


def test_identities(llama):
    """No router: the mean of the experts. One expert: that LoRA, whatever its router. Zero experts: the base."""
    model, loras, gate = llama
    fresh = LoramoeGate.fresh(gate.widths, 3, dtype=torch.float64)
    alone = LoramoeGate(gate.widths, {n: t[1:2] for n, t in gate.tensors.items()}, 1)
    nothing = [Lora({k: LowRank(p.down, torch.zeros_like(p.up)) for k, p in lora.items()}) for lora in loras]

    def under(used, row=None, asked=None):
        with torch.no_grad(), attached(model, used, form="side") as bank:
            if row is None:
                bank.gate = asked
            else:
                bank.row = row
            return model(IDS).logits

    with torch.no_grad():
        base = model(IDS).logits
    torch.testing.assert_close(under(loras, asked=fresh.asked()), under(loras, [1 / 3] * 3), **TIGHT)
    torch.testing.assert_close(under(loras[1:2], asked=alone.asked()), under(loras[1:2], [1.0]), **TIGHT)
    torch.testing.assert_close(under(nothing, asked=gate.asked()), base, **TIGHT)
    torch.testing.assert_close(
        under(loras, asked=gate.asked([1.0, 0.0, 1.0], live=[True, False, True])),
        under([loras[0], loras[2]], asked=LoramoeGate(gate.widths, gate.tensors, 3, [0, 2]).asked()), **TIGHT,
    )  # fmt: skip


def test_generation_is_the_hand_made_models(llama, tmp_path):
    """With a KV cache, prompts of two lengths in one batch; the encoder-decoder without padding."""
    tokenizer = tiny_text.tokenizer()
    model, loras, gate = llama
    file = write_gate(Gate("loramoe", named(loras), gate.tensors, gate.settings()), tmp_path / "g.safetensors")
    given = tokenizer(["abc 12", "de"], return_tensors="pt", padding=True, padding_side="left",
                      return_token_type_ids=False)  # fmt: skip
    hand = handgate.gated_copy(model, [handloop.factors(lora) for lora in loras], _hand(gate, range(3)))
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = hand.generate(**given, **asked)
    with composing_text(model, loras, "loramoe", gate=str(file)):
        assert torch.equal(model.generate(**given, **asked), want)
    assert not torch.equal(model.generate(**given, **asked), want)

    t5 = copy.deepcopy(tiny_text.model("t5")).double()
    # T5's own code reads the weight of `wo`, which a layer made by hand does not have
    loras = [Lora({k: p.to(torch.float64) for k, p in lora.items() if not k.endswith(".wo")})
             for lora in tiny_text.loras("t5", 2)]  # fmt: skip
    gate = _gate(t5, loras)
    hand = handgate.gated_copy(t5, [handloop.factors(lora) for lora in loras], _hand(gate, range(2)))
    with torch.no_grad():
        want = hand(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
        with attached(t5, loras, form="side") as bank:
            bank.gate = gate.asked()
            got = t5(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
    torch.testing.assert_close(got, want, **TIGHT)


# -- the constraint ------------------------------------------------------------------------------------------------


def _by_hand(shares, types, mask, delta):
    """Sample by sample and expert by expert, over plain numbers."""
    total = 0.0
    for share in shares.values():
        k, values = share.shape[-1], []
        for n, kind in enumerate(types):
            tokens = [t for t in range(share.shape[1]) if mask[n][t]]
            for i in range(k):
                mass = sum(float(share[n, t, i]) for t in tokens) / len(tokens)
                own = 0 if i < k // 2 else 1
                values.append(mass * (1.0 if kind == NO_TYPE else 1 + delta if kind == own else 1 - delta))
        mean = sum(values) / len(values)
        total += sum((v - mean) ** 2 for v in values) / (len(values) - 1) / mean**2
    return total / len(shares)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])


@pytest.mark.parametrize("delta", [0.1, -0.3, 0.0])
def test_the_constraint_by_hand_padding_left_out_and_the_same_for_any_depth(delta):
    shares = {n: (2 * _normal(3, 5, 4, seed=s)).softmax(-1) for s, n in enumerate("ab")}
    types = [0, 1, NO_TYPE]
    got = localised_balance(shares, types, MASK, delta)
    assert float(got) == pytest.approx(_by_hand(shares, types, MASK, delta), rel=1e-12)
    other = {n: torch.where(MASK[..., None].bool(), s, torch.full_like(s, 9.0)) for n, s in shares.items()}
    torch.testing.assert_close(localised_balance(other, types, MASK, delta), got)
    deep = {f"{n}{i}": s for n, s in shares.items() for i in range(8)}
    torch.testing.assert_close(localised_balance(deep, types, MASK, delta), got)
    flat = {n: s.flatten(0, 1) for n, s in shares.items()}
    torch.testing.assert_close(localised_balance(flat, types, MASK, delta), got)


def test_bounds_of_the_constraint():
    """0 where Q goes as 1 / I; delta^2 n / (n - 1) at uniform shares; B k when one expert has all of one sample."""
    ones = torch.ones(2, 3)
    uniform = {"a": torch.full((2, 3, 6), 1 / 6).double()}
    assert float(localised_balance(uniform, [0, 1], ones, 0.2)) == pytest.approx(0.2**2 * 12 / 11)
    least = torch.tensor([[0.8] * 3 + [1.2] * 3, [1.2] * 3 + [0.8] * 3]).double() / 6
    assert float(localised_balance({"a": least[:, None].expand(2, 3, 6)}, [0, 1], ones, 0.2)) < 1e-12
    one = torch.eye(6).double()[:1, None].expand(1, 3, 6)
    assert float(localised_balance({"a": one}, [0], ones[:1], 0.2)) == pytest.approx(6.0)
    for seed in range(20):
        some = {"a": (5 * _normal(2, 3, 6, seed=seed)).softmax(-1)}
        assert 0 < float(localised_balance(some, [0, 1], ones, 0.2)) <= 12


@pytest.mark.parametrize("delta", [0.3, -0.3])
def test_descent_tells_the_halves_apart(delta):
    """The published sign gives a sample's own half less of it, (1 - delta) / (1 + delta); a negative one more."""
    logits = torch.zeros(2, 1, 4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], 0.05)
    for _ in range(300):
        optimiser.zero_grad()
        localised_balance({"a": logits.softmax(-1)}, [0, 1], torch.ones(2, 1), delta).backward()
        optimiser.step()
    share = logits.detach().softmax(-1)[:, 0]
    for n in (0, 1):
        own = share[n][torch.tensor(halves(4)) == n].sum() / share[n][torch.tensor(halves(4)) != n].sum()
        assert float(own) == pytest.approx((1 - delta) / (1 + delta), rel=1e-3)


def test_what_the_constraint_does_not_take():
    with pytest.raises(ValueError, match="3 experts: the balancing constraint has two halves"):
        localised_balance({"a": torch.ones(1, 2, 3)}, [0], torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"b\.c: shares of .* wants layers that see every token"):
        localised_balance({"b.c": torch.ones(1, 3, 2)}, [0], torch.ones(1, 2))


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_bad_gate_is_refused_by_name(tmp_path):
    model = nn.Sequential(nn.Linear(5, 4))
    loras = [Lora({"0": LowRank(torch.ones(1, 5), torch.ones(4, 1) * i)}, Card(f"e{i}", sha256=f"{i}" * 64))
             for i in range(2)]  # fmt: skip
    gate = _gate(model, loras)

    def said(**change):
        about = {"version": 1, "kind": "loramoe", "loras": list(named(loras)), "recipe": {},
                 "settings": gate.settings()} | change  # fmt: skip
        held = {n: t.float() for n, t in gate.tensors.items()}
        save_file(held, tmp_path / "b.safetensors", {CARD: json.dumps(about)})
        with pytest.raises(ValueError, match=r"b\.safetensors") as error:
            LoramoeGate.of(read_gate(tmp_path / "b.safetensors"), used)
        return str(error.value)

    used = loras
    assert "a mole gate, wanted loramoe" in said(kind="mole")
    assert "widths['0'] is 0" in said(settings={"widths": {"0": 0}})
    assert "weight.0 is of shape [2, 5], wanted [2, 6]" in said(settings={"widths": {"0": 6}})
    assert "a router at 1, where none of the LoRAs has a part" in said(settings={"widths": {"1": 5}})
    assert "setting widths is None" in said(settings={})
    used = [Lora({"0": LowRank(torch.ones(1, 5), torch.ones(4, 1))}, Card("e1", sha256="f" * 64))]
    assert "LoRA 'e1' is none of them (a LoRA of this name, but another file" in said()


def test_where_experts_are(tmp_path):
    assert experts_of(tmp_path / "g.safetensors") == []
    for name in ("10", "2", "notes"):
        (tmp_path / "g_experts" / name).mkdir(parents=True)
    assert experts_folder(tmp_path / "g.safetensors") == tmp_path / "g_experts"
    assert [p.name for p in experts_of(tmp_path / "g.safetensors")] == ["2", "10"]
