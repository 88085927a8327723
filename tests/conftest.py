"""What the tests share: a tiny random pipeline on disk, and environments on it. No network, no GPU.

One thread, or TEST_THREADS of them.
"""

import json
import multiprocessing
import os
import signal
import socket
import traceback
import warnings

import gymnasium as gym
import pytest
import torch

import diffusion_gym
from diffusion_gym.testing.random_pipeline import write_random_pipeline

pytest.register_assert_rewrite("agent_updates", "scale_out_runs", "trainer_runs")
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
# The tests send these; a background job of a shell ignores the first, nohup the third.
for _name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    if signal.getsignal(_signum := getattr(signal, _name, signal.SIGINT)) is signal.SIG_IGN:
        signal.signal(_signum, signal.default_int_handler if _signum == signal.SIGINT else signal.SIG_DFL)
gym.register_envs(diffusion_gym)

# Their conftest has trainings that many tests look at, or their library compiles for seconds: one worker has them all.
TOGETHER = ("tests/agents/scale_out/", "tests/agents/training/trainer/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file goes to one worker, so that its fixtures are made once; pytest 9.2 drops xdist's groups in silence."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "tianshou" if "tianshou" in nodeid else next((x for x in TOGETHER if file.startswith(x)), file)

    return Files(config, log)


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory):
    """Where this user's key is, in place of the home folder; also for the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """A pipeline directory whose every step is stochastic (`set_alpha_to_one=False`)."""
    return write_random_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def exact_end_pipeline(tmp_path_factory):
    """A pipeline directory whose last step is deterministic (`set_alpha_to_one=True`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers would like every scheduler to be Stable Diffusion's
        return write_random_pipeline(tmp_path_factory.mktemp("models") / "exact-end", set_alpha_to_one=True)


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


brightness.differentiable = True


@pytest.fixture(scope="session")
def make_env(tiny_pipeline):
    """`make_env(num_envs, **keywords of gym.make_vec)` on the tiny pipeline, rewarded for brightness."""

    def make(num_envs=4, **keywords):
        defaults = {
            "model": str(tiny_pipeline),
            "reward": brightness,
            "prompts": ["a red circle", "two blue stars", "a green square"],
            "num_inference_steps": 4,
        }
        return gym.make_vec("DiffusionDenoise-v0", num_envs=num_envs, **{**defaults, **keywords})

    return make


@pytest.fixture(scope="session")
def perturb():
    """`perturb(policy, scale)` moves the trainable weights off the pretrained model; LoRA begins at no change."""

    def move(policy, scale=0.05, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return policy

    return move


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
