"""The package map: root kernels/, pipelines/ and assets/ are installed inside multilora, in every way to install."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = ("kernels", "pipelines", "assets")
SOURCE = ("multilora", *MAPPED, "pyproject.toml", "README.md", "LICENSE", "app.py")

# What must work wherever multilora can be imported. It names no module that imports torch: the first user of torch
# in each ring is looked up, not run.
PROBE = """
import importlib.util as u, sys
import multilora, multilora.cli
from multilora.recipe import Recipe
from multilora.method import methods
from multilora.pipelines.load import assets
assert 'switch' in methods('route')
for name in ('multilora.kernels.routed', 'multilora.pipelines.image', 'multilora.lora', 'multilora.lab.sheet'):
    assert u.find_spec(name), name
assert assets().is_dir(), assets()
print(multilora.__version__, multilora.__file__)
"""
LEAKS = "import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"


def source_copy(target: Path) -> Path:
    """The files that a build reads, without what building would leave in the checkout."""
    target.mkdir(parents=True)
    for name in SOURCE:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif path.exists():
            shutil.copy(path, target / name)
    return target


def build(hook: str, source: Path, out: Path, settings: dict | None = None) -> Path:
    """One hook of the build backend, run in the source folder; no network, nothing installed."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}, {settings!r}))"
    done = run([sys.executable, "-c", code], source)
    return out / done.splitlines()[-1]


def run(command: list, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def data_files(folder: Path) -> set[str]:
    return {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and not any(part.startswith(".") for part in p.parts)
    }


def test_the_package_list_is_the_folders():
    folders = {"multilora"}
    for name in ("multilora", *MAPPED):
        for path in (ROOT / name).rglob("*.py"):
            if "__pycache__" not in path.parts:
                parts = path.parent.relative_to(ROOT).parts
                folders.add(".".join(parts if name == "multilora" else ("multilora", *parts)))
    folders.add("multilora.assets")
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(folders) == sorted(listed), "pyproject.toml: [tool.setuptools] packages"
    assert len(set(listed)) == len(listed)
    inside = [n for n in folders if n.count(".") == 1 and n.split(".")[1] not in MAPPED]
    for name in inside:
        assert (ROOT / name.replace(".", "/") / "__init__.py").exists(), f"{name} has no __init__.py"


def test_versions_agree():
    import multilora

    assert multilora.__version__ == PROJECT["project"]["version"]


@pytest.mark.parametrize(
    ("name", "bound"), [("peft", ">=0.21.2"), ("gradio", ">=6.20"), ("setuptools", "<81"), ("torchvision", ">=")]
)
def test_bounds_that_matter(name, bound):
    line = next(d for d in PROJECT["project"]["dependencies"] if d.startswith(name))
    assert bound in line, line


def test_a_bare_checkout_works(tmp_path):
    """Not installed, started from the checkout's root; -I would hide the checkout, -S hides what is installed."""
    source = source_copy(tmp_path / "checkout")
    site = sysconfig.get_path("purelib")
    # sys.path entries are not scanned for .pth files, so an editable install in `site` stays unseen
    out = run([sys.executable, "-S", "-c", f"import sys; sys.path.append({site!r})\n{PROBE}"], source)
    assert str(source / "multilora" / "__init__.py") in out


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = source_copy(tmp_path / "source")
    wheel = build("build_wheel", source, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
        archive.extractall(tmp_path / "unpacked")
    version = PROJECT["project"]["version"]
    assert {n.split("/")[0] for n in names} == {"multilora", f"multilora-{version}.dist-info"}
    for name in MAPPED:
        wanted = {f"multilora/{name}/{n}" for n in data_files(ROOT / name)}
        assert wanted == {n for n in names if n.startswith(f"multilora/{name}/")}, name
    wanted = {f"multilora/{n}" for n in data_files(ROOT / "multilora")}
    assert wanted <= names
    assert (
        "multilora = multilora.cli:main"
        in (tmp_path / "unpacked" / f"multilora-{version}.dist-info" / "entry_points.txt").read_text()
    )
    assert any(n.endswith("licenses/LICENSE") for n in names)
    # The unpacked wheel, imported from elsewhere.
    site = sysconfig.get_path("purelib")
    code = f"import sys; sys.path[:0] = [{str(tmp_path / 'unpacked')!r}]; sys.path.append({site!r})\n{PROBE}"
    assert "unpacked" in run([sys.executable, "-S", "-c", code], tmp_path)


# -- the long ones: real installs, one fresh environment each ---------------------------------------------------------


def environment(folder: Path, wheel: Path) -> Path:
    """A new virtual environment with `wheel` installed by pip, and this one's other packages within reach."""
    run([sys.executable, "-m", "venv", folder], folder.parent)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--no-index", "--no-deps", wheel], folder.parent)
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder.parent).strip())
    # After the install, so that pip sees an empty environment. Entries of a .pth are not scanned for .pth files.
    (site / "zz_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.long
@pytest.mark.parametrize("way", ["wheel", "sdist", "editable", "strict"])
def test_installed(way, tmp_path):
    checkout = source_copy(tmp_path / "checkout")
    dist = tmp_path / "dist"
    if way == "wheel":
        wheel = build("build_wheel", checkout, dist)
    elif way == "sdist":
        archive = build("build_sdist", checkout, dist)
        shutil.unpack_archive(archive, tmp_path / "unpacked")
        (inside,) = (tmp_path / "unpacked").iterdir()
        wheel = build("build_wheel", inside, dist)
        for name in MAPPED:
            assert data_files(inside / name) == data_files(ROOT / name), name
    else:
        settings = {"editable_mode": "strict"} if way == "strict" else None
        wheel = build("build_editable", checkout, dist, settings)
    python = environment(tmp_path / "venv", wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    where = run([python, "-c", PROBE], elsewhere)
    if way in ("wheel", "sdist"):
        assert "site-packages" in where
    if way == "editable":
        assert str(checkout / "multilora") in where
        new = checkout / "multilora" / "route" / "again.py"  # a method dropped in is there without a new install
        new.write_text((checkout / "multilora/route/merge.py").read_text().replace("def merge(", "def again("))
        code = "from multilora.method import methods; print(list(methods('route')))"
        assert "again" in run([python, "-c", code], elsewhere)
        new.unlink()
    names = ["kernels", "pipelines", "tests", "assets", "app"]
    assert run([python, "-c", LEAKS.format(names=names)], elsewhere).strip() == "[]"
    run([python, "-c", PROBE], checkout)
    run([python, "-P", "-c", PROBE], checkout)
    assert "composite" in run([tmp_path / "venv" / "bin" / "multilora", "methods"], elsewhere)
    run([python, "-c", "from multilora.pipelines.image import Composer; import multilora.kernels.routed"], elsewhere)
    run([python, "-c", "import app"], checkout)

    run([python, "-m", "pip", "uninstall", "-y", "multilora"], elsewhere)
    assert run([python, "-c", LEAKS.format(names=["multilora"])], elsewhere).strip() == "[]"
