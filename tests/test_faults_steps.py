"""A fault at any step of any method: one answer in words, and the next picture is bit-equal to a lone one.

The engine of the app's worker, in this process, on a base of tests/tiny.py in a folder; a sample by default, all steps
of all methods in the long suite, where a real worker is killed, too.
"""

import threading

import numpy as np
import pytest
import torch

import multilora
from multilora.pipelines.image import Composer
from multilora.web.service import Compose, Limits, Service
from multilora.web.service.state import State
from multilora.web.service.worker import Task
from tests import fault_engine, tiny
from tests.fault_engine import FAULTS, METHODS, NAMES, STEPS

ALL = [(m, f, at) for m in METHODS for f in (*FAULTS, "cancel") for at in range(STEPS)
       if at or f not in ("cancel",)]  # fmt: skip
CASES = [case for case in ALL if case[1] not in ("encode", "decode") or case[2] == 0]
# Some methods, each with another fault at another step.
SOME = METHODS[::3]
QUICK = [
    [case for case in CASES if case[0] == m][(7 * i + 1) % (len(CASES) // len(METHODS))] for i, m in enumerate(SOME)
]


class Flag:
    """A cancel that is set by the step before; `run` counts the steps."""

    def __init__(self):
        self.on = False

    def is_set(self):
        return self.on


class World:
    """An engine, the places of its LoRAs, and the lone picture of each method, by a pipeline of its own."""

    def __init__(self, folder):
        self.base = fault_engine.written(folder)
        self.places = {n: str(folder / "loras" / f"{n}.safetensors") for n in NAMES}
        self.engine = fault_engine.Broken(self.base, "cpu")
        self.alone = Composer.from_pretrained(self.base, device="cpu")
        for name in NAMES:
            self.alone.add(self.places[name], name=name)
        self.known = {}

    def lone(self, method):
        if method not in self.known:
            asked = fault_engine.recipe(self.base, method)
            for use in asked.loras:
                use.reference = self.places[use.name]
            self.known[method] = np.asarray(Composer(self.alone.pipe, base=self.base).compose(asked).images[0])
        return self.known[method]

    def run(self, method, fault="", at=0):
        """(answer, events) of a picture with a fault at a step; "cancel" after it."""
        flag, events = Flag(), []
        extra = {"fault": fault, "at": at} if fault not in ("", "cancel") else {}

        def emit(event):
            events.append(event)
            if fault == "cancel" and event.kind == "progress" and event.step == at:
                flag.on = True

        request = Compose(recipe=fault_engine.recipe(self.base, method, extra=extra), preview=at == 1)
        return self.engine.run(Task(1, request, self.places, ""), emit, flag), events


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"))


WORDS = {"raise": "on purpose", "layer": "on purpose", "encode": "on purpose", "decode": "on purpose",
         "nan": "NaN or infinite values", "memory": "try a smaller size", "cancel": ""}  # fmt: skip
CODES = {"nan": "nan", "memory": "memory", "cancel": ""}


def fault_then_picture(world, method, fault, at):
    before = State.of(world.engine.pipe)
    answer, events = world.run(method, fault, at)
    assert answer.kind == ("cancelled" if fault == "cancel" else "failed")
    assert answer.code == CODES.get(fault, "failed")
    assert WORDS[fault] in answer.message
    assert answer.result is None
    assert answer.drift == []
    assert before.differences(State.of(world.engine.pipe)) == []
    steps = [e.step for e in events if e.kind == "progress"]
    if fault in ("raise", "layer", "nan", "cancel"):  # it happened where it was meant to
        assert max(steps, default=0) == max(0, at - 1 if fault == "raise" else at), steps
    after, _ = world.run(method)
    assert after.kind == "done", after.message
    assert np.array_equal(np.asarray(after.result.pictures[0].image), world.lone(method))


@pytest.mark.parametrize(("method", "fault", "at"), QUICK)
def test_a_fault_at_a_step_of_a_method(world, method, fault, at):
    fault_then_picture(world, method, fault, at)


@pytest.mark.long
@pytest.mark.parametrize(("method", "fault", "at"), [case for case in CASES if case not in QUICK])
def test_a_fault_at_every_step_of_every_method(world, method, fault, at):
    fault_then_picture(world, method, fault, at)


def test_the_methods_draw_different_pictures(world):
    """Else bit-equality would say little. Methods whose gate is missing take equal shares, so they are alike."""
    found = {world.lone(m).tobytes() for m in SOME}
    assert len(found) >= len(SOME) - 1


@pytest.mark.long
def test_a_worker_killed_at_each_step(world, tmp_path_factory):
    """The process of a real worker, at each step of three methods: the picture is made again, others go on."""
    folder = tmp_path_factory.mktemp("once")
    with Service(world.base, engine="tests.fault_engine:Broken", devices=["cpu"], loras=world_folder(world),
                 limits=Limits(per_user=9)) as service:  # fmt: skip
        ann, bob = service.session("ann"), service.session("bob")
        for at, method in enumerate(("merge", "composite", "switch"), 1):
            extra = {"fault": "die", "at": at, "flag": str(folder / method)}
            job = service.submit(Compose(recipe=fault_engine.recipe(world.base, method, extra=extra)), ann)
            other = service.submit(Compose(recipe=fault_engine.recipe(world.base, "merge")), bob)
            drawn = np.asarray(job.result(600).pictures[0].image)
            assert (folder / method).exists()
            assert np.array_equal(drawn, world.lone(method))
            assert np.array_equal(np.asarray(other.result(600).pictures[0].image), world.lone("merge"))


def world_folder(world):
    from pathlib import Path

    return Path(world.places["fox"]).parent


def test_threads_that_load_at_once_change_no_class_of_torch(world):
    """diffusers and PEFT exchange torch.nn.Module.register_parameter while they load: here nobody does."""
    pipe, plain = tiny.sd15(), torch.nn.Module.register_parameter
    alone = {n: multilora.load(world.places[n], base=pipe) for n in NAMES}
    found, seen, wrong = [], [], []

    def work(name):
        try:
            for _ in range(3):
                found.append((name, multilora.load(world.places[name], base=pipe)))
                seen.append(torch.nn.Module.register_parameter)
                assert not torch.nn.Linear(2, 2).weight.is_meta
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert len(found) == 9
    assert set(seen) == {plain}
    for name, lora in found:
        assert list(lora) == list(alone[name])
        assert all(torch.equal(part.delta(), alone[name][key].delta()) for key, part in lora.items())
