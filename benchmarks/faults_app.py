"""The app under load and under hostile calls, over HTTP.

    OMP_NUM_THREADS=1 python -m benchmarks.faults_app clients [REQUESTS] [CLIENTS]   # 1,000 of 8, a tenth cut off
    OMP_NUM_THREADS=1 python -m benchmarks.faults_app flood [CLIENTS] [WAITING]      # 200 at once, a queue of 50
    OMP_NUM_THREADS=1 python -m benchmarks.faults_app fuzz [CALLS] [SEED]            # 5,000 calls of any endpoint

`clients` draws with a base of tests/tiny.py in a real worker and compares every picture with a lone one; the other two
have a stand-in for the model. Each writes its part of benchmarks/faults.md, and ends with an error when a bar is
missed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.faults import report, resident
from multilora.web.app import launch
from multilora.web.service import Limits, Service
from multilora.web.service.guard import launch_options
from tests import fault_engine

STUB = "tests.service_engine:Stub"
METHODS = ("merge", "switch", "composite")
SETS = (("fox",), ("robe", "ink"), ("ink", "fox"), ("fox", "robe", "ink"))
SEEDS = 4
REFUSED_SECONDS = 1.0
GROWTH_MB = 50.0  # per 1,000 requests


@contextlib.contextmanager
def app(service: Service) -> Iterator[str]:
    """The address of the app as `multilora app` serves it."""
    served, address = launch(service, prevent_thread_lock=True, quiet=True, **launch_options(service))
    try:
        yield address
    finally:
        served.close(verbose=False)


class Browser:
    """A client with its own cookie, that calls named endpoints and reads their events."""

    def __init__(self, address: str, kept: int = 20):
        """kept: connections that stay open; the server closes them after 5 s, which a late client learns too late."""
        limits = httpx.Limits(max_keepalive_connections=kept)
        self.http = httpx.Client(base_url=address, timeout=300, limits=limits, verify=False)  # plain http: no TLS
        self.http.get("/robots.txt")  # the cookie

    def ask(self, name: str, data: list, cut: float | None = None) -> tuple[str, Any, float]:
        """("complete", "error", "refused" or "cut", what was sent, seconds); cut: seconds until it hangs up."""
        began = time.monotonic()
        answer = self.http.post(f"/gradio_api/call/{name}", json={"data": data})
        if answer.status_code != 200:
            return "refused", answer.text, time.monotonic() - began
        event = ""
        timeout = httpx.Timeout(300 if cut is None else max(0.01, cut))
        try:
            with self.http.stream(
                "GET", f"/gradio_api/call/{name}/{answer.json()['event_id']}", timeout=timeout
            ) as sent:
                for line in sent.iter_lines():
                    if cut is not None and time.monotonic() - began > cut:
                        return "cut", None, time.monotonic() - began
                    word, _, rest = line.partition(": ")
                    event = rest if word == "event" else event
                    if word == "data" and event in ("complete", "error"):
                        return event, json.loads(rest), time.monotonic() - began
        except httpx.ReadTimeout:
            return "cut", None, time.monotonic() - began
        return "cut", None, time.monotonic() - began

    def picture(self, sent: list) -> np.ndarray:
        """The pixels of a picture that `compose` gave."""
        found = self.http.get(f"/gradio_api/file={sent[0]['path']}")
        assert found.status_code == 200, found.text
        return np.asarray(Image.open(io.BytesIO(found.content)).convert("RGB"))


def together(count: int, work: Any) -> None:
    """work(0) to work(count - 1), each in a thread; the first error is raised."""
    wrong: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def idle(service: Service, seconds: float = 60.0) -> int:
    """Jobs that still wait or run after so many seconds."""
    until = time.monotonic() + seconds
    while service._line.jobs() and time.monotonic() < until:
        time.sleep(0.05)
    return len(service._line.jobs())


# -- clients ----------------------------------------------------------------------------------------------------------


def clients(requests: int = 1000, count: int = 8, cuts: int = 10, warm: int = 100) -> dict[str, Any]:
    """`count` clients ask for `requests` pictures of 4 LoRA sets and 3 methods; every `cuts`th drops its line.

    right, wrong  finished pictures that are bit-equal to their lone run, and others; stuck: jobs that never end
    growth        MB per 1,000 requests of the server's process, and of the worker's, after `warm` requests
    """
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        folder = Path(name)
        base = fault_engine.written(folder)
        limits = Limits(waiting=4 * count, per_user=8, sessions=2 * count)
        with Service(base, loras=folder / "loras", devices=["cpu"], limits=limits) as service, app(service) as address:
            lone = _lone(service, folder, base)
            browsers = [Browser(address) for _ in range(count)]
            numbers, found, memory = iter(range(requests)), Counter(), {}
            lock, began = threading.Lock(), time.monotonic()
            took: list[float] = []

            def work(i: int) -> None:
                chance = random.Random(i)
                while True:
                    with lock:
                        number = next(numbers, None)
                        if number == min(warm, requests // 2):
                            memory.update(_memory(service))
                    if number is None:
                        return
                    names, method, seed = SETS[number % 4], METHODS[number // 4 % 3], number // 12 % SEEDS
                    cut = chance.uniform(0.0, 0.3) if number % cuts == cuts - 1 else None
                    kind, sent, seconds = browsers[i].ask("compose", _compose(names, method, seed), cut)
                    right = kind == "complete" and np.array_equal(browsers[i].picture(sent), lone[names, method, seed])
                    with lock:
                        found["right" if right else "wrong" if kind == "complete" else kind] += 1
                        took.append(seconds)
                        if kind in ("error", "refused"):
                            print(kind, sent, flush=True)

            together(count, work)
            stuck, seconds = idle(service), time.monotonic() - began
            now, measured = _memory(service), requests - min(warm, requests // 2)
            growth = {n: (now[n] - memory[n]) * 1000 / measured for n in now}
            again, sent, _ = browsers[0].ask("compose", _compose(SETS[3], "composite", 0))
            found["right after it"] += again == "complete" and np.array_equal(
                browsers[0].picture(sent), lone[SETS[3], "composite", 0]
            )
            starts = sum(worker.starts for worker in service.workers)
    return {**found, "stuck": stuck, "growth": growth, "seconds": seconds, "starts": starts, "requests": requests,
            "median": statistics.median(took), "clients": count}  # fmt: skip


def _compose(names: tuple[str, ...], method: str, seed: int) -> list:
    loras = [{"reference": n, "weight": 0.8 - 0.1 * i} for i, n in enumerate(names)]
    options = {"every": 1} if method == "switch" else {}
    return [
        "a fox in a robe",
        loras,
        method,
        options,
        "blur",
        seed,
        fault_engine.STEPS,
        3.0,
        32,
        32,
        None,
        False,
        None,
    ]


def _lone(service: Service, folder: Path, base: str) -> dict[tuple, np.ndarray]:
    """Every picture that is asked for, by a Composer with a pipeline of its own in this process."""
    import torch

    from multilora.pipelines.image import Composer

    facts = service.about()
    torch.set_num_threads(facts["threads"])
    pipe, found = Composer.from_pretrained(base, device="cpu").pipe, {}
    for names in SETS:
        composer = Composer(pipe, base=base)
        for i, name in enumerate(names):
            composer.add(folder / "loras" / f"{name}.safetensors", name=name, weight=0.8 - 0.1 * i)
        for method in METHODS:
            options = {"every": 1} if method == "switch" else {}
            for seed in range(SEEDS):
                found[names, method, seed] = np.asarray(composer(
                    "a fox in a robe", negative_prompt="blur", method=method, seed=seed, guidance_scale=3.0, width=32,
                    num_inference_steps=fault_engine.STEPS, height=32, **options
                ).images[0])  # fmt: skip
    return found


def _memory(service: Service) -> dict[str, float]:
    gc.collect()
    return {"server": resident(), "worker": resident(service.workers[0].pid)}


# -- flood ------------------------------------------------------------------------------------------------------------


def flood(count: int = 200, waiting: int = 50, pause: float = 0.02) -> dict[str, Any]:
    """`count` people at once, in a process of their own (benchmarks/faults_flood.py), ask for a picture that takes
    3 x `pause` seconds of a server where `waiting` may wait.

    clear   how many of those that were refused were told so in words, and when to try again
    median, latest  seconds until those who were refused knew it, from the moment when all set out
    """
    recipe = {"prompt": "x", "base": "embedded", "steps": 3, "guidance_scale": 3.0, "width": 8, "height": 8, "seed": 1,
              "extra": {"pause": pause}}  # fmt: skip
    body = {"data": [recipe, False]}
    with Service(engine=STUB, limits=Limits(waiting=waiting, per_user=2)) as service, app(service) as address:
        service.about()
        browser = Browser(address, kept=0)
        browser.ask("compose_recipe", body["data"])
        command = [sys.executable, "-m", "benchmarks.faults_flood", address, str(count), json.dumps(body)]
        cpu = time.process_time()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        cpu = time.process_time() - cpu
        stuck = idle(service)
        after = browser.ask("compose_recipe", body["data"])[0]
        taken = len(service.door.places)
    found = json.loads(done.stdout)
    kinds = Counter(each["kind"] for each in found)
    refused = [each for each in found if each["kind"] in ("error", "refused")]
    clear = sum("the server is busy" in each["told"] and "try again" in each["told"] for each in refused)
    late = sorted(each["seconds"] for each in refused)
    drawn = sorted(each["seconds"] for each in found if each["kind"] == "complete")
    return {"clients": count, "waiting": waiting, "drawn": kinds["complete"], "refused": len(refused), "clear": clear,
            "door": sum(each["status"] == 503 and int(each["retry"]) > 0 for each in refused), "taken": taken,
            "latest": late[-1] if late else 0.0, "median": statistics.median(late) if late else 0.0, "stuck": stuck,
            "other": count - kinds["complete"] - len(refused), "after": after, "cpu": cpu,
            "longest": drawn[-1]}  # fmt: skip


# -- reports ----------------------------------------------------------------------------------------------------------


def main(what: str, *numbers: str) -> None:
    """Run one of the three, write its part of the report."""
    given = [int(n) for n in numbers]
    if what == "clients":
        got = clients(*given)
        grown = max(got["growth"].values())
        bad = got["right"] + got.get("cut", 0) != got["requests"] or got["stuck"] or not got["right after it"]
        bad = bad or grown > GROWTH_MB
        report(
            "Clients that take turns",
            "| requests | of 1,000 | clients | cut off | finished, bit-equal | others | stuck | growth per 1,000, MB: "
            "server, worker (bar 50) | median s | minutes |\n|---|---|---|---|---|---|---|---|---|---|\n"
            f"| {got['requests']:,} | {got['requests'] / 1000:.0%} | {got['clients']} | {got.get('cut', 0)} | "
            f"{got['right']} | {got['requests'] - got['right'] - got.get('cut', 0)} | {got['stuck']} | "
            f"{got['growth']['server']:.0f}, {got['growth']['worker']:.0f} | {got['median']:.2f} | "
            f"{got['seconds'] / 60:.1f} |\n\n4 LoRA sets, {', '.join(METHODS)}; a tiny base in a real worker.",
        )
    elif what == "flood":
        got = flood(*given)
        bad = got["latest"] > REFUSED_SECONDS or got["stuck"] or got["other"] or got["clear"] != got["refused"]
        report(
            "Many clients at once",
            "| clients at once | queue | drawn | refused in words | of these by status 503 | neither | refused after, "
            "s: median, latest (bar 1) | last picture after, s | stuck |\n|---|---|---|---|---|---|---|---|---|\n"
            f"| {got['clients']} | {got['waiting']} | {got['drawn']} | {got['clear']} | {got['door']} | "
            f"{got['other']} | {got['median']:.2f}, {got['latest']:.2f} | {got['longest']:.1f} | {got['stuck']} |\n\n"
            "From the request to the answer, of people who have the page or a client open: nobody loads it here. They "
            "are one process of plain HTTP (benchmarks/faults_flood.py), each with a connection and a cookie of his "
            "own; seconds count from when all set out. The model is a stand-in. The server took "
            f"{got['cpu']:.1f} s of computing.",
        )
    else:
        from benchmarks.faults_fuzz import fuzz

        got = fuzz(*given)
        bad = got["found"]
        for item in got["found"][:50]:
            print(*item)
        names = {0: "not sent (no legal address)", 1: "a stream that stays open"}
        codes = ", ".join(f"{n} x {names.get(code, code)}" for code, n in sorted(got["codes"].items()))
        report(
            "Calls of any endpoint",
            "| calls | seed | server errors, traces, paths, secrets, files outside (bar 0) | gradio's errors "
            "without words | answers | minutes |\n"
            f"|---|---|---|---|---|---|\n| {got['calls']:,} | {got['seed']} | {len(got['found'])} | {got['mute']} | "
            f"{codes} | {got['seconds'] / 60:.1f} |",
        )
    if bad:
        raise SystemExit(f"{what}: a bar is missed: {got}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("clients", "flood", "fuzz"):
        sys.exit(__doc__)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"
    main(*sys.argv[1:])
