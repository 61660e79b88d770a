"""The base model: a small Stable Diffusion (U-Net and text encoder, jointly) trained on the drawn scenes.

Data-parallel over processes with gloo, one thread each; resumable from `out`/base.pt.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import (
    AutoencoderTiny,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTokenizer

from multilora.lab.train.precision import fast_bfloat16
from multilora.lab.world.dataset import load_dataset
from multilora.lab.world.render import sheet
from multilora.lab.world.text import build_text_encoder, encode_texts

PROMPTS = (
    "a red cat in a blue scarf holding a yellow balloon, on a beach",
    "a green rabbit wearing a purple cape and a red ball, in the snow",
    "a blue bear in a yellow poncho holding a pink flower, in a forest",
    "a yellow robot wearing a red robe with a blue book, in a city",
    "a pink alien in a green hat holding a sandwich, at night",
    "an orange fox with a white scarf holding a blue umbrella, in a grove",
    "a white cat in a red robe holding a green ball, pixel style",
    "a purple bear wearing an orange hat and a yellow umbrella, on a beach, pencil style",
    "a blue robot in a pink cape holding a red flower, in a city, neon style",
    "a fox wearing a poncho holding a book, in a forest, print style",
    "a red alien",
    "a green bear holding an orange balloon, in the snow",
)


def build_unet(settings):
    """An untrained U-Net over [n, latent channels, 16, 16], attention at 8 x 8 and 4 x 4."""
    torch.manual_seed(settings.seed)
    return UNet2DConditionModel(
        sample_size=settings.size // 8,
        in_channels=settings.latent_channels,
        out_channels=settings.latent_channels,
        layers_per_block=1,
        block_out_channels=settings.channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=settings.text_width,
        attention_head_dim=settings.heads,  # diffusers reads it as the number of heads
        norm_num_groups=32,
    )


def build_scheduler(settings):
    """The sampler that is saved with the model."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=settings.train_steps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="linspace",
        steps_offset=1,
    )


class Trained(torch.nn.Module):
    """The two parts that are trained, as one module for the optimiser, the average and the checkpoint."""

    def __init__(self, unet, text):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, noisy, times, tokens):
        """[n, c, h, w], [n], [n, length] -> v [n, c, h, w]."""
        context = self.text(tokens).last_hidden_state
        return self.unet(noisy, times, context).sample


def noise_times(count, progress, settings, generator):
    """Timesteps [count]: a share from the range that matters at this stage of the training, the rest uniform."""
    share, (low, high) = next(rule[1:] for rule in reversed(settings.emphasis) if progress >= rule[0])
    anywhere = torch.randint(0, settings.train_steps, (count,), generator=generator)
    chosen = torch.randint(low, high, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < share, chosen, anywhere)


def _share_gradients(parameters, world):
    """Average the gradients over the processes, through one flat buffer."""
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    offset = 0
    for p in parameters:
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()


def _progress(seen, spent, settings):
    return max(seen / settings.samples, spent / (settings.minutes * 60))


def _rate(step, progress, settings):
    """Linear warm-up, then a cosine to a hundredth."""
    ramp = min(1.0, (step + 1) / settings.warmup)
    return float(settings.rate * ramp * (0.01 + 0.99 * (0.5 + 0.5 * np.cos(np.pi * min(progress, 1.0)))))


