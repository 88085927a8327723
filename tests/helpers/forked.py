"""A program in a process of its own that is a fork of this one: it need not import torch again, which takes seconds."""

import logging
import multiprocessing
import os
import signal
import sys


class Forked:
    """`program()` in a fork, with the folder, the environment and the standard streams of a process of its own.

    What is registered or imported there stays there. It has what the tests use of `subprocess.Popen`.

    Args:
        program: what to run; what it raises is the end of the process, as in a program.
        folder: the current directory, from which it imports too.
        environment: in place of this process's.
        errors: a file for standard error.
    """

    def __init__(self, program, folder, environment, errors):
        output, write = os.pipe()
        arguments = (program, folder, environment, errors.fileno(), write)
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
        self._process.start()
        os.close(write)
        self.pid = self._process.pid
        self.stdout = os.fdopen(output, encoding="utf-8")

    def poll(self):
        """The exit code; None while it runs."""
        self._process.join(0)
        return self._process.exitcode

    def wait(self, seconds=None):
        """The exit code, once it has ended."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"process {self.pid} did not end within {seconds} seconds"
        return self._process.exitcode

    def send_signal(self, number):
        """Send a signal."""
        os.kill(self.pid, number)

    def terminate(self):
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


def _run(program, folder, environment, errors, output):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    logging.getLogger().handlers.clear()  # pytest's
    os.dup2(output, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8") for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, str(folder))
    program()
