"""Everything that defines a training run: the command line, `config.json` and the presets are views of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from keyword import iskeyword
from pathlib import Path
from typing import Annotated, Any, Final

import gymnasium as gym
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv
from pydantic import JsonValue

from diffusion_gym.agents.algorithms import AGENTS, AgentConfig, agent_class
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.presets import FALLBACK, PRESETS, Preset, default_preset, model_of
from diffusion_gym.agents.training.reward_options import check_no_secrets, parse_keywords
from diffusion_gym.agents.training.run_files import FORMAT
from diffusion_gym.agents.training.schedule import Schedule
from diffusion_gym.agents.training.tracking import Track
from diffusion_gym.config import SamplerConfig
from diffusion_gym.models import has_own_sampler
from diffusion_gym.prompts import PromptSet
from diffusion_gym.registry import closest_name, unknown_name
from diffusion_gym.rewards import Reward, make_reward
from diffusion_gym.rewards.time_limit import limited
from diffusion_gym.rewards.tokens import tokens_only_to
from diffusion_gym.schemas import Schema, checked, options_schema


def check_seed(seed: int) -> None:
    """Refuse a seed that not every generator takes.

    Raises:
        ValueError: the seed and what it may be.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be at least 0 and less than 2**63")


@dataclass(frozen=True)
class RunSettings(Schedule):
    """Train an agent on a denoising environment and write a run folder."""

    env: str = tyro.MISSING
    """Environment id, such as DiffusionDenoise-Shapes-Composition-v0; `diffusion-gym envs` lists them."""
    out: Path = tyro.MISSING
    """The run folder; it must be new, unless --resume is given."""
    agent: str = "ddpo_is"
    """The agent: a name, or module:Class of your own."""
    seed: int = 0
    """All randomness of the run derives from it."""
    preset: str | None = None
    """Hyperparameters to start from; `diffusion-gym presets` lists them. By default the one for the model."""
    rollout_batch: int = 8
    """Trajectories sampled at once; samples_per_iteration is a multiple of it."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""
    track: Track = "tensorboard"
    """Where numbers and pictures are shown while it trains: TensorBoard; W&B as well with `wandb`; or nowhere."""
    probes: tuple[str, ...] = ()
    """Rewards, by name, that are evaluated on the development pictures and never trained on: where the reward rises and
    these fall, it is over-optimised."""
    probe_kwargs: dict[str, str] | None = None
    """Keywords of the probes: a probe's name and a JSON object in turn, such as CLIPScore '{"clip": "models/clip"}'."""
    profile: bool = False
    """Say at the end where an iteration's time went, and write a trace of one."""
    resume: bool = False
    """Go on with the run in the run folder; its settings are taken over."""
    resume_from_older: bool = False
    """With --resume: where the newest checkpoints are damaged, go on from the newest one that is whole."""
    trust: bool = False
    """With --resume: run, contact, read and write what a folder names that was not made here; docs/trust.md."""
    token_to: tuple[str, ...] | None = None
    """The only addresses that get the tokens of the environment; by default those that you named, not a folder."""
    env_options: Annotated[EnvOptions, tyro.conf.arg(name="env")] = field(default_factory=EnvOptions)
    """Keyword arguments of the environment."""
    agent_options: Annotated[AgentConfig, tyro.conf.arg(name="agent")] = field(default_factory=AgentConfig)
    """Options of the agent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)
        if self.rollout_batch < 1:
            raise ValueError(f"rollout_batch={self.rollout_batch!r} must be at least 1")
        check_no_secrets(parse_keywords(self.probe_kwargs or {}), "probe_kwargs")
        if self.probes and not self.development_interval:
            raise ValueError(
                f"probes={self.probes!r} are evaluated on the development set, which this run has not; give "
                "development_every (--development-every 10), or leave them out"
            )
        if len(set(self.probes)) < len(self.probes):
            raise ValueError(f"probes={self.probes!r} names a reward twice; give each once")
        if self.resume_from_older and not self.resume:
            raise ValueError("resume_from_older=True is for a run that goes on; give --resume too")

    @property
    def schedule(self) -> Schedule:
        """How long the run goes on and what it writes."""
        return Schedule(**{entry.name: getattr(self, entry.name) for entry in fields(Schedule)})

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back."""
        return {key: value for key, value in asdict(self).items() if key not in _COMMAND_LINE}

    @classmethod
    def from_json(
        cls, stored: Mapping[str, Any], out: Path, imports: bool = True, file_format: str = FORMAT
    ) -> RunSettings:
        """The settings of a run folder's `config.json`.

        Args:
            stored: the JSON.
            out: the run folder.
            imports: whether to import an agent that is not registered; else its options are taken as they are.
            file_format: that of the file.

        Raises:
            ValueError: the JSON is of something else, lacks an option or has one that this version lacks.
        """
        path, agent = out / "config.json", stored.get("agent")
        known = isinstance(agent, str) and (imports or agent in AGENTS)
        config: Any = agent_class(str(agent)).Config if known else AgentConfig
        stored = migrated(stored, file_format, config)
        run = _read(options_schema(cls, _COMMAND_LINE, env_options=Any, agent_options=Any), stored, f"{path}, settings")
        env = _read(options_schema(EnvOptions), run["env_options"], f"{path}, settings.env_options")
        where, chosen = f"{path}, settings.agent_options", run["agent_options"]
        if known:
            chosen = _read(options_schema(config), chosen, where)
        else:
            config, chosen = _described(checked(dict[str, JsonValue], chosen, where, _REMEDY))
        try:
            parts = {"env_options": EnvOptions(**env), "agent_options": config(**chosen)}
            return cls(**{**run, "out": out, **parts})
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {_REMEDY}") from error


