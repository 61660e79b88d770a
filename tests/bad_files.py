"""Builders of LoRA files, good and bad: drafts that are spelled as any format, and tables of what can be wrong.

A draft is a mapping (component, path, role) -> tensor, or key -> tensor for keys that no format has. A fault changes
a draft, the header's entries or the bytes; it comes with the words that the refusal must hold.
"""

import gzip
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch

Q, K = (f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qk")
TQ, TK = (f"encoder.layers.0.self_attn.{x}_proj" for x in "qk")
PLACES = {"unet": (Q, K), "text_encoder": (TQ, TK)}
FORMATS = ("diffusers", "kohya", "peft")
CELLS = [(f, c) for f in FORMATS for c in PLACES]
RANK, WIDTH = 4, 32  # of every layer above in tests/tiny.py
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
          torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
          torch.complex64: "C64", torch.uint8: "U8"}  # fmt: skip


def draft(seed: int = 0) -> dict:
    """A good LoRA of rank 4 and alpha 4 on two layers of the UNet and two of the text encoder."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for component, paths in PLACES.items():
        for path in paths:
            made[component, path, "down"] = torch.randn(RANK, WIDTH, generator=g)
            made[component, path, "up"] = 0.01 * torch.randn(WIDTH, RANK, generator=g)
    return made


def key(format: str, component: str, path: str, role: str) -> str:
    """How a format spells a tensor."""
    text = component.startswith("text_encoder")
    if format == "kohya":
        ends = {"down": "lora_down.weight", "up": "lora_up.weight"}
        start = "lora_te_text_model_" if text else "lora_unet_"
        return f"{start}{path.replace('.', '_')}.{ends.get(role, role)}"
    ends = {"down": "lora_A.weight", "up": "lora_B.weight"}
    path = f"text_model.{path}" if text else path
    if format == "peft":
        return f"base_model.model.{path}.{ends.get(role, role)}"
    if text:
        ends = {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"}
    return f"{component}.{path}.{ends.get(role, role)}"


def spelled(format: str, tensors: dict, component: str | None = None) -> dict[str, torch.Tensor]:
    """A draft (of one component) by the format's keys."""
    return {
        name if isinstance(name, str) else key(format, *name): tensor
        for name, tensor in tensors.items()
        if component is None or isinstance(name, str) or name[0] == component
    }


def header_of(tensors: dict[str, torch.Tensor], metadata: dict | None = None) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file, written here so that every part of it can be made wrong."""
    header, data = ({} if metadata is None else {"__metadata__": metadata}), b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    return header, data


def pack(header, data: bytes = b"") -> bytes:
    """Bytes of a file; a header that is no text or bytes becomes JSON."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header)
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def config_of(**fields) -> dict:
    """A PEFT configuration that agrees with the draft."""
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["to_q", "to_k"]} | fields


def write(folder: Path, format: str, tensors: dict, *, metadata=None, config=None, edit=None) -> Path:
    """A file, or for peft a folder with one subfolder for each component, of a draft.

    config  changes every PEFT configuration
    edit    called as edit(header, component) on each header before it is written
    """
    if format != "peft":
        header, data = header_of(spelled(format, tensors), metadata)
        if edit:
            edit(header, None)
        path = folder / "bad.safetensors"
        path.write_bytes(pack(header, data))
        return path
    for component in PLACES:
        inner = folder / "bad" / component
        inner.mkdir(parents=True)
        header, data = header_of(spelled(format, tensors, component), metadata)
        if edit:
            edit(header, component)
        (inner / "adapter_model.safetensors").write_bytes(pack(header, data))
        (inner / "adapter_config.json").write_text(json.dumps(config_of() | (config or {})))
    return folder / "bad"


def good_bytes() -> bytes:
    return pack(*header_of(spelled("diffusers", draft())))


def _cut(n):
    return lambda good: good[:n]


class _Run:
    """Pickled, it would run a program when it is read."""

    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/multilora_was_here",)


def _torch_pickle(legacy: bool) -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.safetensors", good_bytes())
    return out.getvalue()


