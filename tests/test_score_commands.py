"""`multilora score` and `multilora judge`: numbers and verdicts for pictures that are there; failures in words."""

import csv
import json
import math
import re
import shlex
import socket
from pathlib import Path

import pytest
from PIL import Image

from multilora.lab.evaluate.judged import Judged, judged, named, pairs_of, read_pictures
from multilora.lab.score.judge import Judge, Verdict
from multilora.lab.score.judge_http import Endpoint
from multilora.lab.score.record import resolve
from multilora.recipe import LoraUse, Recipe, save_png
from tests.judge_server import brighter, serving
from tests.test_cli import call


def recipe(method="merge", seed=1, prompt="a fox", weights=(1.0, 1.0), **more):
    loras = [LoraUse(name=f"lora{i}", weight=w) for i, w in enumerate(weights)]
    return Recipe(prompt=prompt, base="embedded", method=method, loras=loras, steps=3, guidance_scale=3.0, width=24,
                  height=16, seed=seed, **more)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Three methods and no LoRA on four seeds; composite is brighter than merge, switch is brighter on two seeds."""
    pictures = tmp_path / "run" / "pictures"
    pictures.mkdir(parents=True)
    for seed in range(4):
        levels = {"merge": 100, "composite": 180, "switch": 140 if seed < 2 else 60, "none": 20}
        for name, level in levels.items():
            made = recipe("merge", seed, weights=()) if name == "none" else recipe(name, seed)
            save_png(Image.new("RGB", (24, 16), (level + seed,) * 3), pictures / f"{name}{seed}.png", made)
    return tmp_path / "run"


def test_sheets_beside_pictures_are_left_out_of_a_folder(folder, capsys):
    pictures = folder / "pictures"
    Image.new("RGB", (24, 16)).save(pictures / "sheet_a-fox_1234.png")
    status, out, err = call(capsys, "score", str(pictures), "--json")
    assert status == 0, err
    assert "left out, pictures of pictures: sheet_a-fox_1234.png" in err
    assert "sheet_" not in out
    assert out.count("composite") >= 4


def test_methods_are_named_by_what_they_differ_in():
    few = {
        "a": recipe("switch", options={"every": 5}),
        "b": recipe("switch", options={"every": 2}),
        "c": recipe("merge", options={"x": 1}),
        "d": recipe("merge", weights=()),
    }
    assert list(named(few).values()) == ["switch, every 5", "switch, every 2", "merge", "no LoRA"]
    more = {"a": recipe(weights=(0.8, 0.8)), "b": recipe(weights=(1.0,)), "c": recipe(weights=(0.5, 0.5)),
            "d": recipe(weights=(1 / 3,) * 3)}  # fmt: skip
    assert list(named(more).values()) == [
        "merge, weight 0.8",
        "merge, weight 1.0",
        "merge, weight 1/k",
        "merge, weight 1/k",
    ]


def test_pairs_share_prompt_and_noise_and_a_limit_keeps_the_same_ones_for_all(folder):
    recipes = read_pictures([folder])
    assert len(recipes) == 16
    every = pairs_of(recipes)
    assert len(every) == 4 * 6
    assert all(recipes[p.paths[0]].seed == recipes[p.paths[1]].seed == p.seed for p in every)
    some = pairs_of(recipes, limit=2)
    assert len(some) == 2 * 6
    assert len({p.seed for p in some}) == 2


def test_pictures_that_cannot_be_told_apart_or_compared_are_named(tmp_path):
    for name in "xy":
        save_png(Image.new("RGB", (24, 16)), tmp_path / f"{name}.png", recipe())
    with pytest.raises(ValueError, match=r"x\.png and .*y\.png: both are 'merge' for one prompt and seed"):
        pairs_of(read_pictures([tmp_path]))
    (tmp_path / "y.png").unlink()
    with pytest.raises(ValueError, match="no two of different methods share"):
        pairs_of(read_pictures([tmp_path]))
    with pytest.raises(ValueError, match="there is no PNG in it"):
        read_pictures([tmp_path / "nothing"])


def test_points_and_their_intervals(folder):
    pairs = pairs_of(read_pictures([folder]))
    with serving(brighter) as server:
        judge = Judge(Endpoint(server.url, "vlm", parallel=3))
        done = []
        result = judged(judge, pairs, done.append)
    assert done == list(range(1, 25))
    assert result.methods == ["composite", "merge", "no LoRA", "switch"]
    for a, b, want in (("composite", "merge", 1.0), ("merge", "composite", 0.0), ("switch", "merge", 0.5),
                       ("no LoRA", "switch", 0.0)):  # fmt: skip
        assert result.points(a, b).value == want
        assert result.points(a, b).n == 4
    even = result.points("switch", "merge")
    assert (even.low, even.high) == (0.0, 1.0)
    assert result.consistent == 1.0
    holes = Judged([(pairs[0], Verdict(("first", None)))])
    assert math.isnan(holes.points(*pairs[0].methods).value)
    assert math.isnan(holes.consistent)


def test_the_command_judges_a_folder_and_goes_on_where_it_stopped(folder, capsys):
    words = ("judge", folder, "--model", "vlm")
    with serving(lambda asked, n: brighter(asked) if n <= 9 else (401, {})) as server:
        url = ("--url", server.url, "--option", "parallel=1")
        status, out, err = call(capsys, *words, *url, "--dry-run")
        assert (status, out) == (0, "")
        assert "24 pairs: 48 calls with 96 pictures" in err
        assert not server.asked
        assert not (folder / "judged.csv").exists()
        status, out, err = call(capsys, *words, *url)
        assert status == 1
        assert "4 of 24 pairs were judged; run it again to go on" in err
        assert "status 401" in err
        server.reply = brighter
        status, out, err = call(capsys, *words, *url, "--json")
        assert status == 0, err
        assert len(server.asked) == 10 + (48 - 9)
    told = json.loads(out)
    assert told["points"]["composite"]["merge"] == {
        "points": 1.0,
        "low": pytest.approx(0.51, abs=0.01),
        "high": pytest.approx(1.0),
        "pairs": 4,
    }
    assert told["tally"]["kept"] == 9
    assert told["tally"]["shown_first_share"] == 0.5
    assert told["consistent"] == 1.0
    assert "vlm at 127.0.0.1" in told["judge"]
    with (folder / "judged.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert {(r["first"], r["second"], r["points of first"]) for r in rows} >= {("composite", "merge", "1.0")}
    assert all(r["asked so"] == r["asked the other way"] for r in rows)


def test_the_command_prints_a_table(folder, capsys):
    with serving(brighter) as server:
        words = ("--model", "vlm", "--url", server.url, "--pairs", "2", "--criterion", "quality")
        status, out, err = call(capsys, "judge", folder, *words)
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("composite"))
    assert line.count("1.00") >= 3
    assert "n 2" in line
    assert "100% of the pairs got the same answer both ways round; 50% of the choices" in out
    assert "quality, both orders" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "vlm", "--criterion", "beauty"), "--criterion 'beauty'"),
        (("--model", "vlm", "--url", "ftp://x"), "wanted http"),
        (("--model", "vlm", "--option", "paralel=3"), "option of score judge 'paralel'"),
        (("--model", "nowhere/vlm"), "no config.json"),
    ],
)
def test_bad_arguments_of_judge(folder, words, message, capsys):
    status, out, err = call(capsys, "judge", folder, *words)
    assert (status, out) == (2, "")
    assert message in err
    assert not (folder / "judged.csv").exists()


def test_scores_of_pictures_with_their_own_prompts(folder, capsys, tmp_path):
    paths = sorted((folder / "pictures").glob("merge*.png"))[:2]
    images = [Image.open(path).convert("RGB") for path in paths]
    words = ("--by", "clip_text", "--by", "clip_image", "--by", "presence", "--element", "zib",
             "--reference", paths[1], "--option", "clip_text.convention=cosine", "--option", "odds=true")  # fmt: skip
    status, out, err = call(capsys, "score", *paths, *words, "--json")
    assert status == 0, err
    told = json.loads(out)
    want = {
        "clip_text": resolve("clip_text", convention="cosine")(images, "a fox"),
        "clip_image": resolve("clip_image")(images, references=[images[1]]),
        "presence": resolve("presence", odds=True)(images, "zib"),
    }
    for name, values in want.items():
        assert [row[name] for row in told["pictures"]] == pytest.approx(values, abs=1e-4)
        assert told["means"][name] == pytest.approx(sum(values) / 2, abs=1e-4)
    assert told["by"]["clip_text"].startswith("clip-anytorch embedded, float32")
    status, out, err = call(capsys, "score", folder / "pictures", "--prompt", "a robe")
    assert status == 0, err
    assert out.splitlines()[-1].endswith("mean of 16")
    assert "clip_text (100 cos): clip-anytorch embedded" in err


def test_without_pictures_the_scores_are_listed(capsys):
    status, out, _ = call(capsys, "score")
    assert status == 0
    for name in ("clip_text", "clip_image", "presence", "dino", "judge"):
        assert any(line.startswith(name) for line in out.splitlines())
    assert "--by judge --option url=" in out
    listed = json.loads(call(capsys, "score", "--json")[1])
    assert {one["name"]: one["needs"] for one in listed}["judge"] == ["prompt", "references"]


def test_an_unreachable_judge_costs_no_other_number(folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        paths = sorted((folder / "pictures").glob("merge*.png"))
        words = ("--by", "judge", "--by", "clip_text", "--reference", paths[0], "--option", "judge.model=vlm")
        status, out, err = call(capsys, "score", *paths, *words, "--option", f"url={url}")
    assert status == 1, err
    assert len(out.splitlines()) == 1 + 4 + 1, err
    assert "error: judge: judge vlm at 127.0.0.1" in err
    assert "in 2 tries" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--by", "clip_txt"), "--by 'clip_txt'. Nearest: clip_text"),
        (("--by", "presence", "--by", "presence"), "given twice"),
        (("--by", "presence"), "needs elements"),
        (("--by", "clip_image"), "needs reference pictures"),
        (("--option", "modell=x"), "--option 'modell'. Nearest: model"),
        (("--option", "dino.model=x"), "score in --option 'dino'"),
        ((), "--prompt is missing"),
    ],
)
def test_bad_arguments_of_score(words, message, capsys, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    status, out, err = call(capsys, "score", tmp_path / "plain.png", *words)
    assert (status, out) == (2, "")
    assert message in err


# -- docs/scores.md --------------------------------------------------------------------------------------------------

GUIDE = (Path(__file__).parents[1] / "docs" / "scores.md").read_text()


def test_the_guides_python_runs(capsys):
    space = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.S):
        exec(block, space)
    said = capsys.readouterr().out
    assert "'clip_text': [" in said
    assert "'presence': [" in said
    assert said.splitlines()[-1] == "[1.0, 0.0]"


def test_the_guides_commands_have_the_options_that_they_use(folder, capsys, monkeypatch):
    """As far as they go without the servers, models and pictures that they name."""
    monkeypatch.chdir(folder)
    (folder / "out").symlink_to(folder / "pictures")
    (folder / "references" / "character").mkdir(parents=True)
    lines = [line.partition("#")[0] for b in re.findall(r"```bash\n(.*?)```", GUIDE, re.S) for line in b.splitlines()]
    assert len(lines) == 8
    instead = {"judge evaluation": f"judge {folder}", "localhost:8000": "127.0.0.1:9", "ViT-B/32": "embedded"}
    for line in lines:
        for theirs, ours in instead.items():
            line = line.replace(theirs, ours)
        status, _, err = call(capsys, *shlex.split(line)[1:])
        named = ("no answer from", "wanted a folder whose", "no config.json", "CATEGORY/LABEL", "cannot read 'a.jpg'")
        assert status == 0 or any(words in err for words in named), f"{line}: {err}"
