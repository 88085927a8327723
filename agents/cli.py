"""The command `diffusion-gym`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

# Before diffusers and transformers are imported: the console shows our own lines only.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import gymnasium as gym
import tyro

from diffusion_gym._version import VERSION
from diffusion_gym.agents.command_line import parsed
from diffusion_gym.agents.train_command import option_value, parse_train
from diffusion_gym.agents.training.evaluation import EVALUATION_SEED
from diffusion_gym.registry import WrongKeyword, unknown_name

_USAGE: Final = """usage: diffusion-gym COMMAND [options]

Reinforcement learning on the denoising process of a diffusion model.

  envs             list the environments
  presets          list the hyperparameter presets, side by side
  train            train an agent on an environment
  eval             compare a run's result with the pretrained model
  report           write a run's page: curve, pictures, tables
  bench            compare agents on a suite of environments, seed by seed
  download         fetch the files of a model or reward from the hub
  push             upload what a run learned, with a model card, to the hub
  label            choose between pictures on a page, to make a reward of the choices
  fit-preferences  make the reward
  serve-reward     serve a reward to other processes and machines
  demo             a complete small run on the embedded model, in minutes

diffusion-gym COMMAND --help explains the options; --traceback with any command shows where an error came from;
diffusion-gym --version says which one this is; --tyro-print-completion bash (or zsh) prints the shell's completion.

New here? Each of these says at its end what comes next; the times are of two CPU cores:

  diffusion-gym demo                                        1 to 4 minutes: an agent learns, and a page shows it
  diffusion-gym train --env DiffusionDenoise-Shapes-Location-v0 --agent awm --preset fast-demo --out runs/location
                                                            1 to 3 minutes: the same training, as a run of your own
  diffusion-gym eval runs/location                          half a minute: before and after, with 95 % intervals
  diffusion-gym report runs/location                        seconds: runs/location/report.html"""


@dataclass(frozen=True)
class EnvsOptions:
    """List the environments."""


@dataclass(frozen=True)
class EvalOptions:
    """Compare the newest checkpoint of a run with the pretrained model, from the same fresh noise."""

    dir: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    samples: int = 256
    """Pictures sampled from each of the two models, for the training prompts and again for held-out ones."""
    seed: int = EVALUATION_SEED
    """Seed of the noise; it never coincides with the noise of training."""
    probe: str | None = None
    """A reward that is not trained on, to see what the training exploited, or `none`; by default the size as a JPEG."""
    json: bool = False
    """Print one JSON object and nothing else."""
    trust: bool = False
    """Run, contact, read and write what a folder names that was not made here; docs/trust.md."""
    token_to: tuple[str, ...] | None = None
    """The only addresses that get the tokens of the environment; by default those that you named, not a folder."""
    reward_seconds: float | None = None
    """Seconds for one call of the reward; by default the run's own limit, if it has one."""


