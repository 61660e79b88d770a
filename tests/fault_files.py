"""Cases of the table of faults (tests/fault_rows.py) about files: rows of the tables of bad files, by name.

A case writes a bad file, has it refused with nothing changed (tests.test_admit.World), and gives the message.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from multilora import files
from multilora.admit import shown
from multilora.limits import Limits
from tests import bad_files, bad_loras, tiny
from tests.test_admit import World, first, on_disk, refused_draft
from tests.test_admit_paths import OUTSIDE, SPECIAL, laid_out


@dataclass(frozen=True)
class Case:
    """One bad input or fault: `say(bench, folder)` makes it happen, asserts that nothing has changed, and gives what
    was said, which must hold `words`. `slow`: in the long suite only."""

    name: str
    words: str
    say: Callable[[Bench, Path], str]
    slow: bool = False


class Bench:
    """What the cases are tried on, made when it is first wanted."""

    @functools.cached_property
    def files(self) -> World:
        """A pipeline as files meet it, and its fingerprint."""
        return World()

    @functools.cached_property
    def picture(self) -> tuple:
        """A Composer with one LoRA, and its witness: the `world` of tests/test_bad_input.py."""
        from multilora.pipelines.image import Composer
        from tests import scene

        pipe = tiny.sd15()
        composer = Composer(pipe)
        composer.add(scene.loras(pipe, 1)[0])
        return composer, scene.Witness(pipe)


def _wanted(table: Iterable[str], *names: str) -> list[str]:
    """Rows of a table by name, or by the beginning of their names with a star. Each star must find something."""
    found = []
    for name in names:
        some = [n for n in table if n == name or (name.endswith("*") and n.startswith(name[:-1]))]
        assert some, name
        found += [n for n in some if n not in found]
    return found


def whole_files(*names: str) -> list[Case]:
    """Rows of bad_files.BYTES: what the bytes of a whole file can be."""

    def say(bench, folder, name):
        make, words = bad_files.BYTES[name]
        path = folder / "bad.safetensors"
        path.write_bytes(make(bad_files.good_bytes()))
        return bench.files.refused(path, words, begin="bad.safetensors: ")

    return [case_of(f"file: {n}", bad_files.BYTES[n][1], say, name=n) for n in _wanted(bad_files.BYTES, *names)]


def entries(*names: str) -> list[Case]:
    """Rows of bad_files.ENTRIES: what one entry of a header can be."""

    def say(bench, folder, name):
        change, words = bad_files.ENTRIES[name]
        key = bad_files.key("diffusers", *bad_loras.place("unet", "up", 1))
        path = bad_files.write(folder, "diffusers", bad_files.draft(), edit=lambda header, _: change(header[key]))
        return bench.files.refused(path, words, begin="bad.safetensors: ")

    return [case_of(f"header: {n}", bad_files.ENTRIES[n][1], say, name=n) for n in _wanted(bad_files.ENTRIES, *names)]


def names(*wanted: str) -> list[Case]:
    """Rows of bad_files.NAMES: names of tensors."""

    def say(bench, folder, name):
        path = bad_files.write(folder, "diffusers", {**bad_files.draft(), name: torch.ones(4, 32)})
        return bench.files.refused(path, bad_files.NAMES[name], begin="bad.safetensors: key ")

    def title(name):
        return f"tensor named {shown(repr(name), 40)}" + (f", {len(name):,} characters" if len(name) > 100 else "")

    chosen = list(bad_files.NAMES) if not wanted else _wanted(bad_files.NAMES, *wanted)
    return [case_of(title(n), bad_files.NAMES[n], say, name=n) for n in chosen]


def drafts(table: dict, format: str, component: str, *names: str) -> list[Case]:
    """Rows of bad_loras.TENSORS, ALPHAS, PRODUCTS: what tensors can be. The other layers of the file are good."""

    def say(bench, folder, name):
        return refused_draft(bench.files, *table[name], format, component, folder)

    chosen = _wanted(table, *names) if names else list(table)
    part = "" if component == "unet" else f", in the {component}"
    return [case_of(f"{format}: {n}{part}", table[n][1].partition("{")[0], say, name=n) for n in chosen]


def configs(*names: str) -> list[Case]:
    """Rows of bad_loras.CONFIGS: what the configuration of a PEFT folder can say."""

    def say(bench, folder, name):
        fields, words = bad_loras.CONFIGS[name]
        path = bad_files.write(folder, "peft", bad_files.draft(), config=fields)
        return bench.files.refused(path, words, begin=first("peft", "unet"))

    chosen = _wanted(bad_loras.CONFIGS, *names)
    return [case_of(f"adapter_config.json: {n}", bad_loras.CONFIGS[n][1], say, name=n) for n in chosen]


def texts(*names: str) -> list[Case]:
    """Rows of bad_loras.TEXTS: what diffusers' metadata can be."""

    def say(bench, folder, name):
        text, words = bad_loras.TEXTS[name]
        metadata = {"lora_adapter_metadata": text}
        path = bad_files.write(folder, "diffusers", bad_files.draft(), metadata=metadata)
        return bench.files.refused(path, words, begin="bad.safetensors: metadata lora_adapter_metadata")

    return [case_of(f"metadata: {n}", bad_loras.TEXTS[n][1], say, name=n) for n in _wanted(bad_loras.TEXTS, *names)]


