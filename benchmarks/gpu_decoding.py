"""Goals of routed decoding: the linears of a 7B Llama, a token at a time (G5 to G7), and the pair of kernels (G8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu import Report, Row, Setting, agree, implementations, times
from torch import Tensor

from multilora.kernels import routed

EXPERTS, TOP, RANK = 8, 2, 16
CALM = 0.1  # size of what is added to the residual: at 1 rounding grows a thousandfold over 32 layers
GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))  # linears of a layer that read one input


class Linears:
    """The seven linears of each layer, fed one by the other so that no kernel can overtake; norms and attention, which
    all ways share, left out. Experts of rank 16 beside each, the up factors contiguous as [E, r, out]. Weights of a
    group lie behind one another, so that one matmul may take them all."""

    def __init__(self, setting: Setting):
        self.setting = setting
        layers, d, ff = (2, 64, 96) if setting.small else (32, 4096, 11008)
        torch.manual_seed(0)
        self.wide, self.layers = [], []
        for _ in range(layers):
            found = [self._group([d] * 3, d), self._group([d], d, CALM), self._group([ff] * 2, d),
                     self._group([d], ff, CALM)]  # fmt: skip
            self.wide.append([w for w, _ in found])
            self.layers.append([linear for _, linears in found for linear in linears])
        self.routers = [[setting.randn(EXPERTS, layer[0].shape[1]) for layer in each] for each in self.layers]
        self.x = setting.randn(1, d)
        self.index = torch.tensor([2, 5], device=setting.device)
        self.weight = torch.tensor([0.7, 0.3], device=setting.device, dtype=setting.half)

    def _group(
        self, outs: list[int], wide: int, size: float = 1.0
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """The weights of linears side by side, and (weight, down, up) of each."""
        s = self.setting
        weight = size * s.randn(sum(outs), wide) / wide**0.5
        return weight, [
            (w, s.randn(EXPERTS, RANK, wide) / wide**0.5, (0.1 * size * s.randn(EXPERTS, RANK, len(w))).mT)
            for w in weight.split(outs)
        ]

    def token(self, linear: Callable[[int, int, Tensor], Tensor]) -> Tensor:
        x = self.x
        for n in range(len(self.layers)):
            q, k, v = (linear(n, i, x) for i in range(3))
            x = x + linear(n, 3, q + k + v)
            x = x + linear(n, 6, F.silu(linear(n, 4, x)) * linear(n, 5, x))
            x = F.rms_norm(x, x.shape[-1:])
        return x

    def token_in_groups(self, linears: Callable[[int, int, Tensor], Tensor]) -> Tensor:
        """`token`, with one call for the linears that read one input."""
        x = self.x
        for n in range(len(self.layers)):
            q, k, v = linears(n, 0, x).chunk(3, -1)
            x = x + linears(n, 1, q + k + v)
            gate, up = linears(n, 2, x).chunk(2, -1)
            x = x + linears(n, 3, F.silu(gate) * up)
            x = F.rms_norm(x, x.shape[-1:])
        return x

    def bare_in_groups(self, n: int, group: int, x: Tensor) -> Tensor:
        return x @ self.wide[n][group].T

    def beside(self, implementation: str) -> Callable[[int, int, Tensor], Tensor]:
        """What the experts add is computed while the base weights are read: a parallel branch of the graph."""
        cuda = self.setting.device.type == "cuda"
        side = torch.cuda.Stream() if cuda else None

        def added(n: int, group: int, x: Tensor) -> Tensor:
            found = [
                routed.routed_by_index(x, down, up, self.index, self.weight, implementation=implementation)
                for _, down, up in (self.layers[n][i] for i in GROUPS[group])
            ]
            return torch.cat(found, -1) if len(found) > 1 else found[0]

        def linears(n: int, group: int, x: Tensor) -> Tensor:
            if not cuda:
                return self.bare_in_groups(n, group, x).add_(added(n, group, x))
            main = torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                delta = added(n, group, x)
            y = self.bare_in_groups(n, group, x)
            main.wait_stream(side)
            return y.add_(delta)

        return linears

    def bare(self, n: int, i: int, x: Tensor) -> Tensor:
        return x @ self.layers[n][i][0].T

    def read_by_index(self, implementation: str) -> Callable[[int, int, Tensor], Tensor]:
        def linear(n: int, i: int, x: Tensor) -> Tensor:
            w, down, up = self.layers[n][i]
            return routed.add_by_index_(x @ w.T, x, down, up, self.index, self.weight, implementation=implementation)

        return linear

    def merged(self, n: int, i: int, x: Tensor) -> Tensor:
        """The paper's way (LoRA-Switch, arXiv 2405.17741): the picked experts into the weights at every token."""
        w, down, up = self.layers[n][i]
        left = (up.index_select(0, self.index) * self.weight[:, None, None]).transpose(0, 1).flatten(1)
        return x @ torch.addmm(w, left, down.index_select(0, self.index).flatten(0, 1)).T

    def loop_over_all(self, n: int, i: int, x: Tensor) -> Tensor:
        w, down, up = self.layers[n][i]
        y, p = x @ w.T, torch.softmax(x @ self.routers[n][i].T, -1)
        for e in range(EXPERTS):
            y = y + p[:, e : e + 1] * ((x @ down[e].T) @ up[e].T)
        return y

    def loop_over_the_best(self, n: int, i: int, x: Tensor) -> Tensor:
        """A router in every layer, its picks read by the host."""
        w, down, up = self.layers[n][i]
        best, index = torch.softmax(x @ self.routers[n][i].T, -1).topk(TOP, -1)
        y, best = x @ w.T, best / best.sum(-1, keepdim=True)
        for j, e in enumerate(index[0].tolist()):
            y = y + best[:, j : j + 1] * ((x @ down[e].T) @ up[e].T)
        return y


