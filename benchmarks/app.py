"""What the app costs over Composer: pictures through gradio_client by the endpoint for programs, `/compose`, and by
the Compose page's own Draw, with and without live preview, against the same by Composer in the client's process.

    OMP_NUM_THREADS=1 python -m benchmarks.app                  # 30 pictures; on an idle machine
    OMP_NUM_THREADS=1 python -m benchmarks.app 4 --steps 5      # a try

As a module: by its path, this folder would come first and hide the package `kernels`, which transformers looks for.

Every picture is drawn in turn by Composer, endpoint, page, page with preview, gradio alone, and Composer again. The
two Composer columns are the same thing twice: their difference (A/A) is what this machine's noise makes of nothing.
"gradio alone" is an event with the page's inputs and outputs whose picture is there already: what gradio and its
client take by themselves, which is the same for a short picture and a long one; the client looks for news 20 times a
second and fetches a last picture twice. The app's pictures are checked to be Composer's. The server is a process of
its own, as it is for whoever uses it. Writes benchmarks/app.md, and ends with an error when a bar is missed by more
than the A/A.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from multilora.lab.machine import processor
from multilora.pipelines.image import Composer
from multilora.recipe import Recipe
from multilora.web.app import build
from multilora.web.service import Limits, Service
from multilora.web.service.guard import launch_options

REPORT = Path(__file__).with_suffix(".md")
BARS = {"endpoint": 0.05, "page": 0.05, "page, preview": 0.15}
LORAS = {"korv": 0.9, "dotta": 0.8, "palma": 0.8}
PROMPT = "korv fox in dotta poncho, on palma beach"
# Method, and how many times --steps: the shortest pictures, the longest of the usual methods, and one of some seconds,
# which on larger models the shortest takes too.
PICTURES = (("merge", 1), ("composite", 1), ("composite", 3))
GRADIO = "gradio alone"


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("pictures", nargs="?", type=int, default=30)
    reader.add_argument("--steps", type=int, default=30)
    given = reader.parse_args()
    context = multiprocessing.get_context("spawn")
    channel, its = context.Pipe()
    server = context.Process(target=serve, args=(its,))
    server.start()
    its.close()
    try:
        server_is = channel.recv()
        found = []
        for method, times in PICTURES:
            steps = times * given.steps
            found.append((method, measured(*server_is, method, given.pictures, steps), steps))
    finally:
        channel.close()
        server.join()
    parts = [told(*one) for one in found]
    text, missed = "\n\n".join(text for text, _ in parts), [line for _, lines in parts for line in lines]
    print(text)
    if given.pictures >= 30:
        REPORT.write_text(f"# The app over Composer\n\n{machine()}\n\n{text}\n")
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


def serve(channel: Any) -> None:
    """The server's process: sends its address, the controls of the page, and the worker's threads; ends with the pipe.

    Controls are (elem_id, label, value), in the order of the event's inputs.
    """
    with Service("embedded", limits=Limits(per_user=4)) as service:
        app = build(service)
        drawing = published(app)
        controls = [(c.elem_id, getattr(c, "label", None), getattr(c, "value", None))
                    for c in drawing.inputs if type(c).__name__ != "State"]  # fmt: skip
        with app:
            gr.Button(visible=False).click(ready, drawing.inputs, drawing.outputs, api_name="draw_nothing")
        app.queue()
        _, url, _ = app.launch(**launch_options(service), quiet=True, prevent_thread_lock=True)
        channel.send((url, controls, service.about()["threads"]))
        with contextlib.suppress(EOFError):
            channel.recv()
        app.close(verbose=False)


def ready(*values: Any) -> Iterator[list[Any]]:
    """As the page's event, with nothing to draw: picture, name, state, remarks."""
    yield [gr.skip(), gr.skip(), "drawing", gr.skip()]
    path = Path(tempfile.gettempdir()) / "multilora-nothing.png"
    if not path.exists():
        Image.effect_noise((128, 128), 100).convert("RGB").save(path)
    yield [str(path), path.name, "done", gr.skip()]


def published(app: Any) -> Any:
    """The function behind the button Draw, opened to clients under the name `draw_page`."""
    fn = next(f for f in app.fns.values() if f.name == "one")
    fn.api_visibility, fn.api_name = "public", "draw_page"
    return fn


