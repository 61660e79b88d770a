"""The CPU's goals C1 to C14 in one table: `make bench`, 15 minutes.

    OMP_NUM_THREADS=1 python benchmarks/results.py [WORD ...]      writes benchmarks/RESULTS.md, and .json as it goes

Each goal comes from the script that is named beside it; here they run at the size that their goal asks for. Words
measure the parts that have one of them anew ("counts", "decoding") and keep the others' lines. Counts, bits and FLOPs
are gates: a missed one is the exit status 1. Times are not, for they depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from goals import HEAD, Row, in_turn, machine

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 7


def flipping() -> Iterator[Row]:
    """C5: one flip to another LoRA against diffusers' set_adapters."""
    from adapted_layers import ONE_HOT, call_of, sets_of, with_peft
    from flip import unet

    from multilora.attach import attached

    model, other = unet(), unet()
    sets = sets_of(model)
    names = with_peft(other, sets)
    turn = iter(range(10**9))

    def theirs() -> None:
        other.set_adapters(names[next(turn) % len(names)])

    for form in ("bank", "side"):
        with attached(model, sets, form=form) as bank:
            for row in ONE_HOT:
                bank.row = row
                call_of(model, 2)()

            def ours(bank=bank) -> None:
                for _ in range(20):
                    bank.row = ONE_HOT[next(turn) % len(ONE_HOT)]

            found = in_turn({"set_adapters": theirs, "ours": ours}, 3 * ROUNDS)
        what = f"time of one flip, {form} / set_adapters"
        yield Row("C5", what, found.over("ours", "set_adapters") / 20, 1 / 20, None, found.spread)


def merging() -> Iterator[Row]:
    """C8 and C9, on the layer that decides them; all layers are in merge.md."""
    from merge import _one_conv, alternated
    from merge_elementwise import RANK, WEIGHTS, Theirs, lora

    shape = (1280, 1280)
    loras = [lora({"x": shape}, seed) for seed in range(3)]
    theirs = Theirs(loras, shape)
    peft = theirs.model.base_model._svd_generalized_task_arithmetic_weighted_adapter

    def operator():
        return peft("svd", theirs.names, WEIGHTS, RANK, theirs.layer, None, None, None, "total", None)

    def ours():
        a, b, c = (one["x"] * w for one, w in zip(loras, WEIGHTS, strict=True))
        return (a + b + c).truncated(RANK)[0]

    exact = sum(w * one["x"].delta(torch.float64) for one, w in zip(loras, WEIGHTS, strict=True))
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    exact = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    best = alternated([operator, ours], 3)
    best[1] = min(best[1], *alternated([ours], 20))
    yield Row("C8", "time of an svd merge, 1280 x 1280, 3 LoRAs / PEFT", best[1] / best[0], 1 / 100, 1 / 500)
    off = float((ours().delta(torch.float64) - exact).norm() / exact.norm())
    yield Row("C8", "the merged LoRA, off from a float64 svd", off, 1e-5)
    seconds, (unlike, _, changed) = _one_conv((1280, 1280, 3, 3), 4)
    yield Row(
        "C9", "time of merge and unmerge, convolution 1280 x 1280 x 3 x 3 / PEFT", seconds[1] / seconds[0], 1 / 8
    )
    yield Row("C9", "bytes of the base changed by it, and merged weights unlike PEFT's", unlike + changed, 0)


def ties() -> Iterator[Row]:
    """C11."""
    from merge_elementwise import METHODS, RANK, WEIGHTS, Theirs, lora, timed

    from multilora.method import resolve

    shape = (1280, 1280)
    loras = [lora({"x": shape}, seed) for seed in range(3)]
    theirs = Theirs(loras, shape)
    for name in ("ties", "dare"):
        kind, options = METHODS[name]
        ours, best = resolve("merge", name, rank=RANK, **options), [float("inf")] * 2
        for _ in range(3):
            best[0] = min(best[0], timed(theirs.merge, kind, options["density"])[0])
            theirs.model.delete_adapter("merged")
            best[1] = min(best[1], timed(ours, loras, WEIGHTS)[0])
        yield Row("C11", f"time of {name}, cut to rank {RANK}, 1280 x 1280 / PEFT's {kind}", best[1] / best[0], 1 / 4)


def decoding() -> Iterator[Row]:
    """C12."""
    import decoding as script
    from goals import Times

    for title, widths in script.SIZES.items():
        model = script.language_model(*widths)
        ways = script.ways_of(model, script.experts(model), 1)
        script.check(ways)
        each = script.measured(ways, ROUNDS)
        pairs = zip(each["bare model"], each.pop("A/A"), strict=True)
        found = Times(each | {"bare model": [seconds for pair in pairs for seconds in pair]})
        of, bound = script.GOALS[title]
        other = "bare model" if of == "of the bare model" else script.LOOP
        what = f"time of a token, shared route un-merged / {other}, {title}"
        yield Row("C12", what, found.over(script.UNMERGED, other), bound, None, found.spread)


def cached() -> Iterator[Row]:
    """C14, on the meta device."""
    import full_size
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **full_size.SD15).eval()
    flops = full_size.cached(unet, full_size.unet_call(unet, 2))
    yield Row("C14", "FLOPs of a short call of the branch cache, SD 1.5 / a whole one", flops[1] / flops[0], 0.15)
    yield Row("C14", f"FLOPs on average at every = {len(flops)}", sum(flops) / len(flops) / flops[0], 0.32)


