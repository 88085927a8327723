"""The commands `label` and `fit-preferences`."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import torch
import tyro

from diffusion_gym.agents.label.pictures import add_pictures
from diffusion_gym.agents.training.folders import holding
from diffusion_gym.devices import device_called
from diffusion_gym.rewards.preference.features import feature_source, load_features
from diffusion_gym.rewards.preference.fitting import LEAST_ANSWERS, Scaling, fit_labels, picture_features
from diffusion_gym.rewards.preference.labels import Labels
from diffusion_gym.rewards.preference.reward import save_fitted
from diffusion_gym.rewards.server.app import check_address, listen

_HOST: Final = "127.0.0.1"
_EXTRA: Final = "the page needs starlette and uvicorn; pip install 'diffusion-denoise-gym[serve]'"


@dataclass(frozen=True)
class LabelOptions:
    """Choose between two pictures of a prompt on a page of this machine: keys 1, 2, 0 (equal) and u (undo)."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Run folder; its newest checkpoint makes the pictures."""
    model: str | None = None
    """In place of a run: a pretrained model, by name, diffusers directory or hub id."""
    prompts: tuple[str, ...] | None = None
    """A prompt set by name, a file (.txt, .jsonl), or prompts; by default the run's or the model's."""
    out: Path | None = None
    """Folder of the labels, new or begun; by default `labels` in the run's. Alone it means no new pictures."""
    pictures: int = 128
    """Pictures to make; a run or model that has made some for the folder, with the same seed, makes no more."""
    group: int = 16
    """Pictures of one prompt; `pictures` is a multiple of it."""
    num_inference_steps: int | None = None
    """Denoising steps T of the pictures; by default the run's or the model's. The training's are best."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the pictures; likewise."""
    eta: float | None = None
    """Noise of the pictures' sampler; likewise."""
    answers: int = 300
    """Answers that each person is asked for; one may go on."""
    seed: int = 0
    """Seed of the pictures and the questions."""
    features: str = "denoiser"
    """What decides which pictures are asked about: see `fit-preferences`."""
    device: str = "cpu"
    """Where pictures and features are made."""
    port: int = 8765
    """Port of the page on 127.0.0.1; 0 takes a free one."""
    browser: bool = True
    """Open the page in the browser."""
    trust: bool = False
    """Run, contact and read what a run folder names that was not made here; docs/trust.md."""


@dataclass(frozen=True)
class FitOptions:
    """Fit a reward to the answers of a folder of labels, for `--env.reward FILE.safetensors`."""

    labels: Annotated[Path, tyro.conf.Positional]
    """The folder of the labels."""
    out: Path | None = None
    """The reward's file; by default `labels.safetensors` in the folder."""
    features: str = "denoiser"
    """What the reward sees: by `denoiser` the pictures' own pretrained network, or a CLIPModel, directory or hub id."""
    device: str = "cpu"
    """Where the features are made."""


def run_label(options: LabelOptions, shown: Callable[[Labels, torch.Tensor], None] | None = None) -> None:
    """Make pictures, and serve the page until Ctrl-C.

    Args:
        options: the options.
        shown: stands in for the page; gets the labels and the features of their pictures.

    Raises:
        ValueError: an option is wrong, or the labels are damaged or of another model.
        FileNotFoundError: there is no such run, or no labels to go on with.
        FileExistsError: the folder holds other files, or another process labels in it.
    """
    _check(options)
    if shown is None:
        _require_extra()
    folder = options.out or Path(str(options.run), "labels")
    if options.run is None and options.model is None:
        Labels(folder)  # before the folder is made for its lock
    with holding(folder):
        made = options.run is not None or options.model is not None
        labels = add_pictures(options, folder) if made else Labels(folder)
        source = feature_source(options.features, labels.source)
        device = device_called(options.device)
        found = picture_features(labels, list(labels.pictures), load_features(source, device), device)
        (shown or partial(_serve, options))(labels, Scaling.of(found)(found))
        print(summary(labels))


def run_fit(options: FitOptions) -> None:
    """Fit, write the file and say how good it is.

    Raises:
        ValueError: too few answers, or damaged labels.
        FileNotFoundError: no labels, or a picture of theirs is missing.
    """
    labels, device = Labels(options.labels), device_called(options.device)
    source, out = feature_source(options.features, labels.source), options.out or options.labels / "labels.safetensors"
    if out.suffix != ".safetensors":
        raise ValueError(f"out={str(out)!r} must end in .safetensors, by which a reward is known to be such a file")
    fitted = fit_labels(labels, load_features(source, device), device)
    size = labels.images(list(labels.pictures)[:1]).shape[2:]
    save_fitted(out, fitted, source, list(size))
    low, high = fitted.interval
    print(summary(labels))
    print(f"held-out accuracy {fitted.accuracy:.3f} [{low:.3f}, {high:.3f}] on {fitted.choices} choices")
    if low <= 0.5:
        print("That is no better than guessing, as far as these answers tell: a policy would learn noise. Label more.")
    model, preset = labels.source.model, " --preset shapes-labels" if labels.source.model == "Shapes" else ""
    print(
        f"Next: diffusion-gym train --env DiffusionDenoise-v0 --env.model {model} --env.reward {out} --env.prompts "
        f"PROMPTS --agent rwr_sparse{preset}; PROMPTS are those that were asked about, and docs/people.md says why "
        "sparse RWR"
    )


def summary(labels: Labels) -> str:
    """Who answered how often, and how far they agree with themselves."""
    lines = []
    for person, answers in sorted(labels.answers.items()):
        again, equal = labels.agreement([person]), sum(answer.answer == "equal" for answer in answers)
        repeated = f"; asked again, the same answer {again.same} of {again.repeated} times" if again.repeated else ""
        lines.append(f"{person}: {len(answers)} answers, {equal} of them equal{repeated}")
    return "\n".join(lines) or "no answers"


def _check(options: LabelOptions) -> None:
    if options.run is not None and options.model is not None:
        raise ValueError(
            f"run={str(options.run)!r} and model={options.model!r} both name what makes the pictures; give one"
        )
    if options.out is None and options.run is None:
        raise ValueError("out is missing; give --out DIR, a new folder or one of labels")
    for name, least in (("answers", 1), ("group", 2), ("pictures", 2)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}={getattr(options, name)!r} must be at least {least}")
    if options.pictures % options.group:
        raise ValueError(f"pictures={options.pictures!r} must be a multiple of group={options.group!r}")
    check_address(_HOST, options.port, None)


def _require_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{_EXTRA} ({error})") from error


def _serve(options: LabelOptions, labels: Labels, features: torch.Tensor) -> None:
    from diffusion_gym.agents.label.app import make_app
    from diffusion_gym.agents.label.questions import Questions
    from diffusion_gym.rewards.server.connections import run

    app = make_app(Questions(labels, features, options.seed), options.answers)
    listening = listen(_HOST, options.port)
    address = f"http://{_HOST}:{listening.getsockname()[1]}"
    print(f"Labels in {labels.folder}, page at {address}; Ctrl-C ends it, every answer is stored", flush=True)
    if options.browser:
        webbrowser.open(address)
    run(app, listening, 64, 60.0, lifespan="off")
    print(f"Next: diffusion-gym fit-preferences {labels.folder}, from {LEAST_ANSWERS} choices on")
