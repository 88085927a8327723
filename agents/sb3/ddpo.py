"""`DDPOPPO`: Stable-Baselines3's PPO with what DDPO needs and SB3 lacks."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples

from diffusion_gym.agents.adapters import chosen_steps
from diffusion_gym.agents.advantages import PromptStatistics, batch_normalize
from diffusion_gym.agents.algorithms.base import part_of
from diffusion_gym.agents.algorithms.metrics import averages
from diffusion_gym.agents.identity import require_same
from diffusion_gym.agents.losses import KLForm, check_kl_form, clipped_surrogate, with_kl_penalty
from diffusion_gym.agents.sb3.buffer import TrajectoryBuffer
from diffusion_gym.agents.sb3.checks import UnsavedModel
from diffusion_gym.agents.sb3.files import read_archive, write_archive
from diffusion_gym.agents.sb3.policy import CFGUNetPolicy
from diffusion_gym.agents.sb3.setup import (
    FROM_ENV,
    Env,
    as_vec_env,
    check_ddpo_options,
    check_value_network,
    env_identity,
    horizon_of,
    ppo_settings,
)
from diffusion_gym.storage import exact_json, optimizer_tensors, restore_optimizer

_PROGRESS = ("num_timesteps", "_total_timesteps", "_current_progress_remaining", "_n_updates")
Normalization = Literal["prompt", "batch", "none"]


class DDPOPPO(PPO):
    """DDPO_IS on SB3's rollouts, callbacks and logger, with the native agents' update.

    It adds to PPO: gradients accumulated in micro-batches over the time steps of whole trajectories, per-prompt
    normalisation of rewards, a KL term to the pretrained model, a rollout buffer on the device, and files without
    pickle. Defaults are those of `ddpo_is`.

    Args:
        policy: `"CFGUNetPolicy"` or a subclass of it.
        env: a denoising environment; Gymnasium's vector environments are adapted.
        n_steps: steps of a rollout, a multiple of T; T by default.
        batch_size: transitions behind one update, a multiple of T; those of 64 trajectories by default, or of all.
        micro_batch_size: transitions in one forward and backward pass; speed and memory, not the result.
        trained_steps: the part of the trajectory that is trained on, as fractions of T, 0 being the noise.
        normalization: what makes rewards advantages: each prompt's running statistics, the rollout's, or nothing,
            which an environment with rewards before the last step needs.
        statistics_buffer: rewards kept a prompt.
        statistics_min_count: rewards that a prompt needs before its own statistics count.
        advantage_clip: normalised rewards, or the advantages of step rewards, are clipped to +- this.
        kl_weight: weight of the KL term, in advantages a nat of each step's divergence; 0 is none.
        kl_form: how it is measured; see `diffusion_gym.agents.losses.kl_penalty`.
        policy_kwargs: changes to `policy_kwargs(env)`.
        **options: PPO's other arguments.

    Raises:
        ValueError: a value out of its range, or an environment or policy that does not denoise.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"CFGUNetPolicy": CFGUNetPolicy}
    policy: CFGUNetPolicy  # type: ignore[assignment]
    rollout_buffer: TrajectoryBuffer

    def __init__(
        self,
        policy: str | type[CFGUNetPolicy],
        env: Env,
        *,
        n_steps: int | None = None,
        batch_size: int | None = None,
        micro_batch_size: int = 64,
        trained_steps: Sequence[float] = (0.0, 1.0),
        normalization: Normalization = "prompt",
        statistics_buffer: int = 32,
        statistics_min_count: int = 16,
        advantage_clip: float = 5.0,
        kl_weight: float = 0.0,
        kl_form: KLForm = "closed_form",
        policy_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_ddpo_options(policy, micro_batch_size, normalization, advantage_clip, kl_weight, options)
        check_kl_form(kl_form)
        vec_env = as_vec_env(env, output="torch", failed_rewards="keep")
        self.horizon = horizon_of(vec_env)
        settings = {**ppo_settings(vec_env, n_steps, batch_size, policy_kwargs), **options}
        settings["normalize_advantage"] = False  # rewards are normalised, before they become advantages
        check_value_network(settings)
        if settings["batch_size"] % self.horizon:
            raise ValueError(
                f"batch_size={settings['batch_size']} must be a multiple of T={self.horizon}: updates are on whole "
                "trajectories"
            )
        self.micro_batch_size, self.normalization, self.advantage_clip = micro_batch_size, normalization, advantage_clip
        self.kl_weight, self.kl_form = kl_weight, kl_form
        self.statistics = PromptStatistics(statistics_buffer, statistics_min_count)
        super().__init__(
            policy,
            vec_env,
            **settings,
            rollout_buffer_class=TrajectoryBuffer,
            rollout_buffer_kwargs={"horizon": self.horizon},
        )
        self.trained = chosen_steps(self.policy.actor.stochastic_steps, self.horizon, trained_steps)
        self._arguments: dict[str, Any] = {
            **{name: settings[name] for name in settings if name not in ("policy_kwargs", "device")},
            **{"trained_steps": list(trained_steps)},
            **{"micro_batch_size": micro_batch_size, "normalization": normalization, "advantage_clip": advantage_clip},
            **{"statistics_buffer": statistics_buffer, "statistics_min_count": statistics_min_count},
            **{"kl_weight": kl_weight, "kl_form": kl_form},
        }

    # --- training ------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Update the policy on the rollout.

        Raises:
            NoUsableReward: no reward of the rollout is finite.
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = cast(Any, self.clip_range)(self._current_progress_remaining)
        usable = self._normalize_rewards()
        size, rows, stop = self.batch_size // self.horizon, [], False
        for _ in range(self.n_epochs):
            order = np.random.permutation(usable)  # of SB3's generator
            for start in range(0, len(order), size):
                row, stop = self._update(order[start : start + size], clip_range)
                rows.append(row)
                if stop:
                    break
            self._n_updates += 1
            if stop:
                break
        for name, value in averages(rows).items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/samples_dropped", len(self.rollout_buffer) - len(usable))
        self.logger.record("train/clip_range", clip_range)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _normalize_rewards(self) -> np.ndarray:
        """Put normalised rewards into the buffer; the trajectories whose reward is finite."""
        buffer = self.rollout_buffer
        rewards, keys = buffer.trajectory_rewards(), buffer.prompt_keys()
        usable = buffer.usable()
        if buffer.has_step_rewards():
            self._require_no_normalization()
            buffer.step_advantages.clamp_(-self.advantage_clip, self.advantage_clip)
            return usable
        finite = rewards[usable]
        if self.normalization == "prompt":
            finite = self.statistics.normalize([keys[index] for index in usable], finite)
        elif self.normalization == "batch":
            finite = batch_normalize(finite)
        rewards[usable] = np.clip(finite, -self.advantage_clip, self.advantage_clip)
        buffer.replace_rewards(rewards)
        return usable

    def _require_no_normalization(self) -> None:
        if self.normalization != "none":
            raise ValueError(
                f"normalization={self.normalization!r} is for a reward at the end, and env has rewards before the last "
                "step; use normalization='none', with PromptNormalizationVectorEnv below the wrapper that adds them"
            )

    def _update(self, trajectories: np.ndarray, clip_range: float) -> tuple[dict[str, torch.Tensor], bool]:
        """One step on the mean loss of the trained steps of `trajectories`; whether `target_kl` stopped it."""
        pairs = torch.cartesian_prod(torch.from_numpy(trajectories), self.trained).to(self.policy.device)
        self.policy.optimizer.zero_grad()
        totals: dict[str, torch.Tensor] = {}
        for part in pairs.split(self.micro_batch_size):
            losses = self.losses(self.rollout_buffer.transitions(part), clip_range)
            (losses["loss"].sum() / len(pairs)).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value.detach().sum() / len(
                    pairs
                )
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
        stop = self.target_kl is not None and float(totals["approx_kl"]) > 1.5 * self.target_kl
        if not stop:
            self.policy.optimizer.step()
        return totals, stop

    def losses(self, batch: DictRolloutBufferSamples, clip_range: float) -> dict[str, torch.Tensor]:
        """What to minimise for M transitions, `loss` `(M,)`, and other entries `(M,)` for the logs."""
        observation: Any = batch.observations
        policy = self.policy.get_distribution(observation).gaussian
        surrogate = clipped_surrogate(policy.log_prob(batch.actions), batch.old_log_prob, batch.advantages, clip_range)
        rows = surrogate.rows()
        if self.kl_weight:
            reference = self.policy.actor.reference_distribution(observation)
            rows = with_kl_penalty(rows, policy, reference, batch.actions, self.kl_form, self.kl_weight)
        if self.vf_coef:
            errors = (self.policy.predict_values(observation).flatten() - batch.returns) ** 2
            rows |= {"loss": rows["loss"] + self.vf_coef * errors, "value_loss": errors.detach()}
        return rows

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
        policy = {name: value for name, value in self.policy.arguments().items() if name not in FROM_ENV}
        model = self.policy.arguments()["model"]
        try:
            content = exact_json(
                {
                    "model": None if isinstance(model, UnsavedModel) else model,
                    "identity": self.policy.identity(),
                    "arguments": self._arguments,
                    "policy": policy,
                    "progress": {name: getattr(self, name) for name in _PROGRESS},
                    "statistics": self.statistics.state(),
                }
            )
        except TypeError as error:
            raise ValueError(
                f"an argument is no JSON value ({error}), and DDPOPPO pickles nothing; give a number in place of a "
                "function"
            ) from error
        write_archive(path, content, self._tensors())

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
        own = {name: value for name, value in options.items() if name not in FROM_ENV}
        own |= changes.pop("policy_kwargs", {})
        arguments = {**content["arguments"], "policy_kwargs": own, **changes}
        if device != "auto":
            arguments["device"] = device
        model = cls("CFGUNetPolicy", env, **arguments)
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

    def _tensors(self) -> dict[str, torch.Tensor]:
        parts = {"policy": self.policy.state_dict(), "optimizer": optimizer_tensors(self.policy.optimizer)}
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.policy.load_state_dict(part_of(tensors, "policy"))
        restore_optimizer(self.policy.optimizer, part_of(tensors, "optimizer"))
