"""A structure-aware fuzzer of admission: good files of every format with one to three faults drawn at random.

    python -m tests.fuzz_files SEED COUNT      # from the checkout; prints what went wrong

A mutant depends on (seed, number) alone, so that every finding can be made again.
"""

import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from multilora.admit import admit
from multilora.limits import Limits
from tests import bad_files
from tests.bad_files import PLACES, TQ, K, Q, key

CONV = "down_blocks.0.resnets.0.conv1"  # [16, 16, 3, 3]
_WORDS = ("a", "", "unet", "to_q", "0", "lora_A", "lora_down", "weight", "alpha", "__class__", "..", "é", "\n", "\0",
          "x" * 300, "text_model", "hada_w1_a", "lokr_w1", "dora_scale", "diff", "bias", "lora_mid.weight", "%s",
          "<b>", "\ud800", "base_model.model.", "lora_unet_", "lora_te_", "transformer.",
          "double_blocks_0_img_attn_qkv", "single_blocks_0_linear1", "input_blocks_1_1_proj_in", "diffusion_model.",
          "([a-z_.0-9]+)+X")  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 4, 31, 32, 33, 255, 1024, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**400,
            0.5, 1e9, 1e30, 1e308, float("nan"), float("inf"), float("-inf"))  # fmt: skip
_VALUES = (0.0, -1.0, 4.0, 0.1, 65536.0, 1e9, 1e30, 1e-40, *[float("nan")] * 3, float("inf"), float("-inf"))
_FIELDS = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
           "modules_to_save", "target_modules", "init_lora_weights", "lora_dropout", "fan_in_fan_out", "alpha",
           "megatron_config", "trainable_token_indices", "lora_bias", "layers_to_transform", "decompose_both",
           "use_effective_conv2d", "rank_dropout", "task_type", "what")  # fmt: skip
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.bool, torch.uint8)


@dataclass
class Mutant:
    """A file before it is bytes. config is None for a single file; edits act on the header, cuts on the bytes."""

    tensors: dict
    metadata: dict = field(default_factory=dict)
    config: dict | None = None
    edits: list = field(default_factory=list)
    cuts: list = field(default_factory=list)


def _randn(g, *shape):
    return 0.1 * torch.randn(shape, generator=g)


def seeds() -> dict[str, Mutant]:
    """One good file of every format and algorithm."""
    g = torch.Generator().manual_seed(0)
    draft = bad_files.draft()
    alphas = {(c, p, "alpha"): torch.tensor(2.0) for c, paths in PLACES.items() for p in paths}
    places = [("unet", Q), ("text_encoder", TQ)]
    loha = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32), "alpha": ()}
    lokr = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8), "alpha": ()}
    conv = {"down": (4, 16, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "up": (16, 4, 1, 1), "alpha": (), "diff_b": (16,)}
    unet = {name: t for name, t in draft.items() if name[0] == "unet"}
    own = {"multilora": json.dumps({"name": "fox", "triggers": ["fx"], "version": 1})}
    kohya = {"ss_network_dim": "4", "ss_tag_frequency": json.dumps({"a": {"fox": 3, "red": 2}})}
    adapter = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {}})}
    magnitudes = {("unet", p, "lora_magnitude_vector"): _randn(g, 32).abs() + 1 for p in (Q, K)}
    scales = {("unet", p, "dora_scale"): _randn(g, 32, 1).abs() + 1 for p in (Q, K)}

    def products(roles):
        return {key("kohya", c, p, r): _randn(g, *shape) for c, p in places for r, shape in roles.items()}

    return {
        "diffusers": Mutant(bad_files.spelled("diffusers", draft), {**own, **adapter}),
        "kohya": Mutant(bad_files.spelled("kohya", {**draft, **alphas}), kohya),
        "peft": Mutant(bad_files.spelled("peft", unet), own, bad_files.config_of()),
        "loha": Mutant(products(loha), kohya),
        "lokr": Mutant(products(lokr), kohya),
        "conv": Mutant(
            {key("kohya", "unet", CONV, r): _randn(g, *shape) for r, shape in conv.items()}
            | {key("kohya", "unet", Q, "diff"): _randn(g, 32, 32)}
        ),
        "dora": Mutant(bad_files.spelled("diffusers", {**unet, **magnitudes})),
        "dora_scale": Mutant(bad_files.spelled("kohya", {**unet, **scales})),
    }


# -- faults -----------------------------------------------------------------------------------------------------------


def _value(r: random.Random, deep: int = 2):
    """Any JSON value."""
    kind = r.randrange(8 if deep else 5)
    if kind < 2:
        return r.choice(_NUMBERS)
    if kind < 5:
        return r.choice((None, True, False, r.choice(_WORDS), r.choice(_WORDS)))
    if kind == 5:
        return [_value(r, deep - 1) for _ in range(r.randrange(4))]
    return {r.choice(_WORDS): _value(r, deep - 1) for _ in range(r.randrange(4))}


