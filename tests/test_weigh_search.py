"""`multilora search`: a file of weights and a chart, Ctrl-C keeps the best, the same command goes on."""

import json

import pytest
from PIL import Image

from multilora import files
from multilora.cli import main
from multilora.lab.objectives_text import AnswerLoss
from tests import tiny_text


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_text.model("llama")
    model.save_pretrained("model")
    tiny_text.tokenizer().save_pretrained("model")
    for lora in tiny_text.loras("llama", 2):
        files.save(lora, lora.card.name, format="peft", base=model)
    lines = [{"prompt": "ab+", "completion": "cd"}, {"prompt": "b", "completion": "abcd e"}]
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


WORDS = ["search", "--base", "model", "--lora", "llama0", "--lora", "llama1", "--data", "shots.jsonl"]


def _run(*words):
    with pytest.raises(SystemExit) as ended:
        main([*WORDS, *map(str, words)])
    return ended.value.code


def test_weights_their_record_and_the_chart(desk, capsys):
    assert _run("--budget", 14, "--option", "l1=0.01", "-o", "w.json") in (0, None)
    said = json.loads((desk / "w.json").read_text())
    assert capsys.readouterr().out.strip() == "w.json"
    assert [lora["name"] for lora in said["loras"]] == ["llama0", "llama1"]
    assert len(said["trials"]) == 14
    assert (said["method"], said["options"]["l1"], said["score"]) == ("lorahub", 0.01, "few-shot loss")
    loras = [files.load(desk / lora["source"]) for lora in said["loras"]]
    again = AnswerLoss(tiny_text.model("llama"), tiny_text.tokenizer(), desk / "shots.jsonl")
    assert again(loras, [[lora["weight"] for lora in said["loras"]]])[0] == pytest.approx(said["loss"], rel=1e-4)
    assert said["loss"] + said["penalty"] == min(t["loss"] + t["penalty"] for t in said["trials"])
    with Image.open(desk / "w.png") as plot:
        assert plot.width == 760
    assert not (desk / "w.state.json").exists()
    assert _run("-o", "w.json") == 2
    assert "exists already; --force replaces it" in capsys.readouterr().err


def test_learned_gives_weights_per_layer(desk):
    assert _run("--method", "learned", "--budget", 3, "--option", "form=free", "-o", "l.json") in (0, None)
    said = json.loads((desk / "l.json").read_text())
    assert len(said["trials"]) == 4
    assert set(said["loras"][0]["weight"]) == set(files.load(desk / "llama0"))
    assert said["trials"][-1]["loss"] < said["trials"][0]["loss"]


def test_ctrl_c_keeps_the_best_and_the_same_command_goes_on(desk, capsys):
    (desk / "mine.py").write_text(
        "import os, signal, pathlib\n"
        "calls = 0\n"
        "def score(answers, prompts, completions):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 8 and not pathlib.Path('once').exists():\n"
        "        pathlib.Path('once').touch()\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [len(set(a)) / 10 for a in answers]\n"
    )
    words = ["--score", "mine.py:score", "--budget", 19]
    assert _run(*words, "--option", "batch=2", "-o", "cut.json") in (0, None)
    cut = json.loads((desk / "cut.json").read_text())
    assert cut["ended"] == "stopped"
    assert 8 <= len(cut["trials"]) < 19
    assert "the same command goes on" in capsys.readouterr().err
    assert _run(*words, "--option", "batch=2", "-o", "cut.json") in (0, None)
    gone_on = json.loads((desk / "cut.json").read_text())
    assert _run(*words, "--option", "batch=2", "-o", "whole.json") in (0, None)
    whole = json.loads((desk / "whole.json").read_text())
    assert gone_on["trials"] == whole["trials"]
    assert gone_on["loras"] == whole["loras"]
    assert gone_on["trials"][: len(cut["trials"])] == cut["trials"]
    assert not (desk / "cut.state.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "3"], "budget=3 is below the population of 6"),
        (["--score", "beauty"], "wanted file.py:function"),
        (["--score", "clip"], "by file.py:function"),
        (["--score", "shots.jsonl:f"], "wanted file.py:function"),
        (["--method", "sum"], "unknown method 'sum'"),
        (["--method", "uniform", "--budget", "9"], "uniform tries nothing"),
        (["--lora", "llama0:0.5"], "a search finds the weight"),
        (["--data", "none.jsonl"], "there is no such file or folder"),
        (["--prompt", "a"], "prompts are of pictures"),
        (["-o", "w.txt"], "wanted a .json file"),
        (["--option", "l1=-1"], "allowed is at least 0"),
    ],
)
def test_bad_input_writes_nothing(desk, capsys, words, said):
    before = sorted(p.name for p in desk.iterdir())
    assert _run(*words) == 2
    assert said in capsys.readouterr().err
    assert sorted(p.name for p in desk.iterdir()) == before
