"""No ten lines of code stand in two places (outside the tests); no file of code is longer than 400 lines."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("app.py", "benchmarks", "docs", "examples", "kernels", "multilora", "pipelines")
RUN = 10


def sources(root=ROOT):
    found = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True).stdout.split()
    paths = [Path(p) for p in found] or [p.relative_to(root) for p in root.rglob("*.py")]  # a copy without git
    return {p: (root / p).read_text() for p in paths if p.parts[0] in FOLDERS and (root / p).is_file()}


def repeated(texts):
    """(place, other place) of every run of RUN lines that stands twice, layout, comments and imports aside."""
    seen, found = {}, []
    for path, text in texts.items():
        lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
        lines = [(n, s) for n, s in lines if len(s) > 3 and not s.startswith(("#", "import ", "from ", '"""'))]
        for first in range(len(lines) - RUN + 1):
            run = tuple(s for _, s in lines[first : first + RUN])
            here = f"{path}:{lines[first][0]}"
            if run in seen:
                found.append((seen[run], here))
            seen.setdefault(run, here)
    return found


def test_no_ten_lines_stand_twice():
    texts = sources()
    assert len(texts) > 200
    assert repeated(texts) == []


def test_a_copied_function_would_be_found():
    lines = "\n".join(f"    value_{i} = work({i})" for i in range(RUN))
    texts = {Path("a.py"): f"def a():\n{lines}\n", Path("b.py"): f"# other\n\ndef b():\n{lines}\n    return value_1\n"}
    assert repeated(texts) == [("a.py:2", "b.py:4")]
    assert repeated({Path("a.py"): texts[Path("a.py")], Path("b.py"): "def b():\n" + lines[:-30]}) == []


def test_no_file_of_code_is_longer_than_400_lines():
    assert {str(p): n for p, text in sources().items() if (n := len(text.splitlines())) > 400} == {}
