"""The rings of DESIGN section 2: kernels <- core <- pipelines <- lab <- front doors. No import goes up."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# (folder or file in the checkout, ring); the first that matches counts.
RINGS = (
    ("kernels", 0),
    ("assets", 0),
    ("pipelines", 2),
    ("multilora/lab", 3),
    ("multilora/cli", 4),
    ("multilora/web", 4),
    ("app.py", 4),
    ("multilora", 1),
)
NAMES = {0: "kernels", 1: "core", 2: "pipelines", 3: "lab", 4: "front doors"}
# Packages that only rings from this number on may name.
FOREIGN = {
    "diffusers": 2, "transformers": 2, "accelerate": 2, "peft": 2, "clip": 3, "torchvision": 3, "ray": 3, "gradio": 4,
    "typer": 4, "rich": 4,
}  # fmt: skip
# The core's lazy exceptions: diffusers' key converters as pure functions (DESIGN section 2), and the class that tells
# a layer which PEFT has put into a model from any other.
LAZY = {("multilora/files.py", "diffusers"), ("multilora/takeover.py", "peft")}


def ring_of_path(path: str) -> int | None:
    return next((ring for start, ring in RINGS if path == start or path.startswith(f"{start}/")), None)


def ring_of_module(name: str) -> int:
    parts = name.split(".")[1:]
    if parts and parts[0] in ("kernels", "pipelines", "assets"):
        return ring_of_path(parts[0])
    return ring_of_path("/".join(["multilora", *parts]))


def imports(source: str):
    """(line, dotted name, inside a function) of every import, also the lazy ones."""
    tree = ast.parse(source)
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in lazy
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or ""), id(node) in lazy
            elif node.module == "multilora":
                for alias in node.names:
                    yield node.lineno, f"multilora.{alias.name}", id(node) in lazy
            else:
                yield node.lineno, node.module, id(node) in lazy


def complaints(path: str, source: str) -> list[str]:
    ring = ring_of_path(path)
    found = []
    for line, name, lazy in imports(source):
        where, top = f"{path}:{line}", name.split(".")[0]
        if name.startswith("."):
            found.append(f"{where} relative import {name}: write multilora....")
        elif top in ("kernels", "pipelines", "assets", "tests", "app"):
            found.append(f"{where} imports bare {name}: write multilora.{name}")
        elif top == "multilora" and ring_of_module(name) > ring:
            found.append(f"{where} ({NAMES[ring]}) imports {name} ({NAMES[ring_of_module(name)]})")
        elif FOREIGN.get(top, 0) > ring and not (lazy and (path, top) in LAZY):
            found.append(f"{where} ({NAMES[ring]}) imports {top}, which starts at {NAMES[FOREIGN[top]]}")
    return found


def sources() -> list[Path]:
    folders = [ROOT / name for name in ("kernels", "multilora", "pipelines")]
    return [ROOT / "app.py", *(p for folder in folders for p in sorted(folder.rglob("*.py")))]


def test_no_import_goes_up():
    files = sources()
    assert len(files) > 20
    found = [c for p in files for c in complaints(p.relative_to(ROOT).as_posix(), p.read_text())]
    assert not found, "\n".join(found)


def test_ring_packages_are_namespaces():
    """Hugging Face ships a package `kernels` that diffusers imports; ours must never be a package of that name."""
    for folder in ("kernels", "pipelines", "assets"):
        assert not (ROOT / folder / "__init__.py").exists(), f"remove {folder}/__init__.py"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/bad.py", "from multilora.lora import Lora"),
        ("kernels/bad.py", "import multilora.pipelines.image"),
        ("multilora/lora.py", "from multilora.pipelines import image"),
        ("multilora/lora.py", "from multilora import pipelines"),
        ("multilora/lora.py", "def f():\n    from multilora.lab.sheet import contact_sheet"),
        ("multilora/lora.py", "def f():\n    import diffusers"),
        ("multilora/files.py", "import diffusers"),
        ("multilora/route/merge.py", "from multilora.cli import main"),
        ("pipelines/image.py", "from multilora.lab import sheet"),
        ("pipelines/image.py", "import gradio as gr"),
        ("multilora/lab/sheet.py", "from multilora.web import app"),
        ("multilora/lora.py", "from . import files"),
        ("pipelines/image.py", "import kernels"),
    ],
)
def test_planted_imports_are_found(path, source):
    assert complaints(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("multilora/attach.py", "from multilora.kernels.routed import routed"),
        ("multilora/files.py", "def f():\n    import diffusers"),
        ("pipelines/image.py", "from multilora import files\nimport diffusers"),
        ("multilora/lab/sheet.py", "from multilora.pipelines.image import Composer"),
        ("app.py", "import gradio\nfrom multilora.pipelines.image import Composer"),
    ],
)
def test_allowed_imports_are_not(path, source):
    assert not complaints(path, source)


def test_importing_multilora_is_light_and_names_resolve():
    code = (
        "import sys, multilora as ml; heavy = {'torch', 'numpy', 'diffusers', 'pydantic', 'PIL'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'lora' not in vars(ml); records = ml.methods('route'); "
        "assert 'switch' in records and 'torch' not in sys.modules; print(sorted(ml.__all__))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_public_names_are_there():
    import multilora

    for name in multilora.__all__:
        assert getattr(multilora, name) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        multilora.lode  # noqa: B018


def test_files_are_short():
    folders = [ROOT / name for name in ("benchmarks", "docs", "examples", "tests")]
    files = [*sources(), *(p for folder in folders for p in sorted(folder.rglob("*.py")))]
    assert len(files) > 300
    long = {p.relative_to(ROOT).as_posix(): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long
    assert not [p for p in sources() if re.fullmatch(r"utils?|helpers?|common|misc", p.stem)]