def _worker(rank, world, out, settings, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    out = Path(out)
    log = (out / "base.log").open("a") if rank == 0 else None

    def say(text):
        if log:
            log.write(time.strftime("%H:%M:%S ") + text + "\n")
            log.flush()
            print(text, flush=True)

    latents, tokens = load_dataset(out)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    empty = encode_texts(tokenizer, [""], settings.tokens)
    model = Trained(build_unet(settings), build_text_encoder(tokenizer, settings)).train()
    average = Trained(build_unet(settings), build_text_encoder(tokenizer, settings)).requires_grad_(False)
    model.unet.set_attn_processor(AttnProcessor())  # under bfloat16 on CPU faster than the fused kernel
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.rate,
        betas=settings.betas,
        fused=True,
    )
    schedule = DDPMScheduler(num_train_timesteps=settings.train_steps, beta_schedule="squaredcos_cap_v2")
    alpha = schedule.alphas_cumprod
    signal_of, noise_of = alpha.sqrt(), (1 - alpha).sqrt()
    step, seen, spent_before = 0, 0, 0.0
    path = out / "base.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, seen, spent_before = state["step"], state["seen"], state["spent"]
        say(f"resumed at step {step}")
    else:
        average.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(settings.seed + 1000 * rank + 7919 * step + 1)
    each = settings.batch // world
    started = saved = sampled = time.time()
    losses = {"all": [], "high": [], "low": []}
    clock = torch.zeros(1, dtype=torch.float64)
    while True:
        clock[0] = spent_before + time.time() - started
        if world > 1:
            dist.broadcast(clock, 0)
        progress = _progress(seen, clock.item(), settings)
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = _rate(step, progress, settings)
        if step % 400 == 0 and len(latents) < settings.scenes:
            latents, tokens = load_dataset(out)  # shards drawn meanwhile
        rows = torch.randint(0, len(latents), (each,), generator=generator)
        clean = latents[rows].float()
        which = torch.randint(0, tokens.shape[1], (each,), generator=generator)
        words = tokens[rows, which].long()
        silent = torch.rand(each, generator=generator) < settings.drop_caption
        words[silent] = empty
        times = noise_times(each, progress, settings, generator)
        noise = torch.randn(clean.shape, generator=generator)
        signal, level = signal_of[times].view(-1, 1, 1, 1), noise_of[times].view(-1, 1, 1, 1)
        wanted = signal * noise - level * clean
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            made = model(signal * clean + level * noise, times, words).float()
        loss_each = F.mse_loss(made, wanted, reduction="none").mean((1, 2, 3))
        optimiser.zero_grad(set_to_none=False)
        loss_each.mean().backward()
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if world > 1:
            _share_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimiser.step()
        decay = settings.ema if progress < 0.75 else settings.ema_end
        decay = min(decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in parameters], 1 - decay)
        step, seen = step + 1, seen + each * world
        if rank == 0:
            detached = loss_each.detach()
            losses["all"].append(detached.mean().item())
            for name, mask in (("high", times >= 600), ("low", times < 600)):
                losses[name].extend(detached[mask].tolist())
            if step % 50 == 0:
                spent = clock.item()
                parts = ", ".join(f"{name} {np.mean(v or [0]):.4f}" for name, v in losses.items())
                say(
                    f"step {step}, {seen} samples, {spent:.0f} s, loss {parts}, "
                    f"lr {optimiser.param_groups[0]['lr']:.2e}, {(seen / max(spent, 1)):.1f} samples/s"
                )
                losses = {name: [] for name in losses}
            if time.time() - saved > settings.checkpoint_minutes * 60:
                saved = time.time()
                _save(path, model, average, optimiser, step, seen, clock.item())
            if time.time() - sampled > settings.sample_minutes * 60:
                sampled = time.time()
                _save(path, model, average, optimiser, step, seen, clock.item())
                _snapshot(out, average, tokenizer, settings, step)
                say(f"sampled in {time.time() - sampled:.0f} s")
    if rank == 0:
        _save(path, model, average, optimiser, step, seen, clock.item())
        _snapshot(out, average, tokenizer, settings, step)
        (out / "base.json").write_text(json.dumps({"steps": step, "samples": seen, "seconds": clock.item()}))
        say(f"trained: {step} steps, {seen} samples, {clock.item():.0f} s")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _save(path, model, average, optimiser, step, seen, spent):
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimiser": optimiser.state_dict(),
        "step": step,
        "seen": seen,
        "spent": spent,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def assemble(out, unet, text, tokenizer, settings):
    """The parts -> a StableDiffusionPipeline with the newest decoder in `out`/vae."""
    return StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(Path(out) / "vae"),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sample_grid(pipe, settings, prompts=PROMPTS, seed=0, columns=6):
    """One picture of one sample per prompt."""
    pipe.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), 12):
        part = list(prompts[start : start + 12])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images += pipe(
            part, num_inference_steps=settings.sample_steps, guidance_scale=settings.guidance, generator=generators
        ).images
    return sheet(images, columns)


def _snapshot(out, average, tokenizer, settings, step):
    """A sample grid, and the whole model as it stands, in `out`/base_snapshot."""
    pipe = assemble(out, average.unet, average.text, tokenizer, settings)
    sample_grid(pipe, settings).save(Path(out) / f"grid{step:06d}.png")
    write_base(pipe, Path(out) / "tokenizer", Path(out) / "base_snapshot")


def _edit(path, **values):
    """Set values of a JSON file; None removes one."""
    config = json.loads(path.read_text())
    config.update(values)
    config = {key: value for key, value in config.items() if key not in values or value is not None}
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_base(pipe, tokenizer_folder, target):
    """Save the pipeline in half precision in `target`, replacing what is there in one rename."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    pipe.save_pretrained(fresh, safe_serialization=True)
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderTiny), ("text_encoder", None)):
        kind = kind or type(pipe.text_encoder)
        kind.from_pretrained(fresh / part, torch_dtype=torch.float16).save_pretrained(fresh / part)
    # transformers 5 loads in the config's dtype: the plain default is single precision, as the U-Net's
    _edit(fresh / "text_encoder" / "config.json", dtype="float32")
    # AutoencoderTiny saves this one itself and warns of it when it loads
    _edit(fresh / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
    _edit(fresh / "unet" / "config.json", _name_or_path=None)
    for path in Path(tokenizer_folder).iterdir():
        shutil.copy(path, fresh / "tokenizer" / path.name)
    fresh.chmod(0o755)
    old = target.with_name(f".{target.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def train_base(out, settings, echo=print):
    """Stage: train U-Net and text encoder until the settings' samples or minutes are spent; resumable."""
    world = settings.processes
    port = 29_500 + os.getpid() % 2_000
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(threads)
    try:
        if world == 1:
            _worker(0, 1, str(out), settings, port)
        else:
            torch.multiprocessing.spawn(_worker, (world, str(out), settings, port), nprocs=world)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    echo("base: trained")


def export_base(out, settings, target, echo=print):
    """Stage: the averaged weights of `out`/base.pt with `out`/vae -> the folder `target`."""
    out = Path(out)
    state = torch.load(out / "base.pt", weights_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    average = Trained(build_unet(settings), build_text_encoder(tokenizer, settings))
    average.load_state_dict(state["average"])
    write_base(assemble(out, average.unet, average.text, tokenizer, settings), out / "tokenizer", target)
    size = sum(path.stat().st_size for path in Path(target).rglob("*") if path.is_file())
    echo(f"base: written to {target}, {size / 2**20:.1f} MiB")
