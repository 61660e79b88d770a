"""Batches of the stand-in: a driver process on a folder, the pictures there, those of a run without interruption."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from multilora.lab.evaluate.batch import run_batch
from multilora.lab.evaluate.items import items_of
from tests.batch_standin import StandIn, lines

SCRIPT = Path(__file__).parent / "batch_standin.py"


def pictures(folder):
    return {p.name: p.read_bytes() for p in Path(folder, "pictures").iterdir()}


def driver(folder, recipes, seconds=0.0, **options):
    """A driver process on folder/recipes.jsonl, folder/out and folder/log."""
    (folder / "recipes.jsonl").write_text("\n".join(json.dumps(line) for line in recipes))
    command = [sys.executable, str(SCRIPT), *(str(folder / n) for n in ("recipes.jsonl", "out", "log")), str(seconds)]
    return subprocess.Popen(command, **options)


def until(condition, seconds=60.0):
    """Wait for something to become true, which it must."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The pictures of lines(12), drawn without interruption."""
    out = tmp_path_factory.mktemp("reference")
    run_batch(items_of(lines(12)), out, StandIn)
    return pictures(out)
