"""Admission of paths: what is opened, what is not, and files that change meanwhile. The store of admitted files."""

import contextlib
import os
import socket
import struct
import threading

import pytest
import torch

from multilora import files, reading
from multilora.admit import Limits, admit
from multilora.store import Store
from tests import bad_files
from tests.test_admit import World, no_hang, on_disk


@pytest.fixture(scope="module")
def world():
    return World()


@contextlib.contextmanager
def laid_out(folder):
    """library/{fox,inner/fox}.safetensors inside; outside.safetensors beside it; links of every sort."""
    root = folder / "library"
    (root / "inner").mkdir(parents=True)
    good = bad_files.good_bytes()
    for path in (root / "fox.safetensors", root / "inner" / "fox.safetensors", folder / "outside.safetensors"):
        path.write_bytes(good)
    (root / "out.safetensors").symlink_to(folder / "outside.safetensors")
    (root / "up").symlink_to(folder)
    (root / "same.safetensors").symlink_to(root / "fox.safetensors")
    (root / "loop.safetensors").symlink_to(root / "loop.safetensors")
    (root / "gone.safetensors").symlink_to(root / "nowhere.safetensors")
    (root / "folder.safetensors").mkdir()
    os.mkfifo(root / "pipe.safetensors")
    (root / "zero.safetensors").symlink_to("/dev/zero")
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(root)  # names of sockets are short
    listener.bind("socket.safetensors")
    os.chdir(here)
    yield root
    listener.close()


@pytest.fixture
def library(tmp_path):
    with laid_out(tmp_path) as root:
        yield root


OUTSIDE = {
    "../outside.safetensors": "without '..' and not absolute",
    "inner/../../outside.safetensors": "without '..' and not absolute",
    "inner/../fox.safetensors": "without '..' and not absolute",
    "..\\outside.safetensors": "without '..' and not absolute",
    "/etc/passwd": "without '..' and not absolute",
    "C:\\Windows\\a.safetensors": "without '..' and not absolute",
    "~/a.safetensors": "without '..' and not absolute",
    "~root/a.safetensors": "no such file",
    "": "without '..' and not absolute",
    ".": "leads to another folder",
    "out.safetensors": "it leads to another folder",
    "up/outside.safetensors": "it leads to another folder",
    "up/library/../outside.safetensors": "without '..' and not absolute",
    "zero.safetensors": "it leads to another folder",
    "loop.safetensors": "cannot be followed",
    "gone.safetensors": "no such file",
    "nowhere.safetensors": "no such file",
    "fox.safetensors/x": "cannot be followed",
    "fox\0.safetensors": "no NUL character",
    "x" * 300 + ".safetensors": "cannot be followed",
    "org/name": "no such file",
    "http://localhost/a.safetensors": "outside the library",
    "file:///etc/passwd": "outside the library",
    "inner/fox.safetensors\n": "no such file",
}


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: repr(p)[:40])
def test_a_path_that_leaves_the_library_or_is_no_file(world, library, path):
    world.refused(path, OUTSIDE[path], begin="", folder=library.parent, root=library)


@pytest.mark.parametrize("path", ["fox.safetensors", "inner/fox.safetensors", "same.safetensors", "./fox.safetensors",
                                  "up/library/fox.safetensors"])  # fmt: skip
def test_paths_inside_the_library(world, library, path):
    assert len(admit(path, world.base, root=library)) == 4


SPECIAL = {
    "pipe.safetensors": "not a regular file, this is a named pipe",
    "folder.safetensors": "no PEFT folder",
    "socket.safetensors": "not a regular file, this is a socket",
    "zero.safetensors": "not a regular file, this is a device",
    "loop.safetensors": "cannot be followed",
    "gone.safetensors": "no such file",
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_regular_file(world, library, name):
    world.refused(library / name, SPECIAL[name], begin=name, folder=library.parent)
    if name not in ("zero.safetensors",):
        world.refused(name, SPECIAL[name], begin=name, folder=library.parent, root=library)


@pytest.mark.parametrize(
    ("name", "words"),
    [(f"a{s}", "this is a pickle, which is never read") for s in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    + [("a.zip", "an archive"), ("a.gguf", "a GGUF model"), ("a", "wanted a .safetensors file"),
       ("a.safetensors.bin", "a pickle"), ("a.SAFETENSORS", "wanted a .safetensors"), ("a.html", "wanted a .safe"),
       (".safetensors", "wanted a .safetensors file")],
)  # fmt: skip
def test_other_files_are_refused_by_name_though_their_bytes_are_good(world, name, words, tmp_path):
    (tmp_path / name).write_bytes(bad_files.good_bytes())
    world.refused(tmp_path / name, words, begin=name)
    with pytest.raises(ValueError, match="a store takes one"):
        Store(tmp_path / "store").add(tmp_path / name)


@pytest.mark.parametrize("name", ["org/name", "runwayml/stable-diffusion-v1-5", "a/b.c"])
def test_a_name_on_a_hub_is_never_looked_up(world, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("looked up a name"))
    world.refused(name, "no such file", "never looked up here", begin=name.split("/")[1], folder=tmp_path)


@pytest.mark.parametrize("path", [None, 3, b"fox.safetensors", ["a"], 1.5, object()])
def test_what_is_no_path(world, path, tmp_path):
    world.refused(path, "named by a path, got", begin="a LoRA file", folder=tmp_path)


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "a\nb", "\u202egpj", "x" * 200, "$(id)", "%s"])
def test_a_files_name_is_hostile_too(world, name, tmp_path):
    path = tmp_path / f"{name}.safetensors".replace("/", "_")
    path.write_bytes(b"x" * 50)
    world.refused(path, "not safetensors or truncated", begin=reading.shown(path.name))


