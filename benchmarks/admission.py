"""Seconds to admit a LoRA of 200 MB, and to refuse bad ones.

    OMP_NUM_THREADS=1 python benchmarks/admission.py            # writes benchmarks/admission.md

The file is SDXL's attention set in 16 bits with kohya keys, of the rank that makes it 200 MB. Beside it, in turn (A B
A B): sha256 alone, and safetensors' own `load_file`, which maps the file and checks no value. CPU seconds are of this
process, with one thread; wall seconds depend on what else the machine does. The files are in the page cache.
"""

import hashlib
import json
import os
import statistics
import struct
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from multilora.admit import admit
from multilora.bases import Base
from multilora.lab.machine import processor

ROUNDS = 7


def sdxl() -> dict[str, tuple[int, int]]:
    """Layer of SDXL's UNet by kohya's name -> (out, in): the 560 attention projections."""
    found = {}
    for side, block, layers, depth, wide in (
        ("down", 1, 2, 2, 640), ("down", 2, 2, 10, 1280), ("mid", 0, 1, 10, 1280), ("up", 0, 3, 10, 1280),
        ("up", 1, 3, 2, 640),
    ):  # fmt: skip
        for layer in range(layers):
            start = "mid_block" if side == "mid" else f"{side}_blocks_{block}"
            for n in range(depth):
                for attn in (1, 2):
                    for leaf in ("to_q", "to_k", "to_v", "to_out_0"):
                        inner = 2048 if attn == 2 and leaf in ("to_k", "to_v") else wide
                        name = f"{start}_attentions_{layer}_transformer_blocks_{n}_attn{attn}_{leaf}"
                        found[name] = (wide, inner)
    return found


def big(path: Path, layers: dict[str, tuple[int, int]], dtype: torch.dtype, alpha: float) -> int:
    """Write the file; its bytes."""
    rank = round(200e6 / (2 * sum(o + i for o, i in layers.values())))
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, wide) in layers.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = (torch.randn(rank, wide, generator=g) / wide**0.5).to(dtype)
        tensors[f"lora_unet_{name}.lora_up.weight"] = (0.01 * torch.randn(out, rank, generator=g)).to(dtype)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha * rank)
    save_file(tensors, path)
    return path.stat().st_size


def base(layers: dict[str, tuple[int, int]]) -> Base:
    """Only names and shapes of SDXL's layers."""
    from multilora import keys

    return Base("SDXL", "sdxl", ("unet",), {f"unet.{keys.dotted(n)}": shape for n, shape in layers.items()})


def bad(folder: Path, good: Path) -> dict[str, Path]:
    """Files of 200 MB, or with a header of nearly 1 MB, that must be refused at once."""
    data = good.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    last = list(header)[-1]
    made = {}

    def put(name: str, header: dict | bytes, body: bytes) -> None:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        made[name] = folder / f"{len(made)}.safetensors"
        made[name].write_bytes(struct.pack("<Q", len(raw)) + raw + body)

    body = data[8 + length :]
    put("last entry's offsets overlap", {**header, last: {**header[last], "data_offsets": [0, 4]}}, body)
    put("last entry has an unknown dtype", {**header, last: {**header[last], "dtype": "X"}}, body)
    put("truncated by a byte", header, body[:-1])
    put("last key twice", json.dumps(header)[:-1].encode() + f', "{last}": 1}}'.encode(), body)
    put("JSON of 1 MB that ends too early", b"[" + b'"x",' * 249_000, body[:100])
    put("1 MB of opening brackets", b"[" * 999_000, body[:100])
    put("10,000 tensors, the last one bad", {
        f"a{i}.alpha": {"dtype": "F16" if i < 9_999 else "X", "shape": [], "data_offsets": [2 * i, 2 * i + 2]}
        for i in range(10_000)
    }, bytes(20_000))  # fmt: skip
    made["a pickle"] = folder / "pickle.safetensors"
    made["a pickle"].write_bytes(b"\x80\x02}q\x00." + body)
    return made


def timed(call) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def refused(path: Path, against: Base) -> None:
    try:
        admit(path, against)
    except ValueError:
        return
    raise RuntimeError(f"{path} was admitted")


def table(head: str, calls: dict, unit: float = 1.0, digits: int = 3) -> list[str]:
    """Rows of medians and minima, the contenders in turn."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(timed(call))
    rows = [f"| {head} | CPU, median | CPU, least | wall, median | wall, least |", "|---|---|---|---|---|"]
    for name, found in times.items():
        cpu, wall = (sorted(unit * pair[i] for pair in found) for i in (0, 1))
        numbers = (statistics.median(cpu), cpu[0], statistics.median(wall), wall[0])
        rows.append(f"| {name} | " + " | ".join(f"{n:.{digits}f}" for n in numbers) + " |")
    return rows


def main() -> None:
    torch.set_num_threads(1)
    layers = sdxl()
    lines = [
        "# Admission",
        "",
        f"Machine: {processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, "
        f"torch {torch.__version__}; {ROUNDS} rounds in turn, at a load average of {os.getloadavg()[0]:.1f}.",
        "",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, against = Path(name), base(layers)
        calls = {}
        for dtype, alpha in ((torch.float16, 1.0), (torch.bfloat16, 0.5), (torch.float16, 0.3)):
            path = folder / f"{str(dtype)[6:]}-{alpha}.safetensors"
            size = big(path, layers, dtype, alpha)
            calls[f"admit, {str(dtype)[6:]}, alpha = {alpha:g} rank"] = lambda p=path: admit(p, against)
        good = folder / "float16-1.0.safetensors"
        calls["sha256 alone"] = lambda: hashlib.sha256(good.read_bytes())
        calls["safetensors' load_file (mapped, unchecked)"] = lambda: load_file(good)
        lines += table(f"{size / 1e6:.0f} MB, {3 * len(layers)} tensors; seconds (bar 0.5)", calls)
        calls = {n: lambda p=p: refused(p, against) for n, p in bad(folder, good).items()}
        lines += ["", *table("refusals; milliseconds (bar 50)", calls, 1000.0, 1)]
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
