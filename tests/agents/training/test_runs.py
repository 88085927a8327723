"""Run folders: which one a new run takes."""

import os
import signal
import sys
from pathlib import Path

import pytest

from diffusion_gym.agents.training.runs import check_new
from diffusion_gym.storage import write_json
from forked import Forked


def test_a_kill_during_the_first_write_leaves_the_folder_to_the_next_run(tmp_path):
    folder = tmp_path / "run"

    def killed():
        Path.write_bytes = lambda self, data: os.kill(os.getpid(), signal.SIGKILL)
        write_json(folder / "config.json", {})

    process = Forked(killed, tmp_path, os.environ.copy(), sys.__stderr__)
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
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
