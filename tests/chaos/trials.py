"""The kinds of trials: what is broken, and what has to hold afterwards."""

import json
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from functools import partial

from benchmark_suites import write_suite
from diffusion_gym.agents.algorithms import AGENTS
from run_folders import carrying_arguments, metrics_lines
from tests.chaos.folders import benchmark_difference, difference, half_written, newest_checkpoint
from tests.chaos.person import ANSWERS, answer_questions, lines_of
from tests.chaos.programs import Program, end_all, load_pipeline, run_function, start_function

ITERATIONS, SAMPLES = 4, 4  # of a training, which is as short as it can be: there are hundreds of them
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)


class Broken(AssertionError):
    """What should hold does not."""


class NotHere(Exception):
    """A kind of trial that this machine cannot do."""


class Place:
    """A temporary folder with a tiny pipeline, and what uninterrupted commands leave, made when first asked for.

    Attributes:
        folder: the folder.
        pipeline: the pipeline's.
        port: a free one of this machine, for the reward server.
        url: the reward server's.
    """

    def __init__(self, folder):
        self.folder, self.pipeline, self.port = folder, folder / "pipeline", _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        run_function(write_pipeline, self.pipeline)
        self._whole, self._model = {}, load_pipeline(self.pipeline)

    @contextmanager
    def trial(self):
        """A new folder, removed at the end, and a list of what to tell."""
        folder = self.folder / "trial"
        folder.mkdir()
        try:
            yield folder, []
        finally:
            end_all()
            shutil.rmtree(folder)

    def whole(self, name, make):
        """The folder and the seconds of `make(folder)` -> a program, for each name once; it has to succeed."""
        if name not in self._whole:
            folder, started = self.folder / "whole" / name, time.monotonic()
            folder.parent.mkdir(exist_ok=True)
            program = make(folder)
            if program.wait():
                raise RuntimeError(f"the uninterrupted {name} failed: {program.printed}")
            self._whole[name] = folder, time.monotonic() - started
        return self._whole[name]

    def train(self, agent, out, *more):
        """Begin a training of an agent with all that it may carry from one iteration to the next switched on."""
        return Program(train_arguments(self.pipeline, agent, out, *more), _log(out))

    def whole_run(self, agent):
        return self.whole(agent, partial(self.train, agent))


def write_pipeline(folder):
    from diffusion_gym.testing.random_pipeline import write_random_pipeline

    write_random_pipeline(folder)


