"""Choosing weights: `(loras, objective, *, options) -> weights`, one method per file."""
