"""`DDPOPPO`: Stable-Baselines3's rollouts, callbacks and logger around the native agents' update."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
import torch
from stable_baselines3 import PPO

from diffusion_gym.agents.adapters import env_identity, require_no_groups, taken
from diffusion_gym.agents.advantages import RewardNormalizer
from diffusion_gym.agents.algorithms.ddpo_is import DDPOIS
from diffusion_gym.agents.algorithms.ddpo_iskl import DDPOISKL, DDPOISKLConfig
from diffusion_gym.agents.algorithms.policy_gradient import Transitions
from diffusion_gym.agents.denoising_env import denoising_env
from diffusion_gym.agents.identity import require_same
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.optimizer_state import optimizer_tensors, restore_optimizer
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.sb3.buffer import TrajectoryBuffer
from diffusion_gym.agents.sb3.policy import CFGUNetPolicy, UnsavedModel
from diffusion_gym.agents.sb3.setup import FROM_ENV, Env, as_vec_env, ddpo_settings
from diffusion_gym.storage import exact_json, joined, part_of, read_archive, write_archive

_PROGRESS: Final = ("num_timesteps", "_total_timesteps", "_current_progress_remaining", "_n_updates")
# Options of the native agent; the divergence to the pretrained model counts only where a weight is given.
_WITHOUT_KL: Final = {"kl_weight": 0.0, "kl_form": "closed_form"}
_STATISTICS: Final = ("normalization", "statistics_buffer", "statistics_min_count", "advantage_clip")
_NATIVE: Final = ("micro_batch_size", "trained_steps", *_STATISTICS, *_WITHOUT_KL)
_INSTEAD: Final = {
    "normalize_advantage": "normalization",
    "rollout_buffer_class": "its own",
    "rollout_buffer_kwargs": "its own",
    "clip_range_vf": "no bound on values",
    "use_sde": "the sampler's noise",
}


class DDPOPPO(PPO):
    """DDPO_IS on SB3's rollouts, callbacks and logger; its `train` is the native agents' update.

    It adds to PPO: gradients accumulated in micro-batches over the time steps of whole trajectories, per-prompt
    normalisation of rewards, a KL term to the pretrained model, a rollout buffer on the device, and files without
    pickle. Defaults are those of `ddpo_is` and of the native agent.

    Args:
        policy: `"CFGUNetPolicy"` or a subclass of it.
        env: a denoising environment; Gymnasium's vector environments are adapted.
        policy_kwargs: changes to `policy_kwargs(env)`.
        **options: of the native agent `micro_batch_size`, `trained_steps`, `normalization` (`prompt`, `batch`, or
            `none`, which an environment with rewards before the last step needs), `statistics_buffer`,
            `statistics_min_count`, `advantage_clip`, `kl_weight` (0 by default) and `kl_form`: see `DDPOISKLConfig`.
            And PPO's own, of which `n_steps` (T by default) and `batch_size` (transitions behind one update, those of
            64 trajectories by default, or of all) are multiples of T.

    Raises:
        ValueError: a value out of its range, or an environment or policy that does not denoise.
    """

    policy: CFGUNetPolicy  # type: ignore[assignment]
    rollout_buffer: TrajectoryBuffer

    def __init__(
        self,
        policy: str | type[CFGUNetPolicy],
        env: Env,
        *,
        policy_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if policy != "CFGUNetPolicy" and not (isinstance(policy, type) and issubclass(policy, CFGUNetPolicy)):
            raise ValueError(f"policy={policy!r} must be 'CFGUNetPolicy' or a subclass: DDPO trains a denoising policy")
        native: dict[str, Any] = {**_WITHOUT_KL, **taken(options, _NATIVE)}
        native |= {"trained_steps": tuple(native.get("trained_steps", DDPOISKLConfig.trained_steps))}
        for name, instead in _INSTEAD.items():
            if value := options.pop(name, None):
                raise ValueError(f"{name}={value!r} does not go with DDPOPPO, which uses {instead}; leave it out")
        require_no_groups(native.get("normalization", ""))
        self.config = DDPOISKLConfig(**native)
        self.normalizer = RewardNormalizer(self.config)
        self.statistics = self.normalizer.statistics
        vec_env = as_vec_env(env, output="torch", failed_rewards="keep")
        self.horizon: int = denoising_env(vec_env).horizon
        settings = ddpo_settings(PPO, vec_env, {**options, "policy_kwargs": policy_kwargs})
        settings["normalize_advantage"] = False  # rewards are normalised, before they become advantages
        if settings["batch_size"] % self.horizon:
            raise ValueError(
                f"batch_size={settings['batch_size']} must be a multiple of T={self.horizon}: updates are on whole "
                "trajectories"
            )
        buffer: dict[str, Any] = {"rollout_buffer_kwargs": {"horizon": self.horizon}}
        super().__init__(policy, vec_env, **settings, rollout_buffer_class=TrajectoryBuffer, **buffer)
        stored = {name: value for name, value in settings.items() if name not in ("policy_kwargs", "device")}
        self._arguments = {**stored, **{name: getattr(self.config, name) for name in _NATIVE}}
        # Refuses a part of the trajectory without a stochastic step.
        self._fitting = NativeUpdate(self, self.config).optimizer.micro_batch_size

    def train(self) -> None:
        """Update the policy on the rollout.

        Raises:
            NoUsableReward: no reward of the rollout is finite.
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = cast(Any, self.clip_range)(self._current_progress_remaining)
        size = self.batch_size // self.horizon
        config = replace(
            self.config,
            clip_range=clip_range,
            batch_size=size,
            inner_epochs=self.n_epochs,
            max_grad_norm=min(self.max_grad_norm, sys.float_info.max),  # SB3 takes infinity
        )
        order = np.random.default_rng(np.random.randint(2**31, size=2))  # of SB3's generator
        agent = NativeUpdate(self, config)
        agent.optimizer.micro_batch_size = self._fitting
        metrics = agent.update(self.rollout_buffer.trajectories(), order)
        self._fitting = agent.optimizer.micro_batch_size
        an_epoch = -(-(len(self.rollout_buffer) - metrics["samples_dropped"]) // size)
        self._n_updates += int(-(-metrics.pop("updates") // an_epoch))
        for name in ("learning_rate", "updates_skipped"):  # SB3 logs the first, and scales no losses
            metrics.pop(name)
        for name, value in {**metrics, "clip_range": clip_range}.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    # --- files ---------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write weights, optimiser, statistics and arguments: a zip file of safetensors and JSON, without pickle.

        Args:
            path: where to; `.zip` is added to a name without suffix.
            exclude: not used; the file holds nothing else.
            include: must be empty.

        Raises:
            ValueError: `include`, or an argument that JSON cannot hold, such as a schedule given as a function.
        """
        if include:
            raise ValueError(
                f"include={list(include)!r}: DDPOPPO saves no other attributes, because it pickles nothing"
            )
        arguments = self.policy.arguments()
        content = {
            "model": None if isinstance(arguments["model"], UnsavedModel) else arguments["model"],
            "identity": self.policy.identity(),
            "arguments": self._arguments,
            "policy": {name: value for name, value in arguments.items() if name not in FROM_ENV},
            "progress": {name: getattr(self, name) for name in _PROGRESS},
            "statistics": self.statistics.state(),
        }
        try:
            text = exact_json(content)
        except TypeError as error:
            raise ValueError(
                f"an argument is no JSON value ({error}), and DDPOPPO pickles nothing; give a number in place of a "
                "function"
            ) from error
        optimizer = optimizer_tensors(self.policy.optimizer)
        write_archive(path, text, joined({"policy": self.policy.state_dict(), "optimizer": optimizer}))

    @classmethod
    def load(  # type: ignore[override]
        cls,
        path: str | Path | io.BufferedIOBase,
        env: Env | None = None,
        device: torch.device | str = "auto",
        **changes: Any,
    ) -> Self:
        """The algorithm that `save` wrote, to go on in `env`.

        With a seed its random numbers are new ones, of that seed and of the steps taken; those of the first run would
        give the first noise again.

        Args:
            path: the file.
            env: a denoising environment of the same model and sampler.
            device: where to train; by default where the environment is.
            **changes: arguments that are to differ.

        Raises:
            ValueError: the file is none of `save`'s, or `env` does not fit it.
        """
        content, tensors = read_archive(path)
        if env is None:
            raise ValueError(
                "env=None: DDPOPPO.load needs the environment; for predictions alone use CFGUNetPolicy.load"
            )
        options = content["policy"]
        named = {"model": content["model"]} if content["model"] else {}
        stored = content.get("identity", {**options.get("sampler", {}), **named})  # an older file has no identity
        require_same(stored, env_identity(env), f"path={str(path)!r}")
        kwargs = {name: value for name, value in options.items() if name not in FROM_ENV}
        kwargs |= changes.pop("policy_kwargs", {})
        placed = {} if device == "auto" else {"device": device}
        model = cls("CFGUNetPolicy", env, **{**content["arguments"], "policy_kwargs": kwargs, **placed, **changes})
        model._restore(tensors)
        for name in _PROGRESS:
            setattr(model, name, content["progress"][name])
        model.statistics.load(content["statistics"])
        if "seed" not in changes and model.seed is not None and model.num_timesteps:
            words = np.random.SeedSequence([model.seed, model.num_timesteps]).generate_state(1)
            model.set_random_seed(int(words[0]))
        return model

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """Put weights and optimiser in place, from a file of `save` or from `get_parameters`."""
        if isinstance(load_path_or_dict, dict):
            super().set_parameters(load_path_or_dict, exact_match, device)
        else:
            self._restore(read_archive(load_path_or_dict)[1])

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.policy.load_state_dict(part_of(tensors, "policy"))
        restore_optimizer(self.policy.optimizer, part_of(tensors, "optimizer"))


class NativeUpdate(DDPOISKL):
    """The native update on what SB3 holds: its optimiser, its advantages, its value network, its `target_kl`.

    Args:
        algorithm: whose rollout buffer, policy and statistics they are.
        config: the native agent's options.
    """

    def __init__(self, algorithm: DDPOPPO, config: DDPOISKLConfig) -> None:
        self.algorithm = algorithm
        super().__init__(algorithm.policy.actor, replace(config, **asdict(algorithm.policy.options)))
        self.normalizer = algorithm.normalizer
        trained, adam = algorithm.policy.trained_parameters(), algorithm.policy.optimizer
        self.optimizer = self.make_optimizer(trained, adam)

    def advantages(self, trajectories: Trajectories) -> np.ndarray:
        """SB3's advantages `(T, N)` of normalised rewards; NaN for the samples whose reward failed.

        Raises:
            ValueError: there are rewards before the last step, which are not normalised.
        """
        buffer, stepwise = self.algorithm.rollout_buffer, self.algorithm.rollout_buffer.has_step_rewards()
        if stepwise and self.config.normalization != "none":
            raise ValueError(
                f"normalization={self.config.normalization!r} is for a reward at the end, and env has rewards before "
                "the last step; use normalization='none', with PromptNormalizationVectorEnv below the wrapper that "
                "adds them"
            )
        normalized = self.normalized_rewards(trajectories)
        if not stepwise:
            buffer.replace_rewards(self.normalizer.clip(normalized))
        else:
            buffer.step_advantages.clamp_(-self.config.advantage_clip, self.config.advantage_clip)
        return buffer.step_advantages.cpu().numpy()

    def losses(self, batch: Transitions) -> Losses:
        """Those of DDPO_ISKL where the divergence has a weight, else of DDPO_IS."""
        return super().losses(batch) if self.config.kl_weight else DDPOIS.losses(cast(Any, self), batch)

    def finished(self, means: Losses) -> bool:
        """Whether `target_kl` stops the training before this update, as in SB3's PPO."""
        target = self.algorithm.target_kl
        return target is not None and float(means["approx_kl"]) > 1.5 * target

    def _losses_at(
        self,
        transitions_at: Callable[[torch.Tensor], Transitions],
        old_means: torch.Tensor | None,
        items: torch.Tensor,
    ) -> Losses:
        """The losses of some items with the value network's error, where it has a weight."""
        rows, weight = super()._losses_at(transitions_at, old_means, items), self.algorithm.vf_coef
        if not weight:
            return rows
        returns = self.algorithm.rollout_buffer.step_returns[items[:, 1], items[:, 0]]
        observation = transitions_at(items[:, :-1]).observation
        errors = (self.algorithm.policy.predict_values(observation).flatten() - returns) ** 2
        return {**rows, "loss": rows["loss"] + weight * errors, "value_loss": errors.detach()}