def test_a_folder_with_two_candidates_is_ambiguous(world, tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("b", "a"):
        (tmp_path / "two" / f"{name}.safetensors").write_bytes(bad_files.good_bytes())
    world.refused(tmp_path / "two", "no PEFT folder", "name one of a.safetensors, b.safetensors", begin="two: ")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_links_out_of_a_peft_folder(world, component, tmp_path):
    bad_files.write(tmp_path, "peft", bad_files.draft())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        inner, outer = tmp_path / "bad" / component / name, tmp_path.parent / f"outer-{component}-{name}"
        inner.rename(outer)
        inner.symlink_to(outer)
        assert len(admit(tmp_path / "bad", world.base)) == 4  # a person's own folder, as a hub's cache makes them
        world.refused("bad", "no link is followed inside a library", begin=component, folder=tmp_path, root=tmp_path)
        inner.unlink()
        outer.rename(inner)
    assert len(admit("bad", world.base, root=tmp_path)) == 4


# -- sizes and changes ------------------------------------------------------------------------------------------------


def rss() -> int:
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("header", [False, True])
def test_a_sparse_file_counts_in_full(world, header, tmp_path):
    path = tmp_path / "sparse.safetensors"
    shape = [3 * 2**17, 2**11]
    entries = {f"unet.{bad_files.Q}.lora_A.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 3 * 2**30]}}
    start = bad_files.pack(entries) if header else b""
    path.write_bytes(start)
    os.truncate(path, len(start) + 3 * 2**30)
    before = rss()
    world.refused(path, "above the limit file_bytes=2,147,483,648", begin="sparse.safetensors: 3,221,22")
    assert rss() - before < 50 * 2**20


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 101_000_000, 2**30])
def test_a_claimed_header_is_not_allocated(world, length, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{")
    os.truncate(path, 2**30)
    before = rss()
    limit = "header_bytes=1,000,000" if length < 2**30 - 8 else "its header would be"
    world.refused(path, limit, begin="bad.safetensors: ")
    assert rss() - before < 50 * 2**20


def test_what_was_read_does_not_change_with_its_file(world, tmp_path):
    path = bad_files.write(tmp_path, "diffusers", bad_files.draft())
    lora = admit(path, world.base)
    kept = {k: p.delta().clone() for k, p in lora.items()}
    with path.open("r+b") as stream:
        stream.write(b"\xff" * path.stat().st_size)
    os.truncate(path, 10)  # a memory map would now kill the process
    assert all(torch.equal(lora[k].delta(), kept[k]) for k in kept)
    path.unlink()
    assert all(torch.equal(lora[k].delta(), kept[k]) for k in kept)


class _Changing:
    """A stream during whose second read something happens to the file."""

    def __init__(self, stream, act):
        self.stream, self.act = stream, act

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def seek(self, *to):
        self.act()
        return self.stream.seek(*to)


@pytest.mark.parametrize("change", ["cut", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read(world, change, tmp_path, monkeypatch):
    path = bad_files.write(tmp_path, "diffusers", bad_files.draft())
    size, other = path.stat().st_size, tmp_path / "other"
    other.write_bytes(bad_files.pack(*bad_files.header_of(bad_files.spelled("diffusers", bad_files.draft(seed=1)))))
    acts = {"cut": lambda: os.truncate(path, size - 500), "replaced": lambda: os.replace(other, path),
            "removed": path.unlink}  # fmt: skip
    plain = reading.opened

    def opened(*args, **options):
        stream, size = plain(*args, **options)
        return _Changing(stream, acts[change]), size

    monkeypatch.setattr(reading, "opened", opened)
    # Unbuffered data is read after the change, buffered data came before it: old bytes or an error, never a mixture.
    try:
        lora = admit(path, world.base)
    except ValueError as error:
        text = str(error)
        assert change == "cut"  # whether it is refused depends on what was buffered
        assert text.startswith("bad.safetensors: was cut while it was read")
    else:
        draft = bad_files.draft()
        assert torch.equal(lora[f"unet.{bad_files.Q}"].down, draft["unet", bad_files.Q, "down"])


def test_a_link_that_appears_after_the_check_is_not_followed(library, tmp_path, monkeypatch):
    """The check and the opening are two moments; in between `inner` becomes a link out of the library."""
    path = reading.located("inner/fox.safetensors", library)
    (library / "inner").rename(library / "old")
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "fox.safetensors").write_bytes(b"secret")
    (library / "inner").symlink_to(tmp_path / "trap")
    with pytest.raises(ValueError, match=r"^fox: cannot be read"):
        reading.opened(path, where="fox", root=library)


# -- store ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def upload(tmp_path):
    def make(name="fox", seed=0):
        folder = tmp_path / f"upload{seed}"
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.safetensors"
        path.write_bytes(bad_files.pack(*bad_files.header_of(bad_files.spelled("kohya", bad_files.draft(seed)))))
        return path

    return make


def test_a_store_keeps_each_content_once_under_its_hash(world, upload, tmp_path):
    store = Store(tmp_path / "store")
    first, again = store.add(upload(), world.base), store.add(upload("other name"), world.base)
    assert first == again
    assert (first.label, first.size) == ("fox", upload().stat().st_size)
    second = store.add(upload("fox", seed=1), world.base)  # same name, other content
    assert second.label == "fox"
    assert second.sha256 != first.sha256
    assert len(store) == 2
    assert store.size == first.size + second.size
    assert first.path.name == f"{first.sha256}.safetensors"
    assert first.path.stat().st_mode & 0o777 == 0o444
    assert files.load(first.path, world.base).card.sha256 == first.sha256
    assert [e.sha256 for e in Store(tmp_path / "store")] == sorted([first.sha256, second.sha256])
    store.remove(first.sha256)
    assert [e.sha256 for e in store] == [second.sha256]
    assert len(list((tmp_path / "store").iterdir())) == 2  # a file and its label


@pytest.mark.parametrize("label", ["", ".", "..", "../../etc/passwd", "/", "v1.5", "keys", "<img src=x onerror=1>",
                                   "a\nb", "\u202egpj", "x" * 10_000, "\ud800", "\0", None])  # fmt: skip
def test_a_label_is_shown_and_never_a_path(world, upload, label, tmp_path):
    store = Store(tmp_path / "store")
    entry = store.add(upload(), world.base, label=label)
    assert entry.label == ("fox" if label is None else reading.shown(label))
    assert entry.label.isprintable()
    assert store[entry.sha256] == entry == next(iter(Store(tmp_path / "store")))
    assert sorted(p.stem for p in (tmp_path / "store").iterdir()) == [entry.sha256] * 2


@pytest.mark.parametrize("name", list(bad_files.BYTES)[::3])
def test_a_store_keeps_nothing_of_a_bad_file(world, name, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(bad_files.BYTES[name][0](bad_files.good_bytes()))
    store = Store(tmp_path / "store")
    before = on_disk(tmp_path)
    with no_hang(), pytest.raises(ValueError, match=r"^bad\.safetensors: "):
        store.add(path, world.base)
    assert {p: v for p, v in on_disk(tmp_path).items() if v[3]} == {p: v for p, v in before.items() if v[3]}
    assert not list((tmp_path / "store").iterdir())


def test_a_full_store_and_a_file_above_its_limit(world, upload, tmp_path):
    size = upload().stat().st_size
    store = Store(tmp_path / "store", quota=size + 100)
    store.add(upload(), world.base)
    with pytest.raises(ValueError, match=rf"^b\.safetensors: .* beside the {size:,} .*limit quota={size + 100:,}"):
        store.add(upload("b", seed=1), world.base)
    store.add(upload("again"), world.base)  # no more bytes
    small = Store(tmp_path / "small", limits=Limits(file_bytes=1000))
    with pytest.raises(ValueError, match=r"^fox\.safetensors: .*limit file_bytes=1,000"):
        small.add(upload(), world.base)
    assert [len(list((tmp_path / n).iterdir())) for n in ("store", "small")] == [2, 0]
    for quota in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="quota="):
            Store(tmp_path / "store", quota=quota)


def test_a_store_sweeps_what_a_killed_process_left(world, upload, tmp_path):
    entry = Store(tmp_path / "store").add(upload(), world.base)
    left = tmp_path / "store" / ".incoming-x"
    left.mkdir()
    (left / "incoming.safetensors").write_bytes(b"half")
    orphan = tmp_path / "store" / f"{'0' * 64}.json"
    orphan.write_text("{}")
    (tmp_path / "store" / "notes.txt").write_text("mine")
    assert Store(tmp_path / "store").sweep() == []  # too young: another process may be writing them
    assert Store(tmp_path / "store").sweep(older_than=0) == [".incoming-x", orphan.name]
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == sorted(
        [entry.path.name, f"{entry.sha256}.json", "notes.txt"]
    )


@pytest.mark.parametrize("name", ["", "..", "../fox", "0" * 63, "A" * 64, "0" * 64, None, "0" * 64 + "\n"])
def test_only_a_hash_finds_an_entry(name, tmp_path):
    store = Store(tmp_path / "store")
    assert name not in store
    for call in (store.__getitem__, store.remove):
        with pytest.raises(ValueError, match="the store holds no LoRA"):
            call(name)


def test_threads_that_add_the_same_file_make_one(world, upload, tmp_path):
    store, path, found = Store(tmp_path / "store"), upload(), []
    threads = [threading.Thread(target=lambda: found.append(store.add(path, world.base))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == len(store) == 1
