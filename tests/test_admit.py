"""Admission: every bad file is refused in words that name file, key or field and limit, and nothing has changed.

Rows are in tests/bad_files.py (bytes, headers, names) and tests/bad_loras.py (tensors, alphas, words); most are run in
several formats and components, where always the other parts of the file are good: all of a file is read or nothing.
"""

import contextlib
import hashlib
import json
import signal
import warnings

import pytest
import torch

from multilora.admit import Limits, admit, shown
from multilora.bases import base_of
from tests import bad_files, bad_loras, tiny

_CPU_SECONDS, _SECONDS = 10.0, 120.0  # of one case, of 2 s at most on a slow machine; a quadratic search takes minutes


@contextlib.contextmanager
def no_hang():
    def stop(number, frame):
        raise TimeoutError(f"hang: above {_CPU_SECONDS} s of computing, or too long without")

    before = signal.signal(signal.SIGPROF, stop), signal.signal(signal.SIGALRM, stop)
    rearm()
    try:
        yield
    finally:
        disarm()
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def rearm(seconds=_SECONDS):
    """Within no_hang: from now on, the whole time anew."""
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def disarm():
    """Within no_hang: until `rearm` time does not count."""
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def fingerprint(pipe) -> str:
    """Of everything a loader could change in a pipeline: weights, modules, hooks, modes, attributes."""
    digest = hashlib.sha256()
    for name in ("unet", "text_encoder"):
        module = getattr(pipe, name)
        for path, layer in module.named_modules():
            hooks = [len(getattr(layer, h)) for h in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            digest.update(f"{path} {type(layer).__qualname__} {layer.training} {hooks} {sorted(vars(layer))}".encode())
            digest.update(str(getattr(layer, "forward", None).__func__).encode())
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            digest.update(f"{path} {tensor.dtype} {tensor.device} {tensor.requires_grad}".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(str([sorted(vars(pipe)), torch.nn.Module.register_parameter, torch.get_default_dtype()]).encode())
    return digest.hexdigest()


def on_disk(folder) -> dict:
    """Name -> (kind, size, time, bytes) of everything below a folder; pipes and devices are not opened."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        small = path.is_file() and not path.is_symlink() and status.st_size < 2**24
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, path.read_bytes() if small else b"")
    return found


class World:
    """A pipeline, what it was, and what a bad file must come to."""

    def __init__(self):
        self.pipe = tiny.sd15()
        self.base = base_of(self.pipe)
        self.before = fingerprint(self.pipe)

    def refused(self, path, *words, begin="bad", folder=None, base=True, **options):
        folder = folder or path.parent
        disk, work = on_disk(folder), torch.get_rng_state()
        with no_hang(), pytest.raises(ValueError) as caught:
            admit(path, self.base if base else None, **options)
        text = str(caught.value)
        assert text.startswith(begin), text
        for word in words:
            assert word in text, (word, text)
        assert len(text) < 4000
        assert text.isprintable(), text  # so one line
        assert fingerprint(self.pipe) == self.before
        assert on_disk(folder) == disk
        assert torch.equal(torch.get_rng_state(), work)
        return text


@pytest.fixture(scope="module")
def world():
    return World()


def first(format, component):
    """What a message about a file of a format begins with."""
    return f"{component}" if format == "peft" else "bad.safetensors: "


# -- good files first: what is refused below is refused for its fault -------------------------------------------------


@pytest.mark.parametrize("format", bad_files.FORMATS)
def test_the_draft_itself_is_admitted_in_every_format(world, format, tmp_path):
    lora = admit(bad_files.write(tmp_path, format, bad_files.draft()), world.base)
    draft = bad_files.draft()
    assert len(lora) == 4
    for component, paths in bad_files.PLACES.items():
        for path in paths:
            wanted = draft[component, path, "up"].double() @ draft[component, path, "down"].double()
            torch.testing.assert_close(lora[f"{component}.{path}"].delta(torch.float64), wanted, rtol=1e-6, atol=1e-8)
    assert fingerprint(world.pipe) == world.before


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-6)]
)
def test_other_precisions_are_read_and_a_whole_alpha(world, dtype, tolerance, tmp_path):
    draft = {name: t.to(dtype) for name, t in bad_files.draft().items()}
    draft[bad_loras.place("unet", "alpha")] = torch.tensor(2, dtype=torch.int64)
    lora = admit(bad_files.write(tmp_path, "kohya", draft), world.base)
    key = f"unet.{bad_files.Q}"
    plain = bad_files.draft()
    wanted = 0.5 * plain[bad_loras.place("unet", "up")] @ plain[bad_loras.place("unet", "down")]
    assert float((lora[key].delta() - wanted).norm()) <= tolerance * float(wanted.norm())


# -- bytes and headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bad_files.BYTES)
def test_bad_bytes(world, name, tmp_path):
    make, words = bad_files.BYTES[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(make(bad_files.good_bytes()))
    world.refused(path, words, begin="bad.safetensors: ")
    assert not (tmp_path.parents[-1] / "tmp" / "multilora_was_here").exists()


@pytest.mark.parametrize("name", list(bad_files.BYTES)[::4])
def test_bad_bytes_in_one_component_of_a_folder(world, name, tmp_path):
    make, words = bad_files.BYTES[name]
    path = bad_files.write(tmp_path, "peft", bad_files.draft())
    good = path / "text_encoder" / "adapter_model.safetensors"
    good.write_bytes(make(good.read_bytes()))
    world.refused(path, words, begin="text_encoder")


CELLS = [("diffusers", "unet"), ("kohya", "text_encoder"), ("peft", "unet")]


@pytest.mark.parametrize(("format", "component"), CELLS)
@pytest.mark.parametrize("name", bad_files.ENTRIES)
def test_bad_entries(world, name, format, component, tmp_path):
    change, words = bad_files.ENTRIES[name]
    key = bad_files.key(format, *bad_loras.place(component, "up", 1))

    def edit(header, part):
        if part in (None, component):
            change(header[key])

    path = bad_files.write(tmp_path, format, bad_files.draft(), edit=edit)
    # Where offsets no longer tile the bytes, the entry beside the changed one may be the first that is wrong.
    named = "key " if name.startswith("offsets") else f"key {key}"
    world.refused(path, named, words, begin=first(format, component))


@pytest.mark.parametrize("name", bad_files.NAMES, ids=lambda n: repr(n)[:30])
def test_bad_names_of_tensors(world, name, tmp_path):
    draft = {**bad_files.draft(), name: torch.ones(4, 32)}
    world.refused(bad_files.write(tmp_path, "diffusers", draft), bad_files.NAMES[name], begin="bad.safetensors: key ")


def test_too_many_tensors(world, tmp_path):
    count = 20_001
    entries = {f"a{i}.alpha": {"dtype": "F16", "shape": [], "data_offsets": [2 * i, 2 * i + 2]} for i in range(count)}
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bad_files.pack(entries, bytes(2 * count)))
    world.refused(path, "above the limit header_bytes=1,000,000")
    world.refused(path, f"{count:,} tensors, above the limit tensors=20,000", limits=Limits(header_bytes=10**8))


def test_as_many_tensors_as_are_allowed_take_no_time_that_grows_with_their_square(world, tmp_path):
    """10 s of computing stop this test: an early version took minutes for 10,000 layers."""
    layers = {f"a{i}.{end}.weight": torch.ones(1, 1) for i in range(9_999) for end in ("lora_A", "lora_B")}
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bad_files.pack(*bad_files.header_of(layers)))
    wide = Limits(header_bytes=10**7)
    world.refused(path, "this is SD 1.5: 0 of 9999 modules match", limits=wide)
    with no_hang():
        assert len(admit(path, limits=wide)) == 9_999


def test_as_many_patterns_as_layers_are_no_quadratic_search(world, tmp_path):
    layers = {f"a{i}.{end}.weight": torch.ones(1, 1) for i in range(5_000) for end in ("lora_A", "lora_B")}
    (tmp_path / "bad").mkdir()
    config = bad_files.config_of(r=4, rank_pattern={f"a{i}": 1 for i in range(4_999)})
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(bad_files.pack(*bad_files.header_of(layers)))
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config))
    world.refused(tmp_path / "bad", "a4999 rank 4, its tensors have 1", base=False, limits=Limits(header_bytes=10**7))


# -- tensors and what they mean ---------------------------------------------------------------------------------------


def refused_draft(world, change, words, format, component, tmp_path, **options):
    draft = bad_files.draft()
    change(draft, component)
    roles = ("down", "up", "alpha", "lora_C", "weight", "oft_blocks", "boft_R", "ia3_l", "vera_lambda_d")
    names = {r: bad_files.key(format, *bad_loras.place(component, r)) for r in roles}
    names["layer"] = ".".join(bad_loras.place(component, "")[:2])
    names["gone"] = names["layer"].replace("0.", "7.", 1)
    names["match"] = "1 of 2" if format == "peft" else "3 of 4"  # a folder has one file for each component
    path = bad_files.write(tmp_path, format, draft, **options)
    for name, text in names.items():
        words = words.replace("{" + name + "}", text)
    return world.refused(path, words, begin=first(format, component))


@pytest.mark.parametrize(("format", "component"), bad_files.CELLS)
@pytest.mark.parametrize("name", bad_loras.TENSORS)
def test_bad_tensors(world, name, format, component, tmp_path):
    change, words = bad_loras.TENSORS[name]
    if format == "peft" and "rank" in words:  # its configuration has a rank too, which is compared first
        words = "adapter_config.json gives "
    refused_draft(world, change, words, format, component, tmp_path)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("component", list(bad_files.PLACES))
@pytest.mark.parametrize("name", bad_loras.ALPHAS)
def test_bad_alphas(world, name, format, component, tmp_path):
    refused_draft(world, *bad_loras.ALPHAS[name], format, component, tmp_path)


@pytest.mark.parametrize("component", list(bad_files.PLACES))
@pytest.mark.parametrize("name", bad_loras.PRODUCTS)
def test_bad_products(world, name, component, tmp_path):
    refused_draft(world, *bad_loras.PRODUCTS[name], "kohya", component, tmp_path)


@pytest.mark.parametrize("name", bad_loras.CONFIGS)
def test_bad_configurations(world, name, tmp_path):
    fields, words = bad_loras.CONFIGS[name]
    path = bad_files.write(tmp_path, "peft", bad_files.draft(), config=fields)
    world.refused(path, words, begin="unet" if "text_encoder" not in words else "text_encoder")
    if len(str(fields)) < 900_000 and not name.startswith("nested"):
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in fields.items()})}
        (tmp_path / "b").mkdir()
        world.refused(bad_files.write(tmp_path / "b", "diffusers", bad_files.draft(), metadata=metadata), words)


@pytest.mark.parametrize("name", bad_loras.TEXTS)
def test_bad_metadata(world, name, tmp_path):
    text, words = bad_loras.TEXTS[name]
    path = bad_files.write(tmp_path, "diffusers", bad_files.draft(), metadata={"lora_adapter_metadata": text})
    world.refused(path, words, begin="bad.safetensors: metadata lora_adapter_metadata")


@pytest.mark.parametrize("name", bad_loras.HARMLESS)
def test_metadata_drives_nothing(world, name, tmp_path):
    """The update is that of a file without metadata, and what is shown of it is one line of plain text."""
    plain = bad_files.draft()
    with no_hang():
        path = bad_files.write(tmp_path, "diffusers", plain, metadata=bad_loras.HARMLESS[name])
        lora = admit(path, world.base)
    for component, path, _ in list(plain)[::2]:
        part = lora[f"{component}.{path}"]
        assert torch.equal(part.down, plain[component, path, "down"])
        assert torch.equal(part.up, plain[component, path, "up"])
    card = lora.card
    for text in (card.name, card.category, *card.triggers, *card.provenance["metadata"].values()):
        assert text.isprintable()
        assert len(text) < 310
    assert fingerprint(world.pipe) == world.before


@pytest.mark.parametrize("rank", [40, 300])
def test_a_rank_above_the_layer_is_read_with_a_note(world, rank, tmp_path):
    draft = bad_files.draft()
    g = torch.Generator().manual_seed(1)
    down, up = torch.randn(rank, 32, generator=g), 1e-3 * torch.randn(32, rank, generator=g)
    draft |= {bad_loras.place("unet", "down"): down, bad_loras.place("unet", "up"): up}
    lora = admit(bad_files.write(tmp_path, "diffusers", draft), world.base)
    torch.testing.assert_close(lora[f"unet.{bad_files.Q}"].delta(), up @ down)
    assert "rank above the layer's own in 1 modules" in lora.card.provenance["notes"][0]


@pytest.mark.parametrize("alpha", [0.0, -4.0])
def test_alpha_zero_or_negative_is_read_with_a_warning(world, alpha, tmp_path):
    draft = {**bad_files.draft(), bad_loras.place("unet", "alpha"): torch.tensor(alpha)}
    path = bad_files.write(tmp_path, "kohya", draft)
    with pytest.warns(UserWarning, match=r"^bad\.safetensors: key lora_unet_mid.*alpha is"):
        lora = admit(path, world.base)
    wanted = alpha / 4 * draft[bad_loras.place("unet", "up")] @ draft[bad_loras.place("unet", "down")]
    torch.testing.assert_close(lora[f"unet.{bad_files.Q}"].delta(), wanted)


def test_a_file_of_another_family_is_named(world, tmp_path):
    from multilora import files

    for family, name in (("sdxl", "SDXL"), ("sd3", "SD 3"), ("flux", "FLUX.1")):
        for format in ("diffusers", "kohya"):
            path = files.save(tiny.lora_for(getattr(tiny, family)()), tmp_path / "bad.safetensors", format=format)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                world.refused(path, f"made for {name}, this is SD 1.5: ", "modules match")


# -- limits and shown texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"file_bytes": 1000}, "above the limit file_bytes=1,000"),
        ({"header_bytes": 100}, "above the limit header_bytes=100"),
        ({"tensors": 3}, "8 tensors, above the limit tensors=3"),
        ({"ndim": 1}, "2 dimensions, above the limit ndim=1"),
        ({"dimension": 31}, "above the limit dimension=31"),
        ({"key_chars": 20}, "wanted 1 to 20 letters"),
        ({"rank": 3}, "rank 4 is above the limit rank=3"),
        ({"value": 0.5}, "above the limit value=0.5"),
        ({"norm": 1e-3}, "above the limit norm=0.001"),
    ],
)
def test_every_limit_is_kept_and_named(world, limits, words, tmp_path):
    path = bad_files.write(tmp_path, "diffusers", bad_files.draft())
    world.refused(path, words, limits=Limits(**limits))
    admit(path, world.base)


@pytest.mark.parametrize("value", [0, -1, float("nan"), "8", None, True])
def test_a_limit_is_a_number_above_zero(value):
    with pytest.raises(ValueError, match="limit rank="):
        Limits(rank=value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("fox", "fox"), ("v1.5", "v1.5"), ("", "(unnamed)"), (" \n\t ", "(unnamed)"), (".", "."), ("..", ".."),
        ("/", "/"), ("a/b", "a/b"), ("keys", "keys"), ("lora_A", "lora_A"), ("a\nb", "a b"), ("a\r\nb\x1b[31m", None),
        ("<img src=x onerror=alert(1)>", "‹img src=x onerror=alert(1)›"), ('" onload="x', "” onload=”x"),
        ("x" * 10_000, "x" * 99 + "…"), ("\u202egpj.exe", "＼u202egpj.exe"), ("a\u200b\ufeffb", "a＼u200b＼ufeffb"),
        ("a\0b", "a＼u0000b"), ("\ud800", "＼ud800"), ("  a   b  ", "a b"), ("Füchsin 狐 🦊", "Füchsin 狐 🦊"),
        ("`id`", "‘id‘"), ("c:\\x", "c:＼x"), (3, "3"), (None, "None"), ("\u2028x\u2029", "x"), ("\ue000", "＼ue000"),
    ],
)  # fmt: skip
def test_any_text_becomes_one_harmless_line(text, line):
    found = shown(text)
    assert line is None or found == line
    assert found.isprintable()
    assert 0 < len(found) <= 100
    assert not set(found) & set('<>"`\\')
    assert shown(found) == found