def adapted(part: str, *arguments: int) -> Callable[[], Iterable[Row]]:
    def rows() -> Iterable[Row]:
        import adapted_layers

        return getattr(adapted_layers, part)(*arguments)

    return rows


def recompiled() -> Iterable[Row]:
    import recompiles

    return recompiles.rows()


def scripts() -> dict[str, Callable[[], Iterable[Row]]]:
    """Part -> its rows; the part's first word is the script that they come from."""
    counts = {"adapted_layers.py counts": adapted("counts"), "adapted_layers.py accuracy": adapted("accuracy"),
              "full_size.py": cached, "recompiles.py": recompiled}  # fmt: skip
    timed = {
        f"adapted_layers.py {part}": adapted(part, ROUNDS)
        for part in ("composite", "switch", "all_in_one_sample", "compute_bound")
    }
    others = {"flip.py": flipping, "merge.py": merging, "merge_elementwise.py": ties, "decoding.py": decoding}
    found = counts | timed | others
    return {part: rows for part, rows in found.items() if (ROOT / "benchmarks" / part.split()[0]).is_file()}


def gpu() -> str:
    """Where the GPU's table stands; without one, what its script's dry run says."""
    if (ROOT / "benchmarks" / "gpu.md").is_file():
        return "The GPU's goals G1 to G10 are in gpu.md."
    import gpu as script

    setting = script.Setting(torch.device("cpu"), True, 1, torch.float32)
    report = script.run(setting, [], 8)
    made = f"makes {len(report.seconds)} kinds of calls on the CPU at small sizes"
    failed = f" and {len(report.failed)} FAIL: {'; '.join(report.failed)}" if report.failed else " and passes"
    return ("**No GPU was available: goals G1 to G10 are not measured.** The dry run of their script, `python "
            f"benchmarks/gpu.py --dry-run`, {made}{failed}.")  # fmt: skip


def measured(rows: Callable[[], Iterable[Row]]) -> dict[str, Any]:
    """A part's lines, how many of its gates are missed, and when and under what load it was."""
    began, lines, missed = time.process_time(), [], 0
    try:
        with torch.no_grad():
            for row in rows():
                print(row, file=sys.stderr, flush=True)
                missed += row.verdict == "missed" and not row.what.startswith("time ")
                lines.append(str(row))
    except Exception as error:  # the other goals are still worth their lines
        traceback.print_exc()
        missed += 1
        lines.append(f"| | **failed: {type(error).__name__}: {error}** | | | | | |")
    return {"lines": lines, "missed": missed, "seconds": round(time.process_time() - began), "machine": machine(),
            "date": str(datetime.date.today())}  # fmt: skip


def written(parts: dict[str, dict[str, Any]], end: str) -> str:
    """RESULTS.md."""
    first, second = HEAD.splitlines()
    absent = [name for name in scripts() if name not in parts]
    tables = {name: Path(name.split()[0]).with_suffix(".md") for name in absent}
    also = f"Not measured here: {', '.join(absent)}.\n" if absent else ""
    for name, table in tables.items():  # a script's own run, where there is one, says of its goals
        if (ROOT / "benchmarks" / table).is_file():
            said = [line for line in (ROOT / "benchmarks" / table).read_text().splitlines() if line.startswith("Goal")]
            also += "".join(f"\n- {table}, {name}'s own run: {line}" for line in said)
    table = [f"{line} {part.split()[0]} |" for part, each in parts.items() for line in each["lines"]]
    table.sort(key=lambda line: (len(line.split("|")[1]), line.split("|")[1]))
    return "\n".join([
        "# The CPU's goals\n",
        "Made by `make bench` (`python benchmarks/results.py`). Goals and floors: research/performance.md, section 9. "
        "Operations are dispatched aten operations without views; times are CPU seconds of one thread, medians of "
        f"{ROUNDS} rounds in turn or three times as many where a call is short (merges: minima). A/A: the quartiles "
        "of one way against itself, round by round; a bound inside this spread around what was measured is met. One "
        "layer stands for a set where a whole one takes PEFT long; whole sets are in merge.md and "
        "merge_elementwise.md.\n",
        f"{first} script |", f"{second}---|", *table, f"\n{also.rstrip()}\n\n{end}\n",
        "| part | on | CPU seconds | machine, and its load at the end |", "|---|---|---|---|",
        *(f"| {part} | {each['date']} | {each['seconds']} | {each['machine']} |" for part, each in parts.items()), "",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help="words of the parts to measure anew, default all of them")
    words = parser.parse_args().parts
    kept = ROOT / "benchmarks" / "RESULTS.json"
    parts = json.loads(kept.read_text()) if words and kept.is_file() else {}
    parts = {name: each for name, each in parts.items() if name in scripts()}
    for name, rows in scripts().items():
        if not words or any(word in name for word in words):
            print(f"{name} ...", file=sys.stderr, flush=True)
            parts[name] = measured(rows)
            kept.write_text(json.dumps(parts, indent=1) + "\n")
    with torch.no_grad():
        text = written(parts, gpu())
    (ROOT / "benchmarks" / "RESULTS.md").write_text(text)
    print(text)
    return 1 if sum(each["missed"] for each in parts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
