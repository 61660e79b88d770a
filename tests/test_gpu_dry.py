"""benchmarks/gpu.py without a GPU: its dry run makes every call, and what it leaves out is named."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def run(*words):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.long
def test_the_dry_run_passes_and_says_that_it_is_one(tmp_path):
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Dry run on the CPU at small sizes: every call was made, nothing here is a measurement." in done.stdout
    goals = {line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| G")}
    assert goals >= {f"G{i}" for i in range(1, 11)}
    assert "Failed" not in done.stdout
    assert "Not run. G5: Triton, " in done.stdout


def test_without_a_gpu_it_refuses_and_proposes_the_dry_run(monkeypatch, capsys):
    import gpu
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "`--dry-run` makes the same calls" in capsys.readouterr().err


def test_a_goal_that_fails_is_named_and_the_others_run(monkeypatch, capsys, tmp_path):
    import gpu

    def fails(setting, report):
        raise RuntimeError("no such kernel")

    def runs(setting, report):
        found = gpu.times(setting, {"a": lambda: None, "b": lambda: None})
        report.took("G9", found)
        report.rows.append(gpu.Row("G9", "b / a", 1.4, 1.5))

    def lacks(setting, report):
        raise ImportError("No module named 'diffusers'")

    monkeypatch.setattr(gpu, "sections", lambda: {"G4": lacks, "G5": fails, "G9": runs})
    assert gpu.main(["--dry-run", "--out", str(tmp_path / "table.md")]) == 1
    said = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == said
    assert "**Failed. G5: RuntimeError: no such kernel**" in said
    assert "Not run. G4: No module named 'diffusers'." in said
    assert "| G9 | b / a | <= 1.5 |  |" in said.splitlines()
    assert "1.4" not in said  # what a dry run measures means nothing


def test_sdxls_attention_is_counted_from_its_model():
    import gpu_pictures
    from merge_elementwise import SDXL, shapes

    found = Counter(shapes(SDXL, lambda name, module: name.endswith(gpu_pictures.TARGETS)).values())
    assert dict(found) == gpu_pictures.SDXL
