"""The conformance suite that Gymnasium lacks for vector environments, for authors of rewards, models and wrappers.

    check_vector_env(lambda **kwargs: gym.make_vec("DiffusionDenoise-Shapes-Color-v0", reward=mine, **kwargs))

Most rules play the same seed and actions twice and compare: with another output, another number of environments or
another autoreset mode. `DISABLED`, where nothing happens unasked, is the reference for the two other modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, iterate

Make = Callable[..., VectorEnv[Any, Any, Any]]
Results = dict[str, Any]

_NUM_ENVS: Final = 3
_SEED: Final = 7
_OUTPUTS: Final = ("numpy", "torch")
# One picture is decoded and scored in batches of different size, and networks then round differently.
_BATCH_TOLERANCE: Final = 0.01
_RESET: Final = ("observations", "infos")
_STEP: Final = ("observations", "rewards", "terminations", "truncations", "infos")


def check_vector_env(make: Make) -> None:
    """Hold the environments that `make` builds to all `RULES`.

    Args:
        make: called as `make(num_envs=..., autoreset_mode=..., output=...)`; gives a new environment each time. Few
            denoising steps make the check quick; every rule plays an episode or more.

    Raises:
        AssertionError: a rule is broken; the message names the rule, what it wants and what was seen.
        Exception: whatever `make` itself raises.
    """
    make(num_envs=1, autoreset_mode=AutoresetMode.DISABLED, output="numpy").close()
    for rule in RULES:
        try:
            rule(make)
        except Exception as error:
            seen = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"rule {rule.__name__}: {seen}") from error


# --- spaces, types and metadata ----------------------------------------------------------------------------------


def spaces_agree(make: Make) -> None:
    """The batch spaces are `num_envs` times the single ones."""
    for number in (1, _NUM_ENVS):
        with _opened(make, num_envs=number) as env:
            _require(env.num_envs == number, f"num_envs is {env.num_envs} where {number} was asked for")
            for kind in ("observation_space", "action_space"):
                batch, single = getattr(env, kind), getattr(env, f"single_{kind}")
                wanted = batch_space(single, number)
                _require(batch == wanted, f"{kind} must be {wanted}, single_{kind} {number} times; it is {batch}")


def metadata_names_the_mode(make: Make) -> None:
    """`metadata["autoreset_mode"]` is the `AutoresetMode` that was asked for."""
    for mode in AutoresetMode:
        with _opened(make, mode) as env:
            told = env.metadata.get("autoreset_mode")
            _require(told is mode, f"metadata['autoreset_mode'] must be {mode}; it is {told!r}")


def results_fit_the_spaces(make: Make) -> None:
    """Observations lie in their spaces; rewards are float32 `(N,)`, flags bool `(N,)`; all of the asked output."""
    for output in _OUTPUTS:
        for mode in AutoresetMode:
            with _opened(make, mode, output) as env:
                _check_fit(env, output, dict(zip(_RESET, env.reset(seed=_SEED), strict=True)))
                for step in range(_horizon(env)):
                    results = env.step(_actions(env, step, output))
                    _check_fit(env, output, dict(zip(_STEP, results, strict=True)))


def _check_fit(env: VectorEnv[Any, Any, Any], output: str, results: Results) -> None:
    _require(isinstance(results["infos"], dict), f"infos must be a dict; they are {type(results['infos']).__name__}")
    for name, value in results.items():
        for leaf in _leaves(value) if name != "infos" else ():
            _check_kind(env, output, name, leaf)
    observations = _copied(results["observations"])
    _require(observations in env.observation_space, f"observations {observations} are not in {env.observation_space}")
    for index, single in enumerate(iterate(env.observation_space, observations)):
        inside = single in env.single_observation_space
        _require(inside, f"observation {single} of env {index} is not in {env.single_observation_space}")
    for name, dtype in (("rewards", np.float32), ("terminations", np.bool_), ("truncations", np.bool_)):
        found = _copied(results.get(name, np.zeros(env.num_envs, dtype)))
        fits = found.shape == (env.num_envs,) and found.dtype == dtype
        _require(fits, f"{name} must be {dtype.__name__} ({env.num_envs},); they are {found.dtype} {found.shape}")


def _check_kind(env: VectorEnv[Any, Any, Any], output: str, name: str, leaf: Any) -> None:
    kind = torch.Tensor if output == "torch" else np.ndarray
    _require(type(leaf) is kind, f"{name} must hold {kind.__name__} with output={output!r}; saw {type(leaf).__name__}")
    if output == "torch":
        device = torch.device(env.unwrapped.device)  # type: ignore[attr-defined]
        _require(leaf.device == device, f"{name} must be on {device}, as the environment is; they are on {leaf.device}")


def numpy_equals_torch(make: Make) -> None:
    """Both outputs hold the same numbers."""
    with _opened(make) as one, _opened(make, output="torch") as other:
        steps = _horizon(one)
        _same(_play(one, steps), _play(other, steps, output="torch"), "output='numpy' and output='torch' differ")


# --- seeds -------------------------------------------------------------------------------------------------------


def same_seed_same_bits(make: Make) -> None:
    """A seed and actions give one rollout, bit for bit: in a new environment, and again in a used one."""
    with _opened(make) as one, _opened(make) as other:
        steps = _horizon(one)
        first = _play(one, steps)
        _same(first, _play(other, steps), f"two environments with seed={_SEED} differ")
        _same(first, _play(one, steps), f"a second reset with seed={_SEED} differs from the first")


def other_seed_differs(make: Make) -> None:
    """Another seed, another env of the batch and another episode each start elsewhere."""
    with _opened(make) as env:
        first, other, later = (_copied(env.reset(seed=seed)[0]) for seed in (_SEED, _SEED + 100, None))
    for index in range(_NUM_ENVS):
        for what, else_where in (
            (f"with seed={_SEED} and seed={_SEED + 100}", _row(other, index)),
            (f"and env {(index + 1) % _NUM_ENVS} of the batch", _row(first, (index + 1) % _NUM_ENVS)),
        ):
            differs = _difference(_row(first, index), else_where)
            _require(bool(differs), f"env {index} {what} start with equal observations; they must differ")
        _require(
            bool(_difference(_row(other, index), _row(later, index))),
            f"env {index} starts with equal observations after reset(seed) and the reset() that follows it",
        )


def unseeded_reset_goes_on(make: Make) -> None:
    """`reset()` after `reset(seed=s)` goes on with the generators of s."""
    with _opened(make) as one, _opened(make) as other:
        first, second = (_play(env, 0) and _copied(env.reset()[0]) for env in (one, other))
    _same(first, second, f"reset() after reset(seed={_SEED}) differs between two environments")


def batch_equals_singles(make: Make) -> None:
    """N envs with seed s are N one-env vectors with seeds s, s + 1, ..."""
    with _opened(make) as env:
        steps = _horizon(env)
        together = _play(env, steps)
    for index in range(_NUM_ENVS):
        with _opened(make, num_envs=1) as env:
            alone = _play(env, steps, seed=_SEED + index, first=index)
        what = f"env {index} of {_NUM_ENVS} with seed={_SEED} and one env with seed={_SEED + index} differ"
        _same(_row(together[0], index), alone[0], what)
        for one, other in zip(together[1:], alone[1:], strict=True):
            exact = ("observations", "terminations", "truncations")
            _same({key: _row(one[key], index) for key in exact}, {key: other[key] for key in exact}, what)
            _same(_row(one["rewards"], index), other["rewards"], f"{what}: rewards", _BATCH_TOLERANCE)


def seeds_may_be_listed(make: Make) -> None:
    """`reset(seed=[...])` gives each env its own seed."""
    with _opened(make) as env:
        together = _copied(env.reset(seed=_SEED)[0])
        backwards = [_SEED + index for index in reversed(range(_NUM_ENVS))]
        listed = _copied(env.reset(seed=backwards)[0])
    for index in range(_NUM_ENVS):
        what = f"env {index} with seed={_SEED + index} differs when its seed comes from the list {backwards}"
        _same(_row(together, index), _row(listed, _NUM_ENVS - 1 - index), what)


# --- episodes ----------------------------------------------------------------------------------------------------


def episodes_last_horizon_steps(make: Make) -> None:
    """Every episode ends after exactly T steps, terminated and never truncated, whatever the autoreset mode."""
    for mode in AutoresetMode:
        with _opened(make, mode) as env:
            horizon = _horizon(env)
            pause = int(mode == AutoresetMode.NEXT_STEP)  # the step that resets is of no episode
            played = _play(env, horizon)[1:]
            if mode == AutoresetMode.DISABLED:
                env.reset()
            played += [_step(env, step) for step in range(horizon + pause)]
        for number, results in enumerate(played, start=1):
            due = number in (horizon, 2 * horizon + pause)
            ended = results["terminations"]
            _require((ended == due).all(), f"{mode}, T={horizon}: terminations at step {number} are {ended}")
            _require(not results["truncations"].any(), f"{mode}: truncations are {results['truncations']}; never truncate")


def reward_waits_for_the_end(make: Make) -> None:
    """The reward is 0 on every step but the last: r(x_0, c) comes with x_0."""
    with _opened(make) as env:
        for number, results in enumerate(_play(env, _horizon(env))[1:-1], start=1):
            rewards = results["rewards"]
            _require((rewards == 0).all(), f"rewards at step {number} of {_horizon(env)} are {rewards}; they must be 0")


def masked_reset_leaves_the_rest(make: Make) -> None:
    """`options["reset_mask"]` resets its envs and no others, which go on to their own end."""
    with _opened(make) as env:
        before, results = _stagger(env)
        for index in range(_NUM_ENVS):
            change = _difference(_row(before, index), _row(results["observations"], index))
            _require(bool(change) == (index == 0), f"reset_mask of env 0 alone: env {index} changed: {change or 'no'}")
        told = results["infos"].get("_prompt", _only_first())
        _require((told == _only_first()).all(), f"reset_mask of env 0 alone: infos['_prompt'] is {told}")
        horizon, lead = _horizon(env), _lead(env)
        for step in range(horizon - lead):
            ended = _step(env, step)["terminations"]
        wanted = np.ones(_NUM_ENVS, bool) if lead == 0 else ~_only_first()
        _require((ended == wanted).all(), f"envs {wanted} are {horizon} steps old, and terminations are {ended}")


def step_after_the_end_is_refused(make: Make) -> None:
    """With autoreset disabled, `step` raises `ResetNeeded` until the ended envs, all of them, are reset."""
    with _opened(make) as env:
        _stagger(env)
        horizon, lead = _horizon(env), _lead(env)
        for step in range(horizon - lead):
            ended = _step(env, step)["terminations"]
        _raises(gym.error.ResetNeeded, lambda: _step(env, horizon), f"step with ended envs {ended}")
        env.reset(options={"reset_mask": ended.copy()})
        ended = _step(env, horizon)["terminations"]
        wanted = _only_first() if horizon > 1 else np.ones(_NUM_ENVS, bool)
        _require((ended == wanted).all(), f"after the reset of the ended envs, terminations are {ended}, not {wanted}")


def same_step_returns_both_ends(make: Make) -> None:
    """`SAME_STEP`: `final_obs` and `final_info` are the finished episode's, the observation is the next one's."""
    last, fresh = _reference(make)
    with _opened(make, AutoresetMode.SAME_STEP) as env:
        *_, before, results = _play(env, _horizon(env))
    infos = results["infos"]
    for key in ("final_obs", "final_info"):
        early = before["infos"].keys() & {key, f"_{key}"}
        _require(not early, f"infos hold {early} before the end of an episode")
        _require({key, f"_{key}"} <= infos.keys(), f"infos lack {key} or _{key} at the end; they hold {sorted(infos)}")
        _require(infos[f"_{key}"].all(), f"infos['_{key}'] is {infos[f'_{key}']} where all envs ended")
    for index in range(_NUM_ENVS):
        finished = {key: value[index] for key, value in last["observations"].items()}
        _same(infos["final_obs"][index], finished, f"final_obs of env {index} is not the end of its episode")
    _same(infos["final_info"], last["infos"], "final_info is not the info of the end of the episode")
    _same(results["rewards"], last["rewards"], "rewards differ from those with autoreset disabled")
    _same(results["observations"], fresh["observations"], "the observation at the end is not that of a new episode")
    _same({key: infos.get(key) for key in fresh["infos"]}, fresh["infos"], "the infos at the end are not the new ones")


def same_step_masks_the_unfinished(make: Make) -> None:
    """`SAME_STEP`: envs that go on have no final data, and are not touched."""
    with _opened(make, AutoresetMode.SAME_STEP) as env, _opened(make) as reference:
        if _lead(env) == 0:
            return  # episodes of one step all end together
        for each in (env, reference):
            _stagger(each)
        for step in range(_horizon(env) - _lead(env)):
            results, wanted = _step(env, step), _step(reference, step)
    infos, ended = results["infos"], ~_only_first()
    _same(results["terminations"], ended, "terminations")
    _require(infos["final_obs"][0] is None, f"final_obs of env 0, which goes on, is {infos['final_obs'][0]}; want None")
    _same({key: infos[key] for key in ("_final_obs", "_final_info")}, {"_final_obs": ended, "_final_info": ended}, "")
    _same(_row(results["observations"], 0), _row(wanted["observations"], 0), "env 0, which goes on, was touched")
    for index in np.flatnonzero(ended):
        change = _difference(_row(results["observations"], index), _row(wanted["observations"], index))
        _require(bool(change), f"env {index} ended, and its observation is still that of its last step")


def next_step_resets_one_step_later(make: Make) -> None:
    """`NEXT_STEP`: the step after the end resets, whatever its action, with reward 0 and no flag."""
    last, fresh = _reference(make)
    with _opened(make, AutoresetMode.NEXT_STEP) as env:
        _same(_play(env, _horizon(env))[-1], last, "the last step differs from that with autoreset disabled")
        for _ in range(_horizon(env)):
            results = _step(env, _horizon(env))
            _same(results["observations"], fresh["observations"], "the step after the end does not start a new episode")
            _same({key: results["infos"].get(key) for key in fresh["infos"]}, fresh["infos"], "the infos are not new")
            for key in ("rewards", "terminations", "truncations"):
                _require(not results[key].any(), f"{key} of the step that resets are {results[key]}; they must be 0")
            break


def next_step_resets_the_ended_alone(make: Make) -> None:
    """`NEXT_STEP`: while the ended envs are reset, the others take their step."""
    with _opened(make, AutoresetMode.NEXT_STEP) as env, _opened(make) as reference:
        if _lead(env) == 0:
            return  # episodes of one step all end together
        for each in (env, reference):
            _stagger(each)
            for step in range(_horizon(env) - _lead(env)):
                ended = _step(each, step)["terminations"]
        fresh = _copied(reference.reset(options={"reset_mask": ended.copy()})[0])
        results, wanted = _step(env, _horizon(env)), _step(reference, _horizon(env))
    for key in ("observations", "rewards", "terminations"):
        _same(_row(results[key], 0), _row(wanted[key], 0), f"env 0 did not take its step: {key}", _BATCH_TOLERANCE)
    for index in np.flatnonzero(ended):
        _same(_row(results["observations"], index), _row(fresh, index), f"env {index} ended and is not reset")


# --- whose data it is --------------------------------------------------------------------------------------------


def results_are_not_written_again(make: Make) -> None:
    """What a call returned stays as it is: users keep it."""
    for output in _OUTPUTS:
        with _opened(make, AutoresetMode.SAME_STEP, output) as env:
            kept: list[Any] = [env.reset(seed=_SEED)]
            copies = [_copied(kept[0])]
            for step in range(_horizon(env) + 1):
                kept.append(env.step(_actions(env, step, output)))
                copies.append(_copied(kept[-1]))
        for number, (now, then) in enumerate(zip(kept, copies, strict=True)):
            _same(_copied(now), then, f"output={output!r}: what call {number} returned has changed since")


def results_may_be_overwritten(make: Make) -> None:
    """Writing into what a call returned, or into an action after its step, changes nothing in the environment."""
    for output in _OUTPUTS:
        with _opened(make, AutoresetMode.SAME_STEP, output) as env:
            steps = _horizon(env) + 1
            wanted = _play(env, steps, output=output)
            results = env.reset(seed=_SEED)
            for number in range(steps + 1):
                names = _RESET if number == 0 else _STEP
                what = f"output={output!r}: overwriting what the calls before it returned changed call {number}"
                _same(_copied(dict(zip(names, results, strict=True))), wanted[number], what)
                _spoil(results)
                actions = _actions(env, number, output)
                results = env.step(actions)
                _spoil((actions,))


# --- misuse ------------------------------------------------------------------------------------------------------


def step_needs_a_reset(make: Make) -> None:
    """`step` before the first `reset` raises `ResetNeeded`."""
    for mode in AutoresetMode:
        with _opened(make, mode) as env:
            _raises(gym.error.ResetNeeded, lambda env=env: _step(env, 0), f"{mode}: step before reset")


def closed_is_closed(make: Make) -> None:
    """`close` may be called twice; `reset` and `step` after it raise one of Gymnasium's errors."""
    with _opened(make) as env:
        env.reset(seed=_SEED)
        env.close()
        env.close()
        _raises(gym.error.Error, lambda: env.reset(seed=_SEED), "reset after close")
        _raises(gym.error.Error, lambda: _step(env, 0), "step after close")


