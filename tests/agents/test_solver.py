"""Rollouts by diffusers' own schedulers against diffusers' own pipelines, and agents that learn from their pictures."""

import warnings
from typing import get_args

import diffusers
import numpy as np
import pytest
import torch

from diffusion_gym import SamplerConfig
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS, RWR
from diffusion_gym.agents.rollout import collect
from diffusion_gym.config import SolverName
from diffusion_gym.models import load_model
from diffusion_gym.models.solvers import Solver
from diffusion_gym.storage import read_json, write_json
from diffusion_gym.testing.random_pipeline import write_random_pipeline
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3
from diffusion_gym.wrappers.one_step import OneStepVectorEnv

PROMPTS = ["a red circle", "two blue stars", ""]
CLASSES = {
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    **{name: name for name in ("EulerAncestralDiscreteScheduler", "DEISMultistepScheduler", "DDIMScheduler")},
}
FLOW_CLASSES = {**CLASSES, "euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
SHIFTED = {"num_train_timesteps": 1000, "shift": 3.0}


def with_scheduler(path, config):
    """The folder with another scheduler config, which is not complete."""
    kind = config["_class_name"]
    write_json(path / "scheduler" / "scheduler_config.json", config)
    index = read_json(path / "model_index.json")
    write_json(path / "model_index.json", {**index, "scheduler": ["diffusers", kind]})
    return path


@pytest.fixture(scope="module")
def preserving(tmp_path_factory):
    """As the folder of Stable Diffusion 1.4: PNDM, whose config leaves the spacing of timesteps to the class."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    path = write_random_pipeline(tmp_path_factory.mktemp("models") / "pndm")
    return with_scheduler(path, {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": False, **betas})


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    path = write_random_sd3(tmp_path_factory.mktemp("models") / "sd3", t5=False)
    return with_scheduler(path, {"_class_name": "FlowMatchEulerDiscreteScheduler", **SHIFTED})


def start(model):
    return torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def ours(path, name, steps, guidance):
    model = load_model(str(path), "cpu", "float32")
    policy = DenoisingPolicy(model, SamplerConfig(guidance_scale=guidance))
    embeddings = policy.embed_prompts(PROMPTS)
    solver = Solver(model, name, steps)
    generator = torch.Generator().manual_seed(3)
    return solver.solve(lambda x, t: policy.output_at(x, t, embeddings), start(model), generator), model


def theirs(path, kind, steps, guidance, model, **options):
    absent = (
        {}
        if (path / "text_encoder_3").is_dir() or "sd3" not in path.name
        else {"text_encoder_3": None, "tokenizer_3": None}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, **absent)
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS,
        latents=start(model),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images


def close(found, expected):
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", CLASSES)
def test_pictures_are_those_of_the_pipeline_with_that_scheduler(preserving, name, guidance):
    found, model = ours(preserving, name, 6, guidance)
    clamp = {"clip_sample": False} if name == "DDIMScheduler" else {}  # its own default, which no one asked for
    close(found, theirs(preserving, CLASSES[name], 6, guidance, model, **clamp))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", get_args(SolverName))
def test_pictures_of_a_flow_are_those_of_its_pipeline(flow, name, guidance):
    found, model = ours(flow, name, 6, guidance)
    kind = FLOW_CLASSES[name]
    told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    options = {} if kind.startswith("FlowMatch") else told
    close(found, theirs(flow, kind, 6, guidance, model, **options))


def test_a_dynamic_shift_is_that_of_the_pipeline(flow, tmp_path):
    path = write_random_sd3(tmp_path / "sd3", t5=False)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    with_scheduler(path, config)
    found, model = ours(path, "euler", 6, 3.0)
    close(found, theirs(path, "FlowMatchEulerDiscreteScheduler", 6, 3.0, model))
    fixed, _ = ours(flow, "euler", 6, 3.0)
    assert (found - fixed).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"'heun' cannot sample from model=.*no use_dynamic_shifting"):
        Solver(model, "heun", 6)


def test_the_same_solver_samples_again(preserving):
    model = load_model(str(preserving), "cpu", "float32")
    solver = Solver(model, "unipc", 5)
    first, second = (solver.solve(lambda x, t: 0.3 * x, start(model)) for _ in range(2))
    assert torch.equal(first, second)


# --- agents --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rwr(make_env, make_agent):
    env = make_env(4, eta=0.0)
    return env, make_agent(env, agent=RWR, rollout_scheduler="dpm++", rollout_steps=3, batch_size=4, updates=2)


def test_an_agent_learns_from_the_pictures_of_a_solver_without_any_noise(rwr):
    """Of each picture x_0 is kept, and it is x_0 whose reward is known."""
    env, agent = rwr
    rolled = agent.sample(env, 8, (0, 0, 0))
    assert rolled.latents.shape == (1, 8, 4, 4, 4) and rolled.log_probs.numel() == 0
    pictures = env.unwrapped.model.decode(rolled.finished)
    torch.testing.assert_close(rolled.rewards, pictures.mean((1, 2, 3)))
    assert len(rolled.finished.flatten(1).unique(dim=0)) == 8
    again = agent.sample(env, 8, (0, 0, 0))
    assert torch.equal(again.finished, rolled.finished)
    before = [parameter.clone() for parameter in agent.parameters]
    assert np.isfinite(list(agent.update(rolled, np.random.default_rng(0)).values())).all()
    assert not all(map(torch.equal, before, agent.parameters))


def test_the_solver_begins_from_the_noise_of_the_environment(rwr):
    env, agent = rwr
    observation, infos = env.reset(seed=7)
    policy, embeddings = agent.policy, agent.policy.embed_prompts(infos["prompt"])
    with torch.no_grad():
        expected = agent.solver.solve(lambda x, t: policy.output_at(x, t, embeddings), observation["latents"])
    found = collect(OneStepVectorEnv(env), policy, torch.Generator(), seed=7, solver=agent.solver)
    assert torch.equal(found.finished, expected)
    reference = collect(OneStepVectorEnv(env), policy, torch.Generator(), seed=7, solver=agent.solver, reference=True)
    assert not torch.equal(reference.finished, expected)


def test_pictures_noised_anew_may_come_from_a_solver(make_env, make_agent):
    env = make_env(4)
    options = {"rollout_scheduler": "heun", "rollout_steps": 3, "group_size": 2}
    agent = make_agent(env, agent=DDPOIS, renoise=True, **options)
    rolled = agent.sample(env, 4, (0, 0, 0))
    assert rolled.latents.shape[0] == 1 and rolled.prompts[0] == rolled.prompts[1]
    assert agent.update(rolled, np.random.default_rng(0))["grad_norm"] > 0


@pytest.mark.parametrize(
    "agent, options, message",
    [
        (RWR, {"rollout_scheduler": "dpm"}, r"rollout_scheduler.*'dpm'.*dpm\+\+"),
        (RWR, {"rollout_scheduler": "FlowMatchEulerDiscreteScheduler"}, "rollout_scheduler.*EulerDiscreteScheduler"),
        (RWR, {"rollout_scheduler": "DPMSolverSDEScheduler"}, "rollout_scheduler.*EulerDiscreteScheduler"),
        (RWR, {"rollout_scheduler": "unipc", "rollout_steps": 0}, "rollout_steps=0 must be 1 to 1000"),
        (RWR, {"rollout_scheduler": "unipc", "rollout_steps": 1001}, "rollout_steps=1001 must be 1 to 1000"),
        (RWR, {"rollout_steps": 8}, "rollout_steps=8 is of rollout_scheduler, which is not given"),
        (DDPOIS, {"rollout_scheduler": "euler"}, "rollout_scheduler='euler' gives no log-probabilities"),
    ],
)
def test_what_no_solver_can_do_is_refused(make_env, make_agent, agent, options, message):
    with pytest.raises(ValueError, match=message):
        make_agent(make_env(4), agent=agent, **options)


def test_a_prediction_that_a_scheduler_cannot_read_is_refused(tmp_path):
    model = load_model(str(write_random_pipeline(tmp_path / "sample", prediction_type="sample")), "cpu", "float32")
    with pytest.raises(
        ValueError, match="rollout_scheduler=.EulerAncestralDiscreteScheduler. cannot sample from model="
    ):
        Solver(model, "EulerAncestralDiscreteScheduler", 5)


def test_a_model_without_a_scheduler_of_diffusers_is_refused(preserving):
    class Model:
        name = "mine"

    with pytest.raises(ValueError, match="needs a model of a diffusers pipeline, and model='mine' has no"):
        Solver(Model(), "euler", 5)
