"""What the rows of a batch ask for: weights of their own, plans, and so the passes of a token, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multilora.method import Bound
from multilora.pipelines.members import Member
from multilora.plan import Moment, Pass, shares
from multilora.schedule import Schedule


@dataclass(frozen=True)
class Passes:
    """The passes of one token: rows [passes][requests] (a single gate for one request), mix [requests] lists of shares
    (padded with 0), moments [requests], counts [requests] of the passes that each asked for."""

    rows: list[list[Any]]
    mix: list[list[float]]
    moments: list[Moment]
    counts: list[int]


def combines(plans: Sequence[Any]) -> bool:
    """Whether a plan mixes predictions by itself."""
    return any(getattr(plan, "combine", None) is not None for plan in plans)


class Requests:
    """Weights of each row of a batch: requests [rows][loras] schedules; a single row serves every batch.

    Each row is planned for by itself, with the LoRAs whose weight there is not exactly 0. One that asks for fewer
    passes than another has its last repeated at share 0; one without LoRAs runs the base model.
    """

    def __init__(self, members: Sequence[Member], requests: Sequence[Sequence[Schedule]], bound: Bound):
        self.members, self.bound = list(members), bound
        self.rows = [list(request) for request in requests]
        self.live = [[i for i, s in enumerate(request) if not s.is_zero] for request in self.rows]

    def plans(self) -> list[Any]:
        """[requests] a new plan of each, None without LoRAs."""
        return [self.bound([self.members[i].lora for i in live]) if live else None for live in self.live]

    def passes(self, plans: Sequence[Any], step: int, steps: int) -> Passes:
        """The passes of a step. Raises ValueError when a row does not fit the LoRAs."""
        planned: list[list[Pass]] = []
        moments = []
        for plan, live, request in zip(plans, self.live, self.rows, strict=True):
            weights = tuple(request[i].at(step, steps) for i in live)
            cards = tuple(self.members[i].lora.card for i in live)
            moments.append(Moment(step, steps, float(step), None, weights, cards, guidance=1.0))
            planned.append([Pass(())] if plan is None else list(plan(moments[-1])))
        count = max(len(passes) for passes in planned)
        rows: list[list[Any]] = [[] for _ in range(count)]
        mix = []
        for passes, live in zip(planned, self.live, strict=True):
            padding = count - len(passes)
            mix.append(shares(passes) + [0.0] * padding)
            for j, p in enumerate(passes + [passes[-1]] * padding):
                rows[j].append(self._row(p, live))
        return Passes(rows, mix, moments, [len(passes) for passes in planned])

    def _row(self, p: Pass, live: Sequence[int]) -> Any:
        """A pass's row [loras] over all LoRAs of the bank, or its gate."""
        name = self.bound.record.name
        if callable(p.row):
            if len(self.rows) > 1 or len(live) < len(self.members):
                raise ValueError(
                    f"method {name} routes token by token: wanted one set of weights for a whole batch, none of them 0"
                )
            return p.row
        if len(p.row) != len(live):
            raise ValueError(f"method {name}: a pass's row has {len(p.row)} entries for {len(live)} LoRAs")
        whole = [0.0] * len(self.members)
        for i, value in zip(live, p.row, strict=True):
            whole[i] = float(value)
        return tuple(whole)

    def mixed(self, logits: Sequence[Tensor], plans: Sequence[Any], passes: Passes) -> Tensor:
        """The mean of the passes' logits [B, T, V] by each request's shares, in float32 at least.

        One pass at share 1 is handed through untouched. Each request has B / requests samples, side by side.
        """
        if len(logits) == 1 and not combines(plans) and all(mix == [1.0] for mix in passes.mix):
            return logits[0]
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        times, found = len(logits[0]) // len(plans), []
        for r, (plan, count) in enumerate(zip(plans, passes.counts, strict=True)):
            own = [one[r * times : (r + 1) * times].to(wide) for one in logits[:count]]
            combine = getattr(plan, "combine", None)
            if combine is not None:
                found.append(combine(own, passes.moments[r]))
                continue
            total = own[0] * passes.mix[r][0]
            for one, share in zip(own[1:], passes.mix[r][1:count], strict=True):
                total = total + one * share
            found.append(total)
        return found[0] if len(found) == 1 else torch.cat(found)
