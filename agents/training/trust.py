"""Whose folder it is, and what its settings would run, contact, read and write. docs/trust.md.

A folder that this user made here has a seal: an HMAC of its settings under a key that only this user has. In any other
folder what the settings name is listed, and nothing is done before the command line says `--trust`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

from pydantic import ConfigDict, Field

from diffusion_gym.agents.algorithms import AGENTS, AgentConfig, agent_class
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.reward_options import parse_keywords
from diffusion_gym.agents.training.run_files import read_config
from diffusion_gym.agents.training.settings import RunSettings
from diffusion_gym.models import MODELS
from diffusion_gym.prompts.files import names_prompt_file
from diffusion_gym.rewards import REWARDS
from diffusion_gym.rewards.factory import FITTED, reward_sources
from diffusion_gym.schemas import Schema, checked, read_checked
from diffusion_gym.storage import write_json

_SEAL: Final = ".seal.json"
_KEY_BYTES: Final = 32
_SHOWN, _WIDTH = 20, 160  # lines of a list, and characters of a line
_PLAIN: Final = re.compile(r"\w[\w.-]*(:\d+)?", re.ASCII)
# Keywords of rewards whose text is a choice, or said to a model: no path, no address.
_TEXTS: Final = frozenset(
    {"device", "dtype", "image_format", "mode", "prefix", "question", "reference", "rule", "vlm_model"}
)
_WRITTEN: Final = frozenset({"cache", "z_scores"})


Act = Literal["run", "contact", "read", "write"]


class Untrusted(ValueError):
    """A folder that was not made here names things that its user has not agreed to."""


@dataclass(frozen=True)
class Claim:
    """Something that settings name and that is not registered here.

    Attributes:
        act: what would be done with it.
        what: the thing.
        option: where it is named.
    """

    act: Act
    what: str
    option: str


@dataclass(frozen=True)
class Seal:
    """That this user made a folder here, or trusts it.

    Attributes:
        token_to: the only addresses that get tokens of the environment; None where the user named them all.
    """

    token_to: tuple[str, ...] | None = None


class _SealFile(Schema):
    token_to: list[str] | None
    hmac: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def require_trust(folder: Path, claims: Sequence[Claim], trust: bool, source: Path | None = None) -> Seal | None:
    """Refuse a folder without a seal, if its settings name something or it has links that lead out of it.

    Args:
        folder: the folder; it may be missing.
        claims: what its settings name.
        trust: whether the command line has `--trust`.
        source: where the settings are, if not in the folder.

    Returns:
        The seal that the folder has earned, without tokens for anybody; None where there was nothing to trust.

    Raises:
        Untrusted: the message lists everything.
    """
    found = [*claims, *_links(folder)]
    if found and not trust:
        raise Untrusted(_listed(source or folder, found))
    return Seal(()) if found else None


def seal_of(folder: Path) -> Seal | None:
    """The seal of a folder; None where it has none, or its settings or links are others now."""
    path = folder / _SEAL
    try:
        stored = read_checked(_SealFile, path, "") if path.is_file() else None
    except (OSError, ValueError):
        return None
    key = _key(make=False)
    if stored is None or key is None:
        return None
    if not hmac.compare_digest(_hmac(key, folder, stored.token_to), stored.hmac.encode()):
        return None
    return Seal(None if stored.token_to is None else tuple(stored.token_to))


def write_seal(folder: Path, seal: Seal) -> None:
    """Seal a folder as it is; warns where no key can be kept, and the folder stays without."""
    try:
        key = _key(make=True)
    except OSError as error:
        warnings.warn(
            f"{_key_file()} cannot be written ({error.strerror or error}), so that {str(folder)!r} will count as "
            "somebody else's; set XDG_DATA_HOME to a folder of yours",
            stacklevel=2,
        )
        return
    token_to = None if seal.token_to is None else list(seal.token_to)
    stored = {"token_to": token_to, "hmac": _hmac(key or b"", folder, token_to).decode()}
    write_json(folder / _SEAL, stored)


def run_claims(stored: Any) -> list[Claim]:
    """What the settings of a run's `config.json` name; imports nothing of it.

    Raises:
        ValueError: they are no settings of a run.
    """
    own = checked(_Named, stored, "settings", "this is no config of a diffusion-gym run").model_dump()
    env, options, agent = own.pop("env_options"), own.pop("agent_options"), own["agent"]
    config = agent_class(agent).Config if agent in AGENTS else AgentConfig
    return [*_options("", own, RunSettings), *_options("env.", env, EnvOptions), *_options("agent.", options, config)]


class _Named(Schema):
    """What must be known of settings to tell what they name; the rest is read once they are trusted."""

    model_config = ConfigDict(extra="allow")
    agent: str
    env: str
    env_options: dict[str, Any]
    agent_options: dict[str, Any]


def suite_claims(suite: Mapping[str, Any], task_kind: Any) -> list[Claim]:
    """What the fields of a benchmark's `Suite` name, its tasks as mappings too; `task_kind` is the type of a task."""
    found: list[Claim] = []
    configs = [AgentConfig, *(agent_class(agent).Config for agent in AGENTS)]
    tables = ("tasks", "overrides", "agents")
    found += _options("", {k: v for k, v in suite.items() if k not in (*tables, "name", "description")}, RunSettings)
    for options in (suite["overrides"], *suite["agents"].values()):
        for name, value in options.items():
            kinds = {"": RunSettings, "env.": EnvOptions}
            prefix = next((each for each, kind in kinds.items() if name in _choices(kind)), "agent.")
            found += _options(prefix, {name: value}, *([kinds[prefix]] if prefix in kinds else configs))
    for task in suite["tasks"].values():
        found += _options("env.", task["env_options"], EnvOptions)
        own = {key: value for key, value in task.items() if key not in ("env_options", "probe", "probe_kwargs")}
        found += _options("", own, RunSettings, task_kind)
        found += _options("env.", {"reward": task["probe"], "reward_kwargs": task["probe_kwargs"]}, EnvOptions)
    return list(dict.fromkeys(found))


