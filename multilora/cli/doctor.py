"""`multilora doctor`: is this machine set up so that multilora works?"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from multilora.cli.console import print_json

OK, WARNING, BROKEN = "ok", "warning", "broken"


@dataclass(frozen=True)
class Finding:
    """One check: its name, how it went, what was found and, where it did not go well, what to do."""

    name: str
    state: str
    found: str
    advice: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False) -> None:
    """Check versions, device, threads and known traps. Exit status 1 when something is broken."""
    findings = examine()
    if as_json:
        print_json([vars(f) for f in findings])
    else:
        width = max(len(f.name) for f in findings)
        for f in findings:
            print(f"{f.state:8} {f.name.ljust(width)}  {f.found}")
            if f.advice:
                print(f"{'':8} {'':{width}}  -> {f.advice}")
    if any(f.state == BROKEN for f in findings):
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Every check, in order; a check that raises is itself a finding."""
    findings = [_python(), *_requirements()]
    for name, check in CHECKS.items():
        try:
            findings.append(check())
        except Exception as error:
            findings.append(Finding(name, BROKEN, f"the check failed: {type(error).__name__}: {error}"))
    return findings


def _python() -> Finding:
    return Finding("python", OK, f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def _requirements() -> list[Finding]:
    """Every dependency of the installed multilora against its bounds, or the versions found when it is a checkout."""
    import importlib.metadata

    from packaging.requirements import Requirement

    try:
        requires = importlib.metadata.requires("multilora") or []
    except importlib.metadata.PackageNotFoundError:
        import tomllib

        project = Path(__file__).parents[2] / "pyproject.toml"
        requires = tomllib.loads(project.read_text())["project"]["dependencies"]
    findings = []
    for requirement in map(Requirement, requires):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        wanted = f"'{requirement.name}{requirement.specifier}'"
        if version is None:
            findings.append(Finding(requirement.name, BROKEN, "not installed", f"pip install {wanted}"))
        elif not requirement.specifier.contains(version, prereleases=True):
            found = f"{version}, wanted {requirement.specifier}"
            findings.append(Finding(requirement.name, BROKEN, found, f"pip install {wanted}"))
        else:
            findings.append(Finding(requirement.name, OK, version))
    return findings


def _torch_pair() -> Finding:
    name = "torch and torchvision"
    import importlib.metadata

    import torch

    pair = f"torch {torch.__version__}, torchvision {importlib.metadata.version('torchvision')}"
    advice = (
        "they must come from one place: pip install --force-reinstall torch torchvision (and give both the same "
        "--index-url where you use one)"
    )
    try:
        import torchvision
    except (ImportError, RuntimeError, OSError) as error:
        return Finding(name, BROKEN, f"{pair}: torchvision does not load: {error}", advice)
    try:
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.tensor([1.0]), 0.5)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        return Finding(name, BROKEN, f"{pair}: torchvision's operators are not there: {reason}", advice)
    return Finding(name, OK, pair)


def _device() -> Finding:
    from multilora.pipelines.load import default_device

    device = default_device()
    if device == "cuda":
        import torch

        p = torch.cuda.get_device_properties(0)
        return Finding("device", OK, f"cuda: {p.name}, {p.total_memory / 2**30:.0f} GiB")
    return Finding("device", OK, device)


def _threads() -> Finding:
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    found = f"{threads} threads on {cores} cores"
    if threads > cores:
        return Finding("threads", WARNING, found, f"more threads than cores is slower: OMP_NUM_THREADS={cores}")
    return Finding("threads", OK, found)


def _clip() -> Finding:
    import importlib.metadata
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import clip
        except ImportError as error:
            return Finding("clip", BROKEN, f"import clip failed: {error}", "pip install clip-anytorch 'setuptools<81'")
    if not hasattr(clip, "tokenize"):
        found = f"another package named clip is in front: {clip.__file__}"
        return Finding("clip", BROKEN, found, "pip uninstall clip; pip install --force-reinstall clip-anytorch")
    return Finding("clip", OK, f"clip-anytorch {importlib.metadata.version('clip-anytorch')} imports")


def _kernels() -> Finding:
    """diffusers imports Hugging Face's `kernels`; a folder of that name in front of it would be taken instead."""
    import importlib.metadata
    from importlib.util import find_spec

    spec = find_spec("kernels")
    if spec is None:
        return Finding("kernels", OK, "Hugging Face's kernels is not installed (it need not be)")
    where = spec.origin or ", ".join(spec.submodule_search_locations or [])
    if spec.origin is None or "kernels" not in importlib.metadata.packages_distributions():
        import diffusers.utils.import_utils as found

        if getattr(found, "is_kernels_available", lambda: False)():
            return Finding("kernels", BROKEN, f"{where} hides Hugging Face's kernels", "run from another folder")
        return Finding("kernels", OK, f"our own folder {where}; diffusers does not look at it")
    return Finding("kernels", OK, where)


def _adapted_layers() -> Finding:
    """Which code runs the adapted layers, and why."""
    from multilora.kernels import choice

    refused = choice.why_not_triton() if choice.asked() == "triton" else ""
    advice = f"unset {choice.VARIABLE}: plain PyTorch runs everywhere" if refused else ""
    return Finding("adapted layers", BROKEN if refused else OK, choice.described(), advice)


def _assets() -> Finding:
    from multilora.pipelines.load import assets, library

    folder = assets()
    missing = [n for n in ("base/model_index.json", "loras/library.json") if not (folder / n).is_file()]
    if missing:
        advice = "install multilora again, or rebuild them: multilora world train"
        return Finding("embedded world", BROKEN, f"missing in {folder}: {', '.join(missing)}", advice)
    gone = [name for name, entry in library().items() if not entry["path"].exists()]
    if gone:
        return Finding("embedded world", BROKEN, f"files of LoRAs are missing: {', '.join(gone)}", "install again")
    return Finding("embedded world", OK, f"{folder}, {len(library())} LoRAs")


CHECKS: dict[str, Callable[[], Finding]] = {
    "torch and torchvision": _torch_pair,
    "device": _device,
    "threads": _threads,
    "clip": _clip,
    "kernels": _kernels,
    "adapted layers": _adapted_layers,
    "embedded world": _assets,
}
