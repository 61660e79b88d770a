"""Training of gates: what the loss is, that nothing else changes, that a stopped run goes on, that gates learn."""

import threading

import pytest
import torch
from PIL import Image
from torch import nn

from multilora.attach import attached
from multilora.gate_mole import MoleGate
from multilora.gates import read_gate
from multilora.lab.objectives_denoising import reference_loss
from multilora.lab.objectives_text import AnswerLoss
from multilora.lab.train.gates import heads_of, train
from multilora.lora import Card, Lora, LowRank
from multilora.pipelines.denoise import Cancelled
from multilora.routing import mean_shares
from tests import tiny, tiny_text

TEXTS = [{"prompt": p, "completion": c} for p, c in (("ab+", "cd"), ("b", "abcd e"), ("c 1", "3"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four reference pictures with captions."""
    path = tmp_path_factory.mktemp("references")
    for i in range(4):
        Image.effect_noise((32, 32), 20 + 30 * i).convert("RGB").save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"a fox {i}")
    return path


def _pictures(k=2):
    pipe = tiny.sd15()
    return pipe, [tiny.lora_for(pipe, rank=2 + i, seed=i, strength=3.0, text_encoder=i == 0) for i in range(k)]


def _tracked(lora):
    """The same numbers as leaves that would collect gradients."""
    parts = {k: LowRank(p.down.clone().requires_grad_(), p.up.clone().requires_grad_(), kind=p.kind)
             for k, p in lora.items()}  # fmt: skip
    return Lora(parts, lora.card)


def test_the_loss_starts_as_that_of_the_mean_and_nothing_but_the_gate_changes(folder, tmp_path):
    pipe, loras = _pictures()
    loras = [_tracked(lora) for lora in loras]
    before = {n: p.detach().clone() for n, p in pipe.unet.named_parameters()}
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    held = [[p.down.detach().clone() for p in lora.values()] for lora in loras]
    rng = torch.random.get_rng_state()
    done = train(loras, pipe, tmp_path / "g.safetensors", data=folder, draws=2, batch=8, steps=3, per="block",
                 balance=2.0)  # fmt: skip
    # The text encoder's part acts on the captions at weight 1, so the denoiser's mean is compared without it.
    plain = [Lora({k: p for k, p in lora.items() if k.startswith("unet.")}, lora.card) for lora in loras]
    bare = train(plain, pipe, tmp_path / "h.safetensors", data=folder, draws=2, batch=8, steps=1, per="network")
    objective = reference_loss(pipe, folder, draws=2)
    want = objective(plain, [[0.5, 0.5], [1.0, 1.0]])
    assert bare.losses[0] == pytest.approx(want[0], rel=1e-4)
    assert abs(bare.losses[0] - want[1]) > 1e-3
    assert abs(done.losses[0] - want[0]) > 1e-6
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in pipe.unet.named_parameters())
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    for lora, downs in zip(loras, held, strict=True):
        assert all(p.down.grad is None and p.up.grad is None for p in lora.values())
        assert all(torch.equal(p.down, down) for p, down in zip(lora.values(), downs, strict=True))
    assert torch.equal(torch.random.get_rng_state(), rng)
    gate = read_gate(tmp_path / "g.safetensors")
    assert gate.recipe["learned_from"] == "8 noisy reference pictures"
    assert all(float(t.abs().max()) > 0 for n, t in gate.tensors.items() if n.startswith(("weight.", "time.")))


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    pipe, loras = _pictures()
    asked = {"prompts": [["a fox"], ["a robe"]], "draws": 2, "batch": 3, "steps": 6, "timestep": False, "lr": 0.05}
    whole = train(loras, pipe, tmp_path / "a.safetensors", **asked)
    stop = threading.Event()
    with pytest.raises(Cancelled):
        train(loras, pipe, tmp_path / "b.safetensors", cancel=stop, **asked,
              progress=lambda step, of, info: stop.set() if step == 2 else None)  # fmt: skip
    assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(ValueError, match="made with other settings"):
        train(loras, pipe, tmp_path / "b.safetensors", **{**asked, "per": "network"})
    rest = train(loras, pipe, tmp_path / "b.safetensors", **asked)
    assert rest.losses == whole.losses[2:]
    a, b = (read_gate(tmp_path / f"{n}.safetensors") for n in "ab")
    assert list(a.tensors) == list(b.tensors)
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    assert not any(n.startswith("time.") for n in a.tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_text_gate_does_better_than_any_weights_and_balance_evens_it_out(tmp_path):
    """Answers of one LoRA alone: a gate per layer and token gets below every row of numbers that sums to 1."""
    model, tokenizer = tiny_text.model("llama"), tiny_text.tokenizer()
    loras = tiny_text.loras("llama", 2, strength=4.0)
    prompts = [f"{a}{b}" for a in "abcd" for b in "1234"]
    data = []
    with torch.no_grad(), attached(model, loras, form="side") as bank:
        bank.row = [0.0, 1.0]
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            made = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)[0]
            data.append({"prompt": prompt, "completion": tokenizer.decode(made[ids.shape[1] :])})
    fixed = AnswerLoss(model, tokenizer, data)(loras, [[w / 10, 1 - w / 10] for w in range(11)])
    share = {}
    for balance in (0.0, 30.0):
        file = tmp_path / f"{balance}.safetensors"
        asked = {"data": data, "tokenizer": tokenizer, "steps": 40, "lr": 0.05, "per": "linear", "balance": balance}
        losses = train(loras, model, file, **asked).losses
        assert losses[0] == pytest.approx(fixed[5], rel=0.1)  # equal shares, half of the examples
        if not balance:
            assert sum(losses[-4:]) / 4 < min(fixed) - 0.1
        gate = MoleGate.of(read_gate(file), loras)
        ids = tokenizer(prompts[0], return_tensors="pt")["input_ids"]
        with torch.no_grad(), attached(model, loras, form="side") as bank:
            bank.gate = told = gate.asked()
            model(ids)
        share[balance] = float(mean_shares(told.shares).mean(0)[1])
    assert share[0.0] > 0.54
    assert abs(share[30.0] - 0.5) < 0.6 * (share[0.0] - 0.5)


def test_gradients_of_a_gate_are_those_of_finite_differences():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().requires_grad_(False)
    loras = [Lora({"0": LowRank(normal(2, 4), normal(5, 2)), "2": LowRank(normal(1, 5), normal(3, 1))}) for _ in "ab"]
    gate = MoleGate.fresh({"0": ("0", 5), "2": ("2", 3)}, 2, per="linear", time_scale=10.0, dtype=torch.float64)
    for tensor in gate.tensors.values():
        tensor.copy_(0.5 * normal(*tensor.shape))
    names, x, time = list(gate.tensors), normal(3, 2, 4), torch.tensor([1.0, 4.0, 9.0])
    with attached(net, loras, form="side") as bank:

        def answer(*tensors):
            changed = MoleGate(gate.heads, dict(zip(names, tensors, strict=True)), 2, per="linear", time_scale=10.0)
            bank.gate = changed.asked(time=time)
            return net(x)

        tensors = [t.clone().requires_grad_() for t in gate.tensors.values()]
        assert torch.autograd.gradcheck(answer, tensors, atol=1e-6)


def test_a_groups_head_is_the_first_layer_of_those_that_most_loras_have():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(3, 3) for n in "xyz"}) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer["y"](layer["x"](layer["z"](x)))  # not in the order of their registration
            return x

    net = Net()

    def lora(*paths):
        return Lora({p: LowRank(torch.ones(1, 3), torch.ones(3, 1)) for p in paths}, Card("x"))

    both = [lora("layers.0.x", "layers.0.y", "layers.0.z", "layers.1.z"), lora("layers.0.x", "layers.0.y")]
    with attached(net, both, form="side") as bank:

        def run(put):
            put(None, None)
            net(torch.ones(2, 3))

        assert heads_of(bank, "block", run) == {"layers.0": ("layers.0.x", 3), "layers.1": ("layers.1.z", 3)}
        assert heads_of(bank, "network", run) == {"network": ("layers.0.x", 3)}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"out": "g.bin"}, "out='g.bin': a gate is a .safetensors file"),
        ({"loras": 1}, "1 LoRAs: a gate chooses among at least two"),
        ({"kind": "moe"}, "unknown kind 'moe'"),
        ({"per": "head"}, "unknown per 'head'"),
        ({"sums": "two"}, "unknown sums 'two'"),
        ({"temperature": 0.0}, "temperature=0.0: wanted"),
        ({"balance": -1.0}, "balance=-1.0: wanted 0 to"),
        ({"token": True}, "token with per='layer'"),
        ({"data": "here", "prompts": [["a"], ["b"]]}, "data and prompts"),
        ({"prompts": [["a"], []]}, "prompts for 1 of 2 LoRAs"),
    ],
)
def test_settings_that_do_not_go_are_refused(asked, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe, loras = _pictures()
    asked = {"out": "g.safetensors", "steps": 1, **asked}
    with pytest.raises(ValueError, match=message):
        train(loras[: asked.pop("loras", 2)], pipe, **asked)
    assert not list(tmp_path.iterdir())


def test_texts_want_data_a_tokenizer_and_shares_per_token(tmp_path):
    model, loras = tiny_text.model("llama"), tiny_text.loras("llama", 2)
    for asked, message in (
        ({}, "data is missing"),
        ({"data": TEXTS}, "tokenizer is missing"),
        ({"data": TEXTS, "tokenizer": tiny_text.tokenizer(), "token": False}, "look at the words to come"),
    ):
        with pytest.raises(ValueError, match=message):
            train(loras, model, tmp_path / "g.safetensors", **asked)
    assert not list(tmp_path.iterdir())
