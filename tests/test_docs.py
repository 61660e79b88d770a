"""Every fenced block of README.md, CONTRIBUTING.md, docs/guides and docs/ideas runs as it stands, page by page.

A block is Python, or `bash` with one command of multilora a line; the blocks of a page run one after the other in one
folder and one name space. Blocks after the comment `<!-- long -->` run in the long tests only. The guide of real
models is in tests/test_family_guides.py, docs/merging.md in tests/test_guide.py, docs/scores.md in
tests/test_score_commands.py.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

from multilora.cli import main
from multilora.method import methods

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {"real_models.md": "tests/test_family_guides.py"}
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (DOCS / "guides").glob("*.md") if p.name not in ELSEWHERE),
    *sorted((DOCS / "ideas").glob("*.md")),
]
SYSTEMS = [
    "composition", "few_shot", "fisher", "guided_merge", "lora", "lora_switch", "lorahub", "loramoe", "mole", "pem",
]  # fmt: skip
LONG = "<!-- long -->"
SHOWN = re.compile(r"(<!-- long -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)
LANGUAGES = {"bash", "python", "text"}


def blocks(path):
    """(line, language, code, whether it is a long one) of every fenced block."""
    text = path.read_text()
    return [
        (text[: m.start(3)].count("\n") + 1, m[2], m[3], bool(m[1])) for m in SHOWN.finditer(text) if m[2] != "text"
    ]


def run_python(path, line, code, names):
    exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)


def run_commands(path, line, code, capsys):
    for command in code.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if not words:
            continue
        assert words[0] == "multilora", f"{path}:{line}: {command}"
        with pytest.raises(SystemExit) as exit_:
            main(words[1:])
        said = capsys.readouterr()
        assert not exit_.value.code, f"{path}:{line}: {command}\n{said.out}\n{said.err}"


def run_page(path, capsys, long):
    """The short blocks, or all of them."""
    names = {"__name__": "guide"}
    for line, language, code, is_long in blocks(path):
        if is_long and not long:
            continue
        if language == "python":
            run_python(path, line, code, names)
        elif language == "bash":
            run_commands(path, line, code, capsys)
    return names


def id_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in PAGES if any(not b[3] for b in blocks(p))], ids=id_of)
def test_a_pages_blocks_run(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path, capsys, long=False)


@pytest.mark.long
@pytest.mark.parametrize("path", [p for p in PAGES if any(b[3] for b in blocks(p))], ids=id_of)
def test_a_pages_long_blocks_run(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path, capsys, long=True)


def test_every_page_of_docs_is_tested_somewhere():
    assert [p.stem for p in sorted((DOCS / "ideas").glob("*.md"))] == SYSTEMS
    for path in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md"]:
        fences = re.findall(r"^```(\w*)$", path.read_text(), re.M)
        assert set(fences[::2]) <= LANGUAGES, (path, fences)
        assert set(fences[1::2]) <= {""}, (path, fences)
    for name, where in ELSEWHERE.items():
        assert name.partition(".")[0] in (ROOT / where).read_text()


def test_a_page_of_an_idea_says_what_it_has_to():
    for path in (DOCS / "ideas").glob("*.md"):
        text = path.read_text()
        for wanted in ("## The idea", "## The formula", "## Here", "## What held here", "](https://arxiv.org/abs/"):
            assert wanted in text, (path, wanted)
        assert len(re.findall(r"^!\[", text, re.M)) == 1, path


# -- CONTRIBUTING.md -------------------------------------------------------------------------------------------------


def worked_example():
    """(the method's file, its test's file): the two Python blocks of CONTRIBUTING.md."""
    code = [b[2] for b in blocks(ROOT / "CONTRIBUTING.md") if b[1] == "python"]
    assert len(code) == 2
    return code


@pytest.fixture
def dropped_in(monkeypatch, tmp_path):
    """The example's file as a member of multilora.route, as it would be after copying it there."""
    import multilora.route

    method, test = worked_example()
    (name,) = re.findall(r"^def (\w+)\(", method, re.M)
    (tmp_path / f"{name}.py").write_text(method)
    monkeypatch.setattr(multilora.route, "__path__", [*multilora.route.__path__, str(tmp_path)])
    yield name, test
    sys.modules.pop(f"multilora.route.{name}", None)
    vars(multilora.route).pop(name, None)


def test_contributings_method_is_a_method_of_fifteen_lines(dropped_in):
    name, test = dropped_in
    lines = [line for line in worked_example()[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    assert methods("route")[name].options
    names = {"__name__": "example"}
    exec(compile(test, "CONTRIBUTING.md", "exec"), names)
    tests = [value for key, value in names.items() if key.startswith("test_")]
    assert tests
    for one in tests:
        one()


@pytest.mark.long
def test_contributings_commands_run(dropped_in, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line, language, code, _ in blocks(ROOT / "CONTRIBUTING.md"):
        if language == "bash":
            run_commands(ROOT / "CONTRIBUTING.md", line, code, capsys)
    assert Path("shuffled.png").is_file()


# -- the two commands of the README, and links ------------------------------------------------------------------------


def test_the_readmes_make_commands_exist():
    made = re.findall(r"^    make (\S+)", (ROOT / "README.md").read_text(), re.M)
    assert made[:2] == ["demo", "test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(made) <= set(targets)


def test_links_lead_somewhere():
    pages = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md")]
    for path in [*pages, *(DOCS / "guides").glob("*.md"), *(DOCS / "ideas").glob("*.md"), DOCS / "README.md"]:
        for target, _, anchor in (m.partition("#") for m in re.findall(r"\]\(([^)\s]+)\)", path.read_text())):
            if target.startswith("http"):
                continue
            goal = (path.parent / target).resolve() if target else path
            assert goal.exists(), (path, target)
            if anchor and goal.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", goal.read_text(), re.M)
                assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, (path, anchor)


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text()
    for path in [*DOCS.glob("*.md"), *(DOCS / "guides").glob("*.md"), *(DOCS / "ideas").glob("*.md")]:
        if path.name != "README.md":
            assert f"({path.relative_to(DOCS)})" in index, path
