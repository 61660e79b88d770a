"""The commands of docs/merging.md run as they stand there, on the embedded library, one after the other."""

import re
import shlex
from pathlib import Path

import pytest

from multilora import files
from multilora.cli import main
from multilora.method import methods

GUIDE = Path(__file__).parents[1] / "docs" / "merging.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SLOW = ("multilora fisher", "--method fisher")  # they draw pictures


def run(command, capsys):
    words = shlex.split(command)
    assert words[0] == "multilora"
    with pytest.raises(SystemExit) as exit_:
        main(words[1:])
    said = capsys.readouterr()
    assert not exit_.value.code, f"{command}\n{said.err}"
    return words


def written(words):
    outs = [Path(words[i + 1]) for i, word in enumerate(words) if word in ("-o", "--plot")]
    for out in outs:
        assert out.exists(), words
        if out.suffix != ".png" and "fisher" not in words[:2]:
            assert len(files.load(out)) > 0


def test_the_guides_commands_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [c for c in COMMANDS if not any(words in c for words in SLOW)]
    assert len(quick) > 15
    for command in quick:
        written(run(command, capsys))


@pytest.mark.long
def test_the_guides_slow_commands_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (c for c in COMMANDS if any(words in c for words in SLOW)):
        written(run(command, capsys))


def test_the_guides_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    exec(compile(code, str(GUIDE), "exec"), {})
    assert max(p.rank for p in files.load("both.safetensors").values()) <= 8


def test_the_guide_knows_every_method():
    rows = set(re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(), re.M))
    assert rows == set(methods("merge"))