def bad_actions_are_refused(make: Make) -> None:
    """Actions of another shape or dtype, or with NaN, raise `ValueError` (NaN at the end of the episode at the latest)."""
    for output in _OUTPUTS:
        with _opened(make, output=output) as env:
            good = _actions(env, 0, output)
            wide = good.double() if isinstance(good, torch.Tensor) else good.astype(np.float64)
            bad = {"of one env too few": good[:-1], "of an axis too few": good[0], f"of dtype {wide.dtype}": wide}
            for what, actions in {**bad, "with NaN": good * float("nan")}.items():
                env.reset(seed=_SEED)
                calls = _horizon(env) if what == "with NaN" else 1
                repeat = [lambda a=actions: env.step(a)] * calls
                _raises(ValueError, lambda r=repeat: [call() for call in r], f"step with actions {what}, {output}")


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
    episodes_last_horizon_steps,
    reward_waits_for_the_end,
    masked_reset_leaves_the_rest,
    step_after_the_end_is_refused,
    same_step_returns_both_ends,
    same_step_masks_the_unfinished,
    next_step_resets_one_step_later,
    next_step_resets_the_ended_alone,
    results_are_not_written_again,
    results_may_be_overwritten,
    step_needs_a_reset,
    closed_is_closed,
    bad_actions_are_refused,
)
