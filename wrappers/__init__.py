"""Wrappers of denoising environments."""

from diffusion_gym.wrappers.kl_penalty import KLPenalty, KLPenaltyVectorEnv
from diffusion_gym.wrappers.one_step import OneStep, OneStepVectorEnv
from diffusion_gym.wrappers.preview_reward import PreviewReward, PreviewRewardVectorEnv
from diffusion_gym.wrappers.prompt_normalization import PromptNormalization, PromptNormalizationVectorEnv
from diffusion_gym.wrappers.recording import RecordPictures, RecordPicturesVectorEnv

__all__ = [
    "KLPenalty",
    "KLPenaltyVectorEnv",
    "OneStep",
    "OneStepVectorEnv",
    "PreviewReward",
    "PreviewRewardVectorEnv",
    "PromptNormalization",
    "PromptNormalizationVectorEnv",
    "RecordPictures",
    "RecordPicturesVectorEnv",
]
