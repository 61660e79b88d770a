"""The embedded world: it draws pictures with exact labels and trains a small Stable Diffusion on them."""