def _options(prefix: str, values: Mapping[str, Any], *kinds: Any) -> Iterator[Claim]:
    """What options name: every text that is no choice of its type in a dataclass, by the rule of its option."""
    for name, value in values.items():
        option = prefix + name
        if option in ("env.reward_kwargs", "probe_kwargs"):
            given = {} if value is None else checked(dict[str, Any], value, option, "give names and values")
            yield from _keywords(option, parse_keywords(given))
        elif option in ("env.reward", "probes"):
            for part in [value] if isinstance(value, str | Mapping) else _texts_in(value):
                for source in reward_sources(part):
                    yield from _reward(option, source)
        elif option in _RULES:
            for text in _texts_in(value):
                yield from _RULES[option](option, text)
        else:
            for text in _texts_in(value):
                if not any(text in _choices(kind).get(name, ()) for kind in kinds):
                    yield from _files(option, text)


@cache
def _choices(kind: Any) -> dict[str, frozenset[str]]:
    """The texts that the types of a dataclass's fields list."""

    def listed(hint: Any) -> Iterator[str]:
        for part in get_args(hint):
            yield from (part,) if isinstance(part, str) else listed(part)

    return {name: frozenset(listed(hint)) for name, hint in get_type_hints(kind).items()}


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from (*_texts_in(key), *_texts_in(part))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts_in(part)


def _nothing(option: str, text: str) -> Iterator[Claim]:
    yield from ()


def _plain(option: str, text: str) -> Iterator[Claim]:
    if not _PLAIN.fullmatch(text):
        yield from _files(option, text)


def _module(option: str, text: str) -> Iterator[Claim]:
    """`module:attribute`; also Gymnasium imports what stands before the colon of an id."""
    if ":" in text:
        yield Claim("run", f"{text}{_place(text.partition(':')[0])}", option)


def _reward(option: str, text: str) -> Iterator[Claim]:
    if text.startswith(("http://", "https://")):
        yield Claim("contact", f"{text}, sending pictures and prompts", option)
    elif text.endswith(FITTED):
        yield Claim("read", f"{text}, and the model that it names", option)
    elif text not in REWARDS:
        yield Claim("run", f"{text}{_place(text.partition(':')[0])}", option)


def _model(option: str, text: str) -> Iterator[Claim]:
    if text not in MODELS:
        yield from _files(option, text)


def _prompts(option: str, text: str) -> Iterator[Claim]:
    if names_prompt_file(text):
        yield Claim("read", f"{text}, whose lines go to the reward", option)


def _written(option: str, text: str) -> Iterator[Claim]:
    yield Claim("write", text, option)


def _track(option: str, text: str) -> Iterator[Claim]:
    if text not in ("tensorboard", "none"):
        yield Claim("contact", f"{text}, sending pictures and numbers", option)


