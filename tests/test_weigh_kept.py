"""What LoRAs keep of their own effects, against predictions and logits of runs that know nothing of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import multilora as ml
from multilora import files
from multilora.attach import attached
from multilora.cli import main
from multilora.lab.objectives_kept import KeptAnswers, KeptEffects, _Kept
from multilora.lab.search import prepared
from multilora.lab.train.text_data import IGNORED
from multilora.lora import Lora
from multilora.method import resolve
from multilora.pipelines.image import composing
from multilora.pipelines.load import library
from tests import tiny, tiny_text

DATA = [{"prompt": "ab+", "completion": "cd"}, {"prompt": "b", "completion": "abcd e"}]
ROW = [0.7, 1.3]


def shares(base, own, together):
    """The docstring's formula in float64."""
    found = []
    for one in own:
        d = (one - base).double()
        found.append(((together - base).double() * d).sum().item() / d.square().sum().item())
    return found


def predicted(pipe, denoiser, loras=(), weights=()):
    """What the denoiser says in the one step of two pictures: of a plain pipeline without LoRAs, else of a merge."""
    said = []

    def hear(module, args, output):
        said.append(output[0] if isinstance(output, tuple) else output.sample)

    handle = getattr(pipe, denoiser).register_forward_hook(hear)
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config)
    call = {"num_inference_steps": 1, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(7)}
    try:
        if loras:
            with composing(pipe, [ml.merge(list(loras), list(weights))]):
                pipe(["a fox"], **call)
        else:
            pipe(["a fox"], **call)
    finally:
        handle.remove()
        pipe.scheduler = own
    return torch.cat(said)


PIPES = {"sd15": tiny.sd15, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}


@pytest.mark.parametrize("family", PIPES)
def test_of_a_pipelines_predictions(family):
    pipe = PIPES[family]()
    denoiser = "unet" if family.startswith("sd1") or family == "sdxl" else "transformer"
    loras = [tiny.lora_for(pipe, seed=seed) for seed in (1, 2)]
    base = predicted(pipe, denoiser)
    own = [predicted(pipe, denoiser, [lora], [1.0]) for lora in loras]
    together = predicted(pipe, denoiser, loras, ROW)
    wanted = shares(base, own, together)
    objective = KeptEffects(pipe, ["a fox"], [7], steps=1)
    (got,) = objective(loras, [ROW])
    assert got == pytest.approx(wanted, rel=2e-3, abs=2e-3)
    assert abs(got[0] - got[1]) > 0.05
    (one,) = objective(loras[:1], [[1.0]])
    assert one == pytest.approx([1.0], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_of_a_language_models_answers(family):
    model, tokenizer, loras = tiny_text.model(family), tiny_text.tokenizer(family == "t5"), tiny_text.loras(family, 2)
    objective = KeptAnswers(model, tokenizer, DATA, batch=2)
    rows = [ROW, [1.0, 0.5]]

    def said(row):
        found = []
        with attached(model, [ml.merge(loras, row)], form="side") if any(row) else torch.no_grad() as bank:
            if any(row):
                bank.row = [1.0]
            for one in objective.of.tokens:
                ids, labels = torch.tensor([one.ids]), torch.tensor([one.labels])
                with torch.no_grad():
                    logits = model(input_ids=ids, labels=labels).logits[0]
                labels = labels[0]
                if family != "t5":
                    logits, labels = logits[:-1], labels[1:]
                found.append(logits[labels != IGNORED].double().log_softmax(-1))
        return torch.cat(found)

    base, own = said([0.0, 0.0]), [said([1.0, 0.0]), said([0.0, 1.0])]
    for row, got in zip(rows, objective(loras, rows), strict=True):
        assert got == pytest.approx(shares(base, own, said(row)), rel=1e-3, abs=1e-4)
    assert objective(loras, [[1.0, 0.5]])[0] == pytest.approx(objective(loras, rows)[1], rel=1e-6)


def test_predictions_that_are_lists_of_samples():
    """As Z-Image has them: the same sums as of the stacked tensors."""
    base, first, second, together = torch.randn(4, 3, 2, 5)
    lists, whole = _Kept([1.0, 1.0], ""), _Kept([1.0, 1.0], "")
    lists.add(list(base), [list(first), list(second)], list(together))
    whole.add(base, [first, second], together)
    assert lists.shares() == pytest.approx(shares(base, [first, second], together))
    assert whole.shares() == pytest.approx(lists.shares())


def test_balanced_evens_a_loud_and_a_quiet_lora_out():
    """Two LoRAs of which one is four times the other: at equal weights it drowns it, balanced it does not."""
    model, tokenizer = tiny_text.model("llama"), tiny_text.tokenizer()
    quiet, loud = tiny_text.loras("llama", 2, strength=1.0)
    loud = Lora(loud * 4.0, loud.card)
    objective = KeptAnswers(model, tokenizer, DATA)
    found = resolve("weigh", "balanced", rounds=12)([quiet, loud], objective)
    (before,), (after,) = objective([quiet, loud], [[1.0, 1.0]]), objective([quiet, loud], [list(found)])
    assert before[0] < 0.5 * before[1]
    assert after[0] == pytest.approx(after[1], rel=0.1)
    assert found[0] > 1.2 > 0.8 > found[1]


def test_the_embedded_world_by_names_and_by_the_command(tmp_path, monkeypatch, capsys):
    found = prepared("embedded", ["zib", "merlo"], method="balanced", steps=2, seeds=1)
    assert isinstance(found.objective, KeptEffects)
    assert len(found.facts["prompts"]) == 4
    monkeypatch.chdir(tmp_path)
    words = ["search", "--method", "balanced", "--lora", "zib", "--lora", "merlo", "--budget", "2", "--seeds", "1",
             "--steps", "2", "--prompt", "a zib alien in a merlo robe", "-o", "w.json"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code in (0, None)
    said = json.loads((tmp_path / "w.json").read_text())
    assert said["score"] == "kept effects"
    assert sum(lora["weight"] for lora in said["loras"]) == pytest.approx(2.0)
    assert 1 <= len(said["trials"]) <= 2
    assert (tmp_path / "w.png").is_file()
    assert "inf" not in capsys.readouterr().err


def test_texts_by_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_text.model("llama")
    model.save_pretrained("model")
    tiny_text.tokenizer().save_pretrained("model")
    for lora in tiny_text.loras("llama", 2):
        files.save(lora, lora.card.name, format="peft", base=model)
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, DATA)))
    found = prepared("model", ["llama0", "llama1"], method="balanced", data="shots.jsonl")
    assert isinstance(found.objective, KeptAnswers)
    weights = resolve("weigh", "balanced")(found.loras, found.objective)
    assert sum(weights) == pytest.approx(2.0)


