"""The command line, in this process, on tiny pipelines: pictures and sheets; bad input in words, nothing written."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from multilora import files
from multilora.cli import arguments, demo, main
from multilora.pipelines import load
from multilora.recipe import Recipe, save_png
from tests import tiny

STEPS = ["--steps", "3", "--seed", "5"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base in a folder, LoRAs for it (fox, robe with a text encoder part) and one for another base."""
    folder = tmp_path_factory.mktemp("world")
    pipe = tiny.sd15()
    pipe.save_pretrained(folder / "base")
    for seed, name in enumerate(("fox", "robe", "hat", "moon")):
        lora = tiny.lora_for(pipe, seed=seed, name=name, text_encoder=name == "robe")
        files.save(lora, folder / f"{name}.safetensors")
    files.save(tiny.lora_for(tiny.sdxl(), name="xl"), folder / "xl.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _here(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    categories = {"fox": "character", "robe": "garment", "hat": "object", "moon": "background"}
    entries = {
        n: {"name": n, "category": c, "trigger": f"{n}o {c}", "class_word": c, "path": world / f"{n}.safetensors",
            "split": "train"}
        for n, c in categories.items()
    }
    monkeypatch.setattr(load, "library", lambda: entries)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def call(capsys, *words):
    """(exit status, stdout, stderr) of one command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(w) for w in words])
    said = capsys.readouterr()
    return exit_.value.code or 0, said.out, said.err


def compose(capsys, world, *words):
    return call(capsys, "compose", *words, "--base", world / "base", *STEPS)


def test_one_picture_and_again_from_it(capsys, world, tmp_path):
    status, out, err = compose(
        capsys, world, "a fox", "--lora", f"{world}/fox.safetensors:0.8", "--lora", "robe:0@0,1@0.5",
        "--method", "switch", "--option", "every=1", "--out", "a.png", "--negative", "blurry", "--size", "32x40",
    )  # fmt: skip
    assert (status, out) == (0, "a.png\n"), err
    recipe = Recipe.from_png("a.png")
    assert (recipe.prompt, recipe.negative_prompt, recipe.method, recipe.seed) == ("a fox", "blurry", "switch", 5)
    assert recipe.options == {"every": 1, "schedule": "paper", "compensate": 0.0}
    assert [(use.name, use.weight) for use in recipe.loras] == [("fox", 0.8), ("robe", "0@0,1@0.5")]
    assert "<lora:fox:0.8>" in recipe.parameters()
    first = Image.open("a.png")
    assert first.size == (32, 40)

    status, out, err = call(capsys, "compose", "--from", "a.png", "--out", "b.png", "--json")
    assert status == 0, err
    assert Image.open("b.png").tobytes() == first.tobytes()
    assert Recipe.from_png("b.png") == recipe
    assert json.loads(out)["pictures"][0]["recipe"] == recipe.model_dump(mode="json")
    assert "note:" not in err

    status, _, err = call(capsys, "compose", "--from", "a.png", "--method", "composite", "--out", "c.png")
    assert status == 0, err
    changed = Recipe.from_png("c.png")
    assert (changed.method, changed.options, changed.seed) == ("composite", {"mix": "mean"}, 5)
    assert Image.open("c.png").tobytes() != first.tobytes()


def test_compare_makes_a_sheet(capsys, world):
    status, out, err = compose(
        capsys, world, "a fox <lora:robe:0.5>", "--lora", "fox", "--compare", "merge,switch,composite",
        "--option", "every=1", "--singles", "--num", "2", "--out", "grid",
    )  # fmt: skip
    assert status == 0, err
    paths = [Path(line) for line in out.splitlines()]
    assert len(paths) == 2 * (3 + 3) + 1
    assert paths[-1].name.startswith("sheet_a-fox_")
    assert Image.open(paths[-1]).width > 3 * 256
    recipes = [Recipe.from_png(p) for p in paths[:-1]]
    assert [len(r.loras) for r in recipes] == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert [r.method for r in recipes[6:]] == ["merge"] * 2 + ["switch"] * 2 + ["composite"] * 2
    assert {(r.seed, r.index, r.prompt) for r in recipes} == {(5, 0, "a fox"), (5, 1, "a fox")}
    assert recipes[8].options["every"] == 1
    pictures = [Image.open(p).tobytes() for p in paths[:-1]]
    assert len(set(pictures)) == len(pictures)
    assert {p.name for p in Path("grid").iterdir()} == {p.name for p in paths}

    status, _, err = call(capsys, "compose", "--from", paths[7], "--out", "second.png")
    assert status == 0, err
    assert Image.open("second.png").tobytes() == pictures[7]


def test_the_demonstration(capsys, world, monkeypatch):
    load_pipeline = load.load_pipeline
    import multilora.pipelines.image as image

    def tiny_base(base, **options):
        assert base == "embedded"
        return load_pipeline(world / "base", **options)

    monkeypatch.setattr(image, "load_pipeline", tiny_base)
    status, out, err = call(capsys, "compose", "--steps", "4", "--out", "demo")
    assert status == 0, err
    paths = out.splitlines()
    titles = ["base", "fox", "robe", "hat", "moon", "merge", "guided-merge", "switch", "composite"]
    assert len(paths) == len(titles) + 1
    for path, title in zip(paths, titles, strict=False):
        assert f"_{title}_" in path
    assert "sheet_" in paths[-1]
    assert len(Recipe.from_png(paths[-2]).loras) == 4
    # Each LoRA alone: its own trigger, plain things of another colour in place of the others'.
    prompts = [Recipe.from_png(path).prompt for path in paths[:6]]
    triggers = [entry["trigger"] for entry in load.library().values() if entry["name"] in titles]
    assert [sum(t in prompt for t in triggers) for prompt in prompts] == [0, 1, 1, 1, 1, 4]
    assert ["purple" in prompt for prompt in prompts] == [True, False, True, True, True, False]


def test_the_scene_of_the_demonstration():
    entries = {
        n: {"name": n, "category": c, "trigger": f"{n} {k}", "split": "train"}
        for n, c, k in (
            ("ix", "character", "alien"), ("b", "garment", "robe"), ("c", "object", "flower"),
            ("d", "background", "city"),
        )
    }  # fmt: skip
    prompt, names = demo.scene(entries)
    assert names == ["ix", "b", "c", "d"]
    assert all(e["trigger"] in prompt for e in entries.values())
    assert prompt.startswith("an ix alien")
    del entries["c"]
    with pytest.raises(ValueError, match="3 of the categories"):
        demo.scene(entries)


LORA = ("--lora", "fox")
BAD = {
    "method": (["x", *LORA, "--method", "swich"], "unknown method 'swich'. Nearest: switch,"),
    "compared method": (["x", *LORA, "--compare", "merge,composit"], "'composit'. Nearest: composite,"),
    "method twice": (["x", *LORA, "--compare", "merge,merge"], "named twice"),
    "both": (["x", *LORA, "--compare", "merge", "--method", "merge"], "--method and --compare"),
    "option": (["x", *LORA, "--method", "switch", "--option", "evry=2"], "unknown option of switch. Nearest: every."),
    "option of another": (["x", *LORA, "--option", "every=2"], "unknown option of auto."),
    "option without value": (["x", *LORA, "--option", "every"], "--option 'every': wanted KEY=VALUE"),
    "every": (["x", *LORA, "--method", "switch", "--option", "every=0"], "every='0' of switch: allowed is at least 1"),
    "every text": (
        ["x", *LORA, "--method", "switch", "--option", "every=two"],
        "every='two' of switch: a int is wanted",
    ),
    "choice": (["x", *LORA, "--method", "switch", "--option", "schedule=new"], "'paper', 'reference'"),
    "lora": (["x", "--lora", "fxo"], "unknown LoRA 'fxo'. Nearest: fox. Known: fox, hat, moon, robe."),
    "lora file": (["x", "--lora", "nowhere/f.safetensors"], "no such file"),
    "lora empty": (["x", "--lora", ":0.5"], "--lora ':0.5': wanted FILE"),
    "nan": (["x", "--lora", "fox:nan"], "--lora 'fox:nan': weight: 'nan'"),
    "no number": (["x", "--lora", "fox:much"], "--lora 'fox:much': weight: 'much'"),
    "tag": (["x <lora:fox:much>"], "'<lora:fox:much>'"),
    "twice": (["x", *LORA, *LORA], "named 'fox' is in the composition already"),
    "glob": (["x", *LORA, "--block", "fox:up_blcks.*=0.5"], "up_blcks.*"),
    "glob without factor": (["x", *LORA, "--block", "fox"], "--block 'fox': wanted LORA:GLOB=FACTOR"),
    "option of nobody": (["x", *LORA, "--block", "fix:*=0.5"], "'fix'. Nearest: fox."),
    "text weight": (["x", *LORA, "--text-weight", "fox=inf"], "text_encoder_weight of LoRA 'fox'"),
    "mask": (["x", *LORA, "--mask", "fox=nowhere.png"], "cannot read nowhere.png"),
    "size": (["x", "--size", "33x32"], "width=33: wanted a multiple of 4"),
    "size text": (["x", "--size", "big"], "--size 'big': wanted WIDTHxHEIGHT"),
    "steps": (["x", "--steps", "0"], "--steps 0: wanted at least 1"),
    "num": (["x", "--num", "0"], "--num 0: wanted at least 1"),
    "guidance": (["x", "--guidance", "nan"], "guidance_scale=nan"),
    "seed": (["x", "--seed", "-1"], "seed=-1"),
    "scheduler": (["x", "--scheduler", "EulerDiscreteSchedule"], "Nearest: EulerDiscreteScheduler"),
    "text encoder": (["x", *LORA, "--text-encoder", "every"], "unknown text_encoder mode 'every'"),
    "form": (["x", *LORA, "--form", "sidewards"], "sidewards"),
    "passes": (["x", *LORA, "--passes-per-call", "0"], "passes_per_call=0"),
    "prompt": ([*LORA], "PROMPT is missing"),
    "compare nothing": (["x", "--compare", "merge,switch"], "--compare: needs at least one --lora"),
    "singles": (["x", *LORA, "--singles"], "--singles: goes with --compare"),
    "out": (["x", "--out", "a.jpg"], "--out 'a.jpg': wanted a folder, or a .png"),
    "out for several": (["x", *LORA, "--compare", "merge,switch", "--out", "a.png"], "several pictures come out"),
    "no recipe": (["--from", "missing.png"], "missing.png: no such file"),
    "not with from": (["--from", "missing.png", *LORA], "--lora does not go with --from"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(capsys, world, case):
    words, message = BAD[case]
    given = set(words)
    base = [] if "--from" in given else ["--base", world / "base"]
    usual = [w for pair in (STEPS[:2], STEPS[2:]) if pair[0] not in given for w in pair]
    out = [] if "--out" in given else ["--out", "fresh"]
    status, said, err = call(capsys, "compose", *words, *base, *usual, *out)
    assert message in err, err
    assert (status, said) == (2, "")
    assert "Traceback" not in err
    assert not list(Path().iterdir()), "something was written"


def test_a_lora_for_another_base(capsys, world):
    status, _, err = compose(capsys, world, "x", "--lora", world / "xl.safetensors")
    assert status == 2
    assert "xl.safetensors: made for SDXL, this is SD 1.5" in err
    assert not list(Path().iterdir())


def test_no_model_at_base(capsys):
    status, _, err = call(capsys, "compose", "x", "--base", "./nowhere")
    assert (status, "no such folder" in err) == (2, True)


def test_a_full_disk_is_said(capsys, world, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("multilora.cli.shots.save_png", full)
    status, out, err = compose(capsys, world, "x")
    assert (status, out) == (1, "")
    assert "No space left on device" in err
    assert "Traceback" not in err


def test_a_mistake_of_ours_is_said_as_one(capsys, monkeypatch):
    def broken():
        raise KeyError("oops")

    monkeypatch.setattr(load, "library", broken)
    status, _, err = call(capsys, "loras")
    assert status == 1
    assert "KeyError: 'oops'" in err
    assert "--traceback" in err
    with pytest.raises(KeyError):
        main(["--traceback", "loras"])


def test_stopping(capsys, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "library", stop)
    assert call(capsys, "loras")[0] == 130


def test_methods_and_loras(capsys):
    status, out, _ = call(capsys, "methods")
    assert status == 0
    for name in ("merge", "switch", "composite", "sum_of_differences"):
        assert f"  {name} " in out
    records = json.loads(call(capsys, "methods", "--json", "--kind", "route")[1])
    switch = next(r for r in records if r["name"] == "switch")
    assert switch["options"][0] == {
        "name": "every", "type": "int", "default": 5, "help": switch["options"][0]["help"], "minimum": 1,
        "maximum": None, "choices": [],
    }  # fmt: skip
    assert "2402.16843" in switch["paper"]
    assert "Nearest: route" in call(capsys, "methods", "--kind", "rout")[2]
    status, out, _ = call(capsys, "loras")
    assert (status, len(out.splitlines())) == (0, 5)
    assert json.loads(call(capsys, "loras", "--json", "--category", "object")[1])[0]["trigger"] == "hato object"
    assert "Known: background" in call(capsys, "loras", "--category", "thing")[2]


def test_doctor(capsys, monkeypatch):
    doctor = importlib.import_module("multilora.cli.doctor")  # the package's attribute of that name is the command

    monkeypatch.setitem(doctor.CHECKS, "embedded world", lambda: doctor.Finding("embedded world", "ok", "here"))
    status, out, _ = call(capsys, "doctor", "--json")
    findings = {f["name"]: f for f in json.loads(out)}
    assert {"torch", "peft", "torch and torchvision", "device", "threads", "clip", "kernels"} <= set(findings)
    assert not [f for f in findings.values() if f["state"] == "broken"]
    assert status == 0

    monkeypatch.setitem(doctor.CHECKS, "clip", lambda: doctor.Finding("clip", "broken", "gone", "pip install it"))
    monkeypatch.setitem(doctor.CHECKS, "threads", lambda: 1 / 0)
    status, out, _ = call(capsys, "doctor")
    assert status == 1
    assert "-> pip install it" in out
    assert "the check failed: ZeroDivisionError" in out


def test_world_draw(capsys):
    status, out, err = call(capsys, "world", "draw", "--count", "2", "--out", "w", "--design", "zib")
    assert (status, out) == (0, "w/gallery.png\n"), err
    assert len([p for p in Path("w").iterdir() if p.stem.isdecimal()]) == 2
    assert "zib alien" in Path("w/metadata.jsonl").read_text()
    status, _, err = call(capsys, "world", "draw", "--design", "zibb")
    assert (status, "Nearest: zib" in err) == (2, True)
    status, _, err = call(capsys, "world", "train", "--stage", "bas", "--out", "t")
    assert (status, "Nearest: base" in err, Path("t").exists()) == (2, True, False)
    assert "autoencoder" in call(capsys, "world", "train", "--stages")[1]


def test_train_lora(capsys, world):
    for i in range(2):
        Path("data").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (40 * i, 90, 200)).save(f"data/{i}.png")
        Path(f"data/{i}.txt").write_text("a blue square")
    words = ["train", "lora", "data", "--base", world / "base", "--steps", "2", "--batch", "2", "--rank", "2"]
    status, out, err = call(capsys, *words, "--trigger", "blu square", "--out", "new/blu.safetensors", "--json")
    assert status == 0, err
    assert json.loads(out)["steps"] == 2
    lora = files.load("new/blu.safetensors")
    assert (lora.card.name, lora.card.triggers) == ("blu", ("blu square",))
    Path("data/0.txt").unlink()
    status, _, err = call(capsys, *words, "--out", "other.safetensors")
    assert (status, "0.png" in err, Path("other.safetensors").exists()) == (2, True, False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("fox", ("fox", None, None)),
        ("fox:0.8", ("fox", None, 0.8)),
        ("a=fox:-1", ("fox", "a", -1.0)),
        ("x/y.safetensors:0@0,1@0.5", ("x/y.safetensors", None, "0@0,1@0.5")),
        (r"C:\loras\fox.safetensors", (r"C:\loras\fox.safetensors", None, None)),
        (r"C:\loras\fox.safetensors:0.5", (r"C:\loras\fox.safetensors", None, 0.5)),
    ],
)
def test_reading_a_lora(text, wanted):
    found = arguments.read_lora(text)
    assert (found.source, found.name, found.weight) == wanted


def test_help_is_quick_and_light():
    code = "import sys, multilora.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'numpy', 'diffusers', 'PIL'} & set(sys.modules)\nassert not heavy, heavy"
    began = [time.perf_counter(), _children()]
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "compose" in run.stdout
    # CPU time, which other work on the machine does not stretch, or the clock where there is none.
    assert min(_children() - began[1] or 99, time.perf_counter() - began[0]) < 1.5


def _children() -> float:
    try:
        import resource
    except ImportError:
        return 0.0
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_recipe_of_another_base(capsys, world, tmp_path):
    recipe = Recipe(prompt="x", base=str(tmp_path / "gone"), steps=1, guidance_scale=1, width=32, height=32, seed=0)
    save_png(Image.new("RGB", (8, 8)), "old.png", recipe)
    status, _, err = call(capsys, "compose", "--from", "old.png", "--out", "new.png")
    assert (status, "gone" in err, Path("new.png").exists()) == (2, True, False)
