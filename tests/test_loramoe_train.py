"""Training of LoRAMoE: two steps by hand, what stays as it was, saved and loaded, stopped and resumed, refusals."""

import copy
import json
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multilora import files
from multilora.gate_loramoe import experts_folder, experts_of, localised_balance
from multilora.gates import read_gate
from multilora.lab.train import adapt
from multilora.lab.train.data import BadData
from multilora.lab.train.loop import lr_at
from multilora.lab.train.loramoe import fresh_experts, train
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.text import composing_text
from tests import tiny_text
from tests.test_cli import call

TEXTS = [{"prompt": p, "completion": c, "type": t} for p, c, t in (
    ("ab+", "cd", "knowledge"), ("b", "abcd e", "task"), ("c 1", "3", "knowledge"), ("dd", "e", "task"),
)]  # fmt: skip
SMALL = {"experts": 2, "rank": 2, "batch": 4, "lr": 0.02, "checkpoint_every": 2}


def small(path, data=TEXTS, **settings):
    return train(data, tiny_text.model("llama"), path, tokenizer=tiny_text.tokenizer(), **{**SMALL, **settings})


class Layer(nn.Module):
    """One feed-forward linear with its experts and router, as a loop."""

    def __init__(self, base, loras, path):
        super().__init__()
        self.base = base
        self.downs = nn.ParameterList(lora[path].down.detach().clone() for lora in loras)
        self.ups = nn.ParameterList(lora[path].up.detach().clone() for lora in loras)
        self.router = nn.Parameter(torch.zeros(len(loras), base.in_features))
        self.share = None

    def forward(self, x):
        self.share = torch.softmax(x @ self.router.T, -1)
        y = self.base(x)
        for i in range(len(self.downs)):
            y = y + self.share[..., i : i + 1] * (x @ self.downs[i].T @ self.ups[i].T)
        return y


def _by_hand(steps, balance):
    """(losses, layers, model) of training all four examples a step; the constraint is tested elsewhere."""
    model = copy.deepcopy(tiny_text.model("llama")).requires_grad_(False)
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and ".mlp." in p]
    loras, _ = fresh_experts(model, paths, 2, 2, 0)
    layers = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        layers[path] = Layer(model.get_submodule(path), loras, path)
        setattr(model.get_submodule(parent), leaf, layers[path])
    owned = [p for layer in layers.values() for p in (*layer.downs, *layer.ups, layer.router)]
    optimiser = torch.optim.AdamW(owned, 0.02, betas=(0.9, 0.99), weight_decay=0.01)
    tokenizer, losses = tiny_text.tokenizer(), []
    rows = []
    for e in TEXTS:
        start, whole = tokenizer(e["prompt"])["input_ids"], tokenizer(e["prompt"] + e["completion"])["input_ids"]
        rows.append(([*whole, 1], len(start)))
    widest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [0] * (widest - len(r)) for r, _ in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (widest - len(r)) for r, _ in rows])
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.02 * lr_at(step, steps, 10)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        said = [F.cross_entropy(logits[n, t - 1], ids[n, t]) for n, (r, start) in enumerate(rows)
                for t in range(start, len(r))]  # fmt: skip
        loss = torch.stack(said).mean()
        if balance:
            shares = {path: layer.share for path, layer in layers.items()}
            loss = loss + balance * localised_balance(shares, [0, 1, 0, 1], mask, 0.1)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(owned, 1.0)
        optimiser.step()
        losses.append(loss.item())
    return losses, layers, model


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_three_steps_by_hand_and_nothing_else_changes(balance, tmp_path):
    model = tiny_text.model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    rng = torch.random.get_rng_state()
    done = small(tmp_path / "m.safetensors", steps=3, balance=balance)
    losses, layers, hand = _by_hand(3, balance)
    assert done.losses == pytest.approx(losses, rel=1e-4)
    gate = read_gate(tmp_path / "m.safetensors")
    assert (gate.kind, gate.names, done.modules) == ("loramoe", ["m 0", "m 1"], len(layers))
    found = [files.load(path, base=model) for path in experts_of(tmp_path / "m.safetensors")]
    for path, layer in layers.items():
        torch.testing.assert_close(gate.tensors[f"weight.{path}"], layer.router.data, rtol=2e-2, atol=2e-4)
        assert float(layer.router.detach().abs().max()) > 1e-3
        for i, lora in enumerate(found):
            torch.testing.assert_close(lora[path].down, layer.downs[i].data, rtol=2e-2, atol=2e-4)
            torch.testing.assert_close(lora[path].up, layer.ups[i].data, rtol=2e-2, atol=2e-4)
    ids = torch.tensor([[3, 9, 4, 11, 5, 7]])
    with torch.no_grad():
        base = model(ids).logits
        with composing_text(model, experts_of(tmp_path / "m.safetensors"), "loramoe",
                            gate=str(tmp_path / "m.safetensors")):  # fmt: skip
            loaded = model(ids).logits
        torch.testing.assert_close(loaded, hand(ids).logits, rtol=1e-2, atol=1e-3)
        assert float((loaded - base).norm() / base.norm()) > 0.02
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_experts_of_another_training_are_refused_by_name(tmp_path):
    for seed, name in enumerate("mn"):
        small(tmp_path / f"{name}.safetensors", steps=1, seed=seed)
    model, others, gate = tiny_text.model("llama"), experts_of(tmp_path / "n.safetensors"), tmp_path / "m.safetensors"
    with (
        composing_text(model, others, "loramoe", gate=str(gate)),
        pytest.raises(ValueError, match=r"gate m.safetensors: made for m 0, m 1; LoRA 'n 0' is none of them"),
    ):
        model(torch.tensor([[3, 9, 4]]))


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    stop = threading.Event()
    with pytest.raises(Cancelled):
        small(tmp_path / "b.safetensors", steps=5, balance=0.1, cancel=stop,
              progress=lambda step, *_: stop.set() if step == 3 else None)  # fmt: skip
    assert not (tmp_path / "b.safetensors").exists()
    assert not experts_folder(tmp_path / "b.safetensors").exists()
    small(tmp_path / "b.safetensors", steps=5, balance=0.1)
    small(tmp_path / "a" / "b.safetensors", steps=5, balance=0.1)
    one, two = read_gate(tmp_path / "b.safetensors"), read_gate(tmp_path / "a" / "b.safetensors")
    assert one.loras == two.loras
    assert all(torch.equal(t, two.tensors[n]) for n, t in one.tensors.items())


