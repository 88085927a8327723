"""The conformance suite that Gymnasium lacks for vector environments, for authors of rewards, models and wrappers.

    check_vector_env(lambda **kwargs: gym.make_vec("DiffusionDenoise-Shapes-Color-v0", reward=mine, **kwargs))

Most rules play the same seeds and actions twice and compare: with another output, another number of environments,
another autoreset mode. `DISABLED`, where nothing happens unasked, is the reference for the two other modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, iterate

from diffusion_gym.testing.conformance_tools import (
    NUM_ENVS,
    SEED,
    Make,
    Probe,
    Results,
    check_fit,
    copied,
    difference,
    named,
    only_first,
    opened,
    raises,
    require,
    row,
    same,
    spoiled,
)

_OUTPUTS: Final = ("numpy", "torch")
# A picture is decoded and scored in batches of different size there, and networks then round differently.
_BATCH_TOLERANCE: Final = 0.01


def check_vector_env(make: Make) -> None:
    """Hold the environments that `make` builds to all `RULES`.

    Args:
        make: called as `make(num_envs=..., autoreset_mode=..., output=...)`, gives a new environment each time. Ask
            for few denoising steps: every rule plays whole episodes.

    Raises:
        AssertionError: a rule is broken, or an environment raised where it should not; the message names the rule
            and says what was seen.
        Exception: whatever `make` itself raises at its first call.
    """
    make(num_envs=1, autoreset_mode=AutoresetMode.DISABLED, output="numpy").close()
    for rule in RULES:
        try:
            rule(make)
        except AssertionError as error:
            raise AssertionError(f"rule {rule.__name__}: {error}") from error
        except Exception as error:
            raise AssertionError(f"rule {rule.__name__}: raised {error!r}") from error


# --- spaces, types and metadata --------------------------------------------------------------------------------


def spaces_agree(make: Make) -> None:
    """The batch spaces are the single ones, `num_envs` times."""
    for number in (1, NUM_ENVS):
        with opened(make, num_envs=number) as probe:
            require(probe.env.num_envs == number, f"num_envs is {probe.env.num_envs} where {number} was asked for")
            for kind in ("observation_space", "action_space"):
                batch, single = getattr(probe.env, kind), getattr(probe.env, f"single_{kind}")
                wanted = batch_space(single, number)
                require(batch == wanted, f"{kind} of {number} envs must be {wanted}; it is {batch}")


def metadata_names_the_mode(make: Make) -> None:
    """`metadata["autoreset_mode"]` is the `AutoresetMode` that was asked for."""
    for mode in AutoresetMode:
        with opened(make, mode) as probe:
            told = probe.env.metadata.get("autoreset_mode")
            require(told is mode, f"metadata['autoreset_mode'] must be {mode}; it is {told!r}")


def results_fit_the_spaces(make: Make) -> None:
    """Observations lie in their spaces; rewards are float32 `(N,)`, flags bool `(N,)`; all of the asked output."""
    for output in _OUTPUTS:
        for mode in AutoresetMode:
            with opened(make, mode, output) as probe:
                check_fit(probe, named(probe.env.reset(seed=SEED)))
                for number in range(probe.horizon):
                    check_fit(probe, named(probe.env.step(probe.actions(number))))


def numpy_equals_torch(make: Make) -> None:
    """Both outputs hold the same numbers."""
    with opened(make) as one, opened(make, output="torch") as other:
        same(one.play(one.horizon), other.play(one.horizon), "output='numpy' and output='torch' differ")


# --- seeds -----------------------------------------------------------------------------------------------------


def same_seed_same_bits(make: Make) -> None:
    """A seed and actions give one rollout, bit for bit: in a new environment, and again in a used one."""
    with opened(make) as one, opened(make) as other:
        first = one.play(one.horizon)
        same(other.play(one.horizon), first, f"two environments with seed={SEED} differ")
        same(one.play(one.horizon), first, f"a second reset with seed={SEED} differs from the first")


def other_seed_differs(make: Make) -> None:
    """Another seed, another episode and another env of the batch start elsewhere."""
    with opened(make) as probe:
        first, later = probe.reset(seed=SEED)["observations"], probe.reset()["observations"]
        other = probe.reset(seed=SEED + 100)["observations"]
    for index in range(NUM_ENVS):
        start, beside = row(first, index), (index + 1) % NUM_ENVS
        require(difference(row(other, index), start), f"env {index} starts alike with seeds {SEED} and {SEED + 100}")
        require(difference(row(later, index), start), f"env {index} starts alike after reset(seed) and reset()")
        require(difference(row(first, beside), start), f"envs {index} and {beside} of a batch start alike")


def unseeded_reset_goes_on(make: Make) -> None:
    """`reset()` after `reset(seed=s)` goes on with the generators of s."""
    starts = []
    for _ in range(2):
        with opened(make) as probe:
            probe.reset(seed=SEED)
            starts.append(probe.reset())
    same(starts[0], starts[1], f"reset() after reset(seed={SEED}) differs between two environments")


def batch_equals_singles(make: Make) -> None:
    """N envs with seed s are N one-env vectors with seeds s, s + 1, ..."""
    with opened(make) as probe:
        together = probe.play(probe.horizon)
    for index in range(NUM_ENVS):
        with opened(make, num_envs=1, first=index) as probe:
            alone = probe.play(probe.horizon, seed=SEED + index)
        what = f"env {index} of {NUM_ENVS} with seed={SEED} is not one env with seed={SEED + index}"
        same(row(together[0], index), alone[0], what)
        for one, other in zip(together[1:], alone[1:], strict=True):
            for key in ("observations", "terminations", "truncations"):
                same(row(one[key], index), other[key], f"{what}: {key}")
            same(row(one["rewards"], index), other["rewards"], f"{what}: rewards", _BATCH_TOLERANCE)


def seeds_may_be_listed(make: Make) -> None:
    """`reset(seed=[...])` gives each env a seed of its own."""
    backwards = [SEED + index for index in reversed(range(NUM_ENVS))]
    with opened(make) as probe:
        counted, listed = probe.reset(seed=SEED), probe.reset(seed=backwards)
    for index in range(NUM_ENVS):
        what = f"seed={SEED + index} differs by whether it is counted from seed={SEED} or listed in seed={backwards}"
        same(row(listed, NUM_ENVS - 1 - index), row(counted, index), what)


# --- episodes --------------------------------------------------------------------------------------------------


def episodes_last_t_steps(make: Make) -> None:
    """Every episode terminates after exactly T steps, and is never truncated."""
    for mode in AutoresetMode:
        with opened(make, mode) as probe:
            idle = int(mode is AutoresetMode.NEXT_STEP)  # its step that resets belongs to no episode
            played = probe.play(probe.horizon)[1:]
            if mode is AutoresetMode.DISABLED:
                probe.reset()
            played += [probe.step(number) for number in range(idle + probe.horizon)]
        for number, results in enumerate(played, start=1):
            due, ended = number in (probe.horizon, len(played)), results["terminations"]
            require((ended == due).all(), f"{mode}, T={probe.horizon}: terminations of step {number} are {ended}")
            require(not results["truncations"].any(), f"{mode}: step {number} truncates: {results['truncations']}")


def reward_waits_for_the_end(make: Make) -> None:
    """The reward is 0 on every step but the last."""
    with opened(make) as probe:
        for number, results in enumerate(probe.play(probe.horizon - 1)[1:], start=1):
            rewards = results["rewards"]
            require((rewards == 0).all(), f"rewards of step {number} of {probe.horizon} are {rewards}; they must be 0")


def masked_reset_leaves_the_rest(make: Make) -> None:
    """`options["reset_mask"]` resets its envs and no other; those go on to their own end."""
    with opened(make) as probe:
        before, results = probe.stagger()
        for index in range(NUM_ENVS):
            change = difference(row(results["observations"], index), row(before["observations"], index))
            require(bool(change) == (index == 0), f"reset_mask of env 0 alone; env {index}: {change or 'no change'}")
        told = results["infos"].get("_prompt", only_first())
        require((told == only_first()).all(), f"reset_mask of env 0 alone; infos['_prompt'] is {told}")
        ended = probe.to_the_end()["terminations"]
        wanted = ~only_first() | (probe.lead == 0)
        require((ended == wanted).all(), f"terminations are {ended} where envs {wanted} are {probe.horizon} steps old")


def step_after_the_end_is_refused(make: Make) -> None:
    """Without autoreset, `step` raises `ResetNeeded` from the end of any episode to its reset."""
    with opened(make) as probe:
        probe.stagger()
        ended = probe.to_the_end()["terminations"]
        raises(gym.error.ResetNeeded, lambda: probe.step(0), f"step where envs {ended} have ended")
        probe.reset(options={"reset_mask": ended})
        after = probe.step(0)["terminations"]
        wanted = only_first() | (probe.horizon == 1)
        require((after == wanted).all(), f"terminations after the reset of {ended} are {after} instead of {wanted}")


def _reference(make: Make) -> tuple[Results, Results]:
    """The last step of the first episode, and the reset that starts the second, with autoreset disabled."""
    with opened(make) as probe:
        return probe.play(probe.horizon)[-1], probe.reset()


# --- autoreset -------------------------------------------------------------------------------------------------


def same_step_returns_both_ends(make: Make) -> None:
    """`SAME_STEP`: `final_obs` and `final_info` are the finished episode's, the observation is the next one's."""
    last, fresh = _reference(make)
    with opened(make, AutoresetMode.SAME_STEP) as probe:
        *earlier, results = probe.play(probe.horizon)
    keys = {"final_obs", "_final_obs", "final_info", "_final_info"}
    for early in earlier:
        require(not keys & early["infos"].keys(), f"infos hold {keys & early['infos'].keys()} before the end")
    infos = results["infos"]
    require(keys <= infos.keys(), f"infos lack {keys - infos.keys()} at the end of an episode")
    _check_new_episode(results, fresh)
    same(results["rewards"], last["rewards"], "rewards are not those with autoreset disabled")
    for key in ("_final_obs", "_final_info"):
        require(infos[key].all(), f"infos[{key!r}] is {infos[key]} where all envs have ended")
    for index, finished in enumerate(iterate(probe.env.observation_space, last["observations"])):
        same(infos["final_obs"][index], dict(finished), f"final_obs of env {index} is not the end of its episode")
    same(infos["final_info"], last["infos"], "final_info is not the info of the end of the episodes")


def _check_new_episode(results: Results, fresh: Results) -> None:
    same(results["observations"], fresh["observations"], "the observation is not that of a new episode")
    infos = {key: results["infos"].get(key) for key in fresh["infos"]}
    same(infos, fresh["infos"], "the infos are not those of a new episode")


def same_step_leaves_the_unfinished(make: Make) -> None:
    """`SAME_STEP`: envs that have not ended have no final data, and their episode goes on."""
    with opened(make, AutoresetMode.SAME_STEP) as probe, opened(make) as reference:
        if probe.lead == 0:
            return  # where episodes last one step, all end together
        probe.stagger()
        reference.stagger()
        results, wanted = probe.to_the_end(), reference.to_the_end()
    infos, ended = results["infos"], wanted["terminations"]
    same(results["terminations"], ended, "terminations are not those with autoreset disabled")
    for key in ("_final_obs", "_final_info"):
        same(infos[key], ended, f"infos[{key!r}] must be the mask of the ended envs")
    claimed = [key for key, mask in infos["final_info"].items() if key.startswith("_") and mask[0]]
    require(not claimed, f"masks {claimed} in final_info claim something for env 0, which goes on")
    require(infos["final_obs"][0] is None, f"final_obs of env 0, which goes on, is {infos['final_obs'][0]}, not None")
    for index in range(NUM_ENVS):
        change = difference(row(results["observations"], index), row(wanted["observations"], index))
        require(bool(change) == ended[index], f"env {index} (ended: {ended[index]}) was reset: {bool(change)}")


def next_step_resets_one_step_later(make: Make) -> None:
    """`NEXT_STEP`: the step after the end resets, whatever its action, with reward 0 and no flag."""
    last, fresh = _reference(make)
    with opened(make, AutoresetMode.NEXT_STEP) as probe:
        same(probe.play(probe.horizon)[-1], last, "the last step is not that with autoreset disabled")
        results = probe.step(probe.horizon)
    _check_new_episode(results, fresh)
    for key in ("rewards", "terminations", "truncations"):
        require(not results[key].any(), f"{key} of the step that resets are {results[key]}; they must be 0")


def next_step_leaves_the_unfinished(make: Make) -> None:
    """`NEXT_STEP`: while ended envs are reset, the others take their step."""
    with opened(make, AutoresetMode.NEXT_STEP) as probe, opened(make) as reference:
        if probe.lead == 0:
            return  # where episodes last one step, all end together
        for each in (probe, reference):
            each.stagger()
            ended = each.to_the_end()["terminations"]
        fresh = reference.reset(options={"reset_mask": ended})["observations"]
        results, wanted = probe.step(probe.horizon), reference.step(probe.horizon)
    for key in ("observations", "rewards", "terminations"):
        same(row(results[key], 0), row(wanted[key], 0), f"{key}: env 0 has not taken its step")
    for index in np.flatnonzero(ended).tolist():
        same(row(results["observations"], index), row(fresh, index), f"env {index} has ended and was not reset")


# --- whose data it is ------------------------------------------------------------------------------------------


def results_are_not_written_again(make: Make) -> None:
    """What a call returned stays as it is: users keep it."""
    for output in _OUTPUTS:
        with opened(make, AutoresetMode.SAME_STEP, output) as probe:
            kept: list[Any] = [probe.env.reset(seed=SEED)]
            copies = [copied(kept[0])]
            for number in range(probe.horizon + 1):
                kept.append(probe.env.step(probe.actions(number)))
                copies.append(copied(kept[-1]))
        for number, (now, then) in enumerate(zip(kept, copies, strict=True)):
            same(named(copied(now)), named(then), f"output={output!r}: what call {number} returned has changed since")


def results_may_be_overwritten(make: Make) -> None:
    """Writing into what a call returned changes nothing that comes later."""
    for output in _OUTPUTS:
        for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
            with opened(make, mode, output) as probe:
                wanted = probe.play(probe.horizon + 1)
                returned: tuple[Any, ...] = probe.env.reset(seed=SEED)
                for number, results in enumerate(wanted):
                    what = f"output={output!r}, {mode}: overwriting earlier results changed those of call {number}"
                    same(named(copied(returned)), results, what)
                    spoiled(returned)
                    returned = probe.env.step(probe.actions(number))


def actions_may_be_overwritten(make: Make) -> None:
    """Writing into actions after their step changes nothing: a reset of env 0 returns the others as they were."""
    for output in _OUTPUTS:
        with opened(make, output=output) as probe:
            probe.reset(seed=SEED)
            actions = probe.actions(0)
            before = copied(probe.env.step(actions)[0])
            spoiled(actions)
            after = probe.reset(options={"reset_mask": only_first()})["observations"]
        for index in range(1, NUM_ENVS):
            same(row(after, index), row(before, index), f"output={output!r}: overwriting actions changed env {index}")


# --- misuse ----------------------------------------------------------------------------------------------------


def step_needs_a_reset(make: Make) -> None:
    """`step` before the first `reset` raises `ResetNeeded`."""
    for mode in AutoresetMode:
        with opened(make, mode) as probe:
            raises(gym.error.ResetNeeded, lambda: probe.step(0), f"{mode}: step before reset")  # noqa: B023


def closed_is_closed(make: Make) -> None:
    """`close` may be called twice; `reset` and `step` after it raise `ClosedEnvironmentError`."""
    with opened(make) as probe:
        probe.reset(seed=SEED)
        probe.env.close()
        probe.env.close()
        raises(gym.error.ClosedEnvironmentError, lambda: probe.reset(seed=SEED), "reset after close")
        raises(gym.error.ClosedEnvironmentError, lambda: probe.step(0), "step after close")


def bad_actions_are_refused(make: Make) -> None:
    """Actions of wrong shape or dtype raise `ValueError` at once, with NaN at the end of the episode at the latest."""
    for output in _OUTPUTS:
        with opened(make, output=output) as probe:
            good = probe.actions(0)
            wide = good.double() if isinstance(good, torch.Tensor) else good.astype(np.float64)
            for what, bad in (("for too few envs", good[:-1]), ("of one env", good[0]), ("in float64", wide)):
                _check_refused(probe, bad, 1, f"output={output!r}: step with actions {what}")
            _check_refused(probe, good * float("nan"), probe.horizon, f"output={output!r}: an episode of NaN actions")


def _check_refused(probe: Probe, actions: Any, steps: int, what: str) -> None:
    probe.reset(seed=SEED)
    raises(ValueError, lambda: [probe.env.step(actions) for _ in range(steps)], what)


RULES: Final[tuple[Callable[[Make], None], ...]] = (
    spaces_agree,
    metadata_names_the_mode,
    results_fit_the_spaces,
    numpy_equals_torch,
    same_seed_same_bits,
    other_seed_differs,
    unseeded_reset_goes_on,
    batch_equals_singles,
    seeds_may_be_listed,
    episodes_last_t_steps,
    reward_waits_for_the_end,
    masked_reset_leaves_the_rest,
    step_after_the_end_is_refused,
    same_step_returns_both_ends,
    same_step_leaves_the_unfinished,
    next_step_resets_one_step_later,
    next_step_leaves_the_unfinished,
    results_are_not_written_again,
    results_may_be_overwritten,
    actions_may_be_overwritten,
    step_needs_a_reset,
    closed_is_closed,
    bad_actions_are_refused,
)
