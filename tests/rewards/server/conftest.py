"""A real reward server in a process of its own, whose reward the tests steer by files and prompts."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from diffusion_gym.agents.cli import main
from forked import Forked

STEERED = '''
    import os
    import signal
    import time
    from pathlib import Path

    import torch
    from diffusion_gym.rewards import RewardOutput


    def steered(images, prompts, metadata):
        """Brightness. "hold NAME" makes the file "at NAME" and waits; "raise", "nan", "inf" and "open FILE" do so."""
        lives = Path("lives")  # the server kills itself at the call that this file counts down to
        if lives.exists():
            lives.write_text(str(int(lives.read_text()) - 1))
            if lives.read_text() == "0":
                os.kill(os.getpid(), signal.SIGKILL)
        for prompt in prompts:
            if prompt == "raise":
                raise ValueError("this prompt is not to be scored")
            if prompt.startswith("open "):
                Path(prompt.removeprefix("open ")).open()
            if prompt.startswith("hold "):
                Path(prompt.replace("hold ", "at ")).touch()
                while not Path(prompt.removeprefix("hold ")).exists():
                    time.sleep(0.01)
        scores = images.mean((1, 2, 3))
        for index, prompt in enumerate(prompts):
            if prompt in ("nan", "inf"):
                scores[index] = float(prompt)
        weights = torch.tensor([float(entry.get("weight", 0)) for entry in metadata])
        return RewardOutput(scores, {"batch": torch.full((len(prompts),), len(prompts)), "weight": weights})
'''


class Server:
    """A `diffusion-gym serve-reward` process.

    Attributes:
        folder: where it runs: files there steer it.
        url: its address, the same after a restart.

    It is a fork of this process or, where `fresh`, one whose memory is its own.
    """

    def __init__(self, folder, *options, reward="served:steered", token=None, fresh=False):
        self.folder, self._options, self._reward, self._token = folder, options, reward, token
        self._fresh = fresh
        (folder / "served.py").write_text(textwrap.dedent(STEERED))
        self._start("0")

    def _start(self, port):
        command = ["serve-reward", self._reward, "--port", port, *self._options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("DIFFUSION_GYM_REWARD_TOKEN", None)
        if self._token is not None:
            environment["DIFFUSION_GYM_REWARD_TOKEN"] = self._token
        with (self.folder / "stderr").open("a") as errors:
            if self._fresh:
                program = [sys.executable, "-m", "diffusion_gym.agents.cli", *command]
                pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
                self.process = subprocess.Popen(program, cwd=self.folder, env=environment, **pipes)
            else:
                self.process = Forked(lambda: main(command), self.folder, environment, errors)
        line = self.process.stdout.readline()  # comes when it listens
        assert " at http://" in line, line + (self.folder / "stderr").read_text()
        self.url = line.split(" at ")[1].split(";")[0]

    def wait_until_at(self, name):
        """Until the reward is at the prompt "hold NAME"."""
        deadline = time.monotonic() + 60
        while not (self.folder / f"at {name}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self):
        self.process.wait(60)
        self.process.stdout.close()

    def restart(self):
        self._start(self.url.rsplit(":", 1)[1])


@pytest.fixture(scope="module")
def start_server(tmp_path_factory):
    """`start_server(*options, token=None)`: a `Server`, ended with the module's tests."""
    servers = []

    def start(*options, **keywords):
        servers.append(Server(tmp_path_factory.mktemp("server"), *map(str, options), **keywords))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()
