"""What a batch survives, and what workers bring.

    OMP_NUM_THREADS=1 python benchmarks/batch.py kills          # 500 kills over 2,000 items with a fast stand-in
    OMP_NUM_THREADS=1 python benchmarks/batch.py real           # 20 kills with the embedded base
    OMP_NUM_THREADS=1 python benchmarks/batch.py ray            # two actors against one process; on an idle machine

`kills ITEMS KILLS MINUTES` kills no more after so many minutes. Each writes its part of benchmarks/batch.md. `kills`
and `real` end with an error unless every item is there once, whole, and equal to the byte to that of an uninterrupted
run.
"""

import datetime
import os
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the harness is that of the tests

from multilora.lab.evaluate.batch import run_batch  # noqa: E402
from multilora.lab.evaluate.items import items_of  # noqa: E402
from multilora.lab.evaluate.workers import ComposerRenderer  # noqa: E402
from multilora.lab.machine import processor  # noqa: E402
from tests.batch_kills import check, kill_in_turn  # noqa: E402
from tests.batch_standin import StandIn, lines  # noqa: E402

REPORT = Path(__file__).with_suffix(".md")
BAR = 1.7


def machine() -> str:
    load = os.getloadavg()[1]
    today = datetime.date.today().isoformat()
    return f"{today}, {processor()}, {os.cpu_count()} cores, load average {load:.1f}"


def report(title: str, text: str) -> None:
    """Put a part into the report in place of the one of that title."""
    old = REPORT.read_text() if REPORT.exists() else "# Batch\n"
    head, *parts = re.split(r"^(?=## )", old, flags=re.M)
    parts = [p.rstrip() for p in parts if not p.startswith(f"## {title}\n")]
    parts.append(f"## {title}\n\n{machine()}\n\n{text}")
    REPORT.write_text("\n\n".join([head.rstrip(), *sorted(parts)]) + "\n")
    print(text)


def cluster(cpus: int):
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    return Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )


def pictures(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "pictures").iterdir()}


def kills(folder: Path, count: int = 2000, number: int = 500, minutes: int = 10**6) -> None:
    given = lines(count)
    run_batch(items_of(given), folder / "reference", StandIn)
    room = cluster(4)
    try:
        # A driver alone dies with its one worker: two kills of that kind for each round of 1 to 4 actors.
        teams = (0, 0, 1, 2, 3, 4)
        found = kill_in_turn(folder, given, number, teams, room.address, limit=60.0 * minutes)
    finally:
        room.shutdown()
    check(folder, pictures(folder / "reference"), found)
    table("Kills, stand-in", found, count)


def real(folder: Path, count: int = 24, number: int = 20) -> None:
    given = real_lines(count)
    make = partial(ComposerRenderer, "cpu", 1)
    run_batch(items_of(given), folder / "reference", make)
    room = cluster(2)
    try:
        found = kill_in_turn(folder, given, number, (0, 2), room.address, seconds=1.0, extra=["real"])
    finally:
        room.shutdown()
    check(folder, pictures(folder / "reference"), found)
    table("Kills, embedded base", found, count)


def real_lines(count: int, steps: int = 4) -> list[dict]:
    ways = (
        ("merge", {"korv": 0.8}),
        ("switch", {"korv": 0.8, "dotta": 1.0}),
        ("composite", {"korv": 0.8, "palma": 1}),
    )
    return [
        {"prompt": f"a korv, number {i}", "method": method, "loras": loras, "steps": steps}
        for i in range(count)
        for method, loras in [ways[i % 3]]
    ]


def table(title: str, found, count: int) -> None:
    report(
        title,
        "| items | drivers killed | workers killed | most workers | lost, twice or torn | bytes differ | drawn again "
        "| in hand at the kills | minutes |\n|---|---|---|---|---|---|---|---|---|\n"
        f"| {count} | {found.drivers} | {found.workers} | {found.most} | 0 | 0 | {found.again} | {found.in_hand} | "
        f"{found.seconds / 60:.1f} |\n\nDrawn again may be at most workers x kills = {found.most * found.kills}.",
    )


def rate(items, folder: Path, **options) -> float:
    """Pictures a second between the first and the last: without loading and starting."""
    at = []
    run_batch(
        items,
        folder,
        partial(ComposerRenderer, "cpu", 1),
        progress=lambda p: at.append((time.monotonic(), p.done)),
        **options,
    )
    settled = [(t, n) for t, n in at if n >= 4]
    return (settled[-1][1] - settled[0][1]) / (settled[-1][0] - settled[0][0])


def ray(folder: Path, count: int = 24, rounds: int = 3) -> None:
    from multilora.lab.evaluate.ray_workers import RayWorkers

    items = items_of(real_lines(count, steps=30))
    one, two = [], []
    for n in range(rounds):  # A B A B
        one.append(rate(items, folder / f"one {n}"))
        two.append(rate(items, folder / f"two {n}", workers=partial(RayWorkers, workers=2)))
    assert pictures(folder / "one 0") == pictures(folder / "two 0")
    times = statistics.median(two) / statistics.median(one)
    report(
        "Two actors",
        f"{count} pictures of 30 steps, {rounds} rounds in turn, one thread each; pictures a second, median\n\n"
        f"| one process | two Ray actors | times (bar {BAR}) |\n|---|---|---|\n"
        f"| {statistics.median(one):.3f} | {statistics.median(two):.3f} | {times:.2f} |",
    )


if __name__ == "__main__":
    what = {"kills": kills, "real": real, "ray": ray}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if what is None:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(prefix="batch") as scratch:
        what(Path(scratch), *(int(n) for n in sys.argv[2:]))
