"""Training of a token switch: its loss, what is left alone, going on, learning; from the command line to a text."""

import json
import threading

import pytest
import torch

from multilora import files
from multilora.attach import attached
from multilora.gate_token_switch import TokenSwitchGate
from multilora.gates import read_gate
from multilora.lab.objectives_text import AnswerLoss
from multilora.lab.train.token_switch import train
from multilora.lora import Lora, LowRank
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.text import TextComposer
from tests import tiny_text
from tests.test_cli import call

HEAD = "model.layers.0.self_attn.q_proj"


def _data(model, tokenizer, loras):
    """What LoRA 0 says to prompts of letters and LoRA 1 to prompts of digits: the token itself tells which."""
    found = []
    letters, digits = ([f"{a}{b}" for a in left for b in right] for left, right in (("abcd", "efg"), ("0123", "456")))
    for i, prompts in enumerate((letters, digits)):
        with torch.no_grad(), attached(model, loras, form="side") as bank:
            bank.row = [float(j == i) for j in range(len(loras))]
            for prompt in prompts:
                ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
                made = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)[0]
                found.append({"prompt": prompt, "completion": tokenizer.decode(made[ids.shape[1] :])})
    return found


@pytest.fixture(scope="module")
def world():
    model, tokenizer = tiny_text.model("llama"), tiny_text.tokenizer()
    loras = tiny_text.loras("llama", 3, strength=4.0)
    return model, tokenizer, loras, _data(model, tokenizer, loras)


def test_it_learns_picks_its_top_and_leaves_model_and_loras_alone(world, tmp_path):
    model, tokenizer, loras, data = world
    tracked = [Lora({k: LowRank(p.down.clone().requires_grad_(), p.up.clone().requires_grad_())
                     for k, p in lora.items()}, lora.card) for lora in loras]  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    file = tmp_path / "g.safetensors"
    done = train(tracked, model, file, data=data, tokenizer=tokenizer, steps=60, batch=12, lr=0.1, checkpoint_every=0)
    objective = AnswerLoss(model, tokenizer, data)
    mean = objective(loras, [[1 / 3] * 3])[0]
    assert done.losses[0] == pytest.approx(mean, rel=0.15)  # nearly equal shares of all at first
    fixed = objective(loras, [[a / 4, b / 4, (4 - a - b) / 4] for a in range(5) for b in range(5 - a)])
    assert sum(done.losses[-4:]) / 4 < min(fixed) - 0.05
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert all(t.grad is None for lora in tracked for p in lora.values() for t in (p.down, p.up))
    gate = read_gate(file)
    assert gate.settings == {"per": "network", "top_k": 2, "heads": {"network": [HEAD, 16]}}
    assert gate.recipe["trainer"] == "multilora.lab.train.token_switch"
    router = TokenSwitchGate.of(gate, loras)
    with torch.no_grad(), attached(model, loras, form="side") as bank:
        bank.gate = asked = router.asked()
        model(tokenizer("efg456", return_tensors="pt")["input_ids"])  # the prompts' last, which choose what is said
    share = asked.shares["network"][0]
    assert ((share > 0).sum(-1) == 2).all()
    assert share[:3, 0].mean() > share[3:, 0].mean() + 0.2, share
    assert share[3:, 1].mean() > share[:3, 1].mean() + 0.2, share


def test_a_stopped_run_goes_on_to_the_same_bits(world, tmp_path):
    model, tokenizer, loras, data = world
    asked = {"data": data, "tokenizer": tokenizer, "steps": 6, "batch": 4, "per": "layer", "top_k": 1}
    whole = train(loras, model, tmp_path / "a.safetensors", **asked)
    assert whole.modules == 4
    stop = threading.Event()
    with pytest.raises(Cancelled):
        train(loras, model, tmp_path / "b.safetensors", cancel=stop, **asked,
              progress=lambda step, of, info: stop.set() if step == 2 else None)  # fmt: skip
    with pytest.raises(ValueError, match="made with other settings"):
        train(loras, model, tmp_path / "b.safetensors", **{**asked, "top_k": 2})
    rest = train(loras, model, tmp_path / "b.safetensors", **asked)
    assert rest.losses == whole.losses[2:]
    a, b = (read_gate(tmp_path / f"{n}.safetensors") for n in "ab")
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


def test_settings_and_models_that_do_not_fit(world, tmp_path):
    model, tokenizer, loras, data = world
    asked = {"out": tmp_path / "g.safetensors", "data": data, "tokenizer": tokenizer}
    for changed, message in (
        ({"top_k": 0}, "top_k=0: wanted 1 to"),
        ({"explore": 1.5}, "explore=1.5: wanted 0 to 1"),
        ({"per": "word"}, "unknown per"),
        ({"head": "model.layers.1.mlp.up"}, "unknown head.*Nearest: model.layers.1.mlp.up_proj"),
        ({"head": HEAD, "per": "layer"}, "use per='network'"),
        ({"data": None}, "data is missing"),
        ({"loras": loras[:1]}, "at least two"),
        ({"base": tiny_text.model("t5"), "loras": tiny_text.loras("t5", 2), "tokenizer": tiny_text.tokenizer(True)},
         "an encoder-decoder reads two texts"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train(**{"loras": loras, "base": model, **asked, **changed})
    assert not list(tmp_path.iterdir())


def test_from_the_command_line_to_a_text(world, tmp_path, capsys, monkeypatch):
    model, tokenizer, loras, data = world
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    for i, lora in enumerate(loras):
        files.save(lora, tmp_path / f"l{i}", format="peft")
    monkeypatch.chdir(tmp_path)
    words = ["train", "gate", "--kind", "token_switch", "--base", "base", "--data", "data.jsonl", "--steps", "4"]
    words += ["--out", "g.safetensors", "--top-k", "1", *(w for i in range(3) for w in ("--lora", f"l{i}"))]
    threads = torch.get_num_threads()
    try:
        for more, message in ((["--sums", "count"], "--sums: a gate of kind token_switch has no"), ([], "")):
            status, _, err = call(capsys, *words, *more)
            assert (status != 0) == bool(message), err
            assert message in err
        status, _, err = call(
            capsys, "train", "gate", "--lora", "l0", "--lora", "l1", "--top-k", "1", "--out", "h.safetensors"
        )
        assert status != 0
        assert "--top-k: a gate of kind mole has no" in err
    finally:
        torch.set_num_threads(threads)
    assert read_gate("g.safetensors").settings["top_k"] == 1
    composer = TextComposer.from_pretrained("base")
    for i in range(3):
        composer.add(f"l{i}")
    said = [composer(["ab", "1"], "token_switch", {"gate": "g.safetensors"}, max_new_tokens=4, form=form)
            for form in ("side", "rebuilt")]  # fmt: skip
    assert said[0] == said[1]
