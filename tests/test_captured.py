"""What a recorded step may be replayed under. Recording needs a GPU; who replays it is checked here without one."""

import pytest
import torch
from torch import nn

from multilora.attach import attached
from multilora.captured import captured
from multilora.lora import Lora, LowRank


def recorded(call):
    """A graph's way on the CPU: the addresses of the first call, whatever stands in the modules later."""
    pointers = []

    def replay():
        pointers.append(NET.weight.data_ptr())
        assert pointers[0] == pointers[-1], "the graph would read other weights"
        return call()

    return replay


torch.manual_seed(0)
NET = nn.Linear(6, 4, bias=False)
X = torch.randn(3, 6)
MODEL = nn.Sequential(NET)
LORAS = [Lora({"0": LowRank(torch.randn(2, 6), torch.randn(4, 2))}) for _ in range(2)]


@torch.no_grad()
def test_rows_may_change_in_the_rebuilt_form_alone():
    rows = ([1.0, 0.0], [0.0, 0.7])
    want = {tuple(r): X @ (NET.weight + sum(v * p["0"].up @ p["0"].down for v, p in zip(r, LORAS, strict=True))).T
            for r in rows}  # fmt: skip
    for form in ("rebuilt", "side", "bank"):
        with attached(MODEL, LORAS, form=form) as bank:
            bank.row = rows[0]
            step = captured(lambda: MODEL(X), bank, recorder=recorded)
            torch.testing.assert_close(step(), want[tuple(rows[0])])
            bank.row = rows[1]
            if form == "rebuilt":
                torch.testing.assert_close(step(), want[tuple(rows[1])])
            else:
                with pytest.raises(RuntimeError, match="changed since the graph was recorded"):
                    step()
            bank.row = rows[0]
            torch.testing.assert_close(step(), want[tuple(rows[0])])
            bank.row = [0.0, 0.0]  # the base's own weights, elsewhere in memory
            with pytest.raises(RuntimeError, match="changed since"):
                step()
        with pytest.raises(RuntimeError, match="the attachment changed"):
            step()


def test_what_cannot_be_captured_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="gradients are on"):
        captured(lambda: X)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch.no_grad(), pytest.raises(ValueError, match="need a CUDA device, and there is none"):
        captured(lambda: X)
