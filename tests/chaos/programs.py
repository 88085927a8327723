"""Commands of `diffusion-gym` as forks of this process, which has imported what they need: a start costs no seconds.

A fork has the memory of a program that was started anew, has done its imports and has loaded its model. That holds as
long as this process has one thread, no open run and no generator that it has drawn from, which `warm_up` and `Program`
see to.
"""

import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_FORK = multiprocessing.get_context("fork")
_STARTED = []
_LONGEST = 300.0  # seconds that a program may take before it counts as one that hangs
_IMPORTS = (
    "diffusion_gym.agents.cli",
    "diffusion_gym.agents.training.runs",
    "diffusion_gym.agents.benchmark.cells",
    "diffusion_gym.agents.benchmark.command",
    "diffusion_gym.agents.label.app",
    "diffusion_gym.agents.label.command",
    "diffusion_gym.agents.label.questions",
    "diffusion_gym.models.latent",
    "diffusion_gym.testing.random_pipeline",
    "diffusion_gym.rewards.server.app",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "scipy.stats",
    "peft",
    "starlette.applications",
    "uvicorn",
)


def warm_up():
    """Import what the programs import, and read a command line once: its first time takes as long as a training."""
    for name in _IMPORTS:
        importlib.import_module(name)
    from diffusion_gym.agents.cli import parse_train

    parse_train(["--env", "DiffusionDenoise-v0", "--out", "none"])


def load_pipeline(folder):
    """Load the model of a pipeline, which `load_model` then shares with all programs that are started."""
    from diffusion_gym.models import load_model

    model = load_model(str(folder), "cpu", "float32")
    gc.freeze()  # a collection in a program would copy the pages of all objects that it has from here
    return model


def start_function(function, *arguments):
    """Call it in a fork; gives the function that waits for its end."""
    process = _FORK.Process(target=function, args=arguments)
    process.start()

    def wait():
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{function.__name__} failed")

    return wait


def run_function(function, *arguments):
    """Call it in a fork, and wait for its end."""
    start_function(function, *arguments)()


class Hangs(Exception):
    """A program that does not end."""


class Program:
    """`diffusion-gym ARGUMENTS`, begun at once.

    Attributes:
        log: the file of all that it prints.
    """

    def __init__(self, arguments, log):
        assert threading.active_count() == 1, "to fork a process that has threads is not sound"
        self.log = Path(log)
        self._process = _FORK.Process(target=_run_command, args=([str(part) for part in arguments], self.log))
        self._process.start()
        _STARTED.append(self)

    @property
    def running(self):
        return self._process.is_alive()

    @property
    def code(self):
        """Its exit code; that of a signal is negative."""
        return self._process.exitcode

    @property
    def printed(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def own_kilobytes(self):
        """Its resident memory that is no file's, RssAnon of proc(5); 0 when it has ended."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return 0
        found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
        return int(found[0]) if found else 0

    def send(self, signum):
        if self.running:
            os.kill(self._process.pid, signum)

    def kill(self):
        """SIGKILL, and wait for its end."""
        self._process.kill()
        self._process.join()

    def wait(self, seconds=_LONGEST):
        """Its exit code.

        Raises:
            Hangs: it does not end; it is killed.
        """
        self._process.join(seconds)
        if self.running:
            self.kill()
            raise Hangs(f"no end after {seconds:.0f} s")
        return self.code

    def sleep(self, seconds):
        """Wait so long, or until it ends."""
        self._process.join(max(0.0, seconds))

    def wait_until(self, condition, seconds=_LONGEST):
        """Wait until `condition()` holds, or it ends."""
        deadline = time.monotonic() + seconds
        while self.running and not condition():
            if time.monotonic() > deadline:
                self.kill()
                raise Hangs(f"not ready after {seconds:.0f} s")
            time.sleep(0.002)


def end_all():
    """Kill what still runs, of all that was started."""
    while _STARTED:
        program = _STARTED.pop()
        if program.running:
            program.kill()


def _run_command(arguments, log):
    _print_into(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    subprocess.Popen = _ForkingPopen
    from diffusion_gym.agents.cli import main

    main(arguments)


def _print_into(file):
    os.dup2(file, 1)
    os.dup2(file, 2)


class _ForkingPopen(subprocess.Popen):
    """`subprocess.Popen`, but `[python, "-P", "-m", MODULE, ...]` with a pipe as its input is a fork too."""

    def __init__(self, command, **options):
        if list(command[:3]) != [sys.executable, "-P", "-m"]:
            super().__init__(command, **options)
            self._process = None
            return
        assert options["stdin"] == subprocess.PIPE and options["stderr"] == subprocess.STDOUT
        self.returncode = None
        receiver, self._sender = os.pipe()
        ends = (receiver, self._sender, options["stdout"].fileno())
        self._process = _FORK.Process(target=_run_module, args=(command[3:], ends, options["env"]))
        self._process.start()
        os.close(receiver)

    def poll(self):
        if self._process is None:
            return super().poll()
        self.returncode = self._process.exitcode
        return self.returncode

    def kill(self):
        return super().kill() if self._process is None else self._process.kill()

    def wait(self, timeout=None):
        if self._process is None:
            return super().wait(timeout)
        self._process.join(timeout)
        return self.poll()


def _run_module(arguments, ends, env):
    receiver, sender, output = ends
    os.setsid()
    os.close(sender)
    sys.stdin = open(receiver)
    _print_into(output)
    os.environ.update(env)
    sys.argv = arguments
    sys.modules.pop(arguments[0], None)  # runpy warns of a module that is there already
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
