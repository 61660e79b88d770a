"""Commands on LoRA files: the numbers they print, what they refuse, that a plan is what is then written, and that
nothing is left half done."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import multilora as ml
from multilora import files
from multilora.attach import attached
from multilora.cli import main
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.method import methods
from multilora.pipelines import load
from tests import tiny

PLAIN = [name for name in methods("merge") if name not in ("fisher", "regmean")]  # those two need files of their own


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd15()


@pytest.fixture(scope="module")
def shelf(pipe, tmp_path_factory):
    """fox (kohya), robe (peft), hat with more kinds of layers, twin of fox's rank, xl for another base; their base."""
    folder = tmp_path_factory.mktemp("shelf")
    made = {
        "fox": (tiny.lora_for(pipe, rank=3, seed=0, name="fox"), {"format": "kohya"}),
        "robe": (tiny.lora_for(pipe, rank=2, seed=1, name="robe"), {"format": "peft"}),
        "hat": (tiny.lora_for(pipe, rank=4, seed=2, name="hat", conv=True, text_encoder=True), {"dtype": "fp16"}),
    }
    for name, (lora, how) in made.items():
        card = Card(name, "thing", (f"{name}o",), "sd15")
        file = name if how.get("format") == "peft" else f"{name}.safetensors"
        files.save(lora.replace(card=card), folder / file, **how)
    files.save(tiny.lora_for(pipe, rank=3, seed=3, name="twin"), folder / "twin.safetensors")
    other = tiny.lora_for(tiny.sdxl(), name="xl")
    files.save(other.replace(card=Card("xl", family="sdxl")), folder / "xl.safetensors")
    pipe.save_pretrained(folder / "base")
    return folder


