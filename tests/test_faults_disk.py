"""A full disk under the app: said in words, nothing half-written is left, and what comes after is right."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from multilora.pipelines.load import find_lora
from multilora.recipe import png_bytes
from multilora.web import history
from multilora.web.service import Compose, Limits, Picture, Refused, Service
from multilora.web.service.sessions import Sessions
from tests import test_service

FULL = os.strerror(errno.ENOSPC)


def full(monkeypatch, name, after=10):
    """Path.write_bytes and os.fsync that write `after` bytes of files whose name holds `name`, then fail."""
    plain = Path.write_bytes

    def short(self, data):
        if name not in self.name:
            return plain(self, data)
        plain(self, data[:after])
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(Path, "write_bytes", short)


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def session(tmp_path):
    return Sessions(tmp_path, Limits()).get("ann")


def picture(seed):
    from PIL import Image

    recipe = test_service.recipe(seed)
    return Picture(png_bytes(Image.new("RGB", (8, 8), (seed, 0, 0)), recipe), recipe)


@pytest.mark.parametrize("name", [".png.part", ".json.part"])
def test_a_picture_that_cannot_be_kept_leaves_no_part_of_itself(session, monkeypatch, name):
    first = history.keep(session, picture(1))
    before = history.files(session)
    with monkeypatch.context() as patch:
        full(patch, name)
        with pytest.raises(Refused, match=rf"^multilora-merge-2-\w+\.\w+: .*{re.escape(FULL)}") as caught:
            history.keep(session, picture(2))
    assert caught.value.code == "disk"
    assert str(session.folder) not in str(caught.value)
    assert history.files(session) == before
    assert not [p for p in tree(session.folder) if p.name.endswith(".part")]
    assert history.kept(session, first.path.name).recipe.seed == 1
    second = history.keep(session, picture(2))
    assert history.kept(session, second.path.name).recipe.seed == 2


def test_an_upload_and_its_preview_on_a_full_disk(tmp_path, monkeypatch):
    sessions, path = Sessions(tmp_path, Limits()), tmp_path / "mine.safetensors"
    ann = sessions.get("ann")
    shutil.copy(find_lora("zib")[0], path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _fails)
        with pytest.raises(Refused, match=rf"^mine\.safetensors: .*{re.escape(FULL)}"):
            sessions.upload(ann, path, None)
    assert tree(ann.folder) == {}
    assert ann.uploads == {}
    assert ann.taken == []
    entry = sessions.upload(ann, path, None)
    sessions.set_preview(ann, entry.reference, b"first")
    with monkeypatch.context() as patch:
        full(patch, ".png")
        with pytest.raises(Refused, match=re.escape(FULL)):
            sessions.set_preview(ann, entry.reference, b"second picture")
    assert ann.uploads[entry.reference].preview.read_bytes() == b"first"
    assert not [p for p in tree(ann.folder) if p.name.endswith(".part")]


def _fails(*_, **__):
    raise OSError(errno.ENOSPC, FULL)


def test_no_room_for_a_job_or_a_session_is_said_and_the_next_one_works(monkeypatch):
    plain = Path.mkdir

    def mkdir(self, *args, **options):
        return _fails() if self.name.startswith("job-") else plain(self, *args, **options)

    with Service(engine=test_service.STUB, limits=Limits(seconds=60)) as service:
        ann = service.session("ann")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", mkdir)
            with pytest.raises(Refused, match=re.escape(FULL)) as caught:
                service.submit(Compose(recipe=test_service.recipe(3)), ann).result(60)
            assert caught.value.code == "disk"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", _fails)
            with pytest.raises(Refused, match=re.escape(FULL)):
                service.session("bob")
            assert service.session("ann") is ann
        result = service.submit(Compose(recipe=test_service.recipe(3)), ann).result(60)
        assert test_service.color(result) == (3, 0, 0)
        assert service.workers[0].starts == 1


def test_a_client_that_does_not_read_holds_nobody_up():
    """Its messages are few, however long it draws, and others are served meanwhile."""
    with Service(engine=test_service.STUB, limits=Limits(seconds=60)) as service:
        slow = service.submit(Compose(recipe=test_service.recipe(1, steps=100)), service.session("slow"))
        other = service.submit(Compose(recipe=test_service.recipe(2)), service.session("other"))
        assert test_service.color(other.result(60)) == (2, 0, 0)
        assert slow.last.kind == "done"
        assert len(slow._unread) <= 4
        assert [e.kind for e in slow.events()][-1] == "done"
