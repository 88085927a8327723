"""Any scheduler of diffusers in the place of the sampler, for those who need x_0 and no Markov chain."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from diffusers import DDIMScheduler

from diffusion_gym.models.base import DenoisingModel
from diffusion_gym.models.fields import read_config
from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.schedulers import FLOW, FLOW_SOLVERS, PRESERVING, read_scheduler
from diffusion_gym.registry import unknown_name
from diffusion_gym.storage import read_json

# Short names, each for a variance-preserving model and for a flow.
_ALIASES: Final[Mapping[str, tuple[str, str]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "unipc": ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "euler": ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "heun": ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
}
_UNSEEDED: Final = frozenset({"DPMSolverSDEScheduler"})  # its noise comes from no generator
# What moves the times of a flow, where it is set.
_TIMES: Final = (
    *("use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)


class Solver:
    """Samples x_0 by a scheduler class of diffusers, as the model's pipeline does with `Class.from_config(its config)`.

    A flow's solvers get its shift, which `from_config` alone would lose.

    Args:
        model: a model of a diffusers pipeline.
        name: `dpm++`, `unipc`, `euler`, `heun`, or a class of diffusers.
        steps: what its `set_timesteps` is given; T steps of Heun's method take 2 T - 1 predictions.

    Attributes:
        scheduler: of diffusers.

    Raises:
        ValueError: an unknown scheduler, or one that cannot sample from the model; too many steps.
    """

    def __init__(self, model: DenoisingModel, name: str, steps: int) -> None:
        stated: Any = getattr(model, "scheduler_config", None)
        if stated is None:
            raise ValueError(
                f"rollout_scheduler={name!r} needs a model of a diffusers pipeline, and model={model.name!r} has no "
                "scheduler_config; leave it out"
            )
        self._refused = f"rollout_scheduler={name!r} cannot sample from model={model.name!r}"
        self.steps, flow = steps, "beta_schedule" not in stated
        classes = [*FLOW, *FLOW_SOLVERS] if flow else [kind for kind in PRESERVING if kind not in _UNSEEDED]
        if name not in (known := [*_ALIASES, *classes]):
            raise ValueError(unknown_name("rollout_scheduler", name, known))
        if not 1 <= steps <= stated["num_train_timesteps"]:
            raise ValueError(f"rollout_steps={steps!r} must be 1 to {stated['num_train_timesteps']}")
        kind = getattr(diffusers, _ALIASES[name][flow] if name in _ALIASES else name)
        config = {**_given(model), **(_flow_fields(stated) if flow else {"clip_sample": stated["clip_sample"]})}
        parameters = inspect.signature(kind.__init__).parameters
        if flow and (lost := [field for field in _TIMES if stated.get(field) and field not in parameters]):
            raise ValueError(f"{self._refused}: it has no {lost[0]}, which the model's own has; take another")
        with quiet():
            self.scheduler = kind.from_config({field: value for field, value in config.items() if field in parameters})
        told: Any = getattr(model, "timestep_arguments", lambda steps: {})
        accepted = inspect.signature(kind.set_timesteps).parameters
        own = {"sigmas"} if kind.__name__ in FLOW_SOLVERS else set[str]()  # these have flow times of their own
        self._arguments = {field: value for field, value in told(steps).items() if field in accepted.keys() - own}
        self._check(stated, flow)

    def _check(self, stated: Any, flow: bool) -> None:
        """Refuse a scheduler of other noise, or with a prediction that it cannot read, before anything is sampled."""
        if not flow:
            expected = DDIMScheduler.from_config(stated).alphas_cumprod
            if not torch.allclose(self.scheduler.alphas_cumprod, expected, atol=1e-6):
                raise ValueError(f"{self._refused}: it would have other noise levels; take another")
            if self.scheduler.config.get("prediction_type", "epsilon") != stated["prediction_type"]:
                raise ValueError(
                    f"{self._refused}, whose prediction_type is {stated['prediction_type']!r}; take another"
                )
        try:
            self.solve(lambda x, t: torch.zeros_like(x), torch.zeros(1, 1, 1, 1), torch.Generator())
        except Exception as error:  # whatever diffusers raises
            raise ValueError(f"{self._refused} in {self.steps} steps ({error or type(error).__name__})") from error

    def solve(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        noise: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """x_0 `(N, C, H, W)`.

        Args:
            predict: the (guided) output of the network for its input `(N, C, H, W)` at a timestep, which is a scalar.
            noise: drawn from N(0, I), float32 `(N, C, H, W)`.
            generator: of the noise that some schedulers add.
        """
        scheduler = self.scheduler
        scheduler.set_timesteps(self.steps, device=noise.device, **self._arguments)
        seeded = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)  # which schedulers of a flow lack
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            x = scheduler.step(predict(scale(x, t), t), t, x, **seeded, return_dict=False)[0]
        return x


def _given(model: Any) -> dict[str, Any]:
    """The fields of the folder's own scheduler config, with what the pipeline corrects when it loads it.

    As in diffusers, where another class is made from a config, a field that the file does not give has the default of
    that class, not of the file's.
    """
    folder = Path(model.files[0])
    part = "scheduler" if (folder / "scheduler").is_dir() else ""
    complete = read_scheduler(model.name, str(folder), part, read_json(folder / "model_index.json"))
    corrected = {name: value for name, value in model.scheduler_config.items() if complete.get(name, value) != value}
    return {**read_config(model.name, folder / part / "scheduler_config.json"), **corrected}


def _flow_fields(stated: Any) -> dict[str, Any]:
    """What solvers of several kinds of noise are told of a flow; `shift` has two names."""
    fields = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {**fields, "shift": stated["shift"], "flow_shift": stated["shift"]}