@pytest.fixture(autouse=True)
def _here(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {n: shelf / (n if n == "robe" else f"{n}.safetensors") for n in ("fox", "robe", "hat")}
    entries = {n: {"name": n, "category": "thing", "trigger": f"{n}o", "path": path} for n, path in paths.items()}
    monkeypatch.setattr(load, "library", lambda: entries)


def call(capsys, *words):
    """(exit status, stdout, stderr) of one command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(w) for w in words])
    said = capsys.readouterr()
    return exit_.value.code or 0, said.out, said.err


def told(capsys, *words):
    """The JSON of a command that must go well."""
    status, out, err = call(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def loras(shelf, *names):
    return [files.load(load.library()[name]["path"]) for name in names]


def deltas(lora):
    return {k: p.delta(torch.float64) for k, p in lora.items()}


def apart(a, b):
    """Relative distance of two Loras, by whole float64 matrices."""
    a, b = deltas(a), deltas(b)
    assert set(a) == set(b)
    gone = sum(float((a[k] - b[k]).square().sum()) for k in a)
    return (gone / sum(float(d.square().sum()) for d in b.values())) ** 0.5


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tree(folder="."):
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# -- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_is(capsys, shelf):
    (found,) = told(capsys, "inspect", shelf / "hat.safetensors", "--base", shelf / "base")
    lora = files.load(shelf / "hat.safetensors")
    assert [found[n] for n in ("name", "base", "format", "trainer")] == ["hat", "SD 1.5", "diffusers", "multilora"]
    assert found["ranks"] == {"4": len(lora)}
    assert (found["triggers"], found["category"], found["dtypes"]) == (["hato"], "thing", ["float16"])
    file = shelf / "hat.safetensors"
    assert (found["bytes"], found["sha256"]) == (file.stat().st_size, digest(file))
    energy = {k: float(d.square().sum()) for k, d in deltas(lora).items()}
    assert found["norm"] == pytest.approx(sum(energy.values()) ** 0.5, rel=1e-6)
    mid = sum(e for k, e in energy.items() if k.startswith("unet.mid_block"))
    assert found["energy_by_block"]["unet.mid_block"] == pytest.approx(mid, rel=1e-6)
    assert sum(found["energy_by_block"].values()) == pytest.approx(sum(energy.values()), rel=1e-6)
    assert found["energy_by_rank"][-1] == pytest.approx(1.0)
    assert len(found["energy_by_rank"]) == 4


def test_inspect_for_people_of_several_with_one_refused(capsys, shelf):
    Path("bad.safetensors").write_bytes(b"PK\x03\x04 and so on, long enough for a header")
    status, out, err = call(capsys, "inspect", "fox", "bad.safetensors", "robe", "nobody")
    assert status == 2
    for words in ("SD 1.5", "kohya", "rank      3", "alpha     3", "foxo", "unet.mid_block", "█", "energy by rank"):
        assert words in out, out
    assert out.count("sha256") == 2
    assert "bad.safetensors" in err
    assert "zip" in err
    assert "unknown LoRA 'nobody'" in err
    status, out, err = call(capsys, "inspect", "fox", "bad.safetensors", "--json")
    found = json.loads(out)
    assert (status, found[0]["name"], "zip" in found[1]["refused"]) == (2, "fox", True)


def test_inspect_draws(capsys, shelf):
    status, _, err = call(capsys, "inspect", "hat", "--plot", "plots/hat.png")
    assert status == 0, err
    with Image.open("plots/hat.png") as picture:
        assert picture.width <= 800, "readable on a phone"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    for words, message in (
        (["fox", "--plot", "plots/hat.png"], "exists already"),
        (["fox", "hat", "--plot", "b.png"], "draws one file"),
        (["fox", "--plot", "b.jpg"], "wanted a .png"),
    ):
        status, _, err = call(capsys, "inspect", *words)
        assert (status, message in err) == (2, True), err


def test_inspect_warns(capsys):
    save_file(
        {
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(2, 8),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.randn(8, 2),
            "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(-1.0),
        },
        "odd.safetensors",
        {"ss_network_module": "networks.lora", "ss_output_name": "odd\x1b[31m one"},
    )
    (found,) = told(capsys, "inspect", "odd.safetensors")
    assert any("alpha is -1" in text for text in found["warnings"])
    status, out, _ = call(capsys, "inspect", "odd.safetensors")
    assert (status, "kohya sd-scripts" in out, "\x1b" in out) == (0, True, False)


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


# -- resize, convert, extract, compare --------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [["--rank", "1"], ["--energy", "0.7"], ["--rank", "3", "--energy", "0.99"]])
def test_resize(capsys, shelf, cut):
    found = told(capsys, "resize", "hat", *cut, "-o", "small.safetensors", "--dtype", "fp32")
    before, after = files.load(shelf / "hat.safetensors"), files.load("small.safetensors")
    a, b = deltas(before), deltas(after)
    lost = {k: float((a[k] - b[k]).square().sum()) for k in a}
    own = {k: float(a[k].square().sum()) for k in a}
    assert found["energy_kept"] == pytest.approx(1 - sum(lost.values()) / sum(own.values()), abs=1e-6)
    for key, said in found["modules"].items():
        assert said["energy_kept"] == pytest.approx(1 - lost[key] / own[key], abs=1e-6)
        assert (said["rank_before"], said["rank"]) == (before[key].rank, after[key].rank)
        squares = torch.linalg.svdvals(a[key].flatten(1)).square()
        best = squares[: after[key].rank].sum() / squares.sum()
        assert said["energy_kept"] == pytest.approx(float(best), abs=1e-6), "the best of its rank"
    assert 0.1 < found["energy_kept"] < 1.0


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft"])
def test_convert(capsys, shelf, format, dtype, limit):
    out = "folder" if format == "peft" else "new.safetensors"
    found = told(capsys, "convert", "fox", "-o", out, "--format", format, "--dtype", dtype)
    lora = files.load(out)
    assert apart(lora, files.load(shelf / "fox.safetensors")) < limit
    stored = torch.float32 if dtype == "fp32" else torch.float16 if dtype == "fp16" else torch.bfloat16
    assert {p.up.dtype for p in lora.values()} == {stored}
    assert {Path(f["path"]).name for f in found["result"]["files"]} == (
        {"adapter_model.safetensors", "adapter_config.json"} if format == "peft" else {out}
    )
    assert all(f["sha256"] == digest(f["path"]) for f in found["result"]["files"])


def test_block_weights_are_baked(capsys, shelf):
    words = ["--block", "unet.down_blocks.*=0.5", "--block", "*attn2*=-2"]
    told(capsys, "convert", "fox:0.5", *words, "-o", "baked.safetensors")
    got, fox = deltas(files.load("baked.safetensors")), deltas(files.load(shelf / "fox.safetensors"))
    for key, delta in fox.items():
        by = 0.5 * (-2.0 if "attn2" in key else 0.5 if key.startswith("unet.down_blocks") else 1.0)
        assert float((got[key] - by * delta).norm() / delta.norm()) < 1e-6, key


def test_extract(capsys, shelf, pipe):
    want = tiny.lora_for(pipe, rank=2, seed=5)
    base = {f"{k}.weight": v for k, v in _weights(pipe).items()}
    save_file(base, "base.safetensors")
    changes = deltas(want)
    tuned = {k: v + changes.get(k.removesuffix(".weight"), torch.zeros(())).float() for k, v in base.items()}
    save_file(tuned, "t.safetensors")
    found = told(capsys, "extract", "t.safetensors", "base.safetensors", "--rank", 2, "-o", "lora.safetensors")
    assert apart(files.load("lora.safetensors"), want) < 1e-5
    assert found["energy_kept"] == pytest.approx(1.0, abs=1e-9)
    assert set(found["modules"]) == set(want)
    with safe_open("lora.safetensors", "pt") as stream:
        recipe = json.loads(stream.metadata()["multilora"])
    assert recipe["merge"]["tuned"] == {"name": "t", "sha256": digest("t.safetensors")}
    status, _, err = call(capsys, "extract", "t.safetensors", "base.safetensors", "--vectors", "-o", "b.safetensors")
    assert (status, "--format kohya" in err) == (2, True)


def _weights(pipe):
    found = {}
    for path, layer in pipe.unet.named_modules():
        if isinstance(layer, torch.nn.Linear):
            found[f"unet.{path}"] = layer.weight.detach().clone()
    return found


def test_compare(capsys, shelf):
    found = told(capsys, "compare", "fox", "robe", "other=hat", "--plot", "c.png")
    fox, robe, hat = (deltas(x) for x in loras(shelf, "fox", "robe", "hat"))
    dot = sum(float((fox[k] * hat[k]).sum()) for k in fox)
    sizes = [sum(float(d.square().sum()) for d in x.values()) ** 0.5 for x in (fox, hat)]
    assert found["names"] == ["fox", "robe", "other"]
    assert found["cosine"][0][2] == pytest.approx(dot / (sizes[0] * sizes[1]), abs=1e-6)
    assert found["modules"] == [len(fox), len(robe), len(hat)]
    with Image.open("c.png") as picture:
        assert picture.width <= 800
    status, out, err = call(capsys, "compare", "fox", "robe")
    assert (status, "fox and robe: cosine" in out, "by chance" in out) == (0, True, True), err


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


# -- refusals and half-done work -----------------------------------------------------------------------------------

OUT = ["-o", "out.safetensors"]
BAD = {
    "method": (["merge", "fox", "--method", "tie", *OUT], "unknown method 'tie'. Nearest: ties"),
    "option": (["merge", "fox", "--method", "ties", "--option", "densty=1", *OUT], "Nearest: density"),
    "option range": (["merge", "fox", "--method", "ties", "--option", "density=2", *OUT], "density='2' of ties"),
    "option of another": (["merge", "fox", "--option", "density=0.5", *OUT], "unknown option of linear"),
    "weights count": (["merge", "fox", "robe", "--weights", "1", *OUT], "1 numbers for 2 LoRAs"),
    "weights text": (["merge", "fox", "--weights", "much", *OUT], "--weights 'much': wanted numbers"),
    "weights nan": (["merge", "fox", "--weights", "nan", *OUT], "finite number"),
    "weights twice": (["merge", "fox:0.5", "--weights", "1", *OUT], "a weight of its own"),
    "schedule": (["merge", "fox:0@0,1@1", *OUT], "schedules belong to compose"),
    "block": (["merge", "fox", "--block", "fox:*atn9*=1", *OUT], "*atn9*"),
    "block of nobody": (["merge", "fox", "--block", "fix:*=1", *OUT], "'fix'. Nearest: fox"),
    "block text": (["merge", "fox", "--block", "fox:*=x", *OUT], "wanted a number"),
    "rank": (["merge", "fox", "--rank", "0", *OUT], "--rank 0: wanted at least 1"),
    "rank twice": (["merge", "fox", "--method", "svd", "--option", "rank=2", "--rank", "3", *OUT], "give one of them"),
    "energy": (["resize", "fox", "--energy", "1.5", *OUT], "--energy 1.5"),
    "no limit": (["resize", "fox", *OUT], "--rank N or --energy SHARE is missing"),
    "nothing left": (["merge", "fox:0", *OUT], "every weight is 0"),
    "two bases": (["merge", "fox", "XL", *OUT], "xl was made for SDXL, fox for SD 1.5"),
    "not of the base": (["merge", "XL", "--base", "BASE", *OUT], "made for SDXL, this is SD 1.5"),
    "lora": (["merge", "fux", *OUT], "unknown LoRA 'fux'. Nearest: fox"),
    "no file": (["convert", "gone/a.safetensors", *OUT], "no such file"),
    "pickle": (["convert", "pickle.ckpt", *OUT], "pickle"),
    "format": (["convert", "fox", "--format", "kohja", *OUT], "unknown --format 'kohja'. Nearest: kohya"),
    "dtype": (["convert", "fox", "--dtype", "fp8", *OUT], "unknown --dtype 'fp8'"),
    "folder for a file": (["convert", "fox", "-o", "out", "--format", "kohya"], "ends with .safetensors"),
    "file for a folder": (["convert", "fox", *OUT, "--format", "peft"], "wanted a folder's name"),
    "blocks": (["convert", "fox", "--block", "*attn2*", *OUT], "--block '*attn2*': wanted GLOB=FACTOR"),
    "one checkpoint": (["extract", "XL", "gone.safetensors", *OUT], "no such file or folder"),
    "plot": (["compare", "fox", "robe", "--plot", "a.jpg"], "--plot 'a.jpg': wanted a .png"),
    "fisher out": (["fisher", "fox", "-o", "f.bin"], "is a .safetensors file"),
    "fisher both": (["fisher", "fox", "--all", "--module", "*", "-o", "f.safetensors"], "--all and --module"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_in_words_and_nothing_is_written(capsys, shelf, case):
    words, message = BAD[case]
    Path("pickle.ckpt").write_bytes(b"\x80\x04pickle")
    before = tree()
    names = {"XL": shelf / "xl.safetensors", "BASE": shelf / "base"}
    status, out, err = call(capsys, *[names.get(w, w) for w in words])
    assert message in err, err
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert tree() == before


def test_inputs_are_never_written_over(capsys, shelf):
    import shutil

    shutil.copy(shelf / "fox.safetensors", "mine.safetensors")
    shutil.copytree(shelf / "robe", "folder")
    os.symlink("mine.safetensors", "link.safetensors")
    before = tree()
    cases = [
        ["merge", "mine.safetensors", "robe", "-o", "mine.safetensors"],
        ["merge", "mine.safetensors", "robe", "-o", "link.safetensors"],
        ["merge", "fox", "robe", "-o", "mine.safetensors"],  # another copy of an input
        ["resize", "folder", "--rank", "1", "-o", "folder"],
        ["convert", "folder", "-o", "folder/x.safetensors"],
        ["convert", "mine.safetensors", "-o", "./mine.safetensors"],
        ["extract", "mine.safetensors", shelf / "fox.safetensors", "-o", "mine.safetensors"],
        ["fisher", "mine.safetensors", "-o", "mine.safetensors"],
    ]
    for words in cases:
        status, out, err = call(capsys, *words, "--force")
        assert (status, out) == (2, ""), words
        assert "input" in err, err
        assert tree() == before


def test_existing_files_stay_without_force(capsys, shelf):
    Path("out.safetensors").write_bytes(b"old")
    Path("free.md").write_bytes(b"old")
    Path("full").mkdir()
    Path("full/x").write_bytes(b"old")
    before = tree()
    for words in (OUT, ["-o", "free.safetensors", "--card"], ["-o", "full"]):
        status, _, err = call(capsys, "merge", "fox", "robe", *words)
        assert (status, "exists already; --force" in err) == (2, True), err
        assert tree() == before
    told(capsys, "merge", "fox", "robe", *OUT, "--force")
    assert files.load("out.safetensors")


@pytest.mark.parametrize("out", ["out.safetensors", "folder"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [False, True])
def test_a_file_appears_whole_or_not_at_all(capsys, shelf, monkeypatch, out, step, old):
    if old:
        told(capsys, "convert", "hat", "-o", out)
    before = tree()
    calls, real = [0], getattr(os, step)

    def full(*words):
        calls[0] += 1
        if calls[0] == (2 if out == "folder" and not old else 1):
            raise OSError(28, "No space left on device")
        return real(*words)

    monkeypatch.setattr(os, step, full)
    status, said, err = call(capsys, "merge", "fox", "robe", "-o", out, "--force")
    assert (status, said) == (1, ""), err
    assert "No space left on device" in err
    assert tree() == before
    assert sorted(p.name for p in Path().iterdir()) == ([out] if old else []), "no temporary file is left"


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(capsys):
    conv = LowRank(torch.ones(1, 4, 3, 3), torch.ones(16, 1), kind="conv")
    norm = Lora({"unet.conv_norm_out": Dense(torch.ones(16)), "unet.conv_in": conv})
    files.save(norm, "norm.safetensors", format="kohya")
    big = Lora({"unet.mid_block.attentions.0.proj_in": LowRank(torch.full((1, 8), 0.1), torch.full((8, 1), 7e3))})
    files.save(big, "big.safetensors")
    before = tree()
    for words, message in (
        (["norm.safetensors", *OUT], "cannot hold"),
        (["norm.safetensors", "-o", "folder"], "cannot hold"),
        (["big.safetensors:10", *OUT, "--dtype", "fp16"], "do not fit torch.float16"),
    ):
        status, _, err = call(capsys, "convert", *words)
        assert (status, message in err) == (2, True), err
        assert tree() == before


def test_methods_lists_the_merges(capsys):
    records = json.loads(call(capsys, "methods", "--json", "--kind", "merge")[1])
    assert {r["name"] for r in records} == set(methods("merge"))
    assert {"linear", "svd", "ties", "dare", "knots", "fisher"} <= {r["name"] for r in records}
    assert "ties --option density=" in call(capsys, "methods")[1]
