"""What trains by name: native agents, the user's own, and those of Stable-Baselines3 and Tianshou."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from diffusion_gym.agents.benchmark.learner import Learner, NativeLearner
from diffusion_gym.agents.training.settings import RunSettings
from diffusion_gym.registry import unknown_name


@dataclass(frozen=True)
class LibraryAgent:
    """A library's algorithm.

    Attributes:
        config: the native agent that it expresses, whose options and presets it reads.
        package: what must be installed.
        distribution: what pip calls it.
        extra: the extra that installs it.
    """

    config: str
    package: str
    distribution: str
    extra: str


_SB3: Final = ("stable_baselines3", "stable-baselines3", "sb3")
_TIANSHOU: Final = ("tianshou", "tianshou", "tianshou")
LIBRARY_AGENTS: Final = {
    "sb3/ppo": LibraryAgent("ddpo_is", *_SB3),
    "sb3/a2c": LibraryAgent("ddpo_sf", *_SB3),
    "sb3/ddpo_ppo": LibraryAgent("ddpo_is", *_SB3),
    "tianshou/ppo": LibraryAgent("ddpo_is", *_TIANSHOU),
    "tianshou/reinforce": LibraryAgent("ddpo_sf", *_TIANSHOU),
}


def make_learner(agent: str, settings: RunSettings) -> Learner:
    """The learner of a name.

    Args:
        agent: a name in `AGENTS`, `module:Class`, or one of `LIBRARY_AGENTS`.
        settings: of the run; for a library's agent those of the native agent that it expresses.

    Raises:
        ImportError: the library is not installed; the message names the extra.
        ValueError: an option that the agent does not have.
    """
    if agent not in LIBRARY_AGENTS:
        return NativeLearner(settings)
    kind = agent.partition("/")[2]
    if LIBRARY_AGENTS[agent].extra == "sb3":
        from diffusion_gym.agents.benchmark.sb3_learner import SB3Learner

        return SB3Learner(kind, settings)
    from diffusion_gym.agents.benchmark.tianshou_learner import TianshouLearner

    return TianshouLearner(kind, settings)


def config_of(agent: str) -> str:
    """The agent whose options and presets a learner reads: itself, or what a library's agent expresses.

    Raises:
        ValueError: no library has such an agent, or the library is not installed.
    """
    if "/" not in agent:
        return agent
    if agent not in LIBRARY_AGENTS:
        raise ValueError(unknown_name("agent", agent, list(LIBRARY_AGENTS)))
    library = LIBRARY_AGENTS[agent]
    require_package(library.package, library.extra, f"agent={agent!r}")
    return library.config


def require_package(package: str, extra: str, asked: str) -> None:
    """Raise a ValueError where a package is not installed that `asked`, an option and its value, needs."""
    if find_spec(package) is None:
        raise ValueError(f"{asked} needs {package}; pip install 'diffusion-denoise-gym[{extra}]'")
