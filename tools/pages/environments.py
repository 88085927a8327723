"""The cards of docs/environments.md, from the registries of models, rewards and prompts.

python -m tools.pages.environments    # sample the pictures of the embedded models' environments anew
python -m tools.pages                 # write the cards
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

from PIL import Image

from diffusion_gym.config import SamplerConfig
from diffusion_gym.envs.registration import environment_ids
from diffusion_gym.models import MODELS, load_model
from diffusion_gym.prompts import make_prompts
from diffusion_gym.rewards import REWARDS

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = {"docs/environments.md": ("environments",)}
PICTURES: Final = ROOT / "docs" / "images" / "environments"
_REWARDS: Final = ROOT / "docs" / "rewards.md"
_SHOWN: Final = 4  # pictures of a card
_SCALE: Final = 3
_TEXT: Final = "Prompts"  # what a picture's file says of it


class Facts(NamedTuple):
    """What the card of a model says: shapes, the prompts without a reward's wish, and the sampler."""

    latents: tuple[int, int, int]
    picture: int  # pixels each way
    tokens: int  # L; 0 where the model is unconditional
    prompts: str
    sampler: SamplerConfig


def _published(latents: tuple[int, int, int], picture: int, tokens: int, prompts: str) -> Facts:
    return Facts(latents, picture, tokens, prompts, SamplerConfig())


# Of the models whose weights are on the hub: what their published configs say, as nothing is downloaded here.
_STABLE_DIFFUSION: Final = _published((4, 64, 64), 512, 77, "imagenet-animals")
_DDPM: Final = _published((3, 256, 256), 256, 0, "unconditional")
PUBLISHED: Final = {
    **{"SD14": _STABLE_DIFFUSION, "SD15": _STABLE_DIFFUSION},
    **{"CelebaHQ": _DDPM, "Church": _DDPM, "Bedroom": _DDPM},
}


def parts() -> dict[str, str]:
    """The marked part of the page."""
    models: dict[str, list[tuple[str, str]]] = {}
    for id_, kwargs in environment_ids().items():
        models.setdefault(kwargs["model"], []).append((id_, kwargs["reward"]))
    embedded_first = sorted(models, key=lambda model: not is_embedded(model))
    return {"environments": "\n\n".join(_section(model, models[model]) for model in embedded_first)}


def is_embedded(model: str) -> bool:
    """Whether a model ships in the package."""
    return "shapes" in MODELS.traits(model)


def facts_of(model: str) -> Facts | None:
    """What is known of a model without a download; None for one that has no published facts here."""
    if not is_embedded(model):
        return PUBLISHED.get(model)
    loaded = load_model(model, "cpu", "float32")
    sampler = SamplerConfig.from_options({}, loaded.sampler_defaults)
    return Facts(loaded.latent_shape, loaded.image_shape[0], loaded.prompt_length, loaded.default_prompts, sampler)


def _section(model: str, ids: list[tuple[str, str]]) -> str:
    loader: Any = MODELS[model]
    facts, doc = facts_of(model), (getattr(loader, "func", loader).__doc__ or "").strip().splitlines()[0]
    lines = [f"### {model}", "", doc if not is_embedded(model) else "Ships in the package: [the embedded model]"]
    lines[-1] += "(embedded-model.md)." if is_embedded(model) else " Its weights are on the hub: no pictures here."
    if facts is not None:
        lines += ["", _table(facts)]
    return "\n".join([*lines, *(f"\n{_card(id_, model, reward, facts)}" for id_, reward in ids)])


def _table(facts: Facts) -> str:
    """The spaces of a model's environments."""
    channels, height, width = facts.latents
    prompt = f"`prompt` ({facts.tokens},), " if facts.tokens else ""
    guidance = f"{facts.sampler.guidance_scale:g}" if facts.tokens else "none"
    return "\n".join(
        [
            "| observation | action | picture | T | guidance |",
            "|---|---|---|---|---|",
            f"| {prompt}`timestep` (1,), `latents` ({channels}, {height}, {width}) | ({channels}, {height}, {width}) "
            f"| {facts.picture} x {facts.picture} | {facts.sampler.num_inference_steps} | {guidance} |",
        ]
    )


def _card(id_: str, model: str, reward: str, facts: Facts | None) -> str:
    scores, bounds = scored().get(reward, ("", ""))
    said = f"{scores}; {bounds}." if scores else "See [rewards](rewards.md)."
    card = [f"#### {id_}", "", f"- Reward: {said}", f"- Prompts: {_prompts(model, reward, facts)}"]
    picture = PICTURES / f"{model}-{reward}.png"
    if picture.is_file():
        with Image.open(picture) as opened:
            shown = ", ".join(f'"{prompt}"' for prompt in opened.info[_TEXT].splitlines())
        card += ["", f"![Four pictures of the pretrained model](images/environments/{picture.name})", "", f"*{shown}*"]
    return "\n".join(card)


def _prompts(model: str, reward: str, facts: Facts | None) -> str:
    if "prompt" not in MODELS.traits(model):
        return "none, the model is unconditional."
    name = REWARDS.default_prompts(reward) or (facts.prompts if facts else None)
    if name is None:
        return "the model's own."
    prompts = make_prompts(name).prompts
    return f'[`{name}`](prompts.md), {len(prompts):,} prompts, such as "{prompts[0]}".'


def scored() -> dict[str, tuple[str, str]]:
    """What each reward scores and its range, from the first table of docs/rewards.md."""
    found = dict[str, tuple[str, str]]()
    for line in _REWARDS.read_text(encoding="utf-8").split("## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            for name in cells[0].split(","):
                found.setdefault(name.strip(" `"), (cells[1], cells[2]))
    return found


def draw_pictures() -> None:
    """Sample the pictures of the embedded models' environments, in one row each."""
    import gymnasium as gym
    import torch
    from PIL.PngImagePlugin import PngInfo

    from diffusion_gym.agents import DenoisingPolicy

    PICTURES.mkdir(parents=True, exist_ok=True)
    for id_, kwargs in environment_ids().items():
        if not is_embedded(kwargs["model"]):
            continue
        envs = gym.make_vec(id_, num_envs=_SHOWN, autoreset_mode="Disabled")
        policy, noise = DenoisingPolicy.from_env(envs), torch.Generator().manual_seed(0)
        obs, info = envs.reset(seed=0)
        with torch.no_grad():
            for _ in range(envs.unwrapped.horizon):
                obs, *_, info = envs.step(policy.distribution(obs).sample(noise))
        picture = Image.fromarray(torch.cat(list(info["image"]), dim=1).cpu().numpy())
        said = PngInfo()
        said.add_text(_TEXT, "\n".join(info["prompt"]))
        place = PICTURES / f"{kwargs['model']}-{kwargs['reward']}.png"
        size = (picture.width * _SCALE, picture.height * _SCALE)
        picture.resize(size, Image.Resampling.NEAREST).save(place, optimize=True, pnginfo=said)


if __name__ == "__main__":
    draw_pictures()
