"""Before the run: `(loras, weights, *, options) -> Lora`, one method per file."""
