"""What the base and the memory are after thousands of cycles, and admission after a great many mutants.

    OMP_NUM_THREADS=1 python -m benchmarks.faults restore [CYCLES]          # 10,000 apply-and-restore cycles
    OMP_NUM_THREADS=1 python -m benchmarks.faults loads [CYCLES]            # 2,000 load-unload cycles
    OMP_NUM_THREADS=1 python -m benchmarks.faults mutants [COUNT] [CORES]   # mutated files through admission

As a module: by its path, this folder would come first and hide the package `kernels`. Each writes its part of
benchmarks/faults.md, and ends with an error when a bar is missed. The app's part is in benchmarks/faults_app.py; a
short run of each is in tests/test_faults_long.py.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import platform
import re
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from multilora import files
from multilora.attach import attached
from multilora.pipelines.image import Composer
from tests import fuzz_files, tiny

REPORT = Path(__file__).with_suffix(".md")
GROWTH_MB = 10.0


def machine() -> str:
    """The day, the processor, how busy it is."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    today, load = datetime.date.today().isoformat(), os.getloadavg()[1]
    return f"{today}, {name[1] if name else platform.processor()}, {os.cpu_count()} cores, load average {load:.1f}"


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


def mutants(count: int = 2_000_000, cores: int | None = None, seed: int | None = None, piece: int = 5000) -> dict:
    """Mutants through the whole admission (tests/fuzz_files.py), on all cores, of a seed that was not used before."""
    cores, seed = cores or os.cpu_count() or 1, seed or secrets.randbelow(10**6) + 100
    jobs = [(seed, first, min(piece, count - first)) for first in range(0, count, piece)]
    began, done, found = time.monotonic(), {"accepted": 0, "slowest": 0.0, "grown": 0, "cpu": 0.0, "count": 0}, []
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        for result in pool.imap_unordered(_mutated, jobs):
            found += result["found"]
            for name in ("accepted", "count", "cpu"):
                done[name] += result[name]
            done["slowest"] = max(done["slowest"], result["slowest"])
            done["grown"] = max(done["grown"], result["grown"])
            if len(jobs) > 1:
                print(f"{done['count']:,} of {count:,}, {len(found)} findings", flush=True)
    return {**done, "found": found, "seed": seed, "cores": cores, "seconds": time.monotonic() - began}


def _mutated(job: tuple[int, int, int]) -> dict:
    return fuzz_files.run(*job)


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
        got = mutants(*given)
        bad = got["found"]
        for item in got["found"][:50]:
            print(*item)
        text = (
            "| mutants | of 2,000,000 | seed | admitted | crashes, hangs, state changes (bar 0) | slowest, CPU s | "
            "most growth, MB | cores | minutes |\n|---|---|---|---|---|---|---|---|---|\n"
            f"| {got['count']:,} | {got['count'] / 2e6:.2%} | {got['seed']} | {got['accepted']:,} | "
            f"{len(got['found'])} | {got['slowest']:.2f} | {got['grown'] / 2**20:.0f} | {got['cores']} | "
            f"{got['seconds'] / 60:.1f} |"
        )
        report("Mutants", text)
    if bad:
        raise SystemExit(f"{what}: a bar is missed: {got}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("restore", "loads", "mutants"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