@dataclass(frozen=True)
class ReportOptions:
    """Write `report.html` of a run or of a benchmark: one self-contained page."""

    dir: Annotated[Path, tyro.conf.Positional]
    """The run folder, or the folder of a benchmark: its `--out`."""
    seed: int | None = None
    """Of a benchmark: the seed whose pictures are shown; by default each agent's first."""
    trust: bool = False
    """Follow links in a folder that was not made here, though they lead out of it; docs/trust.md."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends in one line on standard error and exit code 2.

    Any other exception keeps its traceback, with a note that it is to be reported; with `--traceback` a mistake too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = [word for word in words if word != "--traceback"]
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return
    if args[0] == "--version":
        print(f"diffusion-gym {VERSION}")
        return
    name, rest = args[0], args[1:]
    try:
        warnings.filterwarnings("ignore", module="(diffusers|transformers|peft|torch).*")
        warnings.filterwarnings("ignore", message=".*Using the latest versioned environment.*")
        if name.startswith("--tyro-"):
            from diffusion_gym.agents.completion import print_completion

            return print_completion(args)
        if name not in _COMMANDS:
            raise ValueError(unknown_name("command", name, list(_COMMANDS)))
        if option_value(rest, "--out") == "":
            raise ValueError("out='' names no folder; give a new one")
        _COMMANDS[name](rest)
    except KeyboardInterrupt as error:
        stopped = getattr(error, "__notes__", None) is None and _STOPPED.get(name, "stopped")
        _fail(error, stopped or _words(error, "stopped at once"), 130)
    except BrokenPipeError:  # whoever reads what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except _mistakes() as error:
        if args != words:
            raise
        _fail(error, _words(error, type(error).__name__), 2)
    except Exception as error:
        error.add_note(_OURS)
        raise


def _mistakes() -> tuple[type[Exception], ...]:
    """The errors that a user can mend; anything else is a bug of ours and shows its traceback."""
    from diffusion_gym.agents.algorithms import Diverged, NoUsableReward
    from diffusion_gym.agents.processes import PeerFailed
    from diffusion_gym.rewards import RewardError

    return (ValueError, WrongKeyword, OSError, gym.error.Error, RewardError, NoUsableReward, Diverged, PeerFailed)


def _words(error: BaseException, unsaid: str) -> str:
    """What an error says, and how to go on; of the system's own, which begin with a number, the path and the reason.

    Args:
        error: the error.
        unsaid: stands for what an error without words says.
    """
    said = str(error) or unsaid
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        paths = [repr(str(path)) for path in (error.filename, error.filename2) if path is not None]
        said = f"{' -> '.join(paths) or 'the system'}: {error.strerror}"
    elif isinstance(error, gym.error.Error):
        said = f"env: {said}; `diffusion-gym envs` lists the environments"
    return "; ".join([said, *getattr(error, "__notes__", ())])


def _fail(error: BaseException, message: str, code: int) -> None:
    from diffusion_gym.agents.processes import told_elsewhere
    from diffusion_gym.agents.training.ending import leave

    if not told_elsewhere(error):
        print("\n".join(map(_shortened, f"error: {message}".splitlines())), file=sys.stderr)
    leave(code)


def _shortened(line: str) -> str:
    """A line without its middle where it shows a value that is very long."""
    return line if len(line) <= 2 * _SHOWN else f"{line[:_SHOWN]} ... {line[-_SHOWN:]}"


def _envs(args: list[str]) -> None:
    from diffusion_gym.envs.registration import GENERIC_ID, environment_ids
    from diffusion_gym.models import MODELS
    from diffusion_gym.rewards import REWARDS

    parsed(EnvsOptions, args, "envs")
    width = 2 + max(map(len, environment_ids()))
    print(f"{'environment':{width}}prompts, unless others are asked for")
    for id_, kwargs in environment_ids().items():
        prompted = "prompt" in MODELS.traits(kwargs["model"])
        own = REWARDS.default_prompts(kwargs["reward"]) or "those of the model"
        print(f"{id_:{width}}{own if prompted else 'none, the model is unconditional'}")
    print(f"{GENERIC_ID:{width}}any: give --env.model, --env.reward and --env.prompts")


def _presets(args: list[str]) -> None:
    from diffusion_gym.agents.presets_table import PresetsOptions, print_presets

    print_presets(parsed(PresetsOptions, args, "presets"))


def _train(args: list[str]) -> None:
    from diffusion_gym.agents.processes import Processes
    from diffusion_gym.agents.training import runs

    processes = Processes.launched()
    with processes.leaving():
        settings = processes.together(lambda: parse_train(args, processes.main))
        if processes.main:
            print(
                f"{settings.agent} on {settings.env}, preset {settings.preset}, seed {settings.seed}; "
                f"run folder {settings.out}",
                flush=True,
            )
        done, loading = runs.train(settings)
    if not processes.main:
        return
    print(f"{done.iteration} iterations, {done.reward_queries} reward queries")
    if done.reward_queries < settings.total_reward_queries:
        print(f"Stopped early, {runs.how_to_go_on(settings.out)}")
    else:
        print(f"Next: diffusion-gym eval {settings.out}; diffusion-gym report {settings.out}")
        print(f"In diffusers: {loading}")


def _eval(args: list[str]) -> None:
    from diffusion_gym.agents.training.evaluation import summary_text
    from diffusion_gym.agents.training.runs import evaluate_run
    from diffusion_gym.storage import json_text

    options = parsed(EvalOptions, args, "eval")
    names = ("samples", "seed", "trust", "token_to", "reward_seconds", "probe")
    given = {name: getattr(options, name) for name in names}
    result = evaluate_run(options.dir, **given)
    print(json_text(result) if options.json else summary_text(result))
    if not options.json:
        print(f"Next: diffusion-gym report {options.dir}")


def _report(args: list[str]) -> None:
    from diffusion_gym.agents.report.benchmark.page import is_benchmark, write_benchmark_report
    from diffusion_gym.agents.report.run import write_report
    from diffusion_gym.agents.training.trust import require_trust, seal_of

    options = parsed(ReportOptions, args, "report")
    if seal_of(options.dir) is None:
        require_trust(options.dir, (), options.trust)
    if is_benchmark(options.dir):
        print(f"report: {write_benchmark_report(options.dir, options.seed)}")
    elif not (options.dir / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(options.dir)!r} holds neither a run (config.json) nor a benchmark (records/); pass the --out of one"
        )
    elif options.seed is not None:
        raise ValueError(
            f"seed={options.seed} chooses pictures of a benchmark, which {options.dir} is not; leave it out"
        )
    else:
        print(f"report: {write_report(options.dir)}")


def _demo(args: list[str]) -> None:
    from diffusion_gym.agents.demo import DemoOptions, run_demo

    run_demo(parsed(DemoOptions, args, "demo"))


def _serve_reward(args: list[str]) -> None:
    from diffusion_gym.agents.training.reward_options import ServeRewardOptions, serve_reward

    serve_reward(parsed(ServeRewardOptions, args, "serve-reward"))


def _label(args: list[str]) -> None:
    from diffusion_gym.agents.label.command import LabelOptions, run_label

    run_label(parsed(LabelOptions, args, "label"))


def _fit_preferences(args: list[str]) -> None:
    from diffusion_gym.agents.label.command import FitOptions, run_fit

    run_fit(parsed(FitOptions, args, "fit-preferences"))


def _download(args: list[str]) -> None:
    from diffusion_gym.agents.downloads import DownloadOptions, run_download

    run_download(parsed(DownloadOptions, args, "download"))


def _push(args: list[str]) -> None:
    from diffusion_gym.agents.publishing import PushOptions, run_push

    run_push(parsed(PushOptions, args, "push"))


def _bench(args: list[str]) -> None:
    from diffusion_gym.agents.benchmark.command import BenchOptions, run_bench, suites_text

    if args == ["--list"]:
        print(suites_text())
    elif code := run_bench(parsed(BenchOptions, args, "bench")):
        raise SystemExit(code)


_OURS: Final = (
    "Unless it comes from code of your own, this is a fault of diffusion-gym and not of your command: please report it "
    "to the maintainers, with these lines and the command."
)
_SHOWN: Final = 1_000  # characters of a line's begin, and of its end
_STOPPED: Final = {
    "train": "stopped at once; `diffusion-gym train --resume --out DIR` goes on from the last checkpoint of the run's "
    "folder, or begins anew where there is none yet; without a folder run the same command again",
    "eval": "stopped; the same command begins anew",
    "bench": "stopped; the same command goes on from the last measurement of each run",
    "demo": "stopped; the same command goes on where it stopped, or begins anew where no checkpoint is yet",
    "label": "stopped; the same command goes on, and has every answer",
    "serve-reward": "stopped",
}
_COMMANDS: Final[dict[str, Callable[[list[str]], None]]] = {
    "envs": _envs,
    "presets": _presets,
    "train": _train,
    "eval": _eval,
    "report": _report,
    "bench": _bench,
    "download": _download,
    "push": _push,
    "label": _label,
    "fit-preferences": _fit_preferences,
    "serve-reward": _serve_reward,
    "demo": _demo,
}

if __name__ == "__main__":
    main()
