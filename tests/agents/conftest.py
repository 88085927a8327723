"""What the agents' tests share."""

import json
import multiprocessing
import os
import signal
import socket
import traceback
from dataclasses import fields

import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.rollout import collect


@pytest.fixture(scope="session")
def make_policy(make_env, perturb):
    """`make_policy(trainable)` on the environment `env`, away from the pretrained model."""

    def make(env=None, trainable="lora", scale=0.05, **keywords):
        torch.manual_seed(0)  # LoRA adapters begin at random values
        policy = DenoisingPolicy.from_env(env if env is not None else make_env(), trainable=trainable, **keywords)
        return perturb(policy, scale)

    return make


@pytest.fixture(scope="session")
def make_agent(make_policy):
    """`make_agent(env, trainable, agent=..., **options)`, with a learning rate that one can see."""

    def make(env=None, trainable="lora", scale=0.05, agent=DDPOIS, **options):
        policy = make_policy(env, trainable, scale)
        defaults = {"learning_rate": 1e-3, "clip_range": 0.2, "normalization": "batch", "micro_batch_size": 64}
        known = {entry.name for entry in fields(agent.Config)}
        chosen = {**{key: value for key, value in defaults.items() if key in known}, **options}
        return agent(policy, agent.Config(trainable=trainable, **chosen))

    return make


@pytest.fixture(scope="session")
def roll():
    """`roll(env, policy, seed)`: one rollout."""

    def rolled(env, policy, seed=0, **keywords):
        return collect(env, policy, torch.Generator().manual_seed(seed), seed=seed, **keywords)

    return rolled


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory):
    """`in_processes(count, function)`: what `function(processes)` gives in each of `count` gloo processes, by JSON.

    They are forks of this one, which spares them the imports; what they register or import stays with them. Those of
    `killed` are to be killed by SIGKILL, and give None.
    """

    def child(function, index, count, port, path):
        from accelerate import PartialState

        PartialState._reset_state()
        ranks = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
        os.environ.update({key: str(value) for key, value in {**ranks, **place}.items()})
        try:
            from diffusion_gym.agents.processes import Processes

            answer = {"value": function(Processes.launched())}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        path.write_text(json.dumps(answer))

    def run(count, function, seconds=120, killed=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        folder = tmp_path_factory.mktemp("answers")
        paths = [folder / f"{index}.json" for index in range(count)]
        children = [
            context.Process(target=child, args=(function, index, count, port, path)) for index, path in enumerate(paths)
        ]
        for process in children:
            process.start()
        for process in children:
            process.join(seconds)
        hanging = [index for index, process in enumerate(children) if process.is_alive()]
        for index in hanging:
            children[index].kill()
        assert not hanging, f"processes {hanging} did not end within {seconds} seconds"
        assert [index for index, process in enumerate(children) if process.exitcode == -signal.SIGKILL] == list(killed)
        for index in killed:
            paths[index].write_text('{"value": null}')
        answers = [json.loads(path.read_text()) if path.exists() else {"error": "died"} for path in paths]
        errors = [f"process {index}: {answer['error']}" for index, answer in enumerate(answers) if "error" in answer]
        assert not errors, "\n".join(errors)
        return [answer["value"] for answer in answers]

    return run