_REMEDY: Final = (
    "the file is of another version or was changed: go on with the version that began the run (`versions` in that file)"
)
# What only a command line says, and a folder never does.
_COMMAND_LINE: Final = frozenset({"out", "profile", "resume", "resume_from_older", "trust", "token_to"})
_STORED_BEFORE: Final = _COMMAND_LINE - {"trust", "token_to"}  # by the first format all the same

# Options that came to be since the first runs: what the runs that lack them did. Each is by the first format whose
# files all have it; in a file of that format or a later one it may not be missing.
ADDED: Final[Mapping[str, Mapping[str, Any]]] = {
    FORMAT: {
        "development_every": 0,
        "development_samples": 64,
        "development_paths": 16,
        "track": "tensorboard",
        "probes": (),
        "probe_kwargs": None,
        "env_options.noisy_steps": None,
        "env_options.revision": None,
        "env_options.height": None,
        "env_options.width": None,
        "env_options.negative_prompt": None,
        "env_options.text_encoder_device": None,
        "env_options.embedding_cache": None,
        "env_options.variant": None,
        "env_options.reward_kwargs": None,
        "env_options.reward_seconds": None,
        "agent_options.optimizer": "adamw",
        "agent_options.lora_alpha": None,
        "agent_options.lora_targets": None,
        "agent_options.init_from": None,
        "agent_options.sharding": "none",
        "agent_options.renoise": False,
        "agent_options.group_size": 1,  # of reward-weighted regression
        "agent_options.reward_deviation": "own",
        "agent_options.component_weights": (),
        "agent_options.skip_equal_groups": False,
        "agent_options.trust_region": "ratio",
        "agent_options.divergence_bound": 1e-5,
        "agent_options.noise_window": "fixed",
        "agent_options.window_every": 25,
        "agent_options.window_stride": 1,
        "agent_options.shared_noise": False,
        "agent_options.rollout_scheduler": None,
        "agent_options.rollout_steps": None,
        "agent_options.reward_floors": (),
        "agent_options.floor_step": 0.1,
    }
}


