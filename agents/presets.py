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
        run={"samples_per_iteration": 64, "total_reward_queries": 4_096, "rollout_batch": 64},
        env={},
        agent={
            "trainable": "full",
            "learning_rate": 5e-4,
            "batch_size": 32,
            "clip_range": 1e-2,
            "micro_batch_size": 128,
        },
    ),
}


def default_preset(env_id: str, model: str | None) -> str:
    """The preset for an environment: `shapes` for the embedded model, the paper's for any other."""
    return "shapes" if model == "Shapes" or (model is None and "-Shapes-" in env_id) else "ddpo-paper"
