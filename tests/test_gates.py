"""Gate files: what goes in comes out, they know their LoRAs, and bad ones are refused by name with nothing changed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from multilora.gate_mole import MoleGate
from multilora.gates import (
    CARD,
    Gate,
    embedded_gates,
    find_gate,
    identity,
    named,
    read_gate,
    write_gate,
)
from multilora.lab.world import language_gates
from multilora.lora import Card, Lora, LowRank
from multilora.pipelines.load import library


def _lora(name, seed, sha256=""):
    g = torch.Generator().manual_seed(seed)
    return Lora(
        {"a": LowRank(torch.randn(2, 5, generator=g), torch.randn(3, 2, generator=g))}, Card(name, sha256=sha256)
    )


LORAS = [_lora("fox", 1, "a" * 64), _lora("robe", 2), _lora("hat", 3)]


def _gate(**settings):
    gate = MoleGate.fresh({"a": ("a", 3)}, 3, per="linear", time_scale=1000.0, **settings)
    for i, tensor in enumerate(gate.tensors.values()):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    return gate


def test_a_gate_comes_back_as_it_was(tmp_path):
    gate = _gate(sums="count", temperature=2.0)
    file = write_gate(
        Gate("mole", named(LORAS), gate.tensors, gate.settings(), {"steps": 5}), tmp_path / "g.safetensors"
    )
    found = read_gate(file)
    assert (found.kind, found.names, found.recipe) == ("mole", ["fox", "robe", "hat"], {"steps": 5})
    assert len(found.sha256) == 64
    back = MoleGate.of(found, LORAS)
    assert back.settings() == gate.settings()
    for name, tensor in gate.tensors.items():
        assert torch.equal(back.tensors[name], tensor)
    assert not list(tmp_path.glob(".*"))


def test_identity_is_the_files_or_that_of_the_numbers():
    assert identity(LORAS[0]) == "a" * 64
    same = _lora("other name", 2)
    assert identity(same) == identity(LORAS[1])
    assert identity(_lora("robe", 4)) != identity(LORAS[1])
    moved = Lora({"b": LORAS[1]["a"]})
    assert identity(moved) != identity(LORAS[1])


def test_a_gate_knows_its_loras(tmp_path):
    gate = Gate("mole", named(LORAS), _gate().tensors, _gate().settings(), source="g.safetensors")
    assert gate.order([LORAS[2], LORAS[0]]) == [2, 0]
    with pytest.raises(ValueError, match=r"g.safetensors: made for fox, robe, hat; LoRA 'sock' is none of them"):
        gate.order([LORAS[0], _lora("sock", 9)])
    with pytest.raises(ValueError, match=r"LoRA 'hat' is none of them \(a LoRA of this name, but another file"):
        gate.order([_lora("hat", 9)])
    with pytest.raises(ValueError, match="LoRA 'fox' is in the set twice"):
        gate.order([LORAS[0], LORAS[0]])
    with pytest.raises(ValueError, match="a mole gate, wanted token_switch; use that method"):
        gate.need("token_switch")


def _bad(path, change=None, tensors=None, card=True, settings=None):
    gate = _gate()
    about = {"version": 1, "kind": "mole", "loras": list(named(LORAS)), "recipe": {},
             "settings": {**gate.settings(), **(settings or {})}, **(change or {})}  # fmt: skip
    held = {**gate.tensors, **(tensors or {})}
    save_file({k: t for k, t in held.items() if t is not None}, path, {CARD: json.dumps(about)} if card else {})
    return path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"card": False}, "bad.safetensors: no gate, its header has no 'multilora_gate'"),
        ({"change": {"kind": 3}}, "multilora_gate.kind is 3, wanted a str"),
        ({"change": {"version": 2}}, "a gate of version 2, this multilora reads up to 1"),
        ({"change": {"version": True}}, "multilora_gate.version is True"),
        ({"change": {"loras": []}}, "has 0 LoRAs, wanted at least one"),
        ({"change": {"loras": [{"name": "fox"}]}}, r"loras\[0\] is .*wanted a name and a sha256"),
        ({"change": {"loras": [{"name": "a", "sha256": "x"}] * 2}}, "none twice"),
        ({"tensors": {"bias.a": torch.tensor([0.0, float("nan"), 0.0])}}, "bias.a holds no finite"),
        ({"tensors": {"bias.a": torch.tensor([0, 1, 2])}}, "bias.a is torch.int64 .*wanted F16"),
        ({"tensors": {"bias.a": torch.zeros(2)}}, r"bias.a is of shape \[2\], wanted \[3\]"),
        ({"tensors": {"weight.a": None}}, r"weight.a is missing, wanted \[3, 9\]"),
        ({"settings": {"per": "word"}}, "setting per is 'word', wanted 'linear' or 'layer'"),
        ({"settings": {"token": 1}}, "setting token is 1, wanted bool"),
        ({"settings": {"time_scale": -1.0}}, "time_scale is -1.0, wanted above 0"),
        ({"settings": {"heads": {"a": ["a", 0]}}}, r"heads\['a'\] is \['a', 0\], wanted"),
        ({"settings": {"heads": {"a": "a"}}}, r"heads\['a'\] is 'a'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, bad, message):
    path = _bad(tmp_path / "bad.safetensors", **bad)
    with pytest.raises(ValueError, match=message) as error:
        MoleGate.of(read_gate(path), LORAS)
    assert "bad.safetensors" in str(error.value)


def test_names_files_and_what_is_neither(tmp_path):
    _bad(tmp_path / "bad.safetensors")
    (tmp_path / "text.safetensors").write_text("no header")
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        read_gate(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        find_gate(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"unknown gate .*'foxes'"):
        find_gate("foxes")
    with pytest.raises(ValueError, match=r"bias.a is not finite; the training diverged"):
        write_gate(Gate("mole", named(LORAS), {"bias.a": torch.tensor([float("inf")])}), tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        write_gate(Gate("mole", named(LORAS), {}), tmp_path / "n.bin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.safetensors", "text.safetensors"]


def test_embedded_gates_are_of_the_library_and_small():
    found = embedded_gates()
    assert sum(path.stat().st_size for path in found.values()) <= 2_000_000
    of_pictures = {entry["sha256"]: name for name, entry in library().items()}
    for name, path in found.items():
        gate = read_gate(path)
        if gate.kind == "mole" and name not in language_gates.GATES:
            assert [of_pictures.get(lora["sha256"]) for lora in gate.loras] == gate.names, name
            MoleGate.of(gate)