def _renamed(r: random.Random, name: str) -> str:
    at = r.randrange(len(name) + 1)
    to = r.randrange(at, len(name) + 1)
    ends = [f".{e}" for e in ("lora_A.weight", "lora_B.weight", "lora_down.weight", "alpha", "diff", "diff_b", "bias",
                              "hada_w1_a", "lokr_w2", "dora_scale", "lora_mid.weight", "w_norm", "lora.up.weight")]
    return r.choice((
        name[:at] + r.choice(_WORDS) + name[at:],
        name[:at] + name[to:],
        name.replace("to_q", "to_k"),
        name.replace("lora_A", "lora_B").replace("down", "up", 1),
        name.replace("0", str(r.randrange(12)), 1),
        name.replace(".", "_"),
        name.replace("_", "."),
        name.split(".")[0] + r.choice(ends),
        r.choice(_WORDS) + name,
        r.choice(_WORDS),
    ))  # fmt: skip


def _tensor(r: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with another shape, precision or values."""
    kind = r.randrange(9)
    if kind == 0:
        return tensor.to(r.choice(_DTYPES))
    if kind == 1:
        return torch.zeros([r.choice((0, 1, 2, 3, 4, 16, 31, 32, 33, 64)) for _ in range(r.randrange(6))])
    if kind == 2:
        return tensor.mT.contiguous() if tensor.ndim > 1 else tensor[None]
    if kind == 3:
        return tensor.flatten()[: r.randrange(tensor.numel() + 1)]
    if kind == 4 and tensor.numel():
        flat = tensor.double().flatten().clone()
        flat[r.randrange(len(flat))] = r.choice(_VALUES)
        return flat.reshape(tensor.shape).to(tensor.dtype)
    if kind == 5 and tensor.is_floating_point():
        return tensor * r.choice((0.0, -1.0, 1e-30, 1e-4, 2.0, 1e4, 1e20))
    if kind == 6 and tensor.numel() == 1:
        return torch.full(tensor.shape, r.choice(_VALUES))
    if kind == 7:
        return tensor[..., None]
    return tensor.reshape([*tensor.shape, *[1] * r.randrange(3)])


def _change_tensors(r: random.Random, m: Mutant) -> None:
    name = r.choice(list(m.tensors))
    kind = r.randrange(7)
    if kind == 0:
        del m.tensors[name]
    elif kind == 1:
        m.tensors[_renamed(r, name)] = m.tensors.pop(name)
    elif kind == 2:
        m.tensors[_renamed(r, name)] = m.tensors[name]
    elif kind == 3:
        m.tensors[name] = m.tensors[r.choice(list(m.tensors))]
    elif kind == 4:
        names = list(m.tensors)
        r.shuffle(names)
        m.tensors = {n: m.tensors[n] for n in names}
    else:
        m.tensors[name] = _tensor(r, m.tensors[name])


def _change_words(r: random.Random, m: Mutant) -> None:
    target = m.metadata if m.config is None or r.random() < 0.3 else m.config
    if target is m.config:
        target[r.choice(_FIELDS)] = r.choice((_value(r), {Q: r.choice(_NUMBERS), "to_k": 4}, r.choice(_NUMBERS)))
        return
    fields = {f"{r.choice(('unet.', '', 'text_encoder.', 'x.'))}{r.choice(_FIELDS)}": _value(r) for _ in range(2)}
    text = r.choice((json.dumps(fields), json.dumps(_value(r)), r.choice(_WORDS), "[" * r.choice((5, 9, 5000)),
                     '{"a":' + "9" * r.choice((3, 5000)) + "}"))  # fmt: skip
    names = ("lora_adapter_metadata", "multilora", "ss_tag_frequency", "ss_network_module", *_WORDS)
    target[r.choice(names)] = text if r.random() < 0.9 else _value(r)


def _change_header(r: random.Random, m: Mutant) -> None:
    def edit(header):
        names = [n for n in header if isinstance(header[n], dict) and n != "__metadata__"]
        if not names:
            return
        entry, kind = header[r.choice(names)], r.randrange(7)
        if kind == 0:
            entry[r.choice(("dtype", "shape", "data_offsets", "what"))] = _value(r)
        elif kind == 1:
            entry["dtype"] = r.choice(("F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "C64", "X", "f32"))
        elif kind == 2 and isinstance(entry.get("shape"), list):
            entry["shape"] = [*entry["shape"], r.choice(_NUMBERS)]
        elif kind == 3 and isinstance(entry.get("data_offsets"), list):
            entry["data_offsets"] = [n + r.choice((-4, 1, 4, 2**40)) if type(n) is int else n
                                     for n in entry["data_offsets"]]  # fmt: skip
        elif kind == 4:
            other = header[r.choice(names)]
            entry["data_offsets"], other["data_offsets"] = other.get("data_offsets"), entry.get("data_offsets")
        elif kind == 5:
            entry.pop(r.choice(list(entry)), None) if entry else None
        else:
            header[r.choice((*_WORDS, "__metadata__"))] = _value(r)

    m.edits.append(edit)


def _change_bytes(r: random.Random, m: Mutant) -> None:
    def cut(data: bytes) -> bytes:
        at, kind = r.randrange(len(data) + 1), r.randrange(7)
        near = r.randrange(min(len(data), 600) + 1)  # mostly the header
        if kind == 0:
            return data[:at]
        if kind == 1:
            return data + r.randbytes(r.randrange(1, 9))
        if kind == 2 and data:
            changed = bytearray(data)
            changed[r.choice((at, near)) % len(data)] ^= 1 << r.randrange(8)
            return bytes(changed)
        if kind == 3:
            return data[:near] + r.randbytes(r.randrange(1, 5)) + data[near:]
        if kind == 4:
            return data[:near] + data[near + r.randrange(1, 9) :]
        if kind == 5:
            return r.choice((0, 1, 2**62, 2**64 - 1, len(data), near)).to_bytes(8, "little") + data[8:]
        changed = bytearray(data)
        for _ in range(4):
            changed[r.randrange(len(changed) // 2, len(changed))] = r.randrange(256)
        return bytes(changed)

    m.cuts.append(cut)


FAULTS = (_change_tensors, _change_tensors, _change_tensors, _change_words, _change_header, _change_bytes)


def write(folder: Path, seed: int, number: int, starts: dict[str, Mutant]) -> Path:
    """The mutant of (seed, number) on disk, over the one before it."""
    r = random.Random(f"{seed}/{number}")
    start = starts[r.choice(list(starts))]
    config = None if start.config is None else dict(start.config)
    m = Mutant(dict(start.tensors), dict(start.metadata), config)
    for _ in range(r.choice((1, 1, 2, 3))):
        if m.tensors:
            r.choice(FAULTS)(r, m)
    header, data = bad_files.header_of(m.tensors, m.metadata)
    for edit in m.edits:
        edit(header)
    packed = bad_files.pack(header, data)
    for cut in m.cuts:
        packed = cut(packed) if len(packed) > 1 else packed
    path = folder / "fuzz.safetensors"
    if m.config is not None:
        path = folder / "fuzz" / "unet" / "adapter_model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "adapter_config.json").write_text(json.dumps(m.config))
    path.write_bytes(packed)
    return path if m.config is None else folder / "fuzz"


# -- runs -------------------------------------------------------------------------------------------------------------


def wrong(path: Path, base) -> tuple[str, str]:
    """(what is wrong with how admission treats a mutant, "" for nothing; "accepted" or the refusal)."""
    begin = "unet" if path.is_dir() else "fuzz.safetensors"
    try:
        lora = admit(path, base)
    except ValueError as error:
        text = str(error)
        fine = text.startswith((f"{begin}:", f"{begin}/adapter_", f"{begin} ")) and text.isprintable()
        return ("" if fine and len(text) < 4000 else f"message {text[:300]!r}"), text
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}", ""
    for name, part in lora.items():
        # A bias alone is an update, too.
        changes = [t for t in (part.delta(), getattr(part, "bias", None)) if t is not None]
        if not changes or not all(torch.isfinite(t).all() for t in changes):
            return f"accepted with a delta of {name} that is not finite", "accepted"
        if base.shapes.get(name) != (part.shape or base.shapes.get(name)):
            return f"accepted with {name} {part.shape}", "accepted"
        if part.norm() > 1.001 * Limits().norm:
            return f"accepted with norm {part.norm()} of {name}", "accepted"
    return "", "accepted"


def run(seed: int, first: int, count: int) -> dict:
    """Admit mutants first .. first + count - 1; what went wrong, and how long, how large, how many accepted."""
    from multilora.bases import base_of
    from tests import tiny
    from tests.test_admit import disarm, fingerprint, no_hang, rearm

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pipe, starts, found, kinds = tiny.sd15(), seeds(), [], Counter()
    base, before, state = base_of(pipe), fingerprint(pipe), torch.get_rng_state()
    slowest, grown, started = 0.0, 0, time.process_time()
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shm) as name, no_hang():
        folder = Path(name)
        for number in range(first, first + count):
            disarm()  # a mutant may have gigabytes, which take longer to write than to refuse
            path = write(folder, seed, number, starts)
            kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} if number % 50 == 0 else None
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            began = time.process_time()
            rearm(3600)  # a run that takes idle time only may get none for minutes
            try:
                bad, said = wrong(path, base)
            except TimeoutError as error:
                bad, said = str(error), ""
            slowest = max(slowest, time.process_time() - began)
            # The highest mark of memory before the first hundred is that of libraries, not of files.
            grown += resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory if number >= first + 100 else 0
            if kept is not None and kept != {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}:
                bad = "a file on the disk changed"
            if number % 200 == 0 and fingerprint(pipe) != before:
                bad = "the pipeline changed"
            if bad:
                found.append((seed, number, bad))
            kinds[said == "accepted"] += 1
    if fingerprint(pipe) != before or not torch.equal(torch.get_rng_state(), state):
        found.append((seed, -1, "the pipeline or the random state changed"))
    cpu = time.process_time() - started
    return {"found": found, "slowest": slowest, "grown": grown * 1024, "accepted": kinds[True], "count": count,
            "cpu": cpu}  # fmt: skip


if __name__ == "__main__":
    report = run(int(sys.argv[1]), 0, int(sys.argv[2]))
    for item in report.pop("found"):
        print(*item)
    print(report)