def test_what_is_refused(tmp_path):
    plain = [{k: v for k, v in e.items() if k != "type"} for e in TEXTS]
    for message, data, settings in (
        ("3 experts: the balancing constraint has two halves", TEXTS, {"experts": 3, "balance": 0.1}),
        ("balance=0.1 wants samples that say their 'type', knowledge or task; none does", plain, {"balance": 0.1}),
        ("example 1: 'type' is 'fact', wanted knowledge or task", [{**TEXTS[0], "type": "fact"}], {}),
        ("delta=1.0: wanted", TEXTS, {"delta": 1.0}),
        ("experts=0: wanted 1 to", TEXTS, {"experts": 0}),
        ("unknown module group", TEXTS, {"modules": "eyes"}),
    ):
        with pytest.raises(ValueError, match=message) as error:
            small(tmp_path / "m.safetensors", data=data, steps=1, **settings)
        assert isinstance(error.value, BadData) == ("type" in message)
    with pytest.raises(ValueError, match=r"a gate is a \.safetensors file"):
        small(tmp_path / "m", steps=1)
    with pytest.raises(ValueError, match="balance with an encoder-decoder"):
        train(TEXTS, tiny_text.model("t5"), tmp_path / "m.safetensors", tokenizer=tiny_text.tokenizer(True), steps=1,
              balance=0.1, **SMALL)  # fmt: skip
    assert not list(tmp_path.iterdir())
    assert not adapt.layers(tiny_text.model("llama"))


def test_from_the_command_line_to_a_map(capsys, tmp_path, monkeypatch):
    """Trained, shown token by token with the experts beside the gate, and errors in words."""
    monkeypatch.chdir(tmp_path)
    tiny_text.model("llama").save_pretrained("base")
    tiny_text.tokenizer().save_pretrained("base")
    Path("data.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    asked = ["train", "gate", "--kind", "loramoe", "--base", "base", "--steps", "2", "--experts", "2", "--rank", "2"]
    status, out, err = call(capsys, *asked, "--data", "data.jsonl", "--balance", "0.2", "--lr", "0.5", "--modules",
                            "up_proj, down_proj", "--out", "m.safetensors", "--json")  # fmt: skip
    assert status == 0, err
    assert json.loads(out)["gates"] == len(read_gate("m.safetensors").settings["widths"])
    assert [p.name for p in experts_of("m.safetensors")] == ["0", "1"]
    show = ["gates", "show", "m.safetensors", "ab+", "--base", "base", "--tokens", "3"]
    status, out, err = call(capsys, *show, "--json")
    assert status == 0, err
    said = json.loads(out)
    assert (said["kind"], said["per"], list(said["shares"])) == ("loramoe", "linear", ["m 0", "m 1"])
    assert sum(said["shares"].values()) == pytest.approx(1.0, abs=1e-4)
    assert said["sharpest"] > 0.51
    assert Path("m_map.png").stat().st_size > 1000
    for words, message in (
        ([*asked, "--data", "data.jsonl", "--out", "m.safetensors"], "exists already; --force"),
        ([*asked, "--out", "n.safetensors"], "--data is missing: loramoe learns from prompts"),
        ([*asked, "--data", "data.jsonl", "--out", "n.safetensors", "--lora", "fox"], "--lora: a gate of kind"),
        ([*asked, "--data", "data.jsonl", "--out", "n.safetensors", "--sums", "count"], "--sums: a gate of kind"),
        (["train", "gate", "--lora", "fox", "--lora", "hat", "--out", "n.safetensors", "--experts", "3"],
         "--experts: a gate of kind mole"),
    ):  # fmt: skip
        status, _, err = call(capsys, *words)
        assert status == 2, err
        assert message in err, err
    Path("m_experts").rename("n_experts")
    status, _, err = call(capsys, *show, "--force")
    assert (status, "LoRA 'm 0' is not in the library" in err) == (2, True)
    status, _, err = call(capsys, *asked, "--data", "data.jsonl", "--out", "n.safetensors")
    assert (status, "exists already; --force replaces its experts" in err) == (2, True)
    status, _, err = call(
        capsys, *asked, "--data", "data.jsonl", "--out", "n.safetensors", "--force", "--experts", "1"
    )
    assert (status, "of an earlier training with more experts" in err) == (2, True)
