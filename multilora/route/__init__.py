"""During the run: `(loras, *, options) -> plan`, one method per file, called once per picture."""