def migrated(stored: Mapping[str, Any], file_format: str, config: Any) -> dict[str, Any]:
    """The settings of a file of an older format, as one of this format would hold them; others as they are.

    Args:
        stored: the settings of a `config.json` or of a benchmark's record, unchecked.
        file_format: that of the file.
        config: the class of the agent's options.
    """
    if file_format == FORMAT:
        return dict(stored)
    found = {name: value for name, value in stored.items() if name not in _STORED_BEFORE}
    known = {"": _names(RunSettings), "env_options": _names(EnvOptions), "agent_options": _names(config)}
    for name, value in ADDED[FORMAT].items():
        part, _, option = name.rpartition(".")
        table = found.get(part) if part else found
        if isinstance(table, dict) and option in known[part]:
            table = {option: value, **table}
            found = {**found, part: table} if part else table
    return found


def _read(schema: type[Schema], stored: Any, where: str) -> dict[str, Any]:
    return checked(schema, stored, where, _REMEDY).model_dump(by_alias=True)


def _described(options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A class of options whose own is in a module that is not to be imported, and their values."""
    for name in options:
        if not name.isidentifier() or iskeyword(name) or name.startswith("_"):
            raise ValueError(f"agent_options has {name!r}, which is no option's name")
    kinds = [(name, type(value).__name__) for name, value in options.items()]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return make_dataclass("Options", kinds, frozen=True), values


def _names(kind: Any) -> frozenset[str]:
    return frozenset(entry.name for entry in fields(kind))


def check_option_names(args: Sequence[str], settings: RunSettings) -> None:
    """Refuse an option of the command line that `train` does not have, before tyro guesses what was meant.

    Args:
        args: the command line.
        settings: those that the command line changes; the agent's and the environment's options are theirs.

    Raises:
        ValueError: there is no such option; it names those that may be meant.
    """
    known, negated = [], []
    parts: dict[str, Any] = {"--env.": settings.env_options, "--agent.": settings.agent_options, "--": settings}
    for prefix, part in parts.items():
        for entry in fields(part):
            name, value = entry.name.replace("_", "-"), getattr(part, entry.name)
            known += [prefix + name] if value not in parts.values() else []
            negated += [f"{prefix}no-{name}"] if isinstance(value, bool) else []
    for argument in args:
        option = argument.partition("=")[0].replace("_", "-")
        if not option.startswith("--") or option in known + negated or option.startswith(("--help", "--tyro-")):
            continue
        meant = " or ".join(_meant(option, known))
        hint = f"; did you mean {meant}?" if meant else ";"
        raise ValueError(f"{option} is no option of train{hint} `diffusion-gym train --help-all` lists them")


def _meant(option: str, known: Sequence[str]) -> list[str]:
    """The options of the same name elsewhere, of these initials (`lr`), or the closest one."""
    prefix, name = _split(option)
    same = [entry for entry in known if _split(entry)[1] == name]
    initials = ["".join(word[0] for word in _split(entry)[1].split("-")) for entry in known]
    short = [entry for entry, found in zip(known, initials, strict=True) if found == name and entry.startswith(prefix)]
    closest = closest_name(option, known)
    return same or short or ([closest] if closest else [])


def _split(option: str) -> tuple[str, str]:
    """The part that an option is of, such as `--agent`, and its name in there; the run's own are of no part."""
    prefix, _, name = option.rpartition(".")
    return prefix, name.removeprefix("--")


# What a preset may say of a run: how long and in which portions, not which one.
_RUN_FIELDS: Final = _names(Schedule) | {"rollout_batch"}


def starting_point(env: str, agent: str, preset: str | None, model: str | None, config: Any = None) -> RunSettings:
    """The settings before the command line: the agent's defaults, overlaid by the preset.

    Args:
        env: environment id.
        agent: the agent.
        preset: a preset's name; None for the one that goes with the model and the agent.
        model: the model, where it is not the environment's own.
        config: stands in for the options of the agent, which is not imported then.

    Raises:
        ValueError: an unknown agent or preset, or a preset with an unknown option.
    """
    given, config = config, config or agent_class(agent).Config
    name = preset or default_preset(env, model, agent)
    if str(name) not in PRESETS:
        raise ValueError(unknown_name("preset", str(name), list(PRESETS)))
    check_preset(f"preset {name!r}", PRESETS[name], None if given else agent)
    values = PRESETS[name].of(agent)
    if preset is None and name == FALLBACK and has_own_sampler(model or model_of(env)):
        values = {key: value for key, value in values.items() if key not in _names(SamplerConfig)}
    run, env_options, options = (
        {key: value for key, value in values.items() if key in known}
        for known in (_RUN_FIELDS, _names(EnvOptions), _names(config))
    )
    return RunSettings(
        env=env,
        agent=agent,
        preset=name,
        env_options=EnvOptions(**env_options),
        agent_options=config(**options),
        **run,
    )


def check_preset(where: str, preset: Preset, agent: str | None = None) -> None:
    """Refuse a preset with an option that nothing reads, such as a misspelt one.

    The common values may name options of any registered agent; those for one agent only what that agent reads.

    Args:
        where: what errors call it.
        preset: the preset.
        agent: an agent that the common values may speak to besides the registered ones.

    Raises:
        ValueError: an unknown agent or option.
    """
    shared = _RUN_FIELDS | _names(EnvOptions)
    speakable = [*AGENTS, *(() if agent is None else (agent,))]
    anyone = shared.union(*(_names(agent_class(entry).Config) for entry in speakable))
    for key in preset.values:
        if key not in anyone:
            raise ValueError(f"{where}: {unknown_name('option', key, sorted(anyone))}")
    for entry, values in preset.agents.items():
        known = shared | _names(agent_class(entry).Config)
        for key in values:
            if key not in known:
                raise ValueError(f"{where}, agent {entry!r}: {unknown_name('option', key, sorted(known))}")


def make_env(
    settings: RunSettings, num_envs: int, prompts: PromptSet | None = None, processes: Processes | None = None
) -> VectorEnv[Any, Any, Any]:
    """The vector environment of a run, episodes reset by hand.

    Args:
        settings: the run's settings.
        num_envs: batch of the environment.
        prompts: other prompts than the run's.
        processes: the processes of the run; of several, each has a device of its own.

    Raises:
        ValueError: the options ask for another device than that of the process; `env` is of something else.
    """
    keywords = settings.env_options.keywords()
    if processes is not None and processes.count > 1:
        if keywords.get("device", processes.device.type) != processes.device.type:
            raise ValueError(
                f"device={keywords['device']!r} cannot be had by all {processes.count} processes, of which this one "
                f"runs on {processes.device}; leave --env.device out"
            )
        keywords["device"] = str(processes.device)
        if settings.agent_options.sharding != "none" and processes.device.type != "cpu":
            keywords["network_device"] = "cpu"  # no GPU need hold it whole
    if prompts is not None:
        keywords["prompts"] = prompts
    keywords["autoreset_mode"] = AutoresetMode.DISABLED.value
    try:
        with tokens_only_to(settings.token_to):
            return gym.make_vec(settings.env, num_envs=num_envs, **keywords)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        told = f"env={settings.env!r} is no denoising environment ({error}); `diffusion-gym envs` lists them"
        raise ValueError(told) from error


def make_probes(settings: RunSettings) -> dict[str, Reward]:
    """The rewards of a run that are evaluated and never trained on, by name.

    Raises:
        ValueError: an unknown reward, or keywords that are not those of a probe.
    """
    keywords, found = parse_keywords(settings.probe_kwargs or {}), dict[str, Reward]()
    for name, given in keywords.items():
        if name not in settings.probes:
            raise ValueError(unknown_name("probe_kwargs", name, list(settings.probes)))
        if not isinstance(given, Mapping):
            raise ValueError(f"probe_kwargs: {name!r} has {given!r}; give a JSON object of its keywords")
    with tokens_only_to(settings.token_to):
        for name in settings.probes:
            made = make_reward(name, **keywords.get(name, {}))
            found[name] = limited(made, settings.env_options.reward_seconds)
    return found
