"""The environment's part of a run's settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from diffusion_gym.agents.training.reward_options import check_no_secrets, parse_keywords
from diffusion_gym.prompts import prompts_of_words


@dataclass(frozen=True)
class EnvOptions:
    """Keyword arguments of the environment; those left at None keep the environment's own defaults."""

    num_inference_steps: int | None = None
    """T, the number of denoising steps."""
    guidance_scale: float | None = None
    """w of classifier-free guidance; 1 switches it off."""
    eta: float | None = None
    """Noise of the sampler; 0 is deterministic, 1 ancestral sampling. Of `flow_sde` and `dance_sde` the noise level."""
    sigma_min: float | None = None
    """Floor of a step's standard deviation."""
    sampler: str | None = None
    """`ddim` or `ddpm`; of a flow-matching model `flow_sde`, `dance_sde` or `cps`."""
    noisy_steps: tuple[int, int] | None = None
    """The only noisy steps: the first (0 is the noise) and how many; others are deterministic and not trained on."""
    log_prob_reduction: str | None = None
    """`mean` or `sum` over the dimensions of a step."""
    model: str | None = None
    """Another model: a name, a diffusers directory or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Such as fp16: the weight files of the model to take where there are several."""
    height: int | None = None
    """Height of the pictures in pixels; by default the pipeline's."""
    width: int | None = None
    """Width of the pictures in pixels; by default the pipeline's."""
    negative_prompt: str | None = None
    """What guidance pushes away from; by default the empty prompt."""
    text_encoder_device: str | None = None
    """Device of the text encoders, such as cpu; by default the model's. Each prompt is encoded once."""
    embedding_cache: str | None = None
    """A folder on disk that keeps what the text encoders make of prompts, for all runs and processes. All prompts to
    train on are encoded at the start, and the text encoders leave memory."""
    reward: str | None = None
    """Another reward: a name, a reward server's http://host:port, module:attribute of your own code, or a weighted sum
    such as Aesthetic=1,Compressibility=0.1."""
    reward_kwargs: dict[str, str] | None = None
    """Keywords of the reward: names and values in turn, values as JSON where they are JSON."""
    strict: bool | None = None
    """Shapes rewards only: score success in {0, 1} in place of the share of facts."""
    reward_seconds: float | None = None
    """Seconds for one call of the reward; a longer one ends the run with its checkpoint kept. By default no limit."""
    prompts: tuple[str, ...] | None = None
    """A prompt set by name, a file (.txt, .jsonl), or the prompts themselves."""
    device: str | None = None
    """Device of the model, the latents and the rewards."""
    dtype: str | None = None
    """Type of the model's weights: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        check_no_secrets(parse_keywords(self.reward_kwargs or {}), "reward_kwargs")

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments for `gym.make` and `gym.make_vec`."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        reward_kwargs = parse_keywords(given.pop("reward_kwargs", {}))
        if reward_kwargs:
            given["reward_kwargs"] = reward_kwargs
        if prompts := given.get("prompts"):
            given["prompts"] = prompts_of_words(prompts)
        return given
