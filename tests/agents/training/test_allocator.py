"""Memory that passes free: kept by the process on a CPU, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

from diffusion_gym.agents.training import allocator, threads

PASSES = """
import resource, runpy, sys
import numpy as np

keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]  # without the package, which imports torch

def passes():
    for _ in range(8):
        blocks = [np.ones(2**20, np.float32) for _ in range(16)]  # 4 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = keep_freed_memory()
print(int(kept), -passes() + passes())
"""
ON_GLIBC = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


def passes(**environment):
    """Whether memory is kept, and the page faults of 8 passes over 64 MB, in a process of its own."""
    silent = {name: value for name, value in os.environ.items() if name not in allocator._SAID}
    command = [sys.executable, "-c", PASSES, allocator.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**silent, **environment})
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


@ON_GLIBC
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_freed_memory_is_kept_for_the_next_pass_unless_the_environment_says_otherwise(name):
    kept, faults = passes()
    returned, many = passes(**{name: "131072"})
    assert kept and not returned and 10 * faults < many


def test_another_platform_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("the C library was asked for"))
    assert allocator.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    for name in allocator._SAID:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False


def test_the_commands_ask_for_it_and_a_policy_never(make_env, make_policy, monkeypatch):
    asked = []
    monkeypatch.setattr(threads, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("the C library was asked for"))
    make_policy(make_env(2))
    assert not asked
    threads.prepare_process(0)
    assert asked == [True]