def _twice(text: str) -> bytes:
    return pack(text, b"\0" * 4)


_ONE = '"a.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
_JSON = "header is no JSON"
# What whole files can be -> (bytes from those of a good file, words of the refusal).
BYTES = {
    **{f"{n} bytes": (_cut(n), f"{n} bytes are too short") for n in (0, 1, 2, 7, 8, 9)},
    "header cut": (_cut(200), "truncated, its header would be"),
    "noise": (lambda g: bytes((37 * i * i + 11) % 251 for i in range(1, 400)), "not safetensors or truncated"),
    "zeros": (lambda g: bytes(64), _JSON),
    "cut by 1": (lambda g: g[:-1], "truncated or overlong, has"),
    "cut by half": (lambda g: g[: len(g) // 2], "truncated or overlong, has"),
    "cut to the header": (lambda g: g[: 8 + struct.unpack("<Q", g[:8])[0]], "truncated or overlong, has"),
    "1 byte too long": (lambda g: g + b"x", "truncated or overlong, has"),
    "1 MB too long": (lambda g: g + bytes(10**6), "truncated or overlong, has"),
    "two files in one": (lambda g: g + g, "truncated or overlong, has"),
    "length 2^63": (lambda g: struct.pack("<Q", 2**63) + g[8:], f"header would be {2**63} bytes"),
    "length 2^64-1": (lambda g: struct.pack("<Q", 2**64 - 1) + g[8:], f"header would be {2**64 - 1} bytes"),
    "length 101 MB": (lambda g: struct.pack("<Q", 101_000_000) + g[8:], "header would be 101000000 bytes"),
    "length 0": (lambda g: struct.pack("<Q", 0) + g[8:], _JSON),
    "length too small": (lambda g: struct.pack("<Q", 40) + g[8:], _JSON),
    "length too large": (lambda g: struct.pack("<Q", struct.unpack("<Q", g[:8])[0] + 9) + g[8:], _JSON),
    "header above 1 MB": (lambda g: pack("{}" + " " * 10**6), "1,000,002 bytes, above the limit header_bytes=1,000,0"),
    "header all blanks": (lambda g: pack(" " * 100), _JSON),
    "no JSON": (lambda g: pack("not json at all"), _JSON),
    "not UTF-8": (lambda g: pack(b'{"\xff\xfe":1}'), "not UTF-8"),
    "UTF-16": (lambda g: pack(json.dumps({"a": 1}).encode("utf-16")), "not UTF-8"),
    "byte order mark": (lambda g: pack(b"\xef\xbb\xbf{}          "), "no JSON"),
    "leading blank": (lambda g: pack("  {}      "), "header begins with b' '"),
    "a list": (lambda g: pack("[1, 2]    "), "header is a list, wanted an object"),
    "a text": (lambda g: pack('"abcdefgh"'), "header is a str, wanted an object"),
    "a number": (lambda g: pack("1234567890"), "header is a int, wanted an object"),
    "null": (lambda g: pack("null      "), "header is a NoneType, wanted an object"),
    "deep lists": (lambda g: pack("[" * 100_000), "nested too deep"),
    "deep objects": (lambda g: pack('{"a":' * 100_000), "nested too deep"),
    "deep in an entry": (lambda g: pack('{"a":' + "[" * 500 + "]" * 500 + "}"), "key a: its entry"),
    "single quotes": (lambda g: pack("{'a': 1}    "), _JSON),
    "trailing comma": (lambda g: pack('{"a": 1,}   '), _JSON),
    "two documents": (lambda g: pack("{}{}      "), _JSON),
    "NUL after it": (lambda g: pack("{}\0\0\0\0\0\0\0\0"), _JSON),
    "a comment": (lambda g: pack("{}/* yes */"), _JSON),
    "NaN for an entry": (lambda g: pack('{"a":NaN}   '), "key a: its entry in the header lacks"),
    "number of 5,000 digits": (lambda g: pack('{"a":' + "9" * 5000 + "}"), "no JSON that is read here"),
    "no tensors": (lambda g: pack("{}      "), "contains no LoRA tensors"),
    "only metadata": (lambda g: pack('{"__metadata__":{"a":"b"}}'), "contains no LoRA tensors"),
    "key twice": (lambda g: _twice("{" + _ONE + "," + _ONE + "}"), "key a.lora_A.weight occurs twice"),
    "metadata twice": (lambda g: _twice('{"__metadata__":{},"__metadata__":{},' + _ONE + "}"), "__metadata__ occurs"),
    "metadata name twice": (lambda g: _twice('{"__metadata__":{"r":"1","r":"2"},' + _ONE + "}"), "key r occurs twice"),
    "field twice": (lambda g: _twice('{"a":{"dtype":"F32","dtype":"F16"}}'), "key dtype occurs twice"),
    **{
        f"metadata {text[:12]}": (
            lambda g, text=text: _twice('{"__metadata__":' + text + "," + _ONE + "}"),
            "__metadata__ in the header must map names to texts",
        )
        for text in ("null", "[]", "1", '"x"', '{"a":1}', '{"a":null}', '{"a":{"b":"c"}}', '{"a":["b"]}', '{"a":true}')
    },
    **{
        f"pickle protocol {p}": (lambda g, p=p: pickle.dumps(_Run(), protocol=p).ljust(99, b"."), "a Python pickle")
        for p in range(6)
    },
    "pickled tensors": (lambda g: _torch_pickle(True), "a Python pickle"),
    "torch.save": (lambda g: _torch_pickle(False), "a zip or a PyTorch pickle"),
    "zip": (lambda g: _zip(), "a zip or a PyTorch pickle"),
    "gzip": (lambda g: gzip.compress(g), "a gzip archive"),
    "7z": (lambda g: b"7z\xbc\xaf\x27\x1c" + g, "a 7z archive"),
    "rar": (lambda g: b"Rar!\x1a\x07\x01\x00" + g, "a rar archive"),
    "LFS pointer": (lambda g: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "web page": (lambda g: b"<!DOCTYPE html><html></html>", "a web page"),
    "web page after blanks": (lambda g: b"\r\n  <html><body>404</body></html>", "a web page"),
    "XML after a mark": (lambda g: b"\xef\xbb\xbf<?xml version='1.0'?><Error/>", "a web page"),
    "JSON text": (lambda g: b'{"error": "Repository not found"}', "JSON text"),
    "GGUF": (lambda g: b"GGUF\x03\0\0\0" + bytes([255] * 60), "a GGUF model"),
    "NumPy": (lambda g: b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "a NumPy array"),
    "HDF5": (lambda g: b"\x89HDF\r\n\x1a\n" + g, "an HDF5 file"),
    "PNG": (lambda g: b"\x89PNG\r\n\x1a\n" + g, "a PNG picture"),
    "JPEG": (lambda g: b"\xff\xd8\xff\xe0\0\x10JFIF" + g, "a JPEG picture"),
    "program": (lambda g: b"\x7fELF\x02\x01\x01\0" + g, "a program"),
    "script": (lambda g: b"#!/bin/sh\nrm -rf x\n", "a script"),
}


def _put(**fields):
    return lambda entry: entry.update(fields)


def _moved(by: int):
    return lambda entry: entry.update(data_offsets=[n + by for n in entry["data_offsets"]])


_LISTS = "shape and data_offsets must be lists of whole numbers"
# What one entry of a header can be -> (change of the entry, words).
ENTRIES = {
    **{f"dtype {d!r}": (_put(dtype=d), f"dtype is {shown}") for d, shown in (("X9", "'X9'"), ("f32", "'f32'"),
       ("", "''"), (3, "3"), (None, "None"), ([], "[]"), ({}, "{}"), ("F32 ", "'F32 '"))},
    **{f"dtype {d}": (_put(dtype=d), f"is torch.{name} ({d}), wanted F16, BF16, F32 or F64") for d, name in (
       ("I32", "int32"), ("I64", "int64"), ("U8", "uint8"), ("BOOL", "bool"), ("C64", "complex64"),
       ("U16", "uint16"), ("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"))},
    "dtype F64, bytes of F32": (_put(dtype="F64"), "takes 1024"),
    "dtype F16, bytes of F32": (_put(dtype="F16"), "takes 256"),
    **{f"shape {s!r}"[:30]: (_put(shape=s), _LISTS) for s in ([-4, 32], [4, 32.0], ["4", 32], [True, 128], [[4], 32],
       None, {}, 128, "4x32", [None], [4, 1e3])},
    "shape of 6": (_put(shape=[4, 32, 1, 1, 1, 1]), "6 dimensions, above the limit ndim=5"),
    "shape of 1000": (_put(shape=[1] * 1000), "1000 dimensions, above the limit ndim=5"),
    "shape 2^62": (_put(shape=[4, 2**62]), "above the limit dimension=16,777,216"),
    "shape 0 x 2^62": (_put(shape=[0, 2**62]), "above the limit dimension=16,777,216"),
    "shape that overflows": (_put(shape=[2**24, 2**24, 2**24]), "takes"),
    "shape too large": (_put(shape=[5, 32]), "F32 of shape [5, 32] takes 640"),
    "shape too small": (_put(shape=[3, 32]), "F32 of shape [3, 32] takes 384"),
    "shape empty": (_put(shape=[0, 32]), "shape [0, 32] holds no values"),
    **{f"offsets {o!r}"[:30]: (_put(data_offsets=o), _LISTS) for o in ([0], [], [0, 1, 2], [-1, 511], [0.0, 512.0],
       None, "0,512", {"0": 512}, [None, None])},
    "offsets swapped": (lambda e: e.update(data_offsets=e["data_offsets"][::-1]), "are -512 bytes"),
    "offsets 2^63": (_put(data_offsets=[2**63, 2**63 + 512]), "bytes go on at"),
    "offsets overlap": (_moved(-4), "bytes go on at"),
    "offsets leave a hole": (_moved(4), "bytes go on at"),
    "offsets all alike": (_put(data_offsets=[0, 512]), "bytes go on at"),
    "unknown field": (_put(strides=[1, 2]), "has fields that no safetensors file has"),
    **{f"without {n}": (lambda e, n=n: e.pop(n), f"its entry in the header lacks its {n}")
       for n in ("dtype", "shape", "data_offsets")},
    "no fields": (lambda e: e.clear(), "lacks its data_offsets, dtype, shape"),
}  # fmt: skip
# Names of tensors that are no names of layers -> how the refusal shows them.
NAMES = {
    "": "(unnamed)", " ": "(unnamed)", "a b.lora_A.weight": "a b.lora_A.weight", "a/b.lora_A.weight": "a/b",
    "../../etc.lora_A.weight": "../../etc", "a\0b.lora_A.weight": "a＼u0000b", "a\nb.lora_A.weight": "a b.lora",
    "\u202eabc.lora_A.weight": "＼u202eabc", "a\u200bb.lora_A.weight": "a＼u200bb", "é.lora_A.weight": "é.lora",
    "<img src=x onerror=1>.lora_A.weight": "‹img src=x onerror=1›", "a;rm -rf.lora_A.weight": "a;rm -rf",
    "$(id).lora_A.weight": "$(id)", "%s%n.lora_A.weight": "%s%n", "{0.__class__}.lora_A.weight": "{0.__class__}",
    "a+b.lora_A.weight": "a+b", "\ud800.lora_A.weight": "＼ud800", "🦊.lora_A.weight": "🦊",
    "([a-z_.0-9]+)+X.lora_A.weight": "([a-z_.0-9]+)+X", "x" * 300 + ".lora_A.weight": "has 314 characters",
    "x" * 100_000: "has 100000 characters", "unet.__class__.__base__.lora_A.weight": "(__...__) are no layers",
    "__init__.lora_A.weight": "(__...__) are no layers", "unet.a.__globals__.lora_B.weight": "(__...__) are no layers",
}  # fmt: skip
