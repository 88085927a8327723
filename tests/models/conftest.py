"""Tiny random pipelines of every latent family, with another scheduler or other fields than they are written with."""

import os
import warnings
from functools import cache

import pytest

from diffusion_gym.storage import read_json, write_json
from diffusion_gym.testing.random_pipeline import write_random_pipeline
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3, write_random_sdxl

FAMILIES = {"sd": write_random_pipeline, "sdxl": write_random_sdxl, "sd3": write_random_sd3}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """`base(family)`: a tiny random pipeline of a family, written once."""

    @cache
    def write(family):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FAMILIES[family](tmp_path_factory.mktemp(family) / "base")

    return write


@pytest.fixture
def folder(base, tmp_path):
    """`folder(family, scheduler, part=changes)`: the tiny pipeline with another scheduler, or other fields of a part.

    Its weights are links to the base's.
    """

    def make(family, scheduler=None, /, weights=(), **parts):
        path, source = tmp_path / "pipeline", base(family)
        for part in source.iterdir():
            if part.is_dir():
                (path / part.name).mkdir(parents=True)
                for file in part.iterdir():
                    os.symlink(file, path / part.name / file.name)
        index = read_json(source / "model_index.json")
        for part, network in weights:
            for file in (path / part).iterdir():
                file.unlink()
            network.save_pretrained(path / part)
        if scheduler is not None:
            (path / "scheduler" / "scheduler_config.json").unlink()
            scheduler.save_pretrained(path / "scheduler")
            index["scheduler"] = ["diffusers", type(scheduler).__name__]
        for part, changes in parts.items():
            file = path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
            config = read_json(file)
            file.unlink()
            write_json(file, {name: value for name, value in {**config, **changes}.items() if value != "absent"})
        write_json(path / "model_index.json", index)
        return path

    return make
