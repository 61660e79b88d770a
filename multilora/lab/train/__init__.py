"""Training: LoRAs (and later gates), on accelerate."""
