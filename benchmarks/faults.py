"""What the base and the memory are after thousands of cycles, and admission after a great many mutants.

    OMP_NUM_THREADS=1 python -m benchmarks.faults restore [CYCLES]          # 10,000 apply-and-restore cycles
    OMP_NUM_THREADS=1 python -m benchmarks.faults loads [CYCLES]            # 2,000 load-unload cycles
    OMP_NUM_THREADS=1 python -m benchmarks.faults mutants [COUNT] [CORES]   # mutated files through admission

As a module: by its path, this folder would come first and hide the package `kernels`. Each writes its part of
benchmarks/faults.md, and ends with an error when a bar is missed. The app's part is in benchmarks/faults_app.py; a
short run of each is in tests/test_faults_long.py.

Runs of `mutants` add up to the 2,000,000 of one seed, on any machines: which are done is in faults_mutants.json. A run
may be stopped at any time; under `nice -n 19 chrt -i 0` it takes idle time only.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from multilora import files
from multilora.attach import attached
from multilora.lab.machine import processor
from multilora.pipelines.image import Composer
from tests import fuzz_files, tiny

REPORT = Path(__file__).with_suffix(".md")
MUTANTS = Path(__file__).with_name("faults_mutants.json")
SEED, ALL = 11, 2_000_000  # of the mutants
GROWTH_MB = 10.0


def machine() -> str:
    """The day, the processor, how busy it is."""
    day, load = datetime.date.today().isoformat(), os.getloadavg()[1]
    return f"{day}, {processor()}, {os.cpu_count()} cores, load average {load:.1f}"


def report(title: str, text: str) -> None:
    """Put a part into the report in place of the one of that title."""
    old = REPORT.read_text() if REPORT.exists() else "# Faults, load and hostile input\n"
    head, *parts = re.split(r"^(?=## )", old, flags=re.M)
    parts = [p.rstrip() for p in parts if not p.startswith(f"## {title}\n")]
    parts.append(f"## {title}\n\n{machine()}\n\n{text}")
    REPORT.write_text("\n\n".join([head.rstrip(), *sorted(parts)]) + "\n")
    print(text)


def resident(pid: int | str = "self") -> float:
    """MB that a process holds in memory."""
    with open(f"/proc/{pid}/statm") as status:
        return int(status.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


# -- apply and restore ------------------------------------------------------------------------------------------------


def restore(cycles: int = 10_000, count: int = 8) -> dict[str, Any]:
    """Rows of `count` LoRAs, exchanged for one another in a bfloat16 U-Net by each form in turn, then taken back.

    bits     of the base that are not as before, over all its tensors
    applied  cycles in which a weight of the base, or the answer of an adapted layer, was really another one
    """
    unet = tiny.sd15(torch.bfloat16).unet
    loras = [tiny.lora_for(unet, rank=2 + i, seed=i) for i in range(count)]
    before = {n: t.detach().clone() for n, t in unet.state_dict().items()}
    layer = next(m for n, m in unet.named_modules() if n.endswith("attn1.to_q"))
    x = torch.randn(4, layer.in_features, dtype=torch.bfloat16)
    own, applied, done, wrong = layer(x), 0, 0, set()
    generator = torch.Generator().manual_seed(0)
    while done < cycles:
        for form in ("rebuilt", "bank", "side"):
            with attached(unet, loras, form=form, bank_bytes=2**20) as bank:
                for _ in range(min(50, cycles - done)):
                    row = torch.randn(count, generator=generator).tolist()
                    bank.row = row
                    applied += not torch.equal(layer(x), own)
                    bank.row = [0.0] * count
                    wrong |= {"an answer"} if not torch.equal(layer(x), own) else set()
                    done += 1
        now = unet.state_dict()
        wrong |= {n for n in before if not torch.equal(before[n].view(torch.int16), now[n].view(torch.int16))}
    return {"cycles": done, "applied": applied, "bits": _bits(before, unet.state_dict()), "wrong": sorted(wrong)}


def _bits(before: dict, now: dict) -> int:
    """Bits of bfloat16 tensors that differ."""
    total = 0
    for name, tensor in before.items():
        apart = tensor.view(torch.int16) ^ now[name].view(torch.int16)
        total += sum(int(((apart >> bit) & 1).sum()) for bit in range(16))
    return total


# -- load and unload --------------------------------------------------------------------------------------------------


def loads(cycles: int = 2000, warm: int = 100) -> dict[str, Any]:
    """A LoRA is read, put into a Composer, composed for one step now and then, taken out, and its file removed.

    growth  MB of resident memory from the cycle number `warm` on
    """
    pipe = tiny.sd15()
    composer, started = Composer(pipe), 0.0
    with tempfile.TemporaryDirectory() as folder:
        sources = [files.save(tiny.lora_for(pipe, seed=i, text_encoder=True), Path(folder, f"{i}.safetensors"))
                   for i in range(4)]  # fmt: skip
        data = [path.read_bytes() for path in sources]
        for i in range(cycles + warm):
            path = Path(folder, f"cycle-{i}.safetensors")
            path.write_bytes(data[i % 4])
            composer.add(path, name=f"lora {i}")
            if i % 20 == 0:
                composer("a fox", seed=i, num_inference_steps=1)
            composer.remove(f"lora {i}")
            path.unlink()
            if i == warm:
                gc.collect()
                started = resident()
    gc.collect()
    assert not composer.loras
    return {"cycles": cycles, "growth": resident() - started, "resident": started}


# -- mutants ----------------------------------------------------------------------------------------------------------


def mutants(count: int = ALL, cores: int | None = None, path: Path = MUTANTS, piece: int = 5000) -> dict[str, Any]:
    """Put `count` more mutants of SEED through the whole admission (tests/fuzz_files.py), on all cores.

    path  the state of all runs, written after every `piece`; those that are going on when a run is stopped are lost:
          seed, done: [[first, after the last], ...], found: [[number, what, commit], ...], and runs. A piece in which
          something is found is not done; it comes again in the next run
    """
    state: dict[str, Any] = {"seed": SEED, "done": [], "found": [], "runs": []}
    if path.exists():
        state = json.loads(path.read_text())
    todo = [(state["seed"], at, min(piece, stop - at)) for first, stop in missing(state["done"], count)
            for at in range(first, stop, piece)]  # fmt: skip
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=REPORT.parent)
    run = {"machine": f"{processor()}, {os.cpu_count()} cores", "commit": git.stdout.strip(),
           "from": _now(), "to": "", "mutants": 0, "admitted": 0, "slowest": 0.0, "grown": 0.0,
           "cpu": 0.0}  # fmt: skip
    pool = multiprocessing.get_context("spawn").Pool(cores, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with contextlib.suppress(KeyboardInterrupt), pool:
        for (_, first, size), got in pool.imap_unordered(_mutated, todo):
            found = [[max(number, first), what] for _, number, what in got["found"]]
            state["found"] += [[*f, run["commit"]] for f in found if f not in [known[:2] for known in state["found"]]]
            state["done"] = merged([*state["done"], *([] if found else [[first, first + size]])])
            state["runs"] += [] if run["mutants"] else [run]
            run |= {"to": _now(), "mutants": run["mutants"] + size, "admitted": run["admitted"] + got["accepted"],
                    "cpu": run["cpu"] + got["cpu"], "slowest": max(run["slowest"], got["slowest"]),
                    "grown": max(run["grown"], got["grown"] / 2**20)}  # fmt: skip
            part = path.with_suffix(".part")
            part.write_text(json.dumps(state, indent=1) + "\n")
            part.replace(path)
            print(f"{_now()} {_total(state):,} of {ALL:,}, {len(unmended(state))} findings", flush=True)
    return state


def unmended(state: dict[str, Any]) -> list[list]:
    """What was found in pieces that have not been without findings since."""
    return [f for f in state["found"] if not any(first <= f[0] < stop for first, stop in state["done"])]


def merged(ranges: list[list[int]]) -> list[list[int]]:
    """Ranges [first, after the last] in order, those that touch put together."""
    found: list[list[int]] = []
    for first, stop in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], stop)
        else:
            found.append([first, stop])
    return found


def missing(done: list[list[int]], count: int, of: int = ALL) -> list[list[int]]:
    """The first `count` numbers below `of` that are in no range, as ranges."""
    found, at = [], 0
    for first, stop in [*merged(done), [of, of]]:
        size = min(first - at, count)
        if size > 0:
            found.append([at, at + size])
            count -= size
        at = stop
    return found


def _total(state: dict[str, Any]) -> int:
    return sum(stop - first for first, stop in state["done"])


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")


def _mutated(job: tuple[int, int, int]) -> tuple[tuple[int, int, int], dict]:
    return job, fuzz_files.run(*job)


def _mutants_table(state: dict[str, Any]) -> str:
    done, found, left = _total(state), state["found"], unmended(state)
    lines = [
        f"{done:,} of {ALL:,} ({done / ALL:.1%}), all of seed {state['seed']}. Crashes, hangs and state changes "
        f"(bar 0): {len(left)}; found and mended: {len(found) - len(left)}.",
        "",
        "| from, to (UTC) | machine | commit | mutants | admitted | slowest, CPU s | most growth, MB | CPU minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in state["runs"]:
        lines.append(
            f"| {run['from']}, {run['to']} | {run['machine']} | {run['commit']} | {run['mutants']:,} | "
            f"{run['admitted']:,} | {run['slowest']:.2f} | {run['grown']:.0f} | {run['cpu'] / 60:.1f} |"
        )
    if found:
        lines += ["", "| number | found | at commit |", "|---|---|---|"]
        lines += [f"| {number} | {what[:200]} | {commit} |".replace("\n", " ") for number, what, commit in found]
    return "\n".join(lines)


def main(what: str, *numbers: str) -> None:
    """Run one of the three, write its part of the report."""
    given = [int(n.replace("_", "").replace(",", "")) for n in numbers]
    began = time.monotonic()
    if what == "restore":
        got = restore(*given)
        bad = got["bits"] or got["wrong"] or got["applied"] < got["cycles"]
        text = "| cycles | LoRAs | form | really applied | bits that differ (bar 0) |\n|---|---|---|---|---|\n" + (
            f"| {got['cycles']:,} | 8 | rebuilt, bank, side in turn | {got['applied']:,} | {got['bits']} |"
        )
        report("Apply and restore, bfloat16", text)
    elif what == "loads":
        got = loads(*given)
        bad = got["growth"] > GROWTH_MB * max(1, got["cycles"] / 2000)
        text = "| cycles | resident before, MB | growth, MB (bar 10 per 2,000) | seconds |\n|---|---|---|---|\n" + (
            f"| {got['cycles']:,} | {got['resident']:.0f} | {got['growth']:.1f} | {time.monotonic() - began:.0f} |"
        )
        report("Load and unload", text)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped run reports, too
        got = mutants(*given)
        bad = unmended(got)
        report("Mutants", _mutants_table(got))
    if bad:
        raise SystemExit(f"{what}: a bar is missed: {got}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("restore", "loads", "mutants"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
