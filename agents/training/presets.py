"""Named sets of hyperparameters, each with its source; docs/presets.md says more about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from diffusion_gym.agents.training.group_presets import GROUP_PRESETS
from diffusion_gym.agents.training.preset import OPTIMIZER, Preset, Values

__all__ = ["PRESETS", "Preset", "default_preset"]

_ANCESTRAL: Final[Values] = {"sampler": "ddim", "eta": 1.0}

_RWR_PAPER: Final[Values] = {
    "samples_per_iteration": 10_000,
    "batch_size": 128,
    "updates": 400,
    "checkpoint_every": 1,
    "pictures_every": 1,
}

_DDPO_PAPER: Final = Preset(
    "arXiv:2305.13301, appendices F.1 to F.3, F.5 and the table of F.6",
    {
        **_ANCESTRAL,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "total_reward_queries": 50_000,
        "samples_per_iteration": 256,
        "rollout_batch": 8,
        "trainable": "full",
        "learning_rate": 1e-5,
        **OPTIMIZER,
    },
    {
        "ddpo_is": {"batch_size": 64, "inner_epochs": 1, "clip_range": 1e-4, "normalization": "prompt"},
        "ddpo_sf": {"batch_size": 256, "inner_epochs": 1, "normalization": "prompt"},
        "rwr": {**_RWR_PAPER, "inverse_temperature": 0.2},
        "rwr_sparse": {**_RWR_PAPER, "percentile": 0.9},
    },
    choices="The paper does not say how many rewards a prompt's statistics need, nor that advantages are clipped: our "
    "defaults stand. RWR's few, long iterations are checkpointed each.",
)

_REPLICATION: Final = Preset(
    "Guiding the Training of Diffusion Models: A Replication of DDPO, table 1",
    {
        **_ANCESTRAL,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "rollout_batch": 8,
        "pictures_every": 100,
        "trainable": "lora",
        "lora_rank": 4,
        "learning_rate": 3e-4,
        **OPTIMIZER,
        "batch_size": 16,
        "normalization": "batch",
    },
    {
        "ddpo_is": {"samples_per_iteration": 8, "inner_epochs": 2, "clip_range": 1e-4},
        "ddpo_sf": {"samples_per_iteration": 16, "inner_epochs": 4},
        "ddpo_iskl": {
            "samples_per_iteration": 8,
            "inner_epochs": 2,
            "clip_range": 1e-4,
            "kl_weight": 0.1,
            "kl_form": "squared_log_ratio",
        },
    },
    choices="The replication gives neither lambda (kl_weight) nor the length of a run, nor says what trains. Its "
    "KL term is of a trajectory's log-probability, here of each step's, both in nats. LoRA is chosen because 3e-4 is "
    "ddpo-pytorch's learning rate for it. Rewards are normalised within the minibatch (algorithms 4 and 5), "
    "which holds all samples of an iteration.",
)


def _thesis(column: str, epochs: int, advantage_clip: float, values: Values, choices: str = "") -> Preset:
    """A column of table A.2; an epoch samples 100 pictures."""
    return Preset(
        f"the thesis Extending Reinforcement Learning Techniques for Diffusion Models, table A.2, column {column}",
        {
            **_ANCESTRAL,
            "num_inference_steps": 40,
            "guidance_scale": 1.0,
            "total_reward_queries": 100 * epochs,
            "samples_per_iteration": 100,
            "rollout_batch": 10,
            "trainable": "full",
            **values,
            **OPTIMIZER,
            "batch_size": 10,
            "normalization": "batch",
            "advantage_clip": advantage_clip,
        },
        {"ddpo_is": {"inner_epochs": 1, "clip_range": 1e-4}},
        choices=f"{choices}eta is not given; a policy gradient needs noise. The models have no prompt, so no guidance.",
    )


_CONSTANT: Final[Values] = {"learning_rate": 9e-8, "learning_rate_schedule": "constant"}
_WARMUP: Final[Values] = {
    "learning_rate": 3.75e-6,
    "learning_rate_schedule": "warmup_cosine",
    "warmup_fraction": 0.25,
    "first_learning_rate": 9e-8,
    "last_learning_rate": 9e-9,
}

_DPOK: Final = Preset(
    "google-research/dpok, the authors' code of arXiv:2305.16381: defaults of train_online_pg.py; T, guidance and eta "
    "of pipeline_stable_diffusion_extended.py",
    {
        **_ANCESTRAL,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "trainable": "lora",
        "lora_rank": 4,
        "learning_rate": 1e-5,
        **OPTIMIZER,
        "weight_decay": 0.0,
        "max_grad_norm": 0.1,
        "mixed_precision": "fp16",
        "gradient_checkpointing": True,
    },
    {
        "dpok": {
            "total_reward_queries": 12_000,  # max_train_steps / p_step = 2,000 iterations of 6 pictures
            "samples_per_iteration": 6,
            "rollout_batch": 6,
            "checkpoint_every": 100,
            "pictures_every": 100,
            "batch_size": 24,  # p_batch_size 2 times 12 accumulation steps
            "updates": 5,
            "clip_range": 1e-4,
            "reward_weight": 100.0,
            "kl_weight": 0.01,
            "kl_form": "closed_form",
            "normalization": "none",
            "advantage_clip": 1e6,  # none
            "value_function": True,
            "value_learning_rate": 1e-4,
            "value_batch_size": 256,
            "value_updates": 5,
            "replay_iterations": 3,  # buffer_size 1,000 holds three times 6 x 50 transitions
        },
    },
    choices="The code penalises the distance of the noise predictions; here it is the divergence of the paper's lemma. "
    "It averages both log-probabilities and distances over the dimensions, so that its weight is per nat too. "
    "It averages the gradients of its 5 value batches into one step, here they are 5 steps.",
)

_SHAPES: Final[Values] = {
    "guidance_scale": 1.0,
    "total_reward_queries": 6_400,
    "samples_per_iteration": 128,
    "rollout_batch": 128,
    "trainable": "full",
    "learning_rate": 1e-4,
    "batch_size": 32,
    "clip_range": 1e-2,
    "trained_steps": (0.0, 0.5),
    "micro_batch_size": 128,
}
_SHAPES_REGRESSION: Final[Values] = {"samples_per_iteration": 640, "batch_size": 64}
_SHAPES_GROUPS: Final[Values] = {"normalization": "group", "group_size": 16, "batch_size": 64}
_SHAPES_AGENTS: Final[Mapping[str, Values]] = {
    "ddpo_sf": {"learning_rate": 3e-4, "samples_per_iteration": 64, "rollout_batch": 64},
    "ddpo_iskl": {"kl_form": "closed_form", "kl_weight": 0.01},
    "dpok": {
        "learning_rate": 2e-4,
        "batch_size": 160,
        "updates": 4,
        "max_grad_norm": 1.0,
        "reward_weight": 1.0,
        "kl_weight": 0.01,
        "value_learning_rate": 1e-3,
        "replay_iterations": 1,
        "advantage_clip": 5.0,
    },
    "rwr": {**_SHAPES_REGRESSION, "updates": 60, "inverse_temperature": 5.0},
    "rwr_sparse": {**_SHAPES_REGRESSION, "updates": 40, "learning_rate": 7e-5},
    "nft": {**_SHAPES_GROUPS, "behaviour_growth": 0.02},
    "awm": {**_SHAPES_GROUPS, "behaviour_growth": 0.02, "clip_range": 1.0},
    "dgpo": {**_SHAPES_GROUPS, "behaviour_growth": 0.02},
    "online_dpo": {**_SHAPES_GROUPS},
}
_FAST: Final[Values] = {"samples_per_iteration": 64, "rollout_batch": 64, "renoise": True}
_FALLING: Final[Values] = {
    "learning_rate_schedule": "warmup_cosine",
    "warmup_fraction": 0.02,
    "first_learning_rate": 1e-5,
    "last_learning_rate": 1e-5,
}
# Where a group has one reward there is no advantage: what is learned stays. The falling learning rate and the bounds on
# advantages and gradients keep failures, rare in the end, from tearing down the rest.
_FAST_DEMO: Final[Values] = {
    **_FAST,
    "timestep_fraction": 0.6,
    **_FALLING,
    "learning_rate": 2e-4,
    "normalization": "group",
    "group_size": 16,
    "advantage_clip": 2.0,
    "max_grad_norm": 0.1,
}
_AWM_DEMO: Final[Values] = {
    **_SHAPES_AGENTS["awm"],
    **_FALLING,
    "batch_size": 32,
    "timestep_fraction": 0.4,
    "learning_rate": 4e-4,
    "ema_decay": 0.9,
    "off_policy": True,
    "rollout_scheduler": "dpm++",
    "rollout_steps": 5,
}
_FLOW: Final[Values] = {"num_inference_steps": 10, "sampler": "flow_sde", "eta": 0.7}
_SHAPES_DEMO: Final[Values] = {"num_inference_steps": 10, "strict": True, "prompts": ("shapes-demo",)}

PRESETS: Final[dict[str, Preset]] = {
    "ddpo-paper": _DDPO_PAPER,
    "replication": _REPLICATION,
    "thesis-compressibility": _thesis("Compressibility", 72, 4.5, _CONSTANT),
    "thesis-incompressibility": _thesis("Incompressibility", 72, 4.5, _CONSTANT),
    "thesis-aesthetic": _thesis(
        "Aesthetic", 35, 10.0, _WARMUP, "The last learning rate is in the text of section 5.1.3. "
    ),
    "dpok": _DPOK,
    **GROUP_PRESETS,
    "shapes": Preset("tuned on the embedded model, docs/shapes-preset.md", _SHAPES, _SHAPES_AGENTS),
    "shapes-demo": Preset(
        "`shapes` at T = 10 on four location prompts, docs/shapes-preset.md",
        {**_SHAPES, **_SHAPES_DEMO},
        _SHAPES_AGENTS,
    ),
    "fast-demo": Preset(
        "four location prompts in the fewest CPU seconds, docs/shapes-preset.md",
        {**_SHAPES, **_SHAPES_DEMO, "total_reward_queries": 3_200},
        {
            **_SHAPES_AGENTS,
            "ddpo_is": _FAST_DEMO,
            "ddpo_iskl": {**_SHAPES_AGENTS["ddpo_iskl"], **_FAST_DEMO},
            "awm": _AWM_DEMO,
        },
        choices="Tuned with DDPO_IS and AWM alone.",
    ),
    "shapes-short": Preset(
        "`shapes-demo` in half the reward queries, docs/shapes-preset.md",
        {**_SHAPES, **_SHAPES_DEMO, "total_reward_queries": 3_200},
        {
            **_SHAPES_AGENTS,
            "ddpo_is": {"learning_rate": 2e-4},
            "ddpo_iskl": {**_SHAPES_AGENTS["ddpo_iskl"], "learning_rate": 2e-4},
        },
    ),
    "shapes-labels": Preset(
        "a reward fitted to people's choices on the embedded model, docs/people.md",
        {**_SHAPES, "num_inference_steps": 10, "total_reward_queries": 2_560},
        {"rwr_sparse": {**_SHAPES_REGRESSION, "samples_per_iteration": 1_280, "updates": 150}},
        choices="Tuned with sparse RWR alone.",
    ),
    "shapes-flow": Preset(
        "`shapes` with Flow-GRPO's noise, docs/shapes-preset.md",
        {**_SHAPES, **_FLOW},
        _SHAPES_AGENTS,
        choices="Tuned with DDPO_IS alone.",
    ),
    "shapes-flow-demo": Preset(
        "`shapes-flow` on four location prompts, docs/shapes-preset.md",
        {**_SHAPES, **_SHAPES_DEMO, **_FLOW, "total_reward_queries": 3_840},
        {**_SHAPES_AGENTS, "ddpo_is": _FALLING},
        choices="Tuned with DDPO_IS alone.",
    ),
    "shapes-flow-general": Preset(
        "all prompts of a task on the flow-matching model, docs/newest-algorithms.md",
        {
            **_SHAPES,
            **_FLOW,
            "strict": True,
            "total_reward_queries": 15_360,
            "samples_per_iteration": 256,
        },
        {**_SHAPES_AGENTS, "awm": {**_AWM_DEMO, "batch_size": 64, "learning_rate": 2e-4}},
        choices="Tuned with AWM alone, on location.",
    ),
    "fast": Preset(
        "the fewest reward queries on the embedded model, docs/sample-efficiency.md",
        {**_SHAPES, "num_inference_steps": 10, "total_reward_queries": 1_344},
        {
            **_SHAPES_AGENTS,
            "ddpo_is": {**_FAST, "batch_size": 16},
            "ddpo_iskl": {**_SHAPES_AGENTS["ddpo_iskl"], **_FAST, "batch_size": 16},
            "ddpo_sf": {**_FAST, "learning_rate": 1e-4},
        },
        choices="Tuned and measured with DDPO_IS alone.",
    ),
}


def model_of(env_id: str) -> str:
    """The model that an environment id names; empty for the generic id."""
    parts = env_id.split("-")
    return parts[1] if len(parts) > 2 else ""


FALLBACK: Final = "ddpo-paper"  # of a model and an agent that have no preset


def default_preset(env_id: str, model: str | None, agent: str) -> str:
    """The preset to begin with: that of the model's paper where it is the thesis or our own, else of the agent's."""
    parts = env_id.split("-")
    name = model or model_of(env_id)
    if name == "Shapes":
        return "shapes"
    if name == "ShapesFlow":
        return "shapes-flow"
    if name in ("CelebaHQ", "Church", "Bedroom"):
        named = f"thesis-{parts[2].lower()}" if len(parts) > 2 else ""
        return named if named in PRESETS else "thesis-aesthetic"
    return agent if agent in PRESETS else FALLBACK