def decoding(setting: Setting, report: Report) -> None:
    stack = Linears(setting)
    bare, merged = (lambda linear=linear: stack.token(linear) for linear in (stack.bare, stack.merged))
    ways: dict[str, Callable[[], Any]] = {
        "bare linears, graph": setting.graph(bare),
        "bare linears, eager": bare,
        "merged at every token, graph": setting.graph(merged),
        "a router a layer, loop over the best 2, eager": lambda: stack.token(stack.loop_over_the_best),
        f"a router a layer, loop over all {EXPERTS}, eager": lambda: stack.token(stack.loop_over_all),
    }
    grouped = setting.graph(lambda: stack.token_in_groups(stack.bare_in_groups))
    ways["bare linears in groups, graph"] = grouped
    agree(grouped(), bare(), "bare linears in groups")
    names = implementations(setting, report, "G5")
    for name in names:
        linear, beside = stack.read_by_index(name), stack.beside(name)
        agree(stack.token(linear), merged(), f"experts by index, {name}")
        ways[f"shared route, by index, {name}, graph"] = setting.graph(lambda linear=linear: stack.token(linear))
        both = setting.graph(lambda beside=beside: stack.token_in_groups(beside))
        agree(both(), merged(), f"experts beside the linears, {name}")
        ways[f"shared route, beside the linears in groups, {name}, graph"] = both
    found = times(setting, ways)
    report.took("G5", found)
    base, _, paper, best, dense, groups = (found[way] for way in list(ways)[:6])
    for name in names:
        value = found[f"shared route, by index, {name}, graph"]
        report.rows += [
            Row("G5", f"shared route, {name} / bare linears, graphs", value / base, 1.15, 1.05),
            Row(
                "G5",
                f"shared route, {name}, beside the linears in groups / bare linears in groups, graphs",
                found[f"shared route, beside the linears in groups, {name}, graph"] / groups,
                1.15,
                1.05,
            ),
            Row("G6", f"shared route, {name} / merged at every token, graphs", value / paper, 0.45),
            Row("G7", f"shared route, {name}, graph / loop over the best 2, eager", value / best, 0.35),
            Row("G7", f"shared route, {name}, graph / loop over all {EXPERTS}, eager", value / dense),
        ]
    report.rows.append(Row("G5", "bare linears again (A/A)", found["A/A"] / base))


def pair(setting: Setting, report: Report) -> None:
    """Shrink and expand for tokens with routes of their own; many layers in a graph, so that no cache holds them."""
    d, layers = (64, 2) if setting.small else (4096, 32)
    for tokens in (16, 64):
        for rank in (16, 64):
            torch.manual_seed(0)
            downs = [setting.randn(EXPERTS, rank, d) / d**0.5 for _ in range(layers)]
            ups = [0.1 * setting.randn(EXPERTS, rank, d).mT for _ in range(layers)]
            x, y = setting.randn(tokens, d), setting.randn(tokens, d)
            index = torch.randint(EXPERTS, (tokens, TOP), device=setting.device)
            weight = torch.rand(tokens, TOP, device=setting.device).to(setting.half)
            ways, results = {}, []
            for name in implementations(setting, report, f"G8, {tokens} tokens, rank {rank}"):

                def all_layers(name=name, x=x, y=y, downs=downs, ups=ups, index=index, weight=weight):
                    for down, up in zip(downs, ups, strict=True):
                        routed.add_by_index_(y, x, down, up, index, weight, implementation=name)

                before = y.clone()
                all_layers()
                results.append(y - before)
                agree(results[-1], results[0], f"experts by index, {tokens} tokens, {name}")
                y.copy_(before)
                ways[name] = setting.graph(all_layers)
            found = times(setting, ways)
            report.took(f"G8, {tokens} tokens, rank {rank}, {layers} layers", found)
            touched = len(index.unique())
            moved = layers * x.element_size() * (3 * tokens * d + touched * 2 * rank * d)  # x, y in and out; factors
            for name in ways:
                what = f"{tokens} tokens, rank {rank}, {name} / the bytes at a copy's speed"
                report.rows.append(Row("G8", what, found[name] * setting.bandwidth / moved, 2.0, 1.4))
