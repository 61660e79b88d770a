"""A LoRA out of two checkpoints: planted changes come back, the reported energy is the measured one."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import multilora as ml
from multilora.extract import extract
from multilora.lora import LowRank
from multilora.modelfiles import ModelFiles
from tests import tiny


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "unet.down_blocks.0.attn.to_q": (67, 43),
    "unet.down_blocks.0.conv": (19, 11, 3, 3),
    "unet.mid_block.proj": (23, 31, 1, 1),
    "text_encoder.embeddings.token_embedding": (97, 29),
}


def planted(rank=3, noise=0.0, dtype=torch.float32):
    """(base, tuned, changes): state dicts of which every weight differs by a matrix of rank `rank` (and noise)."""
    base, tuned, changes = {}, {}, {}
    for i, (key, shape) in enumerate(SHAPES.items()):
        down, up = random(rank, *shape[1:], seed=i), random(shape[0], rank, seed=i + 50)
        if "embedding" in key:
            down, up = random(rank, shape[0], seed=i), random(shape[1], rank, seed=i + 50)
        part = LowRank(down, up, kind="embedding" if "embedding" in key else "linear" if len(shape) == 2 else "conv")
        base[f"{key}.weight"] = random(*shape, seed=i + 100).to(dtype)
        change = part.delta() + noise * random(*shape, seed=i + 200)
        tuned[f"{key}.weight"] = (base[f"{key}.weight"].double() + change.double()).to(dtype)
        changes[key] = tuned[f"{key}.weight"].double() - base[f"{key}.weight"].double()
        if "embedding" in key:
            continue
        base[f"{key}.bias"], tuned[f"{key}.bias"] = torch.zeros(shape[0]), 0.1 * random(shape[0], seed=i + 300)
    base["unet.norm.weight"], tuned["unet.norm.weight"] = torch.ones(7), torch.ones(7) + 0.1 * random(7)
    base["unet.same.weight"] = tuned["unet.same.weight"] = random(5, 5)
    base["unet.table"], tuned["unet.table"] = random(2, 3), random(2, 3, seed=1)
    return base, tuned, changes


@pytest.fixture
def pair(tmp_path):
    def write(**options):
        base, tuned, changes = planted(**options)
        save_file(base, tmp_path / "base.safetensors")
        save_file(tuned, tmp_path / "tuned.safetensors")
        return tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", changes

    return write


def apart(part, change):
    return float((part.delta(torch.float64) - change).norm() / change.norm())


def test_a_planted_low_rank_change_comes_back(pair):
    tuned, base, changes = pair()
    seen = []
    lora = extract(tuned, base, rank=3, progress=lambda *said: seen.append(said))
    assert set(lora) == set(changes)
    for key, change in changes.items():
        assert lora[key].rank == 3
        assert apart(lora[key], change) < 1e-5, key
    assert lora["text_encoder.embeddings.token_embedding"].kind == "embedding"
    facts = lora.card.provenance
    assert facts["energy_kept"] == pytest.approx(1.0, abs=1e-9)
    assert facts["left_out"]["unet.norm.weight"] == pytest.approx(float((0.1 * random(7)).norm()), rel=1e-5)
    assert "unet.table" in facts["left_out"]
    assert "unet.same.weight" not in facts["left_out"]
    assert seen[-1][1:] == (len(seen), len(seen))


@pytest.mark.parametrize("limit", [{"rank": 5}, {"energy": 0.8}, {"energy": 0.999}, {"rank": 4, "energy": 0.99}])
def test_the_reported_energy_is_the_measured_one(pair, limit):
    tuned, base, changes = pair(rank=40, noise=0.3)
    lora = extract(tuned, base, **limit)
    lost, total = 0.0, 0.0
    for key, change in changes.items():
        gone = float((lora[key].delta(torch.float64) - change).square().sum())
        said = lora.card.provenance["modules"][key]
        kept = 1 - gone / float(change.square().sum())
        assert said["energy_kept"] == pytest.approx(kept, abs=1e-6)
        assert said["norm"] == pytest.approx(float(change.norm()), rel=1e-6)
        assert said["rank"] == lora[key].rank
        s2 = torch.linalg.svdvals(change.T if "embedding" in key else change.flatten(1)).square()
        best = s2.cumsum(0) / s2.sum()
        assert kept >= float(best[lora[key].rank - 1]) - 1e-3, "nearly the best of its rank"
        if "rank" not in limit:
            assert kept >= limit["energy"] - 1e-6
            wanted = int((best >= limit["energy"]).int().argmax()) + 1
            assert abs(lora[key].rank - wanted) <= 1, "no more rank than needed"
        else:
            assert lora[key].rank == min(limit["rank"], wanted_rank(best, limit.get("energy", 1.0)))
        lost, total = lost + gone, total + float(change.square().sum())
    assert lora.card.provenance["energy_kept"] == pytest.approx(1 - lost / total, abs=1e-6)


def wanted_rank(best, energy):
    return int((best >= energy - 1e-9).int().argmax()) + 1


def test_biases_and_norms_come_whole_when_asked_for(pair, tmp_path):
    tuned, base, _ = pair()
    lora = extract(tuned, base, rank=3, vectors=True)
    new, old = load_file(tuned), load_file(base)
    for key in list(SHAPES)[:3]:
        assert torch.equal(lora[key].bias, new[f"{key}.bias"] - old[f"{key}.bias"])
    assert torch.equal(lora["unet.norm"].weight, new["unet.norm.weight"] - old["unet.norm.weight"])
    assert set(lora.card.provenance["left_out"]) == {"unet.table"}


def test_it_is_deterministic_and_knows_its_inputs(pair, tmp_path):
    tuned, base, _ = pair(rank=50)
    for seed, file in enumerate(("a.safetensors", "b.safetensors")):
        torch.manual_seed(seed)
        again = extract(tuned, base, rank=2, only=["unet.*"])
        ml.save(again, tmp_path / file)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    said = again.card.provenance["merge"]
    assert said["tuned"] == {"name": "tuned", "sha256": hashlib.sha256(tuned.read_bytes()).hexdigest()}
    assert (said["base"]["name"], again.card.name) == ("base", "tuned")


def test_pipelines_folders_shards_and_the_original_spelling(tmp_path):
    """The same fine-tuning, found in a pipeline's folder, in shards, and between two spellings."""
    pipe = tiny.sd15()
    pipe.save_pretrained(tmp_path / "base")
    want = tiny.lora_for(pipe, rank=2, text_encoder=True, seed=4)
    for key, part in want.items():
        component, _, path = key.partition(".")
        module = getattr(pipe, component)
        layer = dict(module.named_modules()).get(path) or module.get_submodule(f"text_model.{path}")
        layer.weight.data += part.delta()
    pipe.save_pretrained(tmp_path / "tuned", max_shard_size="30KB")
    assert len(list((tmp_path / "tuned/unet").glob("*.safetensors"))) > 2
    got = extract(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert set(got) == set(want)
    assert all(apart(got[k], want[k].delta(torch.float64)) < 1e-4 for k in want)

    alone = extract(tmp_path / "tuned/unet", tmp_path / "base/unet", rank=2, only=["*attn1*"])
    assert set(alone) == {k for k in want if k.startswith("unet.") and "attn1" in k}

    def ldm(folder, name):  # the first resnet and the text encoder in the original code's names
        unet = ModelFiles(tmp_path / folder)
        names = {
            "unet.conv_in": "model.diffusion_model.input_blocks.0.0",
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q":
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
            "text_encoder.encoder.layers.0.self_attn.q_proj":
                "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        }  # fmt: skip
        state = {f"{theirs}.weight": unet.read(f"{ours}.weight").contiguous() for ours, theirs in names.items()}
        save_file({**state, "first_stage_model.x": torch.zeros(2)}, tmp_path / name)
        return tmp_path / name

    across = extract(ldm("tuned", "t.safetensors"), tmp_path / "base", rank=2)
    assert set(across) == {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
    }
    assert all(apart(across[k], want[k].delta(torch.float64)) < 1e-4 for k in across)
    assert "only in the base" in across.card.provenance["left_out"].values()
    with pytest.raises(ValueError, match="same weights: nothing to extract"):
        extract(tmp_path / "base", tmp_path / "base", rank=2)


def test_transposed_and_fused_layers_come_as_loras_name_them(tmp_path):
    base, change = random(12, 36), random(2, 36, seed=1).T @ random(2, 12, seed=2)
    for folder, weight in (("base", base), ("tuned", base + change.T)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["X"]}))
        save_file({"h.0.attn.c_attn.weight": weight}, tmp_path / folder / "model.safetensors")
    lora = extract(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert apart(lora["h.0.attn.c_attn"], change.double()) < 1e-5

    name = "double_blocks.3.img_attn.qkv.weight"
    name = f"model.diffusion_model.{name}"
    whole, rows = random(36, 12), random(36, 12, seed=3)
    save_file({name: whole}, tmp_path / "a.safetensors")
    save_file({name: whole + rows}, tmp_path / "b.safetensors")
    fused = extract(tmp_path / "b.safetensors", tmp_path / "a.safetensors", rank=12)
    attn = "transformer.transformer_blocks.3.attn"
    assert list(fused) == [f"{attn}.to_q", f"{attn}.to_k", f"{attn}.to_v"]
    assert apart(fused[f"{attn}.to_v"], rows[24:].double()) < 1e-5


def test_half_precision_checkpoints(pair):
    tuned, base, changes = pair(dtype=torch.bfloat16)
    lora = extract(tuned, base, rank=3)
    assert all(p.up.dtype == torch.float32 for p in lora.values())
    # What bfloat16 rounded away is noise of full rank, which is not found; the reported energy says so.
    for key, change in changes.items():
        kept = lora.card.provenance["modules"][key]["energy_kept"]
        assert apart(lora[key], change) == pytest.approx(math.sqrt(1 - kept), abs=1e-3)
        assert 0.99 < kept < 1 - 1e-7


def test_what_cannot_be_extracted_is_refused_in_words(pair, tmp_path):
    tuned, base, _ = pair()
    state = load_file(base)
    key = "unet.down_blocks.0.attn.to_q.weight"

    def bad(**changes):
        save_file({**state, **changes}, tmp_path / "bad.safetensors")
        return tmp_path / "bad.safetensors"

    cases = [
        (lambda: extract(tuned, base), "rank=, energy="),
        (lambda: extract(tuned, base, rank=0), "rank=0"),
        (lambda: extract(tuned, base, energy=1.2), "energy=1.2"),
        (lambda: extract(tmp_path / "no", base, rank=2), "no such file or folder"),
        (lambda: extract(bad(**{key: torch.zeros(3, 3)}), base, rank=2), r"\[3, 3\] in bad and \[67, 43\] in base"),
        (lambda: extract(bad(**{key: torch.full((67, 43), math.nan)}), base, rank=2), f"bad: {key} has values"),
        (lambda: extract(tuned, base, rank=2, only=["*atn*"]), "unknown module or glob"),
        (lambda: extract(tmp_path, base, rank=2), "several models lie there"),
    ]
    for make, words in cases:
        with pytest.raises(ValueError, match=words):
            make()
    save_file({"other.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no tensor in common"):
        extract(tmp_path / "other.safetensors", base, rank=2)
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="is a pickle, which is never read"):
        extract(tmp_path / "pickle", base, rank=2)
    (tmp_path / "junk.safetensors").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"junk\.safetensors"):
        extract(tmp_path / "junk.safetensors", base, rank=2)
