"""What is measured of a policy at an evaluation point, from noise that is the same for every agent of the same seed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import torch
from gymnasium.vector import VectorEnv
from torch.nn.functional import interpolate

from diffusion_gym.agents.algorithms import NoUsableReward
from diffusion_gym.agents.diversity import Features, by_prompt, centred, has_features, model_features, vendi_score
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.training.denoised_path import denoised_path
from diffusion_gym.agents.training.evaluation import trajectory_kl
from diffusion_gym.agents.training.sampling import BENCHMARK, finite_mean, sample
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.images import to_float, to_uint8
from diffusion_gym.rewards import Reward, evaluate

_KL_SAMPLES: Final = 32
_SHOWN: Final = 16
_SHOWN_SIDE: Final = 256  # pixels of a stored picture
_PATHS: Final = 4
_PATH_SIDE: Final = 96  # of one along a trajectory, of which there are T + 1


@dataclass(frozen=True)
class Measurement:
    """A policy at an evaluation point.

    Attributes:
        values: the measures by name.
        samples: what the report shows: `images` uint8 `(M, H, W, 3)` of the first samples, `rewards` `(N,)`, `features`
            `(N, D)`, and of a few samples the denoised estimates with their rewards, `path_images`
            `(T + 1, K, H, W, 3)` and `path_rewards` `(T + 1, K)`. Large pictures are made smaller.
        prompts: of the N samples.
    """

    values: dict[str, float]
    samples: dict[str, torch.Tensor]
    prompts: tuple[str, ...]


@dataclass
class Evaluator:
    """Measures a policy on the prompts of its training and on held-out ones.

    Args:
        env: the environment; a measurement's samples are a multiple of its `num_envs`.
        held_out: the same with held-out prompts; None where there are none.
        samples: pictures of a measurement, for either kind of prompts.
        seed: of the noise.
        probe: a reward that is not trained on, or None.
    """

    env: VectorEnv[Any, Any, Any]
    held_out: VectorEnv[Any, Any, Any] | None
    samples: int
    seed: int
    probe: Reward | None = None
    _base: Features | None = field(default=None, init=False)

    def measure(self, policy: DenoisingPolicy) -> Measurement:
        """All measures of the policy.

        Raises:
            NoUsableReward: every reward is NaN or infinite.

        Returns:
            Values `reward`, the reward's components, `probe`, `kl` (nats a trajectory, closed form summed over the
            steps), `vendi` and `distance` (within a prompt), `all_vendi` (over all pictures); and under `held_out_` the
            reward and its components for the held-out prompts. What has no value is NaN.
        """
        trajectories = self._trajectories(self.env, policy)
        path = denoised_path(self.env, policy, trajectories, _PATHS)
        samples = {
            "images": _small(trajectories.images[:_SHOWN], _SHOWN_SIDE),
            "rewards": trajectories.rewards,
            "path_images": torch.stack([_small(images, _PATH_SIDE) for images in path.images]),
            "path_rewards": path.rewards,
        }
        values = _means(trajectories)
        values["kl"] = float(trajectory_kl(policy, trajectories, min(_KL_SAMPLES, len(trajectories))).double().mean())
        features = self._features(policy, trajectories)
        if features is not None:
            values |= {**by_prompt(features, trajectories.prompts), "all_vendi": vendi_score(features)}
            samples["features"] = torch.from_numpy(features).float()
        if self.probe is not None:
            pictures = to_float(trajectories.images.to(policy.device))
            metadata = cast(DenoisingVectorEnv, self.env.unwrapped).prompt_set.metadata_of(trajectories.prompts)
            probed = evaluate(self.probe, pictures, list(trajectories.prompts), metadata).scores
            values["probe"] = finite_mean(probed[trajectories.rewards.isfinite()])  # a picture with NaN is black here
        if self.held_out is not None:
            unseen = _means(self._trajectories(self.held_out, policy))
            values |= {f"held_out_{key}": value for key, value in unseen.items()}
        policy.set_reference_aside()
        return Measurement(values, samples, trajectories.prompts)

    def _trajectories(
        self, env: VectorEnv[Any, Any, Any], policy: DenoisingPolicy, *, reference: bool = False
    ) -> Trajectories:
        return sample(env, policy, self.samples, (self.seed, BENCHMARK), reference=reference)

    def _features(self, policy: DenoisingPolicy, trajectories: Trajectories) -> Features | None:
        """Features less the mean of the pretrained model's from the same noise; None where the network has none."""
        if not has_features(policy):
            return None
        if self._base is None:
            self._base = model_features(policy, self._trajectories(self.env, policy, reference=True).finished)
        return centred(model_features(policy, trajectories.finished), self._base)


def _means(trajectories: Trajectories) -> dict[str, float]:
    if not bool(trajectories.rewards.isfinite().any()):
        number = len(trajectories)
        raise NoUsableReward(f"all {number} rewards of the measurement are NaN or infinite; check the reward")
    parts = {"reward": trajectories.rewards, **trajectories.components}
    return {name: finite_mean(values) for name, values in parts.items()}


def _small(images: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures uint8 `(M, H, W, 3)` of at most `side` pixels."""
    factor = side / max(images.shape[1:3])
    if factor >= 1:
        return images
    shape = [max(1, round(length * factor)) for length in images.shape[1:3]]
    return to_uint8(interpolate(to_float(images), shape, mode="area"))


class Work:
    """Counts what a training costs while `counting`: samples through the network, and seconds.

    Args:
        policy: the policy whose network is counted.

    Attributes:
        evaluations: samples that went through the network forward, both branches of the guidance counted.
        seconds: wall-clock time.
        cpu_seconds: of the process, all its threads together.
    """

    def __init__(self, policy: DenoisingPolicy) -> None:
        self.evaluations, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self._networks = {policy.unet, policy.model.unet}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens within this context."""

        def count(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            named = (keywords.get(name) for name in ("sample", "hidden_states"))
            latents = next(value for value in (*named, *arguments, *keywords.values()) if value is not None)
            self.evaluations += len(latents)

        handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in self._networks]
        started, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
            self.cpu_seconds += time.process_time() - cpu
            for handle in handles:
                handle.remove()