def paths() -> list[Case]:
    """Paths that leave the library, and what is no regular file."""

    def outside(bench, folder, name):
        with laid_out(folder) as root:
            return bench.files.refused(name, OUTSIDE[name], begin="", folder=folder, root=root)

    def special(bench, folder, name):
        with laid_out(folder) as root:
            return bench.files.refused(root / name, SPECIAL[name], begin=name, folder=folder)

    return [case_of(f"path {shown(repr(n), 50)}", w, outside, name=n) for n, w in OUTSIDE.items()] + [
        case_of(f"{w.rpartition('this is ')[2]}: {n}", w, special, name=n) for n, w in SPECIAL.items()
    ]


def hostile_file_names() -> list[Case]:
    def say(bench, folder, name):
        path = folder / f"{name}.safetensors"
        path.write_bytes(b"x" * 50)
        return bench.files.refused(path, "not safetensors or truncated", begin=shown(path.name))

    hostile = ("<img src=x onerror=alert(1)>", "a\nb", "\u202egpj", "x" * 200, "$(id)", "%s", "](javascript:", "..")
    return [case_of(f"file named {shown(repr(n), 50)}", "not safetensors or truncated", say, name=n) for n in hostile]


def other_suffixes() -> list[Case]:
    def say(bench, folder, name):
        (folder / name).write_bytes(bad_files.good_bytes())
        return bench.files.refused(folder / name, SUFFIXES[name], begin=name)

    return [case_of(f"good bytes under the name {n}", w, say, name=n) for n, w in SUFFIXES.items()]


SUFFIXES = {
    **{f"a{s}": "this is a pickle, which is never read" for s in (".bin", ".pt", ".pth", ".ckpt", ".pkl")},
    "a.zip": "an archive", "a.gguf": "a GGUF model", "a": "wanted a .safetensors file",
    "a.safetensors.bin": "a pickle", "a.html": "wanted a .safetensors",
}  # fmt: skip


def sparse() -> list[Case]:
    def say(bench, folder, name):
        path, size = folder / "bad.safetensors", {"3 GB": 3 * 2**30, "1 TB": 2**40}[name]
        path.write_bytes(b"")
        os.truncate(path, size)
        try:
            return bench.files.refused(path, "above the limit file_bytes=", begin="bad.safetensors: ")
        finally:
            os.truncate(path, 0)

    return [case_of(f"sparse file of {n}", "above the limit file_bytes=", say, name=n) for n in ("3 GB", "1 TB")]


