"""A library of LoRAs larger than memory: the limit holds at every moment, and nothing depends on what is loaded."""

import gc
import os
import random
import threading
import weakref

import pytest
import torch

from multilora import files
from multilora.lora import Lora, LowRank
from multilora.method import UnknownName
from multilora.resident import Library, _storages

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WAIT = 120.0  # seconds until a thread that should have ended counts as hanging


def small(seed=0, width=128):
    """A LoRA of 32 * width bytes for no model in particular."""
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, width, generator=generator), torch.randn(width, 4, generator=generator)
    return Lora({KEY: LowRank(down, up)})


@pytest.fixture
def folder(tmp_path):
    """l0 to l9, all of one size."""
    for i in range(10):
        files.save(small(i), tmp_path / f"l{i}.safetensors", format="diffusers")
    return tmp_path


def size_of(folder):
    return (folder / "l0.safetensors").stat().st_size


def is_small(lora, seed):
    part, wanted = lora[KEY], small(seed)[KEY]
    return torch.equal(part.up @ part.down, wanted.up @ wanted.down)


class Watch:
    """Every Lora that files.load has returned and that is alive, counted by our own means, at every load."""

    def __init__(self, monkeypatch):
        self.library, self.threads, self.alive = None, set(), []
        self.most = self.most_alive = 0
        self.original = files.load

        def load(*args, **options):
            self.sample()
            lora = self.original(*args, **options)
            tensors = [t for part in lora.values() for t in (part.down, part.up)]
            size = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
            self.alive.append((weakref.ref(next(iter(lora.values()))), size))
            self.threads.add(threading.current_thread().name.rsplit("_", 1)[0])
            self.sample()
            return lora

        monkeypatch.setattr(files, "load", load)

    def sample(self):
        self.most = max(self.most, self.library.resident_bytes)
        self.alive = [(ref, size) for ref, size in self.alive if ref() is not None]
        self.most_alive = max(self.most_alive, sum(size for _, size in self.alive))


class Worker(threading.Thread):
    """A thread whose error `ended` raises."""

    error = None

    def run(self):
        try:
            super().run()
        except BaseException as error:
            self.error = error


def started(work):
    thread = Worker(target=work, daemon=True)
    thread.start()
    return thread


def ended(*threads):
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), "a thread hangs"
        if thread.error is not None:
            raise thread.error


# -- what stays and what goes ----------------------------------------------------------------------------------------


def test_the_one_used_longest_ago_makes_room(folder):
    library = Library(folder, limit_bytes=3 * size_of(folder))
    assert library.names == [f"l{i}" for i in range(10)]
    for name in ("l0", "l1", "l2", "l0", "l3"):
        with library.using([name]) as loras:
            assert is_small(loras[name], int(name[1:]))
    assert library.resident == ("l2", "l0", "l3")
    assert library.loads == 4
    assert library.resident_bytes == 3 * 32 * 128
    with library.using(["l3", "l0"]) as loras:
        assert list(loras) == ["l3", "l0"]
    assert library.loads == 4
    assert loras == {}


def test_pinned_ones_stay(folder):
    library = Library(folder, limit_bytes=3 * size_of(folder), pinned=["l0"])
    for name in ("l0", "l1", "l2", "l3", "l4"):
        with library.using([name]):
            pass
    assert library.resident == ("l0", "l3", "l4")
    library.unpin("l0")
    with library.using(["l5"]):
        pass
    assert library.resident == ("l3", "l4", "l5")


def test_one_in_use_is_never_dropped(folder):
    library = Library(folder, limit_bytes=2 * size_of(folder))
    with library.using(["l0"]) as mine:

        def others():
            for i in (1, 2, 3, 4):
                with library.using([f"l{i}"]) as loras:
                    assert is_small(loras[f"l{i}"], i)

        ended(started(others))
        assert library.resident == ("l0", "l4")
        assert is_small(mine["l0"], 0)


def test_a_request_waits_for_room_that_others_use(folder):
    library = Library(folder, limit_bytes=2 * size_of(folder))
    asked, done = threading.Event(), threading.Event()

    def other():
        asked.set()
        with library.using(["l2"]):
            done.set()

    with library.using(["l0", "l1"]):
        thread = started(other)
        assert asked.wait(WAIT)
        assert not done.wait(0.2)
        assert library.resident == ("l0", "l1")
    ended(thread)
    assert done.is_set()
    assert library.resident[-1] == "l2"