def _files(option: str, text: str) -> Iterator[Claim]:
    """A text of which is known only that it may be an address, a path or a hub id."""
    if text.startswith(("http://", "https://")):
        yield Claim("contact", f"{text}, sending pictures and prompts", option)
    elif text.startswith((".", "/", "~")) or text.count("/") != 1 or os.path.exists(text):
        yield Claim("read", text, option)
    else:
        yield Claim("contact", f"the hub, for {text}", option)


def _keywords(option: str, values: Mapping[str, Any]) -> Iterator[Claim]:
    """What a reward's keywords name, at any depth."""
    for name, value in values.items():
        own = f"{option} {name}"
        if isinstance(value, Mapping):
            yield from _keywords(own, value)
        elif name not in _TEXTS:
            for text in _texts_in(value):
                yield from (Claim("write", text, own),) if name in _WRITTEN else _files(own, text)


_RULES: Final[Mapping[str, Callable[[str, str], Iterator[Claim]]]] = {
    "agent": _module,
    "env": _module,
    "out": _nothing,  # the folder that the command names stands in for it
    "preset": _plain,
    "track": _track,
    "device": _plain,
    "env.model": _model,
    "env.prompts": _prompts,
    "env.embedding_cache": _written,
    **{f"env.{name}": _plain for name in ("device", "dtype", "log_prob_reduction", "revision", "sampler", "variant")},
    "env.text_encoder_device": _plain,
}


def _place(module: str) -> str:
    """Where the first part of a module would come from; it is not imported for that."""
    top = module.partition(".")[0]
    try:
        found = PathFinder.find_spec(top, [os.getcwd(), *sys.path])
    except (ImportError, OSError, ValueError):
        found = None
    places = [] if found is None else [found.origin, *(found.submodule_search_locations or ())]
    where = next((place for place in places if place), None)
    return f", {top} being {where}" if where else ", which is not found here"


def _links(folder: Path) -> Iterator[Claim]:
    """The symbolic links in a folder that lead out of it, and settings in it that W&B would follow."""
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(root):
                yield Claim("write", f"{os.path.realpath(path)}, and delete in it", os.path.relpath(path, root))
    if (folder / "wandb" / "settings").exists():
        yield Claim("contact", "the address of W&B in that file", "wandb/settings")


def _listed(folder: Path, claims: Sequence[Claim]) -> str:
    """One screen for all claims; control characters of a stranger's texts are escaped."""
    order = get_args(Act)
    lines = []
    for claim in sorted(claims, key=lambda claim: order.index(claim.act)):
        text = f"{claim.what} ({claim.option})".encode("unicode_escape").decode()
        lines.append(f"  {claim.act:8}{text if len(text) <= _WIDTH else text[: _WIDTH - 3] + '...'}")
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(
        [
            f"{str(folder)!r} was not made by you on this machine, or has been changed since. It names what would",
            *lines[:_SHOWN],
            *more,
            "Nothing of it was done. If you trust whoever made it with all that your account can do, add --trust "
            "(docs/trust.md).",
        ]
    )


def _hmac(key: bytes, folder: Path, token_to: Any) -> bytes:
    """What a seal holds: the HMAC of the folder's settings, its links, and the addresses."""
    links = [[claim.option, claim.what] for claim in _links(folder)]
    text = json.dumps([_sealed(folder), sorted(links), token_to], sort_keys=True)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest().encode()


def _sealed(folder: Path) -> Any:
    """The settings of a run, or the text of a benchmark's suite; None where there is neither."""
    try:
        if (folder / "config.json").is_file():
            return read_config(folder).settings
        return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.toml"))]
    except (OSError, ValueError):
        return None


def _key_file() -> Path:
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "diffusion-gym" / "key"


def _key(make: bool) -> bytes | None:
    """This user's key.

    Args:
        make: make one where there is none; of several processes that do, one wins.

    Raises:
        OSError: it cannot be made.
        ValueError: the file holds no key.
    """
    path = _key_file()
    if make and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent)  # readable by this user alone
        try:
            os.write(handle, secrets.token_bytes(_KEY_BYTES))
            os.link(name, path)
        except FileExistsError:
            pass  # another process was faster
        finally:
            os.close(handle)
            os.unlink(name)
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(key) != _KEY_BYTES:
        raise ValueError(f"{path} holds no key of diffusion-gym; remove it, and give --trust for your older folders")
    return key
