"""A pixel DDPM through the command line: train, evaluate, and load the result in plain diffusers."""

import diffusers
import numpy as np
import pytest
import torch

from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training.runs import evaluate_run
from diffusion_gym.storage import read_json
from diffusion_gym.testing.random_ddpm import write_random_ddpm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_ddpm(tmp_path_factory.mktemp("models") / "ddpm")


def train(folder, out, *options):
    arguments = ["--env", "DiffusionDenoise-CelebaHQ-Incompressibility-v0", "--env.model", str(folder)]
    size = ["--total-reward-queries", "8", "--samples-per-iteration", "8", "--rollout-batch", "4"]
    main(["train", *arguments, "--out", str(out), *size, "--env.num-inference-steps", "3", *options])


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_trained_model_loads_and_samples_in_plain_diffusers(trainable, folder, tmp_path, capsys):
    options = ["--preset", "thesis-incompressibility", "--agent.trainable", trainable, "--agent.learning-rate", "1e-2"]
    train(folder, tmp_path / "run", *options, "--agent.batch-size", "8")
    model = tmp_path / "run" / "model"
    assert f"In diffusers: DDPMPipeline.from_pretrained({str(model)!r})" in capsys.readouterr().out
    pipe = diffusers.DDPMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    before = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").state_dict()
    after = pipe.unet.state_dict()
    assert set(after) == set(before)  # adapters are merged
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and (trainable == "full" or all("attentions" in name for name in changed))
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()

    settings = read_json(tmp_path / "run" / "config.json")["settings"]
    assert settings["env_options"]["guidance_scale"] == 1.0 and settings["env_options"]["revision"] is None
    result = evaluate_run(tmp_path / "run", 4, seed=1)
    assert result["kl_to_base"] > 0 and result["reward_mean"] != result["base_reward_mean"]
    assert list(result["prompts"]) == [""]
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        evaluate_run(tmp_path / "run", 0, seed=1)


@pytest.mark.parametrize("agent", ["ddpo_sf", "ddpo_iskl", "dpok", "rwr", "rwr_sparse"])
def test_every_other_agent_trains_it(agent, folder, tmp_path):
    more = [] if agent.startswith("ddpo") else ["--agent.updates", "1"]
    precision = ["--agent.mixed-precision", "no"]
    train(folder, tmp_path / "run", "--agent", agent, "--agent.batch-size", "8", *precision, *more)
    [row] = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"reward_queries": 8' in row
    assert diffusers.UNet2DModel.from_pretrained(tmp_path / "run" / "model", subfolder="unet")
