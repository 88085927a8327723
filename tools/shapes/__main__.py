"""Makes the weights that ship in the package: draw, train the autoencoder, train the denoiser, export, measure.

Run `python -m tools.shapes --help` in the repository's root. Stopped at any point, the same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from transformers import CLIPTokenizer

from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.latent import LatentModel
from diffusion_gym.models.saving import export_pipeline, rename_weights
from diffusion_gym.models.shapes import SAMPLER_DEFAULTS, WEIGHTS
from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.storage import load_tensors, read_json, save_tensors, tensors_metadata, write_json
from tools.shapes.autoencoder import encode, reconstruct, train_autoencoder
from tools.shapes.data import make_pictures
from tools.shapes.denoiser import kind, make_stage, tokenize, train_denoiser
from tools.shapes.measure import parameter_counts, rate_table, success_rates, weights_size, write_model_card
from tools.shapes.networks import make_scheduler
from tools.shapes.vocabulary import write_tokenizer

_ABOUT = """\
A text-to-image latent diffusion model in diffusers' `StableDiffusionPipeline` layout, trained from scratch on drawn
scenes of one to four circles, squares, triangles and stars in six colors. It is made for reinforcement-learning
experiments: a detector scores its pictures exactly, and it leaves room for improvement on purpose.

Made by `python -m tools.shapes`; no outside data or weights. The sampler is DDIM."""


@dataclass(frozen=True)
class BuildConfig:
    """Train the embedded `Shapes` model from scratch."""

    out: Path = WEIGHTS
    """Where the pipeline directory is written."""
    work: Path = Path("runs/shapes-build")
    """Where the state of the training is kept, to go on from."""
    seed: int = 0
    """Seed of the pictures and of the training."""
    device: str = "cpu"
    """Device to train on."""
    threads: int = 1
    """OpenMP threads; on a shared machine one is often faster than two."""
    pictures: int = 60_000
    """Pictures drawn to train on."""
    autoencoder_steps: int = 7_000
    """Steps of the autoencoder, 16 pictures each."""
    denoiser_steps: int = 11_000
    """Steps of the UNet and the text encoder, 32 latents each: the checkpoint is chosen for headroom."""
    denoiser_schedule: int = 15_000
    """Length of the learning-rate schedule of the denoiser."""
    measure_every: int = 1_000
    """Steps of the denoiser between two quick looks at the success rates."""
    samples: int = 256
    """Samples a family behind each number of the model card."""


def export(
    folder: Path,
    vae: AutoencoderKL,
    networks: nn.ModuleDict,
    weights: dict[str, torch.Tensor],
    tokenizer: CLIPTokenizer,
) -> None:
    """Write a `StableDiffusionPipeline` directory in float16, the UNet and text encoder taken from `weights`.

    The text encoder is rounded to float16 too, and stored as `store_text_encoder` says.
    """
    now = {key: value.clone() for key, value in networks.state_dict().items()}
    networks.load_state_dict(weights)
    half = nn.ModuleDict({"vae": vae, **networks}).to(torch.float16)
    pipeline = StableDiffusionPipeline(
        vae=half["vae"],
        text_encoder=half["text"],
        tokenizer=tokenizer,
        unet=half["unet"],
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    export_pipeline(folder, pipeline)
    write_tokenizer(folder / "tokenizer")
    store_text_encoder(folder)
    half.to(torch.float32)
    networks.load_state_dict(now)


def store_text_encoder(folder: Path) -> None:
    """Rewrite the text encoder of a pipeline as float32, under the names that all versions of transformers read.

    Diffusers loads its own networks as float32 whatever their files hold; transformers keeps the files' type, and a
    text encoder in float16 would then not fit the UNet in a plain `from_pretrained`.
    """
    part = folder / "text_encoder"
    path, config = part / "model.safetensors", part / "config.json"
    tensors = {name: tensor.float() for name, tensor in load_tensors(path).items()}
    save_tensors(path, tensors, tensors_metadata(path))
    write_json(config, {**read_json(config), "dtype": "float32"})
    rename_weights(part)


def load(folder: Path, device: torch.device) -> LatentModel:
    """The exported model, for measuring."""
    return LatentModel(folder, device=device, dtype=torch.float32, name="Shapes")


def main(config: BuildConfig) -> None:
    """Run all stages."""
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    captions, pictures = make_pictures(config.pictures, config.seed)
    vae = train_autoencoder(
        pictures, config.work, steps=config.autoencoder_steps, batch=16, seed=config.seed, device=device
    )
    quality = _autoencoder_quality(vae, config, device)
    print("autoencoder:", quality, flush=True)
    tokenizer = write_tokenizer(config.work / "tokenizer")
    stage = make_stage(tokenizer, config.work, seed=config.seed, device=device)

    def look(step: int) -> None:
        if step % config.measure_every == 0:
            export(config.work / "pipeline", vae, stage.modules, stage.average, tokenizer)
            rates = success_rates(load(config.work / "pipeline", device), SamplerConfig(**SAMPLER_DEFAULTS), 64)
            print(f"\nstep {step}: " + ", ".join(f"{k} {v[0]:.2f}" for k, v in rates.items()), flush=True)

    train_denoiser(
        stage,
        encode(vae, pictures, device),
        tokenize(tokenizer, [str(caption) for caption in captions]),
        tokenize(tokenizer, [""]),
        [kind(caption) for caption in captions],
        stop=config.denoiser_steps,
        steps=config.denoiser_schedule,
        batch=32,
        after=look,
    )
    export(config.out, vae, stage.modules, stage.average, tokenizer)
    _write_card(config, device, quality)


def _autoencoder_quality(vae: AutoencoderKL, config: BuildConfig, device: torch.device) -> str:
    captions, fresh = make_pictures(1_024, config.seed + 1)
    decoded = reconstruct(vae, fresh, device)
    exact = torch.from_numpy(fresh).permute(0, 3, 1, 2) / 255
    psnr = float((-10 * torch.log10(((decoded - exact) ** 2).mean((1, 2, 3)))).mean())
    scores = evaluate(make_reward("Composition", strict=True), decoded, [str(c) for c in captions]).scores
    families = sorted({caption.family for caption in captions})
    shares = [float(scores[[c.family == family for c in captions]].mean()) for family in families]
    return f"{psnr:.1f} dB; detector right on " + ", ".join(
        f"{share:.3f} {family}" for family, share in zip(families, shares, strict=True)
    )


def _write_card(config: BuildConfig, device: torch.device, quality: str) -> None:
    model = load(config.out, device)
    settings = [
        SamplerConfig(guidance_scale=guidance, num_inference_steps=steps)
        for guidance, steps in [(1.0, 20), (3.0, 10), (3.0, 20), (3.0, 50), (5.0, 20)]
    ]
    facts = {
        "parameters": parameter_counts(
            {"UNet": model.unet, "text encoder": model.text_encoder, "autoencoder": model.vae}
        ),
        "size": weights_size(config.out),
        "training set": f"{config.pictures} pictures of 32x32, seed {config.seed}",
        "autoencoder": f"{config.autoencoder_steps} steps of 16; reconstructions of 1,024 fresh pictures: {quality}",
        "denoiser": f"{config.denoiser_steps} steps of 32, in the phases of `denoiser.py`; averaged weights",
    }
    write_model_card(config.out / "README.md", "Shapes", _ABOUT, facts, rate_table(model, settings, config.samples))


if __name__ == "__main__":
    main(tyro.cli(BuildConfig))
