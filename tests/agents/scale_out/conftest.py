"""Trainings of several processes, which are forks of this one: quick, and what is registered in one stays there."""

import contextlib
import hashlib
import io
import json
import os
import sys
from functools import cache

import pytest
import torch

from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training import runs
from diffusion_gym.devices import local_part
from run_folders import reward_for
from scale_out_runs import BATCH, ITERATIONS, OPTIONS, REWARDS_MODULE, SAMPLES, codes


@pytest.fixture(scope="session")
def rewards_folder(tmp_path_factory):
    """Where the module with the tests' rewards is."""
    import torch.distributed.fsdp  # noqa: F401 - the forks need not import it again
    import torch.utils.tensorboard  # noqa: F401 - the same

    import diffusion_gym.models.latent  # noqa: F401 - the same
    import diffusion_gym.models.lora  # noqa: F401 - the same

    folder = tmp_path_factory.mktemp("rewards")
    (folder / "scale_out_rewards.py").write_text(REWARDS_MODULE.format(batches=SAMPLES // BATCH))
    return folder


@pytest.fixture(scope="session")
def arguments(tiny_pipeline):
    """`arguments(out, agent, reward, **options)` of `diffusion-gym`."""

    def make(out, agent="ddpo_is", reward="Patchy", **options):
        given = {
            "env": "scale_out_rewards:DiffusionDenoise-v0",
            "agent": agent,
            "preset": "ddpo-paper",
            "env.model": tiny_pipeline,
            "env.reward": reward_for(agent, reward),
            "env.num-inference-steps": 3,
            "env.guidance-scale": 2.0,
            "out": out,
            "seed": 3,
            "total-reward-queries": SAMPLES * ITERATIONS,
            "samples-per-iteration": SAMPLES,
            "rollout-batch": BATCH,
            "checkpoint-every": 1,
            "pictures-every": 2,
            "keep-checkpoints": 9,
            "agent.trainable": "full",
            "agent.mixed-precision": "no",
            "agent.learning-rate": 1e-3,
            "agent.adam-epsilon": 1e-3,  # smaller ones blow up the rounding of gradients that are almost 0
            **{f"agent.{key}": value for key, value in OPTIONS.get(agent, {}).items()},
            **{key.replace("_", "-"): value for key, value in options.items()},
        }
        if agent in ("ddpo_sf", "ddpo_is"):
            given |= {"agent.normalization": "prompt", "agent.statistics-min-count": 4}
        return ["train", "--env.prompts", "a red circle", "two blue stars"] + [
            text for key, value in given.items() for text in (f"--{key}", str(value))
        ]

    return make


def refuse_writing(folder):
    """An audit hook: the main process alone writes."""

    def guard(event, given):
        if event == "open" and str(folder) in str(given[0]) and given[2] & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(f"another process than the main one writes {given[0]}")

    return guard


@pytest.fixture(scope="session")
def train(in_processes, arguments, rewards_folder):
    """`train(count, out, ...)`: exit codes, outputs and the agents of `count` forked processes."""

    def run(count, out, *extra, before=None, resume=False, killed=(), **options):
        command = ["train", "--resume", "--out", str(out)] if resume else arguments(out, **options)

        def child(processes):
            sys.path.insert(0, str(rewards_folder))
            torch.set_num_threads(1)
            if not processes.main:
                sys.addaudithook(refuse_writing(out))
            if before is not None:
                before(processes)
            agents, build = [], runs.build_agent
            runs.build_agent = lambda *given: agents.append(build(*given)) or agents[0]
            shown, errors, code = io.StringIO(), io.StringIO(), 0
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
                try:
                    main([*command, *extra])
                except SystemExit as stop:
                    code = stop.code
                except Exception as error:
                    code = f"{type(error).__name__}: {error}"
            weights = [local_part(weight.detach()).flatten() for agent in agents for weight in agent.parameters]
            digest = hashlib.sha256(torch.cat(weights).numpy().tobytes()).hexdigest() if weights else ""
            state = [agent.state() for agent in agents]
            return {"code": code, "out": shown.getvalue(), "err": errors.getvalue(), "agent": [digest, state]}

        return in_processes(count, child, killed=killed)

    return run


@pytest.fixture(scope="session")
def alone(train, tmp_path_factory):
    """`alone(agent, ...)`: the folder of the run that one process makes with these options."""
    folders = {}

    def run(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("alone") / "run"
            assert codes(train(1, folders[key], **options)) == [0]
        return folders[key]

    return run


@pytest.fixture(scope="session")
def paired(train, tmp_path_factory):
    """`paired(agent)`: what two processes gave, as `train` does, and the folder of their run."""

    @cache
    def run(agent):
        folder = tmp_path_factory.mktemp("paired") / "run"
        return train(2, folder, agent=agent), folder

    return run
