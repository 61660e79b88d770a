"""The command merge: the exact sum with its recipe, plans that are what is then written, files for others, cards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import multilora as ml
from multilora import files
from multilora.attach import attached
from multilora.method import methods
from multilora.pipelines import load
from tests import tiny
from tests.cli_shelf import _here, apart, call, deltas, digest, loras, pipe, shelf, told

__all__ = ["_here", "pipe", "shelf"]  # fixtures

PLAIN = [name for name in methods("merge") if name not in ("fisher", "regmean")]  # those two need files of their own


# -- merge -----------------------------------------------------------------------------------------------------------


def test_merge_writes_the_exact_sum_with_its_recipe(capsys, shelf):
    found = told(capsys, "merge", "fox", shelf / "robe", "hat", "--weights", "1,-0.8,0.5", "-o", "out.safetensors")
    fox, robe, hat = loras(shelf, "fox", "robe", "hat")
    assert apart(files.load("out.safetensors"), fox - 0.8 * robe + 0.5 * hat) < 1e-6
    assert [i["sha256"] for i in found["inputs"]] == [x.card.sha256 for x in (fox, robe, hat)]
    assert [i["weight"] for i in found["inputs"]] == [1.0, -0.8, 0.5]
    assert found["energy_kept"] == 1.0
    for one, said in zip((fox, robe, hat), found["inputs"], strict=True):
        total, own = deltas(fox - 0.8 * robe + 0.5 * hat), deltas(one)
        mixed = sum(float((total[k] * d).sum()) for k, d in own.items())
        assert said["share"] == pytest.approx(mixed / sum(float(d.square().sum()) for d in own.values()), abs=1e-6)
    (file,) = found["result"]["files"]
    assert (file["bytes"], file["sha256"]) == (Path("out.safetensors").stat().st_size, digest("out.safetensors"))
    with safe_open("out.safetensors", "pt") as stream:
        recipe = json.loads(stream.metadata()["multilora"])
    assert recipe["merge"] == {"method": "linear", "options": {}}
    assert [(t["name"], t["sha256"], t["weight"]) for t in recipe["terms"]] == [
        ("fox", digest(shelf / "fox.safetensors"), 1.0),
        ("robe", digest(shelf / "robe/adapter_model.safetensors"), -0.8),
        ("hat", digest(shelf / "hat.safetensors"), 0.5),
    ]
    assert recipe["library"] == f"multilora {ml.__version__}"
    assert recipe["triggers"] == ["foxo", "robeo", "hato"]

    status, out, err = call(capsys, "merge", "fox:1", "robe:-0.8", "hat:0.5", "-o", "again.safetensors")
    assert (status, out) == (0, "again.safetensors\n"), err
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes(), "the same bytes every time"


def test_block_weights_of_a_merge(capsys, shelf):
    told(
        capsys, "merge", "fox:0.5", "robe", "--block", "fox:*attn2*=0.25", "--block", "fox:unet.mid_block.*=0",
        "-o", "out.safetensors",
    )  # fmt: skip
    fox, robe = loras(shelf, "fox", "robe")
    got = deltas(files.load("out.safetensors"))
    for key, delta in deltas(fox).items():
        by = 0.0 if key.startswith("unet.mid_block") else 0.125 if "attn2" in key else 0.5
        want = by * delta + robe[key].delta(torch.float64)
        assert float((got[key] - want).norm() / want.norm()) < 1e-6, key


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("cut", [[], ["--rank", "2"]])
def test_a_plan_is_what_is_then_written(capsys, shelf, method, cut):
    other = shelf / "twin.safetensors" if method == "factor" else "robe"  # factor wants equal ranks
    words = ["merge", "fox", other, "--weights", "0.9,0.7", "--method", method, *cut, "-o", "out.safetensors"]
    plan = told(capsys, *words, "--plan")
    assert plan.pop("plan") is True
    assert not list(Path().iterdir()), "a plan writes nothing"
    done = told(capsys, *words)
    assert done.pop("plan") is False
    assert plan == done
    lora = files.load("out.safetensors")
    assert done["result"]["ranks"] == {str(r): n for r, n in sorted(_count(p.rank for p in lora.values()).items())}
    assert done["result"]["norm"] == pytest.approx(lora.norm(), rel=1e-5)
    assert done["result"]["files"][0]["sha256"] == digest("out.safetensors")
    assert max(p.rank for p in lora.values()) <= (2 if cut else 6)
    memory = done["memory"]
    members = [*loras(shelf, "fox"), files.load(other if method == "factor" else shelf / "robe")]
    assert memory["inputs"] == sum(_size(x) for x in members)
    assert memory["result"] == _size(lora)
    assert (memory["module"] > 0) == ("dense" in {o.name for o in methods("merge")[method].options})


def _size(lora):
    return sum(4 * t.numel() for p in lora.values() for t in (p.up, p.down))


def _count(values):
    found = {}
    for v in values:
        found[v] = found.get(v, 0) + 1
    return found


@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.8}])
def test_the_energy_that_a_cut_keeps_is_the_measured_one(capsys, shelf, cut):
    words = [w for n, v in cut.items() for w in (f"--{n}", v)]
    for method in ("linear", "svd", "knots"):
        whole = ml.merge(loras(shelf, "fox", "hat"), [1.0, 0.5], method=method if method != "svd" else "linear")
        found = told(capsys, "merge", "fox", "hat:0.5", "--method", method, *words, "-o", f"{method}.safetensors")
        lost = apart(files.load(f"{method}.safetensors"), whole) ** 2
        assert found["energy_kept"] == pytest.approx(1 - lost, abs=1e-6), method
        assert 0.2 < found["energy_kept"] < 0.99


def test_options_go_to_the_method(capsys, shelf):
    words = ["--method", "ties", "--option", "density=0.3", "--rank", "3"]
    told(capsys, "merge", "fox", "robe", *words, "-o", "a.safetensors")
    want = ml.merge(loras(shelf, "fox", "robe"), method="ties", density=0.3, rank=3)
    assert apart(files.load("a.safetensors"), want) < 1e-6
    with safe_open("a.safetensors", "pt") as stream:
        merge = json.loads(stream.metadata()["multilora"])["merge"]
    assert merge["method"] == "ties"
    assert (merge["options"]["density"], merge["options"]["rank"]) == (0.3, 3)


def test_merged_files_act_in_plain_diffusers_and_peft_as_ours_do(capsys, shelf, pipe):
    """The prediction of the U-Net with the file loaded by others, and with the Loras attached here."""
    import peft

    words = ["merge", "fox", "robe:-0.5", "--method", "ties", "--option", "density=0.6", "--rank", "3"]
    unet = pipe.unet
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    text = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(4))

    def predict(model):
        with torch.no_grad():
            return model(x, torch.tensor([10, 700]), text).sample

    bare = predict(unet)
    merged = ml.merge(loras(shelf, "fox", "robe"), [1.0, -0.5], method="ties", density=0.6, rank=3)
    with attached(unet, [merged], component="unet") as bank:
        bank.row = [1.0]
        want = predict(unet)
    effect = float((want - bare).norm())
    assert effect > 0.01 * float(bare.norm())
    for fmt in ("diffusers", "kohya"):
        told(capsys, *words, "--format", fmt, "-o", f"{fmt}.safetensors")
        other = tiny.sd15()
        other.load_lora_weights(".", weight_name=f"{fmt}.safetensors")
        assert float((predict(other.unet) - want).norm()) < 1e-5 * float(want.norm()), fmt
    told(capsys, *words, "-o", "folder")
    model = peft.PeftModel.from_pretrained(tiny.sd15().unet, "folder")
    assert float((predict(model) - want).norm()) < 1e-5 * float(want.norm())


def test_fisher_and_the_merge_by_it(capsys, shelf):
    for name in ("fox", "robe"):
        words = ["--base", shelf / "base", "--examples", 3, "--pictures", 1, "--steps", 1, "--size", 32]
        found = told(capsys, "fisher", name, *words, "-o", f"{name}.fisher.safetensors")
        assert found["about"]["estimator"] == "probe"
        stored = load_file(f"{name}.fisher.safetensors")
        assert found["tensors"] == len(stored) >= len(files.load(load.library()[name]["path"]))
        assert all(bool((t >= 0).all()) for t in stored.values())
    status, _, err = call(capsys, "fisher", "fox", "--base", shelf / "base", "-o", "fox.fisher.safetensors")
    assert (status, "exists already" in err) == (2, True)
    fishers = "fox.fisher.safetensors,robe.fisher.safetensors"
    words = ["--method", "fisher", "--option", f"fishers={fishers}"]
    found = told(capsys, "merge", "fox", "robe", *words, "-o", "m.safetensors")
    want = ml.merge(loras(shelf, "fox", "robe"), method="fisher", fishers=fishers)
    assert apart(files.load("m.safetensors"), want) < 1e-6
    assert found["options"]["fishers"] == fishers


def test_methods_lists_the_merges(capsys):
    records = json.loads(call(capsys, "methods", "--json", "--kind", "merge")[1])
    assert {r["name"] for r in records} == set(methods("merge"))
    assert {"linear", "svd", "ties", "dare", "knots", "fisher"} <= {r["name"] for r in records}
    assert "ties --option density=" in call(capsys, "methods")[1]


# -- cards -----------------------------------------------------------------------------------------------------------


def test_a_model_card_names_the_inputs(capsys, shelf):
    words = ["merge", "fox", "robe:0.5", "--method", "ties", "--option", "density=0.4", "--card"]
    words += ["--name", "fox in a robe"]
    told(capsys, *words, "-o", "out.safetensors")
    text = Path("out.md").read_text()
    for part in (
        "# fox in a robe", "`ties` (density=0.4", f"| fox | 1 | `{digest(shelf / 'fox.safetensors')}` |",
        f"| robe | 0.5 | `{digest(shelf / 'robe/adapter_model.safetensors')}` |", "`foxo`, `robeo`", "SD 1.5",
        'weight_name="out.safetensors"', "## Licence",
    ):  # fmt: skip
        assert part in text, text
    from huggingface_hub import ModelCard

    data = ModelCard.load("out.md").data
    assert (data.library_name, "lora" in data.tags, data.instance_prompt) == ("diffusers", True, "foxo, robeo")
    told(capsys, *words, "-o", "folder")
    assert "# fox in a robe" in Path("folder/README.md").read_text()
    files.load("folder")
