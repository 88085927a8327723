"""Presets of the algorithms that compare within groups, each with its source: their authors' configurations."""

from __future__ import annotations

from typing import Final

from diffusion_gym.agents.training.preset import OPTIMIZER, Preset, Values

# Stable Diffusion 3.5 Medium with groups, as Flow-GRPO set it up and the others took it over.
_GROUPS: Final[Values] = {
    "num_inference_steps": 10,
    "samples_per_iteration": 1_152,  # 48 groups of 24
    "rollout_batch": 24,
    "trainable": "lora",
    "lora_rank": 32,
    "learning_rate": 3e-4,
    **OPTIMIZER,
    "normalization": "group",
    "group_size": 24,
    "reward_deviation": "batch",
    "advantage_clip": 5.0,
    "mixed_precision": "fp16",
    "checkpoint_every": 30,
    "pictures_every": 30,
}
_FLOW_SDE: Final[Values] = {**_GROUPS, "guidance_scale": 4.5, "eta": 0.7, "trained_steps": (0.0, 0.9)}
_TWO_UPDATES: Final[Values] = {"batch_size": 576, "inner_epochs": 1}
_ALPHA: Final = "Their adapters have alpha = 2 r, ours alpha = r."

_FLOW_GRPO: Final = Preset(
    "arXiv:2505.05470 and yifan123/flow_grpo, config/grpo.py, geneval_sd3",
    _FLOW_SDE,
    {"ddpo_iskl": {**_TWO_UPDATES, "clip_range": 1e-4, "kl_form": "closed_form", "kl_weight": 0.004}},
    choices=f"{_ALPHA} Their KL leaves out the length of a step, a tenth on average, so that their beta of 0.04 is "
    "0.004 a nat here. The moving average for evaluation is left out.",
)
_FLOW_GRPO_FAST: Final = Preset(
    "yifan123/flow_grpo, config/grpo.py, geneval_sd3_fast_nocfg",
    {
        **_FLOW_SDE,
        "guidance_scale": 1.0,
        "sampler": "cps",
        "eta": 0.8,
        "noisy_steps": (0, 3),
        "trained_steps": (0.0, 0.5),
    },
    {"ddpo_is": {**_TWO_UPDATES, "clip_range": 1e-5, "noise_window": "random"}},
    choices=_ALPHA,
)
_MIX_GRPO: Final = Preset(
    "arXiv:2507.21802 and Tencent-Hunyuan/MixGRPO, scripts/finetune/finetune_flux_grpo_MixGRPO.sh",
    {
        "num_inference_steps": 25,
        "sampler": "flow_sde",
        "eta": 0.7,
        "noisy_steps": (0, 4),
        "samples_per_iteration": 384,  # 12 on each of 32 GPUs
        "rollout_batch": 12,
        "trainable": "full",
        "learning_rate": 1e-5,
        **OPTIMIZER,
        "normalization": "group",
        "group_size": 12,
        "advantage_clip": 5.0,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
    },
    {
        "ddpo_is": {
            "batch_size": 96,  # 3 accumulated on each GPU
            "inner_epochs": 1,
            "clip_range": 1e-4,
            "noise_window": "sliding",
            "window_every": 25,
            "window_stride": 1,
            "shared_noise": True,
        }
    },
    choices="The script normalises each of its rewards on its own: name them with --agent.component-weights.",
)
_GRPO_GUARD: Final = Preset(
    "arXiv:2510.22319 and yifan123/flow_grpo, config/grpo_guard.py, geneval_sd3_rationorm",
    {**_FLOW_SDE, "learning_rate": 1e-4, "reward_deviation": "own"},
    {"ddpo_is": {**_TWO_UPDATES, "clip_range": 2e-6, "trust_region": "normalized_ratio"}},
    choices=_ALPHA,
)
_FLOW_DPPO: Final = Preset(
    "arXiv:2606.11025 and Tencent-Hunyuan/UniRL, examples/diffusion/sd3_flowdppo.yaml",
    {
        **_FLOW_SDE,
        "guidance_scale": 1.0,
        "noisy_steps": (0, 3),
        "trained_steps": (0.0, 0.5),
        "samples_per_iteration": 768,  # 48 groups of 16
        "rollout_batch": 16,
        "group_size": 16,
        "weight_decay": 0.0,
        "mixed_precision": "bf16",
    },
    {
        "ddpo_is": {
            "batch_size": 384,
            "inner_epochs": 1,
            "trust_region": "divergence",
            "divergence_bound": 1e-5,
            "noise_window": "random",
        }
    },
    choices=f"{_ALPHA} They draw three noisy steps among the first five, here a window of three moves there.",
)
_NFT: Final = Preset(
    "arXiv:2509.16117 and NVlabs/DiffusionNFT, config/nft.py, sd3_geneval",
    {**_GROUPS, "guidance_scale": 1.0, "trained_steps": (0.0, 0.9)},
    {
        "nft": {
            "eta": 0.0,
            "rollout_scheduler": "dpm++",
            "batch_size": 1_152,
            "inner_epochs": 1,
            "mixture": 1.0,
            "kl_weight": 1e-4,
            "behaviour_decay": 0.5,
            "behaviour_growth": 1e-3,
            "ema_decay": 0.9,
        }
    },
    choices=f"{_ALPHA} Their solver dpm2 is DPM-Solver++ of second order.",
)
_AWM: Final = Preset(
    "arXiv:2509.25050 and scxue/advantage_weighted_matching, config/dgx_awm.py, geneval_sd3_no_cfg_1node",
    {
        **_GROUPS,
        "num_inference_steps": 14,
        "guidance_scale": 1.0,
        "samples_per_iteration": 1_728,  # 72 groups of 24
        "trained_steps": (0.07, 0.857),  # the second to the twelfth step
    },
    {
        "awm": {
            "eta": 0.0,
            "rollout_scheduler": "dpm++",
            "timestep_fraction": 0.545,  # 6 of those 11
            "batch_size": 1_728,
            "inner_epochs": 1,
            "clip_range": 1.0,
            "error_power": 0.25,
            "advantage_weight": 0.2,
            "kl_weight": 1e-3,
            "behaviour_weight": 1.0,
            "behaviour_decay": 0.3,
            "behaviour_growth": 1e-3,
            "ema_decay": 0.99,
        }
    },
    choices=f"{_ALPHA} They sample with SA-Solver, and draw the six steps from six equal parts of the trajectory.",
)
_DGPO: Final = Preset(
    "arXiv:2510.08425 and Luo-Yihong/DGPO, config/dgpo.py, geneval_sd3_4gpu",
    {
        **_GROUPS,
        "guidance_scale": 4.5,
        "samples_per_iteration": 128,  # 8 groups of 16; 24 of 24 do better, says the file
        "rollout_batch": 16,
        "lora_rank": 64,
        "group_size": 16,
        "reward_deviation": "own",
        "trained_steps": (0.0, 0.5),
    },
    {
        "dgpo": {
            "eta": 0.0,
            "rollout_scheduler": "dpm++",
            "cfg_training": False,
            "timestep_fraction": 0.8,  # 4 of the 5
            "batch_size": 32,
            "inner_epochs": 1,
            "clip_range": 1e-2,
            "preference_scale": 100.0,
            "kl_weight": 0.02,
            "behaviour_decay": 0.3,
            "behaviour_growth": 1e-3,
        }
    },
    choices=f"{_ALPHA} An update of theirs has four groups at two steps each, here two groups at four. They sample "
    "with the moving average from update 500 on, here from the begin, where the two hardly differ.",
)
_ONLINE_DPO: Final = Preset(
    "arXiv:2505.05470 and yifan123/flow_grpo, config/dpo.py, geneval_sd3",
    {
        **_GROUPS,
        "num_inference_steps": 40,
        "guidance_scale": 4.5,
        "samples_per_iteration": 192,
        "trained_steps": (0.0, 0.975),
    },
    {
        "online_dpo": {
            "eta": 0.0,
            "batch_size": 192,
            "inner_epochs": 1,
            "form": "denoising_error",
            "preference_scale": 100.0,
            "reference": "pretrained",
        }
    },
    choices=f"{_ALPHA} The number of groups an iteration, one a GPU, is not given: 8. For their online variant, whose "
    "reference follows the policy every 40 updates, give --agent.reference behaviour and a --agent.behaviour-decay.",
)

GROUP_PRESETS: Final[dict[str, Preset]] = {
    "flow_grpo": _FLOW_GRPO,
    "flow_grpo_fast": _FLOW_GRPO_FAST,
    "mix_grpo": _MIX_GRPO,
    "grpo_guard": _GRPO_GUARD,
    "flow_dppo": _FLOW_DPPO,
    "nft": _NFT,
    "awm": _AWM,
    "dgpo": _DGPO,
    "online_dpo": _ONLINE_DPO,
}
