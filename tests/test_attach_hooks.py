"""Hooks that have nothing to add come off once they have counted a call, and are there again when they are needed."""

import pytest
import torch
from torch.utils.hooks import RemovableHandle

from multilora import attach, rebuilt_many
from multilora.attach import attached
from multilora.lora import Lora
from multilora.rebuilt import Weight
from tests.test_attach_hosts import BASE, INPUTS, LORAS, SAMPLES, WANT, _net

MERGED = ("rebuilt", "bank")


def hooks(net):
    return sum(len(m._forward_hooks) for m in net.modules())


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", MERGED)
def test_merged_weights_run_without_hooks_after_the_first_call(form):
    net = _net()
    with torch.no_grad(), attached(net, LORAS, form=form, dozing=True) as bank:
        for i, row in enumerate(WANT):
            bank.row = row
            assert hooks(net) == (4 if i == 0 else 0)
            close(net(*INPUTS), WANT[row])
        bank.check_called()
        bank.row = (0.0, 0.0)
        torch.testing.assert_close(net(*INPUTS), BASE)
        assert hooks(net) == 0
    assert hooks(net) == 0
    torch.testing.assert_close(net(*INPUTS), BASE)


@pytest.mark.parametrize("form", MERGED)
def test_a_row_per_sample_and_a_gate_call_them_back(form):
    net, want = _net(), torch.cat([WANT[1.0, 0.0][:2], WANT[0.0, 0.7][2:]])
    with torch.no_grad(), attached(net, LORAS, form=form, dozing=True) as bank:
        for _ in range(3):
            for row in WANT:
                bank.row = row
                close(net(*INPUTS), WANT[row])
            assert hooks(net) == 0
            bank.row = SAMPLES
            assert hooks(net) == 4
            close(net(*INPUTS), want)
            bank.row = (1.0, 0.0)
            bank.gate = lambda path, x: torch.tensor([0.5, -1.0])
            close(net(*INPUTS), WANT[0.5, -1.0])
            bank.gate = None
            assert hooks(net) == 0
            close(net(*INPUTS), WANT[1.0, 0.0])


def test_a_new_count_needs_them_and_sees_what_is_not_called():
    net = _net()
    with torch.no_grad(), attached(net, LORAS, form="rebuilt", dozing=True) as bank:
        for row in WANT:
            bank.row = row
            net(*INPUTS)
        bank.reset_calls()
        assert hooks(net) == 4
        bank.row = (0.5, -1.0)
        assert hooks(net) == 4  # none was called since
        net.a(torch.randn(2, 8))
        bank.row = (1.0, 0.0)
        assert hooks(net) == 3
        with pytest.raises(RuntimeError, match="3 of 4 adapted modules were not called, first 'b'"):
            bank.check_called()


def test_the_side_form_keeps_its_hooks():
    net = _net()
    with torch.no_grad(), attached(net, LORAS, form="side", dozing=True) as bank:
        for row in [*WANT, (0.0, 0.0), *WANT]:
            bank.row = row
            if any(row):
                close(net(*INPUTS), WANT[row])
                assert hooks(net) == 4
            else:
                torch.testing.assert_close(net(*INPUTS), BASE)


def test_other_hooks_keep_their_place_after_ours():
    """One that is there stays after ours, and one that came while ours were off sees the LoRAs' part as well."""
    net, seen = _net(), {}
    with torch.no_grad(), attached(net, LORAS, form="rebuilt", dozing=True) as bank:
        net.a.register_forward_hook(lambda m, args, y: seen.__setitem__("a", y.clone()))
        for row in WANT:
            bank.row = row
            net(*INPUTS)
        assert (len(net.a._forward_hooks), len(net.b._forward_hooks)) == (2, 0)
        net.b.register_forward_hook(lambda m, args, y: seen.__setitem__("b", y.clone()))
        net(*INPUTS)
        merged = dict(seen)
        bank.row = [[0.0, 0.7]] * 4
        net(*INPUTS)
        assert merged.keys() == seen.keys() == {"a", "b"}
        for name, value in merged.items():
            close(seen[name], value)
    assert (len(net.a._forward_hooks), len(net.b._forward_hooks)) == (1, 1)


def test_an_attachment_taken_up_again_counts_again():
    net = _net()
    with torch.no_grad(), attached(net, LORAS, form="rebuilt", dozing=True) as bank:
        for row in WANT:
            bank.row = row
            net(*INPUTS)
    with torch.no_grad(), bank.again():
        bank.row = (1.0, 0.0)
        assert (hooks(net), set(bank.calls.values())) == (4, {0})
        close(net(*INPUTS), WANT[1.0, 0.0])
        assert set(bank.calls.values()) == {1}
    assert hooks(net) == 0


