"""Chart of a search for weights: every candidate's loss, the best so far, and the best one's weights."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from multilora.chosen import Trial
from multilora.lab.chart import _heading, _legend, _stacked, _text
from multilora.lab.schedule_chart import _weights


def draw_search(names: Sequence[str], trials: Sequence[Trial], *, title: str, subtitle: str = "") -> Image.Image:
    """One RGB picture of chart.WIDTH pixels and any height. names: [loras]. Raises ValueError without trials."""
    if not trials:
        raise ValueError("a search to draw has at least one candidate")
    best, losses, weights = trials[0], [], []
    for trial in trials:
        best = trial if trial.total < best.total else best
        losses.append((trial.total, best.total))
        weights.append(best.weights)
    parts = [_heading(title, 30), *([_text(subtitle)] if subtitle else [])]
    parts += [_heading("Loss, lower is better"), _legend(["candidate", "best so far"]), _weights(losses, "candidate")]
    parts += [_heading("Weights of the best so far"), _legend(names), _weights(weights, "candidate")]
    return _stacked(parts)
