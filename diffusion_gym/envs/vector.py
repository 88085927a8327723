"""The environment: the denoising process as a Markov decision process, batched over N trajectories.

DDPO, section C.3: the state is (c, t, x_t), the action is x_{t-1}, the transition carries the action over, and
the reward r(x_0, c) comes with the last of T steps. The network never runs in here: it is the policy.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Final, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from diffusion_gym.config import SamplerConfig
from diffusion_gym.devices import device_called, require_memory, to_device
from diffusion_gym.envs.checks import (
    ResetOptions,
    check_action,
    check_metadata,
    check_num_envs,
    check_options,
    check_picture_size,
    check_prompt_set,
    check_render_mode,
    check_seeds,
    merged,
    named_choice,
)
from diffusion_gym.envs.description import description
from diffusion_gym.envs.spaces import make_spaces
from diffusion_gym.images import to_uint8
from diffusion_gym.models import OPTIONS, DenoisingModel, load_model, sampling_table, torch_dtype
from diffusion_gym.models.cut_prompts import warn_of_cut_prompts
from diffusion_gym.prompts import PromptSet, make_prompts
from diffusion_gym.registry import WrongKeyword, unknown_name
from diffusion_gym.rewards import Reward, RewardOutput, default_prompts, evaluate, make_reward
from diffusion_gym.rewards.factory import Source
from diffusion_gym.rewards.time_limit import limited
from diffusion_gym.rewards.worker import RewardWorker
from diffusion_gym.scheduling import TERMINAL, StepTable
from diffusion_gym.timing import span

Output = Literal["torch", "numpy"]
_ANY: Final = 10**9  # T where it is the model's own, which is not known before the model is


class DenoisingVectorEnv(VectorEnv[dict[str, Any], Any, Any]):
    """N denoising processes in lock-step or staggered, on one device.

    Args:
        num_envs: N.
        model: a registered name, a diffusers directory, a hub id, or a model object.
        model_kwargs: `height`, `width`, `negative_prompt`, `revision`, ... of the model; see `load_model`.
        reward: a name, a reward server's URL, `module:attribute`, a weighted sum or a callable; see `make_reward`.
        reward_kwargs: keywords of a reward that is not a callable.
        strict: the same as `reward_kwargs={"strict": ...}`, of the Shapes rewards.
        reward_seconds: what one call of the reward may take, in seconds, see `TimeLimited`; None for no limit.
        prompts: a registered prompt set, a list, a file; by default the reward's, else the model's. What the set says
            of a prompt besides its text is in `info["metadata"]`, and the reward gets it.
        device: where latents, decoding and rewards live.
        dtype: type of the model's weights; latents are always float32.
        autoreset_mode: `SAME_STEP` (with `final_obs` and `final_info`), `NEXT_STEP` or `DISABLED`.
        output: `torch` tensors on the device, or `numpy` arrays.
        render_mode: None or `rgb_array`, the decoded preview of x_t.
        **options: the fields of `SamplerConfig`, the model's own defaults standing in; and those of `model_kwargs`.

    Raises:
        ValueError: a value that is out of range or unknown.
        TypeError: a keyword that does not exist.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        model: str | DenoisingModel = "Shapes",
        model_kwargs: Mapping[str, Any] | None = None,
        reward: Source = "Compressibility",
        reward_kwargs: Mapping[str, Any] | None = None,
        strict: bool | None = None,
        reward_seconds: float | None = None,
        prompts: str | Sequence[str | Mapping[str, Any]] | PromptSet | None = None,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        output: Output = "torch",
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_envs = check_num_envs(num_envs)
        self.autoreset_mode = AutoresetMode(named_choice("autoreset_mode", autoreset_mode, list(AutoresetMode)))
        self.output = named_choice("output", output, ["torch", "numpy"])
        self.render_mode = check_render_mode(render_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        # Everything cheap is checked before weights are looked for.
        _check_known(options)
        of_model = merged("model_kwargs", model_kwargs, **{name: options.get(name) for name in OPTIONS})
        sampler = {name: value for name, value in options.items() if name not in OPTIONS}
        SamplerConfig.from_options(sampler, {"num_inference_steps": _ANY})
        device_called(device)
        torch_dtype(dtype)
        made = make_reward(reward, **merged("reward_kwargs", reward_kwargs, strict=strict))
        self.reward: Reward = limited(made, reward_seconds)
        chosen = make_prompts(prompts) if prompts is not None else None
        if chosen is not None:
            check_prompt_set(self.reward, chosen)
        self.model: DenoisingModel = load_model(model, device, dtype, of_model)
        self.model_kwargs: dict[str, Any] = dict(of_model)
        check_picture_size(self.reward, self.model)
        preferred = default_prompts(reward, self.reward) if self.model.prompt_length else None
        self.prompt_set: PromptSet = chosen or make_prompts(preferred or self.model.default_prompts)
        check_prompt_set(self.reward, self.prompt_set)
        warn_of_cut_prompts(self.model, self.prompt_set.prompts, f"prompts={self.prompt_set.name!r}")
        self.sampler_config = SamplerConfig.from_options(sampler, self.model.sampler_defaults)
        self.device = self.model.device
        # The bounds of two spaces, and the latents.
        numbers = 5 * self.num_envs * math.prod(self.model.latent_shape)
        require_memory(f"num_envs={num_envs!r}", numbers, torch.device("cpu"), "make fewer at once")
        self.step_table: StepTable = sampling_table(self.model, self.sampler_config)
        self._timesteps = np.append(self.step_table.timesteps.cpu().numpy(), TERMINAL)
        self.single_observation_space, self.single_action_space = make_spaces(self.model)
        self._observed = list(self.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._worker: RewardWorker | None = None
        self._deferred: list[Future[RewardOutput]] = []
        self._forget()
        self.__doc__ = description(self)  # what `help(env)` shows

    def _forget(self) -> None:
        number, shape = self.num_envs, self.model.latent_shape
        self._rngs: list[np.random.Generator | None] = [None] * number
        self._prompts = np.full(number, None, dtype=object)
        self._tokens = torch.zeros(number, self.model.prompt_length, dtype=torch.int64, device=self.device)
        self._latents = torch.zeros(number, *shape, device=self.device)
        self._finite = torch.ones(number, dtype=torch.bool, device=self.device)
        self._step = np.zeros(number, dtype=np.int64)
        self._started = np.zeros(number, dtype=bool)
        self._done = np.zeros(number, dtype=bool)

    @property
    def horizon(self) -> int:
        """T, the number of steps of an episode."""
        return self.sampler_config.num_inference_steps

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start new episodes: a prompt c ~ p(c) and noise x_T ~ N(0, I) for each.

        Args:
            seed: env i gets `seed + i`, or `seed[i]`; None goes on with the generators there are.
            options: `prompt` (a string, or N) and `latents` (`(C, H, W)` or `(N, C, H, W)`) fix what would be
                drawn; `reset_mask` (bool `(N,)`) resets a part.

        Raises:
            ValueError: an option or seed of the wrong kind; nothing has changed then.
        """
        self._require_open()
        chosen = check_options(options, tuple(self._latents.shape), self.device)
        seeds = check_seeds(seed, self.num_envs)
        if chosen.prompts is not None:
            asked = [chosen.prompts[index] for index in np.flatnonzero(chosen.mask)]
            check_metadata(self.reward, self.prompt_set, asked, "options['prompt']")
        self._seed(seeds, chosen.mask)
        self._begin(chosen)
        if chosen.prompts is not None:
            warn_of_cut_prompts(self.model, list(self._prompts[chosen.mask]), "options['prompt']")
        return self._observe(), self._prompted(chosen.mask)

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Carry x_{t-1} over; decode and score the pictures of the episodes that end.

        Args:
            actions: x_{t-1}, float32 `(N, C, H, W)`: a tensor on the device or a NumPy array.

        Returns:
            Observations, rewards `(N,)`, terminations `(N,)`, truncations `(N,)` (never true), infos.

        Raises:
            gymnasium.error.ResetNeeded: before `reset`, or after the end with autoreset disabled.
            ValueError: an action of wrong shape, dtype or device, or with NaN, which on a GPU is found at the end of an
                episode. Nothing has been stepped then.
            RewardError: the reward raised, took too long or returned something else than one number a picture.
        """
        self._require_open()
        self._require_running()
        latents = check_action(actions, tuple(self._latents.shape), self.device)
        moving = ~self._done  # with NEXT_STEP the others are reset, whatever their action
        self._require_finite(latents, moving)
        if not moving.all():
            self._begin(ResetOptions(~moving, None, None))
        self._carry_over(latents, moving)
        ended = moving & (self._step == self.horizon)
        rewards = torch.zeros(self.num_envs, device=self.device)
        infos = self._prompted(np.ones(self.num_envs, dtype=bool))
        if ended.any():
            self._started[ended] = False  # a reward that raises leaves them to be reset
            infos.update(self._score(ended, rewards))
            self._started[ended] = True
            if self.autoreset_mode == AutoresetMode.SAME_STEP:
                infos = self._restart(ended, infos)
        self._done = ended if self.autoreset_mode != AutoresetMode.SAME_STEP else np.zeros_like(ended)
        return self._observe(), self._out(rewards), self._flags(ended), self._flags(np.zeros_like(ended)), infos

    def skip_to_last_step(self) -> None:
        """Put every running episode before its last step, so that the next action is x_0."""
        self._step[~self._done] = self.horizon - 1

    @contextmanager
    def deferred_rewards(self) -> Iterator[list[Future[RewardOutput]]]:
        """Within this context a thread scores the pictures, while the caller goes on with the next episodes.

        The step that ends episodes gives reward 0 and no components. It appends one future to the list that this
        context yields: the scores of the episodes that ended, in their order, or the error of the reward. Leaving the
        context cancels what is not scored yet.

        Raises:
            ValueError: episodes are reset by themselves, which leaves no time for their rewards.
        """
        if self.autoreset_mode != AutoresetMode.DISABLED:
            raise ValueError(
                f"autoreset_mode={self.autoreset_mode.value!r} gives the reward with the last step; use "
                f"{AutoresetMode.DISABLED.value!r} to defer it"
            )
        self._worker, self._deferred = RewardWorker(self.reward), []
        try:
            yield self._deferred
        finally:
            worker, self._worker = self._worker, None
            worker.close()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The decoded preview of every x_t: N uint8 pictures `(H, W, 3)`; without a render mode a warning, and None."""
        if self.render_mode is None:
            gym.logger.warn("render() without a render mode gives None; make the env with render_mode='rgb_array'")
            return None
        self._require_open()
        self._require_started()
        return tuple(to_uint8(self.model.decode(self._latents)).cpu().numpy())

    def close_extras(self, **kwargs: Any) -> None:
        """Let go of the batch; the model stays in the cache for other environments."""
        self._forget()

    # --- the parts of a step -------------------------------------------------------------------------------

    def _seed(self, seeds: list[int | None], mask: np.ndarray) -> None:
        for index in np.flatnonzero(mask):
            if seeds[index] is not None or self._rngs[index] is None:
                self._rngs[index], used = seeding.np_random(seeds[index])
                if index == 0:
                    self._np_random, self._np_random_seed = self._rngs[0], used

    def _begin(self, options: ResetOptions) -> None:
        """Draw (or take from `options`) prompt and noise of the episodes in its mask."""
        indices, prompts = np.flatnonzero(options.mask), self._prompts.copy()
        noise = np.empty((len(indices), *self.model.latent_shape), np.float32)
        for row, index in enumerate(indices):
            rng = self._rngs[index]
            assert rng is not None
            # Both are always drawn, so that a fixed prompt leaves the noise of a seed as it was.
            prompts[index] = self.prompt_set.draw(rng)
            noise[row] = rng.standard_normal(self.model.latent_shape, dtype=np.float32)
        if options.prompts is not None:
            prompts[indices] = np.array(options.prompts, dtype=object)[indices]
        rows = to_device(indices, self.device)
        start = to_device(noise, self.device) if options.latents is None else options.latents[rows]
        if self.model.prompt_length:
            tokens = to_device(self.model.tokenize(list(prompts[indices])), self.device)
            self._tokens = self._tokens.index_copy(0, rows, tokens)
        # New tensors, not writes into the old ones: those are in the observations that users keep.
        self._latents, self._prompts = self._latents.index_copy(0, rows, start), prompts
        self._finite = self._finite.index_fill(0, rows, True)
        self._step[indices], self._done[indices], self._started[indices] = 0, False, True

    def _require_finite(self, latents: torch.Tensor, moving: np.ndarray) -> None:
        """Refuse actions that are not finite, before anything is carried over."""
        finite = latents.isfinite().flatten(1).all(1)
        if not moving.all():
            finite = finite | to_device(~moving, self.device)
        so_far = self._finite & finite
        # On a GPU the check waits for the end of an episode, where the device is waited for anyway.
        if self.device.type == "cpu" or (self._step[moving] == self.horizon - 1).any():
            if not bool(so_far.all()):
                before = np.flatnonzero(~self._finite.cpu().numpy()).tolist()
                self._started[before] = False
                bad = np.flatnonzero(~so_far.cpu().numpy()).tolist()
                remedy = f"reset env {before}, whose earlier actions did" if before else "step again with finite ones"
                raise ValueError(f"actions hold NaN or infinite values in env {bad}; no env was stepped: {remedy}")
        self._finite = so_far

    def _carry_over(self, latents: torch.Tensor, moving: np.ndarray) -> None:
        self._step[moving] += 1
        if not moving.all():
            keep = to_device(moving, self.device)[:, None, None, None]
            latents = torch.where(keep, latents, self._latents)
        self._latents = latents.clone()

    def _score(self, ended: np.ndarray, rewards: torch.Tensor) -> dict[str, Any]:
        """Decode and score the pictures of `ended` in one batch; fills `rewards`, returns their infos."""
        rows = to_device(np.flatnonzero(ended), self.device)
        with span("decode"):
            images = self.model.decode(self._latents[rows])
            pictures = to_uint8(images)
        prompts = list(self._prompts[ended])
        metadata = self.prompt_set.metadata_of(prompts)
        if self._worker is None:
            with span("reward"):
                result = evaluate(self.reward, images, prompts, metadata)
        else:
            self._deferred.append(self._worker.submit(images, prompts, metadata))
            result = RewardOutput(torch.zeros(len(prompts)))
        rewards[rows] = result.scores.to(self.device)

        def spread(part: torch.Tensor) -> Any:
            full = torch.zeros(self.num_envs, *part.shape[1:], dtype=part.dtype, device=self.device)
            return self._out(full.index_copy(0, rows, part.to(self.device)))

        components = self._with_masks({name: spread(value) for name, value in result.info.items()}, ended)
        return self._with_masks({"image": spread(pictures), "reward_components": components}, ended)

    def _restart(self, ended: np.ndarray, infos: dict[str, Any]) -> dict[str, Any]:
        """Move what belongs to the finished episodes to `final_obs` and `final_info`, and reset them."""
        last = self._observe()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for index in np.flatnonzero(ended):
            final_obs[index] = {key: value[index] for key, value in last.items()}
        final_info = {**infos, **self._prompted(ended)}
        self._begin(ResetOptions(ended, None, None))
        fresh = self._prompted(np.ones(self.num_envs, dtype=bool))
        return {**fresh, **self._with_masks({"final_obs": final_obs, "final_info": final_info}, ended)}

    # --- what goes out -------------------------------------------------------------------------------------

    def _observe(self) -> dict[str, Any]:
        timesteps = to_device(self._timesteps[self._step][:, None], self.device)
        observation = {"timestep": self._out(timesteps), "latents": self._out(self._latents, copy=True)}
        if self.model.prompt_length:
            observation["prompt"] = self._out(self._tokens, copy=True)
        return {key: observation[key] for key in self._observed}

    def _prompted(self, mask: np.ndarray) -> dict[str, Any]:
        """The infos of the episodes in `mask`: their prompts, and the metadata where the prompt set has some."""
        infos = {"prompt": self._prompts.copy()}
        if self.prompt_set.metadata:
            infos["metadata"] = np.array(self.prompt_set.metadata_of(self._prompts.tolist()), object)
        return self._with_masks(infos, mask)

    def _out(self, tensor: torch.Tensor, copy: bool = False) -> Any:
        tensor = tensor.clone() if copy else tensor
        return tensor if self.output == "torch" else tensor.cpu().numpy()

    def _flags(self, flags: np.ndarray) -> Any:
        return flags.copy() if self.output == "numpy" else to_device(flags.copy(), self.device)

    def _with_masks(self, infos: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
        """Gymnasium's convention: `_key` says for which envs `key` holds something."""
        return {**infos, **{f"_{key}": mask.copy() for key in infos}}

    # --- order of calls ------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self.closed:
            raise gym.error.ClosedEnvironmentError("the environment is closed; make a new one")

    def _require_started(self) -> None:
        if not self._started.all():
            raise gym.error.ResetNeeded("step or render before reset; call env.reset() first")

    def _require_running(self) -> None:
        self._require_started()
        if self.autoreset_mode == AutoresetMode.DISABLED and self._done.any():
            over = np.flatnonzero(self._done).tolist()
            raise gym.error.ResetNeeded(
                f"the episodes of env {over} are over; reset them first: env.reset(options={{'reset_mask': mask}})"
            )


def _check_known(keywords: Mapping[str, Any]) -> None:
    """Refuse a keyword that is neither the environment's, the model's nor the sampler's; all are said to be known."""
    parameters = inspect.signature(DenoisingVectorEnv.__init__).parameters.values()
    own = [entry.name for entry in parameters if entry.name != "self" and entry.kind is not entry.VAR_KEYWORD]
    further = [*OPTIONS, *(entry.name for entry in fields(SamplerConfig))]
    for name in keywords:
        if name not in further:
            raise WrongKeyword(unknown_name("keyword argument", name, own + further))
