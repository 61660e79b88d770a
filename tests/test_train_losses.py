"""The trainer's losses against their formulas: weights, noise, targets, paths; predictions are the pipelines' own."""

import pytest
import torch

from multilora.lab.train import loss
from tests import tiny


def test_min_snr_weights_are_the_formula():
    a = torch.linspace(0.999, 0.001, 50)
    t = torch.arange(50)
    snr = a.double() / (1 - a.double())
    for gamma in (1.0, 5.0, 20.0):
        low = torch.minimum(snr, torch.full_like(snr, gamma))
        for kind, want in (("epsilon", low / snr), ("v_prediction", low / (snr + 1)), ("sample", low)):
            got = loss.min_snr_weights(a, t, gamma, kind)
            torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0)


def test_min_snr_at_zero_terminal_snr_is_finite():
    a = torch.tensor([0.5, 0.0])
    assert loss.min_snr_weights(a, torch.tensor([1]), 5.0, "epsilon").tolist() == [1.0]
    assert loss.min_snr_weights(a, torch.tensor([1]), 5.0, "v_prediction").tolist() == [0.0]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_diffusers(prediction):
    from diffusers import DDPMScheduler

    known = DDPMScheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2")
    ours = loss.Noise.of(known)
    x, noise, t = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), torch.tensor([0, 400, 999])
    torch.testing.assert_close(ours.noisy(x, noise, t), known.add_noise(x, noise, t))
    want = {"epsilon": noise, "v_prediction": known.get_velocity(x, noise, t), "sample": x}[prediction]
    torch.testing.assert_close(ours.target(x, noise, t), want)


def test_high_noise_share_and_range():
    ours = loss.Noise(torch.linspace(1, 0, 1000), "epsilon")
    u = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    t = ours.draw(u, 0.5)
    assert 0 <= int(t.min()) <= int(t.max()) <= 999
    assert abs(float((t >= 800).float().mean()) - (0.5 + 0.5 * 0.2)) < 0.02


@pytest.mark.parametrize(("make", "scale"), [(tiny.sd3, 1000.0), (tiny.flux, 1.0)])
def test_flow_target_and_path_are_the_formula(make, scale):
    pipe = make()
    flow = loss.family_of_pipeline(pipe).loss(pipe)
    x, noise, s = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([0.25, 0.75])
    for i in range(2):
        torch.testing.assert_close(flow.noisy(x, noise, s)[i], (1 - s[i]) * x[i] + s[i] * noise[i])
    torch.testing.assert_close(flow.target(x, noise, s), noise - x)
    torch.testing.assert_close(flow.time(s), s * scale)
    # a perfect velocity leads from any point of the path to both ends
    torch.testing.assert_close(flow.noisy(x, noise, s) - s.view(-1, 1, 1, 1) * flow.target(x, noise, s), x)
    u = torch.rand(50_000, 2, generator=torch.Generator().manual_seed(1))
    shift = flow.shift
    median = flow.draw(u, 0.0).median()
    assert abs(float(median) - shift / (1 + shift)) < 0.02  # logit-normal has its median at one half, then the shift
    with pytest.raises(ValueError, match="flow"):
        flow.weights(s, 5.0)


@pytest.mark.parametrize("make", [tiny.sd15, tiny.sdxl, tiny.sd3, tiny.flux])
def test_a_prediction_is_the_pipelines_own(make):
    """The first model call of the pipeline and ours, on the same latents, time and prompt."""
    pipe = make()
    family = loss.family_of_pipeline(pipe)
    denoiser = getattr(pipe, family.denoiser)
    seen = {}

    def watch(module, args, kwargs, output):
        if not seen:
            seen.update(x=kwargs.get("hidden_states", args[0] if args else None), out=output[0])
            seen["t"] = kwargs.get("timestep", args[1] if len(args) > 1 else None)

    handle = denoiser.register_forward_hook(watch, with_kwargs=True)
    more = {"max_sequence_length": 512} if family.name == "flux" else {}
    pipe("a fox", num_inference_steps=2, height=32, width=32, output_type="latent", guidance_scale=1.0, **more)
    handle.remove()
    x = seen["x"]
    if family.name == "flux":
        n, _, packed = x.shape
        side = 32 // pipe.vae_scale_factor
        x = x.view(n, side // 2, side // 2, packed // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
        x = x.reshape(n, packed // 4, side, side)
    with torch.no_grad():
        time = torch.as_tensor(seen["t"]).reshape(-1).expand(len(x))
        got = family.predict(pipe, x, time, family.text(pipe, ["a fox"]))
    want = seen["out"]
    if family.name == "flux":
        n, channels = want.shape[0], want.shape[2] // 4
        want = want.view(n, side // 2, side // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(got.shape)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
