"""The app from a program, through gradio_client: list LoRAs, draw, merge two of them, upload the merge, draw with it.

    multilora app --port 7860 &
    python examples/api_client.py http://127.0.0.1:7860 --out pictures

One client is one user: its uploads and files are there until it ends, or has been away for hours.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from gradio_client import Client, handle_file


def run(url: str, out: Path, steps: int | None = None, auth: tuple[str, str] | None = None) -> dict[str, Path]:
    """Files by what they are: "picture", "merge", "again".

    steps of each picture, None: the base's own number; auth: name and password, where the app asks for a login
    """
    out.mkdir(parents=True, exist_ok=True)
    client = Client(url, verbose=False, download_files=out / "downloads", auth=auth)

    loras = {entry["name"]: entry for entry in client.predict("", "all", api_name="/list_loras")}
    fox, poncho = loras["korv"], loras["dotta"]
    prompt = f"{fox['trigger']} and {poncho['trigger']}"
    print(f"{len(loras)} LoRAs; prompt: {prompt}")

    chosen = [{"reference": fox["reference"], "weight": 0.9}, {"reference": poncho["reference"], "weight": 0.8}]
    drawn, about = client.predict(prompt, chosen, method="composite", seed=7, steps=steps, api_name="/compose")
    print(f"drawn in {about['seconds']:.1f} s by {about['recipe']['method']}")

    references = [fox["reference"], poncho["reference"]]
    job = client.submit(references, [0.9, 0.8], "ties", {"density": 0.5}, name="fox in poncho", api_name="/merge")
    doing = ""
    for facts, _ in job:  # what it says on the way, "merging, layer: 3 of 104"; the last one is the result
        state = facts.get("state", "merged")
        if state.partition(":")[0] != doing:
            print(state)
        doing = state.partition(":")[0]
    facts, merged = job.result()
    print(f"rank {facts['ranks'][-1]}, {facts['energy_kept']:.1%} of the energy kept")

    added = client.predict(handle_file(merged), "fox in poncho", api_name="/upload_lora")
    mine = [{"reference": added["reference"], "weight": 1.0}]
    again, _ = client.predict(prompt, mine, seed=7, steps=steps, api_name="/compose")
    client.predict(added["reference"], api_name="/remove_lora")

    files = {"picture": drawn, "merge": merged, "again": again}
    return {what: Path(shutil.copy(path, out / f"{what}{Path(path).suffix}")) for what, path in files.items()}


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("url")
    reader.add_argument("--out", type=Path, default=Path("pictures"))
    reader.add_argument("--steps", type=int)
    reader.add_argument("--auth", metavar="NAME:PASSWORD", help="of an app that asks for a login")
    given = reader.parse_args()
    login = tuple(given.auth.split(":", 1)) if given.auth else None
    for what, path in run(given.url, given.out, given.steps, login).items():
        print(f"{what}: {path}")