def test_what_it_refuses(tmp_path):
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, seed=seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match="0 prompts and 1 seeds"):
        KeptEffects(pipe, [], [0])
    with pytest.raises(ValueError, match="weight 0"):
        KeptEffects(pipe, ["a"], [0], steps=1)(loras, [[1.0, 0.0]])
    silent = Lora(loras[1] * 0.0, loras[1].card.replace(name="silent"))
    with pytest.raises(ValueError, match="'silent' changes nothing where it was measured"):
        resolve("weigh", "balanced")([loras[0], silent], KeptEffects(pipe, ["a"], [0], steps=1))
    burnt = Lora(loras[1] * 1e30, loras[1].card)
    with pytest.raises(ValueError, match="predictions are not finite at the weights"):
        KeptEffects(pipe, ["a"], [0], steps=1)([loras[0], burnt], [[1.0, 1.0]])
    text = KeptAnswers(tiny_text.model("llama"), tiny_text.tokenizer(), DATA)
    with pytest.raises(ValueError, match="weight 0"):
        text(tiny_text.loras("llama", 2), [[1.0, 0.0]])
    with pytest.raises(ValueError, match="balanced measures what each LoRA keeps of its effect and takes no score"):
        prepared("embedded", ["zib", "merlo"], method="balanced", score="clip")
    with pytest.raises(ValueError, match="balanced measures what each LoRA keeps of its effect and takes no score"):
        prepared("embedded", ["sort", "next"], method="balanced", data=_shots(tmp_path), score="clip")
    mine = shutil.copy(library()["zib"]["path"], tmp_path / "mine.safetensors")
    with pytest.raises(ValueError, match=r"balanced wants prompts that name all .*: 'zib' is not of"):
        prepared("embedded", [str(mine), "merlo"], method="balanced")


def _shots(folder):
    (folder / "shots.jsonl").write_text("\n".join(map(json.dumps, DATA)))
    return folder / "shots.jsonl"
