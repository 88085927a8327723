"""Run folders: begin one, go on with one, load one, evaluate one."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, cast

import torch

from diffusion_gym.agents.algorithms import Agent, NoUsableReward, agent_class
from diffusion_gym.agents.encoding import encode_ahead
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.training.card import write_card
from diffusion_gym.agents.training.changes import probe_for
from diffusion_gym.agents.training.checkpoint import Checkpoints, Progress
from diffusion_gym.agents.training.development import DevelopmentSet
from diffusion_gym.agents.training.evaluation import compare, save_pictures
from diffusion_gym.agents.training.export import export_policy, exported_network
from diffusion_gym.agents.training.folders import check_out, content, holding
from diffusion_gym.agents.training.profile import Profile
from diffusion_gym.agents.training.records import read_metrics
from diffusion_gym.agents.training.run_files import FORMAT, read_config
from diffusion_gym.agents.training.settings import RunSettings, check_seed, make_env, make_probes
from diffusion_gym.agents.training.threads import check_threads, cores, prepare_process
from diffusion_gym.agents.training.tracking import check_track
from diffusion_gym.agents.training.trainer import Trainer
from diffusion_gym.agents.training.trust import Seal, require_trust, run_claims, seal_of, write_seal
from diffusion_gym.envs.checks import check_metadata
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.storage import write_json

_LIBRARIES = ("diffusion-denoise-gym", "torch", "gymnasium", "diffusers", "transformers", "peft")
_PICTURES = 16


def load_settings(folder: Path, trust: bool = False) -> RunSettings:
    """The settings of a run folder, to go on with it; a module that they name as the agent is imported.

    Args:
        folder: the run folder.
        trust: go on though the folder was not made here, and remember that.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its `config.json` is truncated or of something else.
        Untrusted: the folder was not made here, and names something that is not registered.
    """
    config = read_config(folder)
    try:
        claims = run_claims(config.settings)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    seal = seal_of(folder) or require_trust(folder, claims, trust)
    settings = RunSettings.from_json(config.settings, folder, file_format=config.format)
    if seal is not None and trust:
        write_seal(folder, seal)
    return replace(settings, token_to=() if seal is None else seal.token_to)


def read_settings(folder: Path) -> RunSettings:
    """The settings of a run folder, to be shown: nothing that they name is imported.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its `config.json` is truncated or of something else.
    """
    config = read_config(folder)
    return RunSettings.from_json(config.settings, folder, imports=False, file_format=config.format)


def write_config(settings: RunSettings) -> None:
    """Write `config.json` of a run; a folder that is new, or has a seal, is sealed with it."""
    seal = seal_of(settings.out) if settings.resume else Seal()
    content = {"format": FORMAT, "settings": settings.to_json(), "versions": library_versions()}
    write_json(settings.out / "config.json", content)
    if seal is not None:
        write_seal(settings.out, Seal(settings.token_to))


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def check_new(folder: Path) -> None:
    """Refuse a folder in which something is already, but for a run that came to the end of no iteration.

    Raises:
        FileExistsError: it holds another run, or other files.
    """
    if (folder / "config.json").exists() and not _not_begun(folder):
        raise FileExistsError(f"out={str(folder)!r} already holds a run; go on with --resume, or choose another --out")
    check_out(folder, "run", _not_begun)


# All that a run writes before the end of its first iteration.
_AT_THE_START: Final = frozenset(
    {"config.json", "metrics.jsonl", "checkpoints", "images", "tensorboard", "wandb", "wandb.json"}
)


def _not_begun(folder: Path) -> bool:
    """Whether a folder holds a run without one iteration, such as one that failed at its start: nothing to lose."""
    entries = content(folder)
    if not {path.name for path in entries} <= _AT_THE_START or any(path.is_symlink() for path in entries):
        return False
    metrics = folder / "metrics.jsonl"
    if not (folder / "config.json").is_file() or (metrics.is_file() and metrics.stat().st_size):
        return False
    pictures = {path.name for path in (folder / "images").glob("*")}
    states = {path.name for path in (folder / "checkpoints").glob("*")}
    try:
        read_config(folder)
    except ValueError:
        return False
    return pictures <= {"iteration-000000.png"} and states <= {"iteration-000000.safetensors"}


def _clear(folder: Path) -> None:
    """Remove what a run without one iteration left."""
    for path in content(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def build_agent(
    settings: RunSettings, env: Any, processes: Processes | None = None, from_checkpoint: bool = False
) -> Agent:
    """The agent of a run with the weights that it begins from; the same in every process.

    Args:
        settings: of the run.
        env: its environment.
        processes: its processes.
        from_checkpoint: the weights will come from a checkpoint, so that `init_from` need not be there any more.
    """
    torch.manual_seed(settings.seed)  # LoRA adapters begin at random values
    options = settings.agent_options
    if from_checkpoint:
        options = replace(options, init_from=None)
    policy = DenoisingPolicy.from_env(env, **options.trained_part)
    return agent_class(settings.agent)(policy, options, processes)


def train(settings: RunSettings) -> tuple[Progress, str]:
    """Run or resume a training; returns how far it came and the line that loads the result in diffusers.

    A run that was killed before its first checkpoint begins anew when it is resumed.

    Under `accelerate launch` every process calls it; the main one writes the run folder.

    Raises:
        FileExistsError: the run folder is taken, or another process trains in it.
        ValueError: the processes cannot share the samples evenly; or the newest checkpoint of a run to be resumed is
            damaged. Nothing is written then.
        PeerFailed: another process failed; that one raises what went wrong.
        NoUsableReward: an iteration without one finite reward; a checkpoint is kept.
        Diverged: an update left numbers that are not finite; the last checkpoint is kept.
    """
    processes = Processes.launched()
    processes.agree(_refusal(settings, processes) if processes.main else None)
    with holding(settings.out, processes):
        return _train(settings, processes)


def _train(settings: RunSettings, processes: Processes) -> tuple[Progress, str]:
    prepare_process(settings.threads)
    env = processes.together(lambda: make_env(settings, settings.rollout_batch, processes=processes))
    going_on = settings.resume and bool(Checkpoints(settings.out / "checkpoints").paths())
    agent = build_agent(settings, env, processes, going_on)
    encode_ahead(agent.policy, cast(DenoisingVectorEnv, env.unwrapped).prompt_set.prompts, processes)
    processes = agent.processes
    samples = processes.main or processes.in_step
    pictures = make_env(settings, _PICTURES, processes=processes) if samples else None
    development = processes.together(lambda: _development(settings, processes))
    trainer = Trainer(env, agent, settings.out, settings.schedule, settings.seed, pictures, track=settings.track)
    trainer.development = development
    _begin(trainer, settings)
    trainer.profile = Profile(agent.policy.device) if settings.profile and processes.main else None
    try:
        done = trainer.run()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            _write_profile(trainer)
        if paths := trainer.checkpoints.paths():
            iteration = int(paths[-1].stem.rpartition("-")[2])
            error.add_note(f"a checkpoint keeps iteration {iteration}, {how_to_go_on(settings.out)}")
        raise
    loading = ""
    failure: OSError | ValueError | None = None
    with agent.averaged():
        network = exported_network(agent.policy, processes)
    if processes.main:
        try:
            _write_profile(trainer)
            with agent.averaged():
                loading = export_policy(agent.policy, settings.out / "model", network)
            write_card(settings.out)
        except (OSError, ValueError) as error:  # the second is a damaged file that the card would tell of
            failure = error
    processes.agree(failure)  # no process ends, and may have a launcher end the others, before all is written
    return done, loading


def _begin(trainer: Trainer, settings: RunSettings) -> None:
    """Go back to the checkpoint of a run that is resumed; only then is anything written."""
    processes, failure = trainer.processes, None
    if settings.resume and not _killed_early(trainer):
        trainer.restore(older=settings.resume_from_older)
        had, total = trainer.done.reward_queries, settings.total_reward_queries
        if total + settings.samples_per_iteration <= had:
            raise ValueError(
                f"total_reward_queries={total} is less than the {had} that the run has had; give more of them"
            )
    if processes.main:
        try:
            if not settings.resume:
                check_new(settings.out)  # again: another process may have been here before the folder was held
                _clear(settings.out)
            write_config(settings)
        except OSError as error:
            failure = error
    processes.agree(failure)


def _write_profile(trainer: Trainer) -> None:
    if trainer.profile is not None:
        print(trainer.profile.write(trainer.out), flush=True)


def how_to_go_on(folder: Path) -> str:
    """What to tell the user of a run that has not come to its end."""
    return f"go on with: diffusion-gym train --resume --out {folder}"


def _development(settings: RunSettings, processes: Processes) -> DevelopmentSet | None:
    """The development set, in the largest batches that fit it and are no more than the grids'."""
    if not settings.development_interval or not (processes.main or processes.in_step):
        return None
    samples = settings.development_samples
    batch = max(size for size in range(1, _PICTURES + 1) if samples % size == 0)
    env, probes = make_env(settings, batch, processes=processes), make_probes(settings)
    prompts = cast(DenoisingVectorEnv, env.unwrapped).prompt_set
    for name, probe in probes.items():
        check_metadata(probe, prompts, prompts.prompts, f"probes={name!r}, prompts={prompts.name!r}")
    together = processes if processes.in_step else Processes()
    paths = settings.development_paths
    return DevelopmentSet(env, settings.out, settings.seed, samples, paths, together, probes)