def measured(
    url: str, controls: list[tuple], threads: int, method: str, pictures: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of each picture by way of drawing it, the first one of each (warming up) left out."""
    import torch
    from gradio_client import Client

    torch.set_num_threads(threads)
    # The address is plain http: certificates, which the client would read anew for each call and file, are not needed.
    client = Client(url, ssl_verify=False, verbose=False)
    composer = Composer.from_pretrained("embedded", device="cpu")
    for name, weight in LORAS.items():
        composer.add(name, weight=weight)

    def alone(seed: int) -> Any:
        return composer(PROMPT, method=method, seed=seed, num_inference_steps=steps).images[0]

    def paged(preview: bool, event: str = "/draw_page") -> Callable[[int], Any]:
        return lambda seed: client.predict(*values(controls, method, seed, steps, preview), api_name=event)

    def by_endpoint(seed: int) -> Any:
        loras = [{"reference": name, "weight": weight} for name, weight in LORAS.items()]
        return client.predict(PROMPT, loras, method=method, seed=seed, steps=steps, api_name="/compose")

    ways = {"Composer": alone, "endpoint": by_endpoint, "page": paged(False), "page, preview": paged(True),
            GRADIO: paged(False, "/draw_nothing"), "Composer again": alone}  # fmt: skip
    times: dict[str, list[float]] = {way: [] for way in ways}
    for seed in range(pictures + 1):
        drawn = {}
        for way, draw in ways.items():
            began = time.perf_counter()
            drawn[way] = draw(seed)
            took = time.perf_counter() - began
            if seed:
                times[way].append(took)
        if seed == 1:
            check(drawn, seed)
    return times


def values(controls: list[tuple], method: str, seed: int, steps: int, preview: bool) -> list[Any]:
    """What a browser would send with Draw: every control as it is on the page, but for these."""
    own = {
        "Prompt": PROMPT,
        "Seed": seed,
        "Steps": steps,
        "Live preview": preview,
        "Score it": False,
        "Method": method,
    }
    loras = [{"reference": name, "weight": weight} for name, weight in LORAS.items()]
    return [loras if elem_id == "ml-loras" else own.get(label, value) for elem_id, label, value in controls]


def check(drawn: dict[str, Any], seed: int) -> None:
    """The app's picture is Composer's, and its file has the recipe. AssertionError else."""
    for way in BARS:
        files = [f for f in _paths(drawn[way]) if f.endswith(".png")]
        assert files, f"{way}: no PNG among {drawn[way]!r:.400}"
        assert Recipe.from_png(files[0]).seed == seed
        with Image.open(files[0]) as image:
            far = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(drawn["Composer"], int)).max()
        assert far <= 1, f"{way}: a pixel is {far} away from Composer's"


def _paths(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [path for part in parts for path in _paths(part)]


def told(method: str, times: dict[str, Sequence[float]], steps: int) -> tuple[str, list[str]]:
    """(a report in Markdown, the bars that are missed by more than the A/A spread)."""
    base = [(a + b) / 2 for a, b in zip(times["Composer"], times["Composer again"], strict=True)]
    low, high = interval(times["Composer"], times["Composer again"])
    spread = max(abs(low), abs(high))
    lines = [
        f"{len(base)} pictures of 128 x 128, {steps} steps, {len(LORAS)} LoRAs, {method}; seconds a picture.",
        "",
        "| way | median | mean | over Composer, with 95% interval | bar |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    missed = []
    alone = fmean(times[GRADIO])
    for way, seconds in times.items():
        if way == GRADIO:
            lines.append(f"| {way} | {statistics.median(seconds):.3f} | {alone:.3f} | {alone / fmean(base):+.1%} | |")
            continue
        against = times["Composer"] if way == "Composer again" else base
        over = sum(seconds) / sum(against) - 1
        low, high = interval(against, seconds)
        bar = BARS.get(way)
        shown = "" if way == "Composer" else f"{over:+.1%} ({low:+.1%} to {high:+.1%})"
        lines.append(
            f"| {way} | {statistics.median(seconds):.3f} | {fmean(seconds):.3f} | {shown} | "
            f"{'A/A' if way == 'Composer again' else '' if bar is None else f'{bar:.0%}'} |"
        )
        if bar is not None and over > bar + spread:
            what = f"{way}, {method}, {steps} steps"
            missed.append(f"{what}: {over:+.1%}, at most {bar:.0%} was wanted, A/A {spread:.1%}")
    ours = [f"{way} {(fmean(times[way]) - alone) / fmean(base) - 1:+.1%}" for way in BARS]
    lines += ["", f"Without what gradio and its client take by themselves: {', '.join(ours)}."]
    return "\n".join(lines), missed


def interval(base: Sequence[float], other: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95% of the ratio of sums less 1, by bootstrap over the pictures."""
    chance, n = random.Random(0), len(base)
    found = []
    for _ in range(draws):
        picked = [chance.randrange(n) for _ in range(n)]
        found.append(sum(other[i] for i in picked) / sum(base[i] for i in picked) - 1)
    found.sort()
    return found[int(0.025 * draws)], found[int(0.975 * draws)]


def machine() -> str:
    """The day, the processor, how busy it is."""
    today, load = datetime.date.today().isoformat(), os.getloadavg()[1]
    return f"{today}, {processor()}, {os.cpu_count()} cores, load average {load:.1f}"


if __name__ == "__main__":
    main()
