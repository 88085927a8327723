"""Named sets of hyperparameters, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True)
class Preset:
    """Values that stand in for the defaults of a training run.

    Attributes:
        source: where the values come from.
        run: fields of `RunSettings`.
        env: fields of `EnvOptions`.
        agent: fields of the agent's config; those that an agent does not have are left out.
    """

    source: str
    run: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    agent: Mapping[str, Any] = field(default_factory=dict)


_SHAPES_AGENT: Final[dict[str, Any]] = {
    "trainable": "full",
    "learning_rate": 1e-4,
    "batch_size": 32,
    "clip_range": 1e-2,
    "trained_steps": (0.0, 0.5),
    "micro_batch_size": 128,
}

PRESETS: Final[dict[str, Preset]] = {
    "ddpo-paper": Preset(
        "DDPO, arXiv:2305.13301, tables F.1 and F.6",
        run={"samples_per_iteration": 256, "total_reward_queries": 50_000, "rollout_batch": 8},
        env={"num_inference_steps": 50, "guidance_scale": 5.0, "eta": 1.0},
        agent={
            "trainable": "full",
            "learning_rate": 1e-5,
            "weight_decay": 1e-4,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "max_grad_norm": 1.0,
            "batch_size": 64,
            "clip_range": 1e-4,
        },
    ),
    "shapes": Preset(
        "tuned on the embedded model, docs/shapes-preset.md",
        run={"samples_per_iteration": 128, "total_reward_queries": 6_400, "rollout_batch": 128},
        env={"guidance_scale": 1.0},
        agent=_SHAPES_AGENT,
    ),
    "shapes-demo": Preset(
        "`shapes` at T = 10 on four location prompts, docs/shapes-preset.md",
        run={"samples_per_iteration": 128, "total_reward_queries": 6_400, "rollout_batch": 128},
        env={"guidance_scale": 1.0, "num_inference_steps": 10, "strict": True, "prompts": ("shapes-demo",)},
        agent=_SHAPES_AGENT,
    ),
}


def default_preset(env_id: str, model: str | None) -> str:
    """The preset for an environment: `shapes` for the embedded model, the paper's for any other."""
    return "shapes" if model == "Shapes" or (model is None and "-Shapes-" in env_id) else "ddpo-paper"