def test_shared_memory_counts_once():
    down, up = torch.randn(4, 8), torch.randn(24, 4)
    fused = Lora({f"b.{i}": LowRank(down, up[8 * i : 8 * i + 8]) for i in range(3)})
    assert sum(_storages(fused).values()) == down.nbytes + up.nbytes


def test_files_that_come_later_and_mappings(folder, tmp_path_factory):
    library = Library({"a": folder / "l0.safetensors", "b": folder / "l0.safetensors"}, limit_bytes=10**6)
    with library.using(["a", "b"]) as loras:
        assert is_small(loras["a"], 0)
        assert loras["b"].card.name == "b"
    library = Library(folder, limit_bytes=10**6)
    files.save(small(77), folder / "new.safetensors", format="diffusers")
    with library.using(["new"]) as loras:
        assert is_small(loras["new"], 77)
    library.close()
    assert library.resident == ()


# -- files that change -----------------------------------------------------------------------------------------------


def test_a_changed_file_is_loaded_again_and_blocks_keep_theirs(folder):
    library = Library(folder, limit_bytes=4 * size_of(folder))
    path = folder / "l0.safetensors"
    with library.using(["l0"]) as old:
        before = path.stat()
        content = path.read_bytes()
        files.save(small(50), folder / "other.safetensors", format="diffusers")
        changed = (folder / "other.safetensors").read_bytes()
        path.write_bytes(changed)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a tool that keeps times does

        def again():
            with library.using(["l0"]) as new:
                assert is_small(new["l0"], 50)
                assert library.resident_bytes == 2 * 32 * 128  # the old one counts as long as it is used

        ended(started(again))
        assert is_small(old["l0"], 0)
    assert library.resident_bytes == 32 * 128
    path.write_bytes(content)
    with library.using(["l0"]) as loras:
        assert is_small(loras["l0"], 0)
    assert library.loads == 3


def test_bad_files_say_so_and_are_tried_again(folder):
    library = Library(folder, limit_bytes=4 * size_of(folder))
    path = folder / "l1.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-5])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"l1\.safetensors: truncated"), library.using(["l0", "l1"]):
            pass
    with pytest.raises(ValueError, match="truncated"):
        library.prefetch("l1").result(WAIT)
    assert library.resident == ("l0",)
    path.write_bytes(good)
    with library.using(["l0", "l1"]) as loras:
        assert is_small(loras["l1"], 1)
    path.unlink()
    with pytest.raises(ValueError, match=r"l1\.safetensors: cannot be read"), library.using(["l1"]):
        pass


def test_what_cannot_fit_is_refused_by_name(folder):
    files.save(small(0, 1024), folder / "big.safetensors", format="diffusers")
    limit = 3 * size_of(folder)
    library = Library(folder, limit_bytes=limit, pinned=["l9"])
    with library.using(["l9", "l0"]):
        pass
    before = library.resident
    wanted = rf"big\.safetensors: [\d,]+ bytes, above the limit limit_bytes={limit:,}"
    with pytest.raises(ValueError, match=wanted), library.using(["big"]):
        pass
    wanted = r"l1, l2, l3 beside the pinned l9 have [\d,]+ bytes together, above the limit limit_bytes"
    with pytest.raises(ValueError, match=wanted), library.using(["l1", "l2", "l3"]):
        pass
    with pytest.raises(UnknownName, match="l5"), library.using(["l0", "l55"]):
        pass
    assert "l9" in library.resident
    assert set(before) - {"l0"} <= set(library.resident)
    assert library.prefetch("big").result(WAIT) is False
    with library.using(["l1", "l2"]), pytest.raises(RuntimeError, match="one using"), library.using(["l3"]):
        pass
    with library.using(["l3"]) as loras:
        assert is_small(loras["l3"], 3)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "8"])
def test_bad_limits(folder, limit):
    with pytest.raises(ValueError, match="limit_bytes="):
        Library(folder, limit_bytes=limit)


def test_bad_sources(folder):
    with pytest.raises(ValueError, match="wanted a folder"):
        Library(folder / "none", limit_bytes=1)
    (folder / "l0").mkdir()
    (folder / "l0" / files.PEFT_CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="one name"):
        Library(folder, limit_bytes=1)


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "secret.safetensors"
    files.save(small(1), away, format="diffusers")
    (folder / "link.safetensors").symlink_to(away)
    library = Library(folder, limit_bytes=10**6)
    with pytest.raises(ValueError, match="outside the library"), library.using(["link"]):
        pass