def test_without_dozing_every_call_is_counted():
    net = _net()
    with torch.no_grad(), attached(net, LORAS, form="rebuilt") as bank:
        for row in WANT:
            bank.row = row
            net(*INPUTS)
        assert hooks(net) == 4
        assert set(bank.calls.values()) == {len(WANT)}


@pytest.mark.parametrize(("how", "dozing"), [("in place", False), ("in place", True), ("wrapped", False)])
def test_a_model_that_is_compiled_within_the_block_keeps_its_loras(how, dozing):
    """Its first call traces the graph, and no hook that comes later would be asked. A wrapper says nothing at the
    model, so that dozing is not for it, as its docstring has it."""
    net, want = _net(), torch.cat([WANT[1.0, 0.0][:2], WANT[0.0, 0.7][2:]])
    with torch.no_grad(), attached(net, LORAS, form="rebuilt", dozing=dozing) as bank:
        if how == "in place":
            net.compile(backend="eager")
        step = net if how == "in place" else torch.compile(net, backend="eager")
        for row in WANT:
            bank.row = row
            close(step(*INPUTS), WANT[row])
        bank.row = SAMPLES
        close(step(*INPUTS), want)
        bank.check_called()


def breaks_at(monkeypatch, number, error):
    """The building of the number-th weight fails."""
    count, own = [], Weight.build

    def build(self, *args):
        count.append(self)
        if len(count) == number:
            raise error
        return own(self, *args)

    monkeypatch.setattr(rebuilt_many, "rebuilt_at_once", lambda *_: ())
    monkeypatch.setattr(attach, "rebuilt_at_once", lambda *_: ())
    monkeypatch.setattr(Weight, "build", build)


@pytest.mark.parametrize("before", [(0.0, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_while_weights_are_built_leaves_every_lora_at_work(monkeypatch, number, error, before):
    net = _net()
    with torch.no_grad(), attached(net, LORAS, form="rebuilt", dozing=True) as bank:
        for row in (*WANT, before):
            bank.row = row
            net(*INPUTS)
        assert hooks(net) == 0
        with monkeypatch.context() as patch:
            breaks_at(patch, number, error)
            with pytest.raises(type(error)):
                bank.row = (0.5, -1.0)
        close(net(*INPUTS), WANT[0.5, -1.0])
        bank.row = (0.5, -1.0)
        close(net(*INPUTS), WANT[0.5, -1.0])
    torch.testing.assert_close(net(*INPUTS), BASE)
    assert hooks(net) == 0


def test_an_interrupt_among_the_hooks_adds_no_lora_twice(monkeypatch):
    net, want = _net(), torch.cat([WANT[1.0, 0.0][:2], WANT[0.0, 0.7][2:]])
    own = RemovableHandle.remove
    with torch.no_grad(), attached(net, LORAS, form="rebuilt", dozing=True) as bank:
        bank.row = (1.0, 0.0)
        net(*INPUTS)
        removed = []

        def interrupted(self):
            removed.append(self)
            if len(removed) == 2:
                raise KeyboardInterrupt
            own(self)

        with monkeypatch.context() as patch:
            patch.setattr(RemovableHandle, "remove", interrupted)
            with pytest.raises(KeyboardInterrupt):
                bank.row = (0.5, -1.0)
        for _ in range(2):
            bank.row = SAMPLES
            assert hooks(net) == 4
            close(net(*INPUTS), want)


@pytest.mark.parametrize("dozing", [False, True])
@pytest.mark.parametrize("form", ["auto", "side", "rebuilt", "bank"])
def test_a_module_under_two_names_has_the_loras_of_each(form, dozing):
    net = _net()
    net.also = net.a
    one = Lora({"a": LORAS[0]["a"], "b": LORAS[0]["b"]})
    other = Lora({"also": LORAS[1]["a"]})
    plain = _net()
    with torch.no_grad():
        plain.a.weight += 0.5 * one["a"].delta() - 2.0 * other["also"].delta()
        plain.b.weight += 0.5 * one["b"].delta()
        with attached(net, [one, other], form=form, dozing=dozing) as bank:
            for _ in range(3):
                bank.row = (0.5, -2.0)
                close(net(*INPUTS), plain(*INPUTS))
                bank.row = (0.0, 0.0)
                torch.testing.assert_close(net(*INPUTS), BASE)
            bank.check_called()
    assert hooks(net) == 0
