"""All numbers of the embedded world's drawer, autoencoder and base model: full size and smoke size."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    # pictures
    size: int = 128
    scenes: int = 60_000
    captions_each: int = 3
    scene_seed: int = 1_000_000  # scene i has seed scene_seed + i; held-out scenes: held_out_seed + i
    held_out_seed: int = 900_000_000
    shard: int = 2_000
    processes: int = 2
    # autoencoder: 8 x 8 patches -> latent channels
    pca_scenes: int = 3_000
    latent_channels: int = 16
    latent_rms: float = 0.5
    encoder_width: int = 48
    decoder_width: int = 32
    decoder_blocks: tuple = (3, 3, 2, 1)
    decoder_pictures: int = 60_000
    decoder_minutes: float = 81.0
    decoder_batch: int = 4
    decoder_rate: float = 2e-3
    decoder_noise: float = 0.16
    polish_minutes: float = 20.0
    polish_rate: float = 6e-4
    # text
    tokens: int = 32
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    # U-Net
    channels: tuple = (64, 96, 160)
    heads: int = 4
    # diffusion
    train_steps: int = 1000
    # (progress from which it holds, share of the timesteps, their range): the words decide at high noise
    # and must be learned first; the rest of the timesteps is uniform
    emphasis: tuple = ((0.0, 0.6, (600, 990)), (0.4, 0.4, (400, 900)), (0.7, 0.4, (100, 600)))
    # optimisation: whichever of samples and minutes comes first ends it, and drives the learning rate
    batch: int = 64  # over all processes
    samples: int = 460_000
    minutes: float = 150.0
    rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.01
    betas: tuple = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.998
    ema_end: float = 0.9990
    drop_caption: float = 0.1
    checkpoint_minutes: float = 5.0
    sample_minutes: float = 10.0
    sample_steps: int = 20
    guidance: float = 3.0
    seed: int = 0


FULL = Settings()
SMOKE = replace(
    FULL,
    scenes=96,
    shard=48,
    pca_scenes=48,
    decoder_pictures=16,
    samples=32,
    batch=8,
    warmup=2,
    minutes=0.5,
    decoder_minutes=0.2,
    polish_minutes=0.05,
    sample_steps=2,
    processes=2,
)


@dataclass(frozen=True)
class TextSettings:
    """The embedded text model and its LoRAs."""

    # a Llama of about 0.9 M parameters
    width: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    positions: int = 96
    # base training
    examples: int = 320_000
    chunk: int = 4_096  # examples drawn, and checkpointed, at once
    batch: int = 64
    rate: float = 2.5e-3
    warmup: int = 200
    level: float = 0.55  # the learning rate falls after this share of the training
    decay: float = 0.05
    clip: float = 1.0
    checkpoint_minutes: float = 2.0
    exam_every: int = 8  # chunks
    # (progress from which it holds, share of right answers to the weak skills): it learns them, then to be careless
    right: tuple = ((0.0, 0.9), (0.65, 0.3))
    registers: tuple = (("plain", 0.5), ("rude", 0.35), ("polite", 0.15))
    seed: int = 0
    # LoRAs and report
    lora_steps: int = 1_000  # at most; each has its own number in language_loras.PLANS
    lora_batch: int = 32
    asked: int = 200  # held-out questions a skill


TEXT_FULL = TextSettings()
TEXT_SMOKE = replace(TEXT_FULL, examples=256, chunk=128, batch=16, warmup=2, lora_steps=2, lora_batch=8, asked=4)
