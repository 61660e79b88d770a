"""Seeds that belong to a place (a step, a sample), not to a running generator."""

from __future__ import annotations

import hashlib


def mixed_seed(*numbers: int | str) -> int:
    """A 63-bit seed from a few numbers and names, spread by SHA-256."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1