def train_arguments(pipeline, agent, out, *more):
    short = {
        "--env.num-inference-steps": 2,
        "--total-reward-queries": ITERATIONS * SAMPLES,
        "--samples-per-iteration": SAMPLES,
        "--rollout-batch": SAMPLES,
        "--checkpoint-every": 1,
        "--pictures-every": 2,
    }
    words = (part for pair in short.items() for part in pair)
    return [*carrying_arguments(pipeline, agent, out, batch_size=SAMPLES // 2), *words, *more]


def go_on(place, agent, out, *more):
    """What a user does after an end: `--resume`, or the same command where nothing was begun."""
    if (out / "config.json").is_file():
        return Program(["train", "--resume", "--out", out], _log(out))
    return place.train(agent, out, *more)


def killed(place, folder, rng, told, agent):
    """SIGKILL at a random moment, in half of the trials twice; resumed, the run equals the uninterrupted one."""
    whole, seconds = place.whole_run(agent)
    out = folder / "run"
    for kill in range(rng.choice((1, 2))):
        program = go_on(place, agent, out) if kill else place.train(agent, out)
        _break_at(program, rng.uniform(0, seconds / (kill + 1)), told, out, Program.kill)
    _finish(go_on(place, agent, out))
    _require(difference(out, whole))


def signalled(place, folder, rng, told):
    """SIGTERM, SIGHUP, SIGUSR1 or SIGINT at a random moment: it ends by itself, once it trains with a checkpoint of its
    last iteration; resumed, the run equals the uninterrupted one."""
    agent, signum = rng.choice(AGENTS.names()), rng.choice(SIGNALS)
    told.append(f"{agent}, {signum.name}")
    whole, seconds = place.whole_run(agent)
    out = folder / "run"
    program = place.train(agent, out)
    _break_at(program, rng.uniform(0, seconds), told, out, lambda running: running.send(signum))
    code, rows = program.wait(), metrics_lines(out)
    if code not in (0, 130, -signum):
        raise Broken(f"exit code {code} after {signum.name}: {program.printed[-500:]}")
    if code == 0 and rows and newest_checkpoint(out).stem != f"iteration-{len(rows):06d}":
        raise Broken(f"{len(rows)} iterations were done, the newest checkpoint is {newest_checkpoint(out).name}")
    _finish(go_on(place, agent, out))
    _require(difference(out, whole))


def disk_full(place, folder, rng, told):
    """A disk that is too small by a random amount: one error that names the file and exit code 2; on a larger disk the
    resumed run equals the uninterrupted one."""
    agent = rng.choice(AGENTS.names())
    whole, _ = place.whole_run(agent)
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    size = int(rng.uniform(0.02, 1.2) * needed)
    told.append(f"{agent}, {size // 1024} of {needed // 1024} KiB")
    with _disk(folder / "disk", size) as (disk, enlarge):
        out = disk / "run"
        log = folder / "run.log"  # on another disk
        program = Program(train_arguments(place.pipeline, agent, out), log)
        code = program.wait()
        told.append(f"exit code {code}, {_iterations(out)}")
        if code:
            _require_one_error(program, "No space left on device")
        enlarge()
        if code:
            again = ["train", "--resume", "--out", out]
            started = (out / "config.json").is_file()
            _finish(Program(again if started else train_arguments(place.pipeline, agent, out), folder / "again.log"))
        _require(difference(out, whole))


def two_writers(place, folder, rng, told):
    """Two commands that begin or resume one folder at nearly the same time: one trains, the other is told who does;
    the run equals the uninterrupted one."""
    agent, resumed = rng.choice(AGENTS.names()), rng.random() < 0.5
    whole, seconds = place.whole_run(agent)
    out = folder / "run"
    if resumed:
        program = place.train(agent, out)
        program.wait_until(lambda: newest_checkpoint(out).name != "none")
        program.kill()
    first = go_on(place, agent, out)
    first.sleep(rng.choice((0.0, rng.uniform(0, 0.2), rng.uniform(0, seconds))))
    arguments = ["train", "--resume", "--out", out] if resumed else train_arguments(place.pipeline, agent, out)
    second = Program(arguments, folder / "second.log")
    codes = first.wait(), second.wait()
    told.append(f"{agent}, {'resumed' if resumed else 'new'}, exit codes {codes}")
    for program in (first, second):
        if program.code:
            _require_one_error(program, "in use by", "already holds a run")
    if 0 not in codes:
        raise Broken(f"neither of them trained: {first.printed[-300:]} / {second.printed[-300:]}")
    _require(difference(out, whole))


def bench_killed(place, folder, rng, told):
    """SIGKILL of `bench` at a random moment, in half of the trials twice; the same command goes on, and its records and
    samples equal the uninterrupted ones."""
    suite = write_suite(place.folder / "suite", place.pipeline)

    def start(out):
        arguments = ["bench", "--suite", suite, "--out", out, "--agents", "ddpo_is,dpok", "--seeds", 1, "--trust"]
        return Program(arguments, _log(out))

    whole, seconds = place.whole("bench", start)
    out = folder / "bench"
    for kill in range(rng.choice((1, 2))):
        _break_at(start(out), rng.uniform(0, seconds / (kill + 1)), told, out, Program.kill)
    _finish(start(out))
    _require(benchmark_difference(out, whole))


def label_killed(place, folder, rng, told):
    """SIGKILL of `label` at a random moment while a person answers, in half of the trials twice; no answer that the
    page took is lost, and with the same command the answers become those of an uninterrupted session."""

    def whole_session(out):
        program = _label(place, out)
        run_function(answer_questions, place.url, out.with_name("taken"))
        program.send(signal.SIGINT)
        return program

    whole, seconds = place.whole("labels", whole_session)
    out, taken = folder / "labels", folder / "taken"
    for _ in range(rng.choice((1, 2))):
        program = _label(place, out, rng.uniform(0, 2 * seconds))  # in the other trials the page opens
        ended = start_function(answer_questions, place.url, taken)
        _wait_for_lines(program, taken, rng.randrange(ANSWERS), place.port)
        program.sleep(rng.uniform(0, 0.02))
        program.kill()
        ended()
        told.append(f"broken with {len(lines_of(taken))} of {ANSWERS} answers taken")
        stored = [json.loads(line)["number"] for line in lines_of(out / "answers.jsonl") if line.endswith("\n")]
        if lost := {int(line) for line in lines_of(taken)}.difference(stored):
            raise Broken(f"the answers {sorted(lost)} were taken and are not stored")
    program = _label(place, out)
    run_function(answer_questions, place.url, taken)
    program.send(signal.SIGINT)
    _finish(program)
    if lines_of(out / "answers.jsonl") != lines_of(whole / "answers.jsonl"):
        raise Broken("the answers are others than those of the uninterrupted session")


def _label(place, out, seconds=None):
    """Begin `label`, and wait until its page answers or so many seconds are over."""
    made = ["--model", place.pipeline, "--prompts", "a cat", "a dog", "--pictures", 16, "--group", 8]
    program = Program(["label", *made, "--out", out, "--port", place.port, "--no-browser"], _log(out))
    deadline = None if seconds is None else time.monotonic() + seconds
    program.wait_until(lambda: _answers(place.port) or (deadline is not None and time.monotonic() > deadline))
    return program


def _wait_for_lines(program, file, number, port):
    """Wait until the file has so many lines, or the page is gone."""
    program.wait_until(lambda: len(lines_of(file)) >= number or not _answers(port))


def server_killed(place, folder, rng, told):
    """The reward server is killed at a random moment and started again; the run that it scores goes on by itself and
    equals one with an undisturbed server."""

    def disturb(server):
        server.kill()
        time.sleep(rng.uniform(0, 1))
        return _serve(place, folder)

    _served(place, folder, rng, told, disturb)


def server_stopped(place, folder, rng, told):
    """The reward server hangs (SIGSTOP) for longer than its client waits for an answer, and goes on; so does the run,
    which equals one with an undisturbed server."""

    def disturb(server):
        server.send(signal.SIGSTOP)
        time.sleep(rng.uniform(0.5, 4))
        server.send(signal.SIGCONT)
        return server

    _served(place, folder, rng, told, disturb)


def client_killed(place, folder, rng, told):
    """SIGKILL of a run that a reward server scores; the server serves on, and the resumed run equals the uninterrupted
    one."""
    _served(place, folder, rng, told, None)


def _served(place, folder, rng, told, disturb):
    """A run that a reward server scores; `disturb(server)` gives the server that serves on, None kills the run."""
    agent = rng.choice(("ddpo_is", "rwr"))
    remote = ("--env.reward", place.url, "--env.reward-kwargs", "timeout", "2")
    server = _serve(place, folder)
    whole, seconds = place.whole(f"served-{agent}", lambda out: place.train(agent, out, *remote))
    out = folder / "run"
    program = place.train(agent, out, *remote)
    program.wait_until(lambda: (out / "config.json").exists())  # without a server no run begins
    moment = rng.uniform(0, seconds / 2)
    if disturb is None:
        _break_at(program, moment, told, out, Program.kill)
        program = go_on(place, agent, out, *remote)
    else:
        program.sleep(moment)
        told.append(f"{agent}, {moment:.2f} s after its begin, {len(metrics_lines(out))} of {ITERATIONS} iterations")
        server = disturb(server)
    _finish(program)
    _require(difference(out, whole))


def _serve(place, folder):
    server = Program(["serve-reward", "Compressibility", "--port", place.port], folder / "server.log")
    server.wait_until(lambda: _answers(place.port))
    if not server.running:
        raise RuntimeError(f"no reward server: {server.printed}")
    return server


def _answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _log(out):
    return out.with_name(f"{out.name}.log")


def _break_at(program, seconds, told, out, act):
    """`act(program)` so many seconds after its start, and say what was there then."""
    program.sleep(seconds)
    ended = not program.running
    act(program)
    writing = ", in the middle of a write" if half_written(out) else ""
    told.append(f"{'ended before' if ended else 'broken'} at {seconds:.2f} s, {_iterations(out)}{writing}")


def _iterations(out):
    return f"{len(metrics_lines(out))} of {ITERATIONS} iterations"


def _finish(program):
    if code := program.wait():
        raise Broken(f"exit code {code}: {program.printed[-2000:]}")


def _require(fault):
    if fault:
        raise Broken(fault)


def _require_one_error(program, *texts):
    """Exit code 2 and one line that says one of these."""
    errors = [line for line in program.printed.splitlines() if line.startswith("error: ")]
    if program.code != 2 or len(errors) != 1 or "Traceback" in program.printed:
        raise Broken(f"exit code {program.code}, {len(errors)} errors: {program.printed[-2000:]}")
    if not any(text in errors[0] for text in texts):
        raise Broken(f"another error than {' or '.join(texts)}: {errors[0]}")


@contextmanager
def _disk(folder, size):
    """A file system of `size` bytes in memory, and a function that enlarges it.

    Raises:
        NotHere: this user may mount none.
    """
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "chaos", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotHere(f"a small disk takes the right to mount ({done.stderr.strip()}); run it as root")

    mount(f"size={size}")
    try:
        yield folder, lambda: mount("remount,size=1g")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


KINDS = {
    **{f"kill {agent}": partial(killed, agent=agent) for agent in AGENTS},
    "signal": signalled,
    "disk full": disk_full,
    "two writers": two_writers,
    "kill bench": bench_killed,
    "kill label": label_killed,
    "kill server": server_killed,
    "stop server": server_stopped,
    "kill client": client_killed,
}
