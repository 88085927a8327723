"""Environments that break one rule of the conformance suite on purpose."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorRewardWrapper

from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.testing import conformance

BROKEN = []


def breaks(rule):
    """Enter an environment class that breaks `rule`."""

    def enter(kind):
        BROKEN.append(pytest.param(kind, rule, id=f"{rule.__name__}-{kind.__name__}"))
        return kind

    return enter


# --- spaces, types and metadata ---


@breaks(conformance.spaces_agree)
class HasSingleSpaces(DenoisingVectorEnv):
    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.observation_space = self.single_observation_space


@breaks(conformance.metadata_names_the_mode)
class NamesTheModeByAString(DenoisingVectorEnv):
    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode.value}


@breaks(conformance.metadata_names_the_mode)
class NamesAnotherMode(DenoisingVectorEnv):
    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}


@breaks(conformance.results_fit_the_spaces)
class AlwaysReturnsNumPy(DenoisingVectorEnv):
    def _out(self, tensor, copy=False):
        return tensor.clone().numpy()


@breaks(conformance.results_fit_the_spaces)
class ReturnsShortTimesteps(DenoisingVectorEnv):
    def _out(self, tensor, copy=False):
        return super()._out(tensor.int() if tensor.dtype == torch.int64 else tensor, copy)


@breaks(conformance.results_fit_the_spaces)
class ReturnsDoubleRewards(DenoisingVectorEnv):
    def step(self, actions):
        observation, rewards, *rest = super().step(actions)
        return observation, rewards.astype(np.float64) if self.output == "numpy" else rewards.double(), *rest


@breaks(conformance.results_fit_the_spaces)
class ReturnsAColumnOfRewards(DenoisingVectorEnv):
    def step(self, actions):
        observation, rewards, *rest = super().step(actions)
        return observation, rewards[:, None], *rest


@breaks(conformance.results_fit_the_spaces)
class LeavesTheSpace(DenoisingVectorEnv):
    def _begin(self, indices, options):
        super()._begin(indices, options)
        self._latents = self._latents * 1e6


@breaks(conformance.numpy_equals_torch)
class RoundsInNumPy(DenoisingVectorEnv):
    def _out(self, tensor, copy=False):
        rounded = tensor.half().float() if tensor.is_floating_point() and self.output == "numpy" else tensor
        return super()._out(rounded, copy)


# --- seeds ---


@breaks(conformance.same_seed_same_bits)
class IgnoresSeeds(DenoisingVectorEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(options=options)


@breaks(conformance.same_seed_same_bits)
class RewardsAtRandom(DenoisingVectorEnv):
    def _score(self, ended, rewards):
        found = super()._score(ended, rewards)
        rewards += torch.rand(len(rewards))
        return found


@breaks(conformance.other_seed_differs)
class StartsAlwaysAlike(DenoisingVectorEnv):
    def _begin(self, indices, options):
        for index in indices:
            self._rngs[index] = np.random.default_rng(index)
        super()._begin(indices, options)


@breaks(conformance.other_seed_differs)
class GivesAllTheSameSeed(DenoisingVectorEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=[seed] * self.num_envs if isinstance(seed, int) else seed, options=options)


@breaks(conformance.unseeded_reset_goes_on)
class ForgetsItsGenerators(DenoisingVectorEnv):
    def reset(self, *, seed=None, options=None):
        self._rngs = [None] * self.num_envs
        return super().reset(seed=seed, options=options)


@breaks(conformance.batch_equals_singles)
class SharesOneGenerator(DenoisingVectorEnv):
    def _begin(self, indices, options):
        self._rngs = [self._rngs[0]] * self.num_envs
        super()._begin(indices, options)


@breaks(conformance.batch_equals_singles)
class RewardsTheBatch(DenoisingVectorEnv):
    def _score(self, ended, rewards):
        found = super()._score(ended, rewards)
        rewards[:] = rewards.sum()
        return found


@breaks(conformance.seeds_may_be_listed)
class CountsFromTheFirstOfAList(DenoisingVectorEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed[0] if isinstance(seed, list) else seed, options=options)


# --- episodes ---


@breaks(conformance.episodes_last_t_steps)
class EndsOneStepEarlyToo(DenoisingVectorEnv):
    def step(self, actions):
        observation, rewards, terminations, *rest = super().step(actions)
        terminations[self._step == self.horizon - 1] = True
        return observation, rewards, terminations, *rest


@breaks(conformance.episodes_last_t_steps)
class TruncatesToo(DenoisingVectorEnv):
    def step(self, actions):
        observation, rewards, terminations, _, infos = super().step(actions)
        return observation, rewards, terminations, terminations, infos


@breaks(conformance.reward_waits_for_the_end)
class RewardsEveryStep(VectorRewardWrapper):
    def __init__(self, **keywords):
        super().__init__(DenoisingVectorEnv(**keywords))

    def rewards(self, rewards):
        return rewards + 1


@breaks(conformance.masked_reset_leaves_the_rest)
class IgnoresTheMask(DenoisingVectorEnv):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


@breaks(conformance.step_after_the_end_is_refused)
class ResetsUnasked(DenoisingVectorEnv):
    def step(self, actions):
        if self._done.any():
            self._begin(np.flatnonzero(self._done), {})
        return super().step(actions)


@breaks(conformance.step_after_the_end_is_refused)
class StepsOnAfterTheEnd(DenoisingVectorEnv):
    def _require_running(self):
        self._require_started()
        self._step[self._done] = 0


# --- autoreset ---


@breaks(conformance.same_step_returns_both_ends)
class FinalObservationIsTheNewOne(DenoisingVectorEnv):
    def _restart(self, ended, infos):
        infos = super()._restart(ended, infos)
        now = self._observe()
        for index in np.flatnonzero(ended):
            infos["final_obs"][index] = {key: value[index] for key, value in now.items()}
        return infos


@breaks(conformance.same_step_returns_both_ends)
class FinalInfoLacksThePicture(DenoisingVectorEnv):
    def _restart(self, ended, infos):
        return super()._restart(ended, {"prompt": infos["prompt"]})


@breaks(conformance.same_step_returns_both_ends)
class ReturnsTheOldObservation(DenoisingVectorEnv):
    def step(self, actions):
        observation, rewards, ended, truncations, infos = super().step(actions)
        for index in np.flatnonzero(np.asarray(ended)) if "final_obs" in infos else ():
            observation["latents"][index] = infos["final_obs"][index]["latents"]
        return observation, rewards, ended, truncations, infos


@breaks(conformance.same_step_returns_both_ends)
class HasNoFinalData(DenoisingVectorEnv):
    def _restart(self, ended, infos):
        infos = super()._restart(ended, infos)
        return {key: value for key, value in infos.items() if "final" not in key}


@breaks(conformance.same_step_leaves_the_unfinished)
class RestartsAllTogether(DenoisingVectorEnv):
    def _restart(self, ended, infos):
        infos = super()._restart(ended, infos)
        self._begin(np.flatnonzero(~ended), {})
        return infos


@breaks(conformance.same_step_leaves_the_unfinished)
class MasksNothing(DenoisingVectorEnv):
    def _restart(self, ended, infos):
        infos = super()._restart(ended, infos)
        return {**infos, "_final_obs": np.ones(self.num_envs, bool), "_final_info": np.ones(self.num_envs, bool)}


@breaks(conformance.same_step_leaves_the_unfinished)
class ClaimsFinalInfoOfAll(DenoisingVectorEnv):
    def _restart(self, ended, infos):
        infos = super()._restart(ended, infos)
        infos["final_info"]["_prompt"] = np.ones(self.num_envs, bool)
        return infos


@breaks(conformance.next_step_resets_one_step_later)
class RewardsTheResetToo(DenoisingVectorEnv):
    def step(self, actions):
        was_done = self._done.copy()
        observation, rewards, *rest = super().step(actions)
        rewards[was_done] = 0.5
        return observation, rewards, *rest


@breaks(conformance.next_step_resets_one_step_later)
class TakesTheActionAtTheReset(DenoisingVectorEnv):
    def _carry_over(self, latents, moving):
        super()._carry_over(latents, moving)
        self._latents = latents.clone()


@breaks(conformance.next_step_resets_one_step_later)
class ResetsAtOnceInDisguise(DenoisingVectorEnv):
    def __init__(self, autoreset_mode, **keywords):
        same = AutoresetMode.SAME_STEP
        super().__init__(
            autoreset_mode=same if autoreset_mode == AutoresetMode.NEXT_STEP else autoreset_mode, **keywords
        )
        self.metadata = {**self.metadata, "autoreset_mode": autoreset_mode}


@breaks(conformance.next_step_leaves_the_unfinished)
class WaitsForTheReset(DenoisingVectorEnv):
    def _carry_over(self, latents, moving):
        moving &= moving.all()  # in place: nobody moves while one is reset
        super()._carry_over(latents, moving)


# --- whose data it is ---


@breaks(conformance.results_are_not_written_again)
class ReusesItsBuffer(DenoisingVectorEnv):
    def _observe(self):
        fresh = super()._observe()
        if not hasattr(self, "_buffer"):
            self._buffer = fresh
        for key, value in fresh.items():
            self._buffer[key][...] = value
        return dict(self._buffer)


@breaks(conformance.results_are_not_written_again)
class ReusesItsInfo(DenoisingVectorEnv):
    def _with_masks(self, infos, mask):
        if "prompt" in infos:
            self._told = getattr(self, "_told", infos["prompt"])
            self._told[:] = infos["prompt"]
            infos = {**infos, "prompt": self._told}
        return super()._with_masks(infos, mask)


@breaks(conformance.results_may_be_overwritten)
class HandsOutItsState(DenoisingVectorEnv):
    def _out(self, tensor, copy=False):
        return super()._out(tensor, copy=False)


@breaks(conformance.results_may_be_overwritten)
class HandsOutItsFlags(DenoisingVectorEnv):
    def _flags(self, flags):
        return flags if self.output == "numpy" else super()._flags(flags)


@breaks(conformance.actions_may_be_overwritten)
class KeepsTheActions(DenoisingVectorEnv):
    def _carry_over(self, latents, moving):
        super()._carry_over(latents, moving)
        self._latents = latents


# --- misuse ---


@breaks(conformance.step_needs_a_reset)
class StepsUnreset(DenoisingVectorEnv):
    def _require_started(self):
        pass


@breaks(conformance.closed_is_closed)
class NeverCloses(DenoisingVectorEnv):
    def _require_open(self):
        pass


@breaks(conformance.closed_is_closed)
class ClosesOnce(DenoisingVectorEnv):
    def close(self, **keywords):
        if self.closed:
            raise RuntimeError("closed already")
        super().close(**keywords)


@breaks(conformance.bad_actions_are_refused)
class TakesDoubles(DenoisingVectorEnv):
    def step(self, actions):
        return super().step(actions.astype(np.float32) if isinstance(actions, np.ndarray) else actions.float())


@breaks(conformance.bad_actions_are_refused)
class TakesNaN(DenoisingVectorEnv):
    def step(self, actions):
        return super().step(np.nan_to_num(actions) if isinstance(actions, np.ndarray) else actions.nan_to_num())


@breaks(conformance.bad_actions_are_refused)
class BroadcastsActions(DenoisingVectorEnv):
    def step(self, actions):
        return super().step(torch.as_tensor(actions).expand(self.num_envs, -1, -1, -1) if len(actions) else actions)
