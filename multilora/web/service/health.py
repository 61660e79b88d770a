"""Is it well, and how much does it do: a small dict, and Prometheus' text format (version 0.0.4), written by hand."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

_BUCKETS = (1, 2, 5, 10, 30, 60, 120, 300, 900)
_HELP = {
    "jobs": ("jobs that ended", ("action", "outcome")),
    "refused": ("requests that were not taken", ("code",)),
    "pictures": ("pictures made", ()),
    "retried": ("jobs run a second time", ()),
    "restarts": ("workers replaced", ()),
    "drift": ("times that a pipeline was not as before after a job", ()),
}


class Counts:
    """Counters with labels joined by ":", and the seconds that jobs ran and waited."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counters: dict[str, Counter] = {name: Counter() for name in _HELP}
        self.seconds: dict[str, Counter] = {"run": Counter(), "wait": Counter()}

    def add(self, name: str, labels: str = "", amount: int = 1) -> None:
        """Count."""
        with self._lock:
            self.counters[name][labels] += amount

    def took(self, action: str, ran: float, waited: float) -> None:
        """A job ended."""
        with self._lock:
            for name, seconds in (("run", ran), ("wait", waited)):
                found = self.seconds[name]
                found["sum"] += seconds
                found["count"] += 1
                for bucket in _BUCKETS:
                    found[bucket] += seconds <= bucket

    def copy(self) -> tuple[dict[str, dict], dict[str, dict]]:
        """Counters and seconds as they are now."""
        with self._lock:
            return {n: dict(c) for n, c in self.counters.items()}, {n: dict(c) for n, c in self.seconds.items()}


def health(service: Any) -> dict[str, Any]:
    """{"status", "workers": [...], "queued", "running", "sessions", "uptime"}; nothing of any user."""
    workers = [
        {"alive": w.alive, "ready": w.about is not None, "device": (w.about or {}).get("device"), "starts": w.starts}
        for w in service.workers
    ]
    if service._stopping.is_set() or service._line.closed:
        status = "stopping"
    elif any(w["ready"] and w["alive"] for w in workers):
        status = "ok"
    elif all(w.broken for w in service.workers):
        status = "broken"
    else:
        status = "starting"
    return {
        "status": status,
        "workers": workers,
        "queued": len(service._line),
        "running": service._line.running,
        "sessions": len(service._sessions),
        "uptime": round(time.time() - service.started, 1),
    }


def metrics(service: Any) -> str:
    """https://prometheus.io/docs/instrumenting/exposition_formats/"""
    counters, seconds = service.counts.copy()
    lines = []
    for name, (text, labels) in _HELP.items():
        lines += [f"# HELP multilora_{name}_total {text}", f"# TYPE multilora_{name}_total counter"]
        values = counters[name] or ({} if labels else {"": 0})
        for key, value in sorted(values.items()):
            pairs = ",".join(f'{label}="{part}"' for label, part in zip(labels, key.split(":"), strict=False))
            lines.append(f"multilora_{name}_total{{{pairs}}} {value}" if pairs else f"multilora_{name}_total {value}")
    for name, found in seconds.items():
        full = f"multilora_{name}_seconds"
        lines += [f"# HELP {full} seconds that jobs {name}", f"# TYPE {full} histogram"]
        count = found.get("count", 0)
        lines += [f'{full}_bucket{{le="{b}"}} {found.get(b, 0)}' for b in _BUCKETS]
        lines += [
            f'{full}_bucket{{le="+Inf"}} {count}',
            f"{full}_sum {found.get('sum', 0):g}",
            f"{full}_count {count}",
        ]
    state = health(service)
    gauges = {
        "queued": (state["queued"], "jobs that wait"),
        "running": (state["running"], "jobs that run"),
        "sessions": (state["sessions"], "sessions that are remembered"),
        "workers": (sum(w["alive"] and w["ready"] for w in state["workers"]), "workers that are ready"),
        "up": (int(state["status"] == "ok"), "1 when a worker is ready"),
    }
    for name, (value, text) in gauges.items():
        lines += [f"# HELP multilora_{name} {text}", f"# TYPE multilora_{name} gauge", f"multilora_{name} {value}"]
    return "\n".join(lines) + "\n"