def test_a_file_that_expands_counts_with_its_tensors(folder, monkeypatch):
    """A LoHa file becomes a whole difference: room for it is made when it has been read and is known."""
    library = Library(folder, limit_bytes=3 * size_of(folder))
    original = files.load
    big = small(3, 256)
    monkeypatch.setattr(
        files, "load", lambda path, *a, **o: big if str(path) == "l3.safetensors" else original(path, *a, **o)
    )
    with library.using(["l0", "l1"]):
        pass
    with library.using(["l3"]):
        assert library.resident == ("l1", "l3")
        assert library.resident_bytes == 3 * 32 * 128
        reads = library.loads
        assert library.prefetch("l0").result(WAIT)
        assert library.resident == ("l3", "l0")
    with library.using(["l1", "l2"]), pytest.raises(RuntimeError), library.using(["l3"]):
        pass
    with pytest.raises(ValueError, match="together"), library.using(["l0", "l1", "l3"]):
        pass
    assert library.loads > reads


def test_an_old_state_of_a_file_that_nobody_uses_is_not_counted(folder):
    """The file changes after it was read ahead and before it is on the shelf, and is asked for again."""
    library = Library(folder, limit_bytes=size_of(folder))
    original = library._load

    def load(entry):
        lora = original(entry)
        if entry.name == "l0" and library.loads == 0:
            files.save(small(5), folder / "l0.safetensors", format="diffusers")
            with library._changed:
                library._current("l0")
        return lora

    library._load = load
    library.prefetch("l0").result(WAIT)
    assert library.loads == 1
    assert library.resident_bytes == 0
    thread = started(lambda: library.using(["l1"]).__enter__())  # would wait for ever for room
    ended(thread)
    assert library.resident == ("l1",)


def test_a_closed_library_says_so_and_keeps_nothing(folder):
    library = Library(folder, limit_bytes=4 * size_of(folder))
    with library.using(["l0"]) as loras:
        assert library.prefetch("l1").result(WAIT)
        library.close()
        assert library.resident == ("l0",)
        assert is_small(loras["l0"], 0)
    assert library.resident_bytes == 0
    for names in (["l0"], ["l0", "l1"], []):
        with pytest.raises(RuntimeError, match="library of LoRAs is closed"), library.using(names):
            pass
    with pytest.raises(RuntimeError, match="library of LoRAs is closed"):
        library.prefetch("l0")
    with pytest.raises(UnknownName):
        library.prefetch("none")
    library.close()


# -- threads ---------------------------------------------------------------------------------------------------------


def test_prefetch_loads_in_the_background_once(folder, monkeypatch):
    watch = Watch(monkeypatch)
    library = watch.library = Library(folder, limit_bytes=2 * size_of(folder))
    with library.using(["l0"]):
        assert library.prefetch("l1").result(WAIT) is True
        assert library.resident == ("l0", "l1")
        assert watch.threads >= {"multilora-library"}
        assert library.loads == 2
    with library.using(["l1"]):
        assert library.loads == 2
    with library.using(["l0", "l1"]):
        assert library.prefetch("l2").result(WAIT) is False  # no room, and nobody is disturbed
    assert library.resident == ("l0", "l1")


def test_many_threads_get_what_they_asked_for(folder, monkeypatch):
    watch = Watch(monkeypatch)
    library = watch.library = Library(folder, limit_bytes=4 * size_of(folder), pinned=["l9"])
    wrong, served = [], []

    def work(seed):
        draw = random.Random(seed)
        for _ in range(40):
            names = draw.sample(library.names, draw.randint(1, 3))
            library.prefetch(draw.choice(library.names))
            with library.using(names) as loras:
                watch.sample()
                wrong.extend(n for n in names if not is_small(loras[n], int(n[1:])))
            served.append(names)

    ended(*[started(lambda seed=seed: work(seed)) for seed in range(4)])
    assert len(served) == 160
    assert not wrong
    assert watch.most <= library.limit_bytes
    assert watch.most_alive <= library.limit_bytes
    assert library.loads > 40
    assert "multilora-library" in watch.threads
    library.close()
    gc.collect()
    watch.sample()
    assert not watch.alive
