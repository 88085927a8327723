"""Run folders: which one a new run takes."""

import os
import signal
import subprocess
import sys

import pytest

from diffusion_gym.agents.training.runs import check_new
from diffusion_gym.storage import write_json

# Dies while it writes the file that is named, as by SIGKILL.
KILLED = """
import os, signal, sys
from pathlib import Path
from diffusion_gym.storage import write_json

Path.write_bytes = lambda self, data: os.kill(os.getpid(), signal.SIGKILL)
write_json(sys.argv[1], {})
"""


def test_a_kill_during_the_first_write_leaves_the_folder_to_the_next_run(tmp_path):
    folder = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder / "config.json")], env=environment)
    assert done.returncode == -signal.SIGKILL
    [left] = folder.iterdir()
    assert left.name.startswith(".config.json.")
    check_new(folder)
    assert left.exists()  # to look at a folder changes nothing in it


@pytest.mark.parametrize("name", ["thesis.txt", ".note", "a.unfinished"])
def test_files_of_another_kind_are_respected(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and no run of diffusion-gym; choose another --out"):
        check_new(tmp_path)


def test_a_folder_with_a_run_and_a_file_instead_of_a_folder_are_refused(tmp_path):
    check_new(tmp_path / "new")
    check_new(tmp_path)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(FileExistsError, match="already holds a run; go on with --resume"):
        check_new(tmp_path)
    with pytest.raises(FileExistsError, match="is not empty and no run"):
        check_new(tmp_path / "config.json")