def _killed_early(trainer: Trainer) -> bool:
    """Whether the run came to no checkpoint before it was killed, so that to resume it is to begin it anew."""
    rows = read_metrics(trainer.out / "metrics.jsonl")
    return not trainer.checkpoints.paths() and len(rows) <= trainer.schedule.checkpoint_every


def _refusal(settings: RunSettings, processes: Processes) -> Exception | None:
    """What keeps the run from beginning, before anything is loaded or written."""
    try:
        if not settings.resume:
            check_new(settings.out)
        processes.share(settings.samples_per_iteration // settings.rollout_batch)
        check_track(settings.track)
        check_threads(settings.threads)
    except (FileExistsError, ValueError) as error:
        return error
    return None


def evaluate_run(
    folder: Path,
    samples: int,
    seed: int,
    batch: int = 64,
    *,
    trust: bool = False,
    token_to: tuple[str, ...] | None = None,
    reward_seconds: float | None = None,
    probe: str | None = None,
) -> dict[str, Any]:
    """Compare a run's newest checkpoint with the pretrained model; writes `eval.json` and pictures.

    Args:
        folder: the run folder.
        samples: pictures of each model.
        seed: seed of the noise, independent of the training's.
        batch: pictures sampled at once.
        trust: go on though the folder was not made here.
        token_to: the only addresses that get the tokens of the environment; None leaves it at what the folder may.
        reward_seconds: what one call of the reward may take; None leaves it at the run's own limit.
        probe: a reward that is not trained on, to see what the training exploited; `none` for none, None for the
            size as a JPEG, unless that is what the run trains on.

    Returns:
        The content of `eval.json`; `held_out` has the same numbers for prompts that training never saw, where the
        prompt set has such.
    """
    if samples < 1:
        raise ValueError(f"samples={samples!r} must be at least 1")
    check_seed(seed)
    settings = replace(load_settings(folder, trust), rollout_batch=min(batch, samples))
    if token_to is not None:
        settings = replace(settings, token_to=token_to)
    if reward_seconds is not None:
        settings = replace(settings, env_options=replace(settings.env_options, reward_seconds=reward_seconds))
    prepare_process(min(settings.threads, cores()))  # a run of a larger machine gets all of this one
    env = make_env(settings, settings.rollout_batch)
    agent = build_agent(settings, env, from_checkpoint=True)
    progress = Checkpoints(folder / "checkpoints").load(agent)
    result = {"env": settings.env, "agent": settings.agent, "seed": seed, **vars(progress)}
    with agent.averaged():
        comparison = compare(env, agent.policy, samples, seed, probe=probe_for(env, probe))
        result |= comparison.summary()
        save_pictures(folder / "images", comparison)
        prompts = cast(DenoisingVectorEnv, env.unwrapped).prompt_set
        if prompts.held_out:
            other = make_env(settings, settings.rollout_batch, prompts.held_out_set())
            comparison = compare(other, agent.policy, samples, seed)
            result["held_out"] = comparison.summary()
            save_pictures(folder / "images", comparison, "held-out-")
    write_json(folder / "eval.json", result)
    if (folder / "model" / "export.json").is_file():
        write_card(folder)
    return result


__all__ = ["NoUsableReward", "evaluate_run", "load_settings", "read_settings", "train"]
