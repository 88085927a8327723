"""Rewards by name, by address, from a module, or as a weighted sum of such."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

from diffusion_gym.registry import WrongKeyword, imported, unknown_name
from diffusion_gym.rewards.base import REWARDS, Reward, needed_metadata, reward_name
from diffusion_gym.rewards.preference.reward import PreferenceReward
from diffusion_gym.rewards.remote import RemoteReward
from diffusion_gym.rewards.weighted import WeightedSum, ZScores

FITTED: Final = ".safetensors"  # ends the name of a file that `diffusion-gym fit-preferences` wrote
Source = str | Reward | Callable[..., Any] | Mapping[Any, float]


def make_reward(reward: Source, **kwargs: Any) -> Reward:
    """Build a reward from a description of it, or pass a callable through.

    Args:
        reward: one of

            - a name in `REWARDS`;
            - `"labels.safetensors"`, a file that was fitted to people's choices (`PreferenceReward`);
            - `"http://host:port"`, a reward server (`RemoteReward`);
            - `"module:attribute"`: a class is built with the keywords; any other callable is the reward itself, and
              gets the keywords at each call;
            - a mapping from names, addresses, `module:attribute` or callables to weights, or the same as a string,
              `"Aesthetic=1,Compressibility=0.1"` (`WeightedSum`);
            - a callable `(images, prompts, metadata) -> RewardOutput or (N,) numbers`.
        **kwargs: the reward's own keywords, such as `strict=True` for the Shapes rewards. Those of a weighted sum are
            `z_scores` (see `WeightedSum`) and `keywords`, the keywords of each part under what the sum calls it.

    Raises:
        ValueError: an unknown name, something that is no reward, or keywords together with a callable.
        TypeError: a keyword that the reward does not take.
        RewardError: no reward server answers at that address.
    """
    if isinstance(reward, Mapping):
        return _sum(reward, kwargs)
    if isinstance(reward, str):
        return _named(reward, kwargs)
    if not callable(reward):
        raise ValueError(f"reward={reward!r} is neither a name nor a callable; known names: {', '.join(REWARDS)}")
    if kwargs:
        raise ValueError(f"reward_kwargs={kwargs!r} goes with a reward's name, not with a callable; bind them yourself")
    return reward


def default_prompts(source: object, reward: Reward) -> str | None:
    """The prompt set that goes with a reward; None for the model's.

    Args:
        source: what `make_reward` was given.
        reward: what it made of that.
    """
    own: str | None = getattr(reward, "default_prompts", None)  # may depend on its keywords
    if own is None and isinstance(source, str) and source in REWARDS:
        return REWARDS.default_prompts(source)
    return own


def _named(name: str, kwargs: dict[str, Any]) -> Reward:
    if name in REWARDS:
        _check_keywords(name, REWARDS[name], kwargs)
        return REWARDS[name](**kwargs)
    if "=" in name and not name.endswith(FITTED):
        return _sum(_weights(name), kwargs)
    if name.endswith(FITTED):
        _check_keywords(name, partial(PreferenceReward, name), kwargs)
        return PreferenceReward(name, **kwargs)
    if name.startswith(("http://", "https://")):
        hint = "; the reward's own keywords go with `diffusion-gym serve-reward` at the server"
        _check_keywords(name, partial(RemoteReward, name), kwargs, hint)
        return RemoteReward(name, **kwargs)
    if ":" in name:
        return _imported(name, kwargs)
    return REWARDS[name](**kwargs)  # raises, with the closest name


def reward_sources(reward: object) -> Iterator[str]:
    """The names, addresses and `module:attribute` that `make_reward` would build `reward` of: those of each part.

    Args:
        reward: a text or a mapping, as for `make_reward`; other things name nothing.
    """
    if isinstance(reward, Mapping):
        for part in reward:
            yield from reward_sources(part)
    elif isinstance(reward, str) and reward not in REWARDS and "=" in reward and not reward.endswith(FITTED):
        yield from reward_sources(_weights(reward))
    elif isinstance(reward, str):
        yield reward


def _check_keywords(name: str, factory: Callable[..., Any], kwargs: Mapping[str, Any], hint: str = "") -> None:
    """Check the names of keywords, and those that are true or false, before anything is built.

    Raises:
        WrongKeyword: a keyword that `factory` does not take; `hint` ends the message.
        ValueError: a keyword that is true or false by default has another value.
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # a class written in C tells nothing of itself
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return  # the factory checks them
    fixed = factory.keywords if isinstance(factory, partial) else {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [parameter.name for parameter in parameters if parameter.kind in named and parameter.name not in fixed]
    for key in kwargs:
        if key not in known:
            told = (
                unknown_name("reward_kwargs", key, known) if known else f"reward_kwargs={key!r}: it takes no keywords"
            )
            raise WrongKeyword(f"with reward={name!r}: {told}{hint}")
    _check_switches(name, parameters, kwargs)


def _check_switches(name: str, parameters: Iterable[inspect.Parameter], kwargs: Mapping[str, Any]) -> None:
    """Refuse what is neither true nor false for a keyword that is one of them by default: 'no' would count as true.

    Raises:
        ValueError: the keyword and its value.
    """
    for parameter in parameters:
        value = kwargs.get(parameter.name, True)
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            raise ValueError(
                f"reward={name!r}: {parameter.name}={value!r} must be True or False; on a command line true or false"
            )


def _sum(weights: Mapping[Any, float], kwargs: dict[str, Any]) -> Reward:
    parts = [source if isinstance(source, str) else reward_name(source) for source in weights]
    hint = f"; keywords of a part go in keywords={{{parts[0] if parts else 'Color'!r}: {{...}}}}"
    _check_keywords(",".join(parts), partial(_weighted, weights), kwargs, hint)
    return _weighted(weights, **kwargs)


def _weights(text: str) -> dict[str, float]:
    """`"A=1,B=-0.5"` as a mapping."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            name = ""
        if not name or name in weights:
            raise ValueError(
                f"reward={text!r} must name each reward once with its weight, such as Aesthetic=1,Compressibility=0.1"
            )
        weights[name] = number
    return weights


def _weighted(
    weights: Mapping[Any, float],
    *,
    keywords: Mapping[str, Mapping[str, Any]] | None = None,
    z_scores: ZScores | None = None,
) -> Reward:
    named = [source if isinstance(source, str) else reward_name(source) for source in weights]
    for name in keywords or {}:
        if name not in named:
            raise ValueError(unknown_name("keywords", name, named))
    parts: dict[str, tuple[Reward, float]] = {}
    prompts: list[str] = []
    for key, (source, weight) in zip(named, weights.items(), strict=True):
        part = make_reward(source, **(keywords or {}).get(key, {}))
        name = key if key in REWARDS else reward_name(part)
        if name in parts:
            raise ValueError(f"reward={list(weights)!r} holds two rewards named {name!r}; give one another name")
        parts[name] = (part, weight)
        prompts += [chosen for chosen in [default_prompts(source, part)] if chosen is not None]
    return WeightedSum(parts, z_scores=z_scores, default_prompts=prompts[0] if prompts else None)


def _imported(name: str, kwargs: dict[str, Any]) -> Reward:
    """The reward `module:attribute`."""
    value: Any = imported("reward", name, "module:attribute, such as my_rewards:brightness for my_rewards.py", callable)
    if isinstance(value, type):
        _check_keywords(name, value, kwargs)
        value = value(**kwargs)
    elif kwargs and callable(value):
        value = _bound(name, value, kwargs)
    if not callable(value):
        raise ValueError(
            f"reward={name!r} is {type(value).__name__}, not callable; name a function, or a class with one"
        )
    return value


def _bound(name: str, function: Callable[..., Any], kwargs: dict[str, Any]) -> Reward:
    try:
        signature = inspect.signature(function)
        signature.bind(None, None, None, **kwargs)
    except TypeError as error:
        raise WrongKeyword(f"reward={name!r} called with reward_kwargs={kwargs!r}: {error}") from None
    _check_switches(name, signature.parameters.values(), kwargs)
    bound: Any = partial(function, **kwargs)
    bound.name, bound.needs_metadata = reward_name(function), needed_metadata(function)
    return bound