def many_tensors() -> list[Case]:
    def say(bench, folder, count):
        entries = {
            f"a{i}.alpha": {"dtype": "F16", "shape": [], "data_offsets": [2 * i, 2 * i + 2]} for i in range(count)
        }
        path = folder / "bad.safetensors"
        path.write_bytes(bad_files.pack(entries, bytes(2 * count)))
        return bench.files.refused(path, "above the limit header_bytes=1,000,000")

    return [
        case_of(f"{n:,} tensors", "above the limit header_bytes", say, slow=n > 10**5, count=n)
        for n in (20_001, 300_000)
    ]


def ambiguous() -> list[Case]:
    def two(bench, folder):
        inner = folder / "two"
        inner.mkdir()
        for name in ("b", "a"):
            (inner / f"{name}.safetensors").write_bytes(bad_files.good_bytes())
        return bench.files.refused(inner, "name one of a.safetensors, b.safetensors", begin="two: ")

    def missing(bench, folder, name):
        with contextlib.chdir(folder):
            return bench.files.refused(name, "no such file", begin="", folder=folder)

    hubs = ("org/name", "runwayml/stable-diffusion-v1-5", "gone.safetensors")
    return [case_of("a folder with two files", "name one of", two)] + [
        case_of(f"{n}, which is not here", "no such file", missing, name=n) for n in hubs
    ]


def no_paths() -> list[Case]:
    def say(bench, folder, given):
        return bench.files.refused(given, "named by a path, got", begin="a LoRA file", folder=folder)

    return [case_of(f"{g!r} for a path", "named by a path", say, given=g) for g in (None, 3, b"fox.safetensors", 1.5)]


def other_families() -> list[Case]:
    def say(bench, folder, family, format):
        name = {"sdxl": "SDXL", "sd3": "SD 3", "flux": "FLUX.1"}[family]
        path = files.save(tiny.lora_for(getattr(tiny, family)()), folder / "bad.safetensors", format=format)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bench.files.refused(path, f"made for {name}, this is SD 1.5: ", "modules match")

    return [
        case_of(f"{format} file of {family} on SD 1.5", "made for", say, slow=True, family=family, format=format)
        for family in ("sdxl", "sd3", "flux")
        for format in ("diffusers", "kohya")
    ]


def limits() -> list[Case]:
    """Every limit, by a file that is good otherwise."""
    small = {"file_bytes": 1000, "header_bytes": 100, "tensors": 3, "ndim": 1, "dimension": 31, "key_chars": 20,
             "rank": 3, "value": 0.5, "norm": 1e-3}  # fmt: skip

    def say(bench, folder, name):
        path = bad_files.write(folder, "diffusers", bad_files.draft())
        words = "wanted 1 to 20 letters" if name == "key_chars" else f"limit {name}="
        return bench.files.refused(path, words, limits=Limits(**{name: small[name]}))

    return [case_of(f"a file above Limits({n}={v:g})", "", say, name=n) for n, v in small.items()]


def stores() -> list[Case]:
    """What a store of admitted files refuses; it and the disk stay as they were."""
    from multilora.store import Store

    def full(bench, folder):
        path = bad_files.write(folder, "diffusers", bad_files.draft())
        store = Store(folder / "store", quota=1000)
        return _store_refuses(store, folder, lambda: store.add(path, bench.files.base))

    def unknown(bench, folder):
        store = Store(folder / "store")
        return _store_refuses(store, folder, lambda: store.remove("../" + "0" * 61))

    return [case_of("a file for a full store", "above the limit quota=1,000", full),
            case_of("an entry that a store does not have", "the store holds no LoRA", unknown)]  # fmt: skip


def _store_refuses(store, folder, call) -> str:
    before = {k: v[3] for k, v in on_disk(folder).items() if v[3]}
    try:
        call()
    except ValueError as error:
        assert {k: v[3] for k, v in on_disk(folder).items() if v[3]} == before
        assert len(store) == 0
        return str(error)
    raise AssertionError("not refused")


def case_of(title: str, words: str, say: Callable, /, slow: bool = False, **options) -> Case:
    return Case(title, words, functools.partial(say, **options), slow)
