"""The service with real workers on the embedded base: two users at once, killed workers, faults, cancels."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from multilora.pipelines.image import Composer
from multilora.recipe import LoraUse, Recipe
from multilora.web.service import Compose, Fisher, Limits, Merge, Refused, Service, Share

pytestmark = pytest.mark.long


def recipe(names: str, method: str, seed: int, steps: int = 4, **more) -> Recipe:
    loras = [LoraUse(name=n, reference=n, weight=0.8) for n in names.split()]
    fields = {"prompt": "zib alien and korv fox", "base": "embedded", "guidance_scale": 3.0, "width": 64, "height": 64}
    return Recipe(**fields, loras=loras, method=method, seed=seed, steps=steps, **more)


@pytest.fixture(scope="module")
def service():
    with Service(
        engine="tests.service_engine:Faulty", devices=["cpu"], limits=Limits(waiting=40, per_user=30)
    ) as service:
        service.about()
        yield service


@pytest.fixture(scope="module")
def composer(service):
    import torch

    torch.set_num_threads(service.about()["threads"])
    return Composer.from_pretrained("embedded", device="cpu")


def lone(composer, asked: Recipe) -> np.ndarray:
    return np.asarray(composer.compose(asked).images[0])


def pixels(result) -> np.ndarray:
    return np.asarray(result.pictures[0].image)


def test_two_users_at_once_each_get_what_they_would_have_got_alone(service, composer):
    ann, bob = service.session("ann"), service.session("bob")
    methods = ("merge", "composite", "switch")
    recipes = [recipe("zib korv" if i % 2 else "gorm inka", methods[i % 3], i) for i in range(12)]
    asked = [(ann if i % 2 else bob, r) for i, r in enumerate(recipes)]
    jobs = [service.submit(Compose(recipe=r), session) for session, r in asked]
    found = [pixels(job.result(300)) for job in jobs]
    assert all(np.array_equal(a, lone(composer, r)) for a, (_, r) in zip(found, asked, strict=True))
    assert len({a.tobytes() for a in found}) == 12


def test_a_worker_killed_in_mid_picture_costs_nobody_a_picture(service, composer):
    asked, next_one = recipe("zib korv", "composite", 1, steps=6), recipe("gorm", "merge", 2)
    job = service.submit(Compose(recipe=asked), service.session("ann"))
    waits = service.submit(Compose(recipe=next_one), service.session("bob"))
    kinds = []
    for event in job.events(timeout=300):
        kinds.append(event.kind)
        if event.kind == "progress" and event.step == 2 and "note" not in kinds:
            os.kill(service.workers[0].pid, signal.SIGKILL)
            kinds.append("note")
    assert kinds[-1] == "done"
    assert np.array_equal(pixels(job.result()), lone(composer, asked))
    assert np.array_equal(pixels(waits.result(300)), lone(composer, next_one))


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("die", "worker"),
        ("raise", "failed"),
        ("nan", "nan"),
        ("memory", "memory"),
        ("drift", "worker"),
        ("hook", "worker"),
    ],
)
def test_each_fault_gives_one_error_and_the_next_picture_is_right(service, composer, fault, code):
    extra = {"fault": fault, "at": 2, "room": 0}
    job = service.submit(Compose(recipe=recipe("zib korv", "merge", 3, extra=extra)), service.session("ann"))
    with pytest.raises(Refused) as caught:
        job.result(300)
    assert caught.value.code == code
    asked = recipe("zib korv", "merge", 3)
    after = service.submit(Compose(recipe=asked), service.session("bob")).result(300)
    assert np.array_equal(pixels(after), lone(composer, asked))


def test_a_fault_that_happens_once_gives_the_picture(service, composer, tmp_path):
    asked = recipe("zib korv", "merge", 4, extra={"fault": "drift", "at": 2, "flag": str(tmp_path / "once")})
    result = service.submit(Compose(recipe=asked), service.session("ann")).result(300)
    assert (tmp_path / "once").exists()
    assert np.array_equal(pixels(result), lone(composer, asked))


def test_cancel_in_mid_run_frees_the_worker(service):
    job = service.submit(Compose(recipe=recipe("zib korv", "composite", 5, steps=150)), service.session("ann"))
    for event in job.events(timeout=300):
        if event.kind == "progress" and event.step == 2:
            break  # which closes the events, as a closed tab does
    began = time.monotonic()
    service.submit(Compose(recipe=recipe("gorm", "merge", 1, steps=1)), service.session("bob")).result(300)
    print(f"cancel in mid-run to the next user's one-step picture: {time.monotonic() - began:.2f} s")
    assert job.last.kind == "cancelled"
    assert service.workers[0].alive


def test_an_estimate_serves_a_merge_of_its_session_only(service):
    ann = service.session("ann")
    files = []
    for name in ("zib", "korv"):
        job = service.submit(Fisher(reference=name, examples=2, pictures=1, steps=2), ann)
        events = list(job.events(timeout=300))
        assert any(e.kind == "progress" and e.steps == 2 for e in events)
        files.append(job.result().files[0].reference)
    asked = Merge(loras=(Share(reference="zib"), Share(reference="korv")), method="fisher", options={"fishers": files})
    merged = service.submit(asked, ann).result(300)
    assert merged.files[0].path.stat().st_size > 100_000
    with pytest.raises(Refused, match="not a file that one of your requests made"):
        service.submit(asked, service.session("bob"))


def test_an_upload_is_admitted_used_and_removed_by_its_owner_only(service, tmp_path):
    import shutil

    from multilora.pipelines.load import find_lora

    ann, bob = service.session("ann"), service.session("bob")
    shutil.copy(find_lora("zib")[0], tmp_path / "mine.safetensors")
    entry = service.upload(ann, tmp_path / "mine.safetensors")
    assert entry in service.library(ann)
    asked = recipe("zib", "merge", 6)
    mine = Recipe(**{**asked.model_dump(), "loras": [{**asked.loras[0].model_dump(), "reference": entry.reference}]})
    result = service.submit(Compose(recipe=mine), ann).result(300)
    plain = service.submit(Compose(recipe=asked), bob).result(300)
    assert np.array_equal(pixels(result), pixels(plain))
    with pytest.raises(Refused, match="upload its file again"):
        service.submit(Compose(recipe=mine), bob)
    with pytest.raises(Refused, match="only those can be removed"):
        service.remove(bob, entry.reference)
    (tmp_path / "bad.safetensors").write_bytes(b"<html>")
    with pytest.raises(Refused, match=r"bad\.safetensors"):
        service.upload(ann, tmp_path / "bad.safetensors")
    service.remove(ann, entry.reference)
    assert entry not in service.library(ann)
    assert not entry.path.exists()
