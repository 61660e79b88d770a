"""The CPU's goals C1 to C14 in one table: `make bench`, 15 minutes.

    OMP_NUM_THREADS=1 python benchmarks/results.py [--counts]      writes benchmarks/RESULTS.md

Each goal comes from the script that is named beside it; here they run at the size that their goal asks for. Counts and
FLOPs are gates: a missed one is the exit status 1. Times are not, for they depend on what else the machine does.
--counts leaves the times out.
"""

from __future__ import annotations

import datetime
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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
        found = Times(each, each.pop("A/A"))
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


def adapted(rounds: int) -> Iterable[Row]:
    import adapted_layers

    return adapted_layers.rows(rounds)


def recompiled() -> Iterable[Row]:
    import recompiles

    return recompiles.rows()


def scripts(rounds: int) -> dict[str, Callable[[], Iterable[Row]]]:
    found: dict[str, Callable[[], Iterable[Row]]] = {
        "adapted_layers.py": lambda: adapted(rounds),
        "recompiles.py": recompiled,
        "full_size.py": cached,
    }
    timed = {"flip.py": flipping, "merge.py": merging, "merge_elementwise.py": ties, "decoding.py": decoding}
    return found | (timed if rounds else {})


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


def main() -> int:
    rounds, began, before, missed = 0 if "--counts" in sys.argv else ROUNDS, time.monotonic(), machine(), 0
    table = []
    for script, rows in scripts(rounds).items():
        print(f"{script} ...", file=sys.stderr, flush=True)
        try:
            with torch.no_grad():
                for row in rows():
                    print(row, file=sys.stderr, flush=True)
                    missed += row.verdict == "missed" and not row.what.startswith("time ")
                    table.append(f"{row} {script} |")
        except Exception as error:  # the other goals are still worth their lines
            traceback.print_exc()
            missed += 1
            table.append(f"| | **failed: {type(error).__name__}: {error}** | | | | | | {script} |")
    table.sort(key=lambda line: (len(line.split("|")[1]), line.split("|")[1]))
    with torch.no_grad():
        end = gpu()
    first, second = HEAD.splitlines()
    text = "\n".join([
        "# The CPU's goals\n",
        f"Made by `make bench` (`python benchmarks/results.py{' --counts' * (not rounds)}`) on "
        f"{datetime.date.today()} in {(time.monotonic() - began) / 60:.0f} minutes. Machine at the start: {before}; "
        f"at the end: {machine()}.\n",
        f"Goals and floors: research/performance.md, section 9. Operations are dispatched aten operations without "
        f"views; times are CPU seconds of one thread, medians of {ROUNDS} rounds in turn (merges: minima). A/A: the "
        "quartiles of one way against itself, round by round; a bound inside this spread around what was measured is "
        "met. One layer stands for a set where a whole one takes PEFT long; whole sets are in merge.md and "
        "merge_elementwise.md.\n",
        f"{first} script |", f"{second}---|", *table, f"\n{end}\n",
    ])  # fmt: skip
    (ROOT / "benchmarks" / "RESULTS.md").write_text(text)
    print(text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
