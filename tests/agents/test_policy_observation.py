"""How the policy reads an observation: guidance, prompts, timesteps; and what it refuses."""

import json
import shutil

import gymnasium as gym
import pytest
import torch
from diffusers import DDIMScheduler

from diffusion_gym.agents import DenoisingPolicy

TRAINABLE = ["lora", "full"]


@pytest.fixture
def pipeline_that_ends_at(tiny_pipeline, tmp_path):
    """`pipeline_that_ends_at(t)`: the tiny pipeline, whose sampler visits t = 0 or 1 last."""

    def written(timestep):
        folder = shutil.copytree(tiny_pipeline, tmp_path / str(timestep))
        config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        config |= {"timestep_spacing": ("linspace", "leading")[timestep], "set_alpha_to_one": True}
        (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
        return folder

    return written


def observe(rolled, step=1):
    samples = torch.arange(len(rolled))
    return rolled.states(samples, torch.full_like(samples, step))


# --- guidance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.0])
@torch.no_grad()
def test_the_guided_mean_by_two_calls_of_the_network_and_diffusers(make_env, make_policy, roll, trainable, guidance):
    env = make_env(guidance_scale=guidance)
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    model, states = policy.model, observe(rolled)
    t, x = states["timestep"][0, 0], states["latents"]
    assert (states["timestep"] == t).all()

    def network(prompts):
        embeddings = model.text_encoder(model.tokenize(prompts)).last_hidden_state
        return policy.unet(x, t, encoder_hidden_states=embeddings).sample.double()

    eps = guidance * network(list(rolled.prompts)) + (1 - guidance) * network([""] * 4)
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(4)
    expected = scheduler.step(eps, t, x.double(), eta=1.0, variance_noise=torch.zeros_like(eps)).prev_sample
    torch.testing.assert_close(policy.distribution(states).mean.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_bfloat16_network_leaves_the_state_in_float32(make_env, make_policy, roll):
    """x_t enters the mean itself, not only the network: rounding it there would shift the mean by 0.4 %."""
    env = make_env(guidance_scale=1.0, dtype="bfloat16", prompts=["a red circle"])
    policy = make_policy(env)
    states = observe(roll(env, policy))
    t, x = states["timestep"][0, 0], states["latents"]
    embeddings = policy.model.text_encoder(policy.model.tokenize(["a red circle"])).last_hidden_state
    eps = policy.unet(x.bfloat16(), t, encoder_hidden_states=embeddings.repeat(4, 1, 1)).sample.double()
    scheduler = DDIMScheduler.from_config(policy.model.scheduler_config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(4)
    expected = scheduler.step(eps, t, x.double(), eta=1.0, variance_noise=torch.zeros_like(eps)).prev_sample
    torch.testing.assert_close(policy.distribution(states).mean.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance, batches", [(1.0, [4]), (1, [4]), (5.0, [8]), (0.0, [8])])
def test_without_guidance_the_network_runs_once_on_each_state(make_env, make_policy, roll, guidance, batches):
    env = make_env(guidance_scale=guidance)
    policy = make_policy(env)
    states = observe(roll(env, policy))
    seen = []
    policy.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    policy.distribution(states)
    assert seen == batches


def test_each_state_is_scored_with_its_own_prompt(make_env, make_policy, roll):
    env = make_env(prompts=["a red circle", "two blue stars"])
    policy = make_policy(env)
    rolled = roll(env, policy)
    states = observe(rolled)
    states["latents"] = states["latents"][:1].expand(4, -1, -1, -1)
    del states["embedding"]  # that of the old prompts
    means = {}
    for prompts in (["a red circle", "two blue stars"] * 2, ["two blue stars"] * 3 + ["a red circle"]):
        mean = policy.distribution({**states, "prompt": policy.model.tokenize(prompts)}).mean
        for prompt, value in zip(prompts, mean, strict=True):
            torch.testing.assert_close(value, means.setdefault(prompt, value), rtol=1e-5, atol=1e-5)
    assert (means["a red circle"] - means["two blue stars"]).abs().max() > 1e-3


# --- construction and errors -----------------------------------------------------------------------------------


def test_the_policy_holds_the_sampler_of_the_environment(make_env, tiny_pipeline):
    env = make_env(guidance_scale=3.0)
    assert DenoisingPolicy.from_env(env).config is env.unwrapped.sampler_config
    single = gym.make(
        "DiffusionDenoise-v0", model=str(tiny_pipeline), prompts=["a red circle"], num_inference_steps=3, eta=0.7
    )
    policy = DenoisingPolicy.from_env(single)
    assert policy.config is single.unwrapped.vector.sampler_config
    assert (policy.config.eta, len(policy.table)) == (0.7, 3)


def test_a_single_environment_can_be_played(make_policy, tiny_pipeline):
    env = gym.make("DiffusionDenoise-v0", model=str(tiny_pipeline), prompts=["a red circle"], num_inference_steps=3)
    policy = DenoisingPolicy.from_env(env)
    observation, _ = env.reset(seed=0)
    ended = False
    for _ in range(3):
        assert not ended
        alone, batched = (
            policy.distribution(states)
            for states in (observation, {key: value[None] for key, value in observation.items()})
        )
        assert torch.equal(alone.mean, batched.mean) and alone.mean.shape == (1, 4, 4, 4)
        observation, _, ended, _, info = env.step(alone.sample()[0].numpy())
    assert ended and info["image"].shape == (8, 8, 3)


def test_numpy_observations_are_read_as_tensors_are(make_env, make_policy, roll):
    env = make_env()
    policy = make_policy(env)
    states = observe(roll(env, policy))
    expected = policy.distribution(states)
    found = policy.distribution({key: value.numpy() for key, value in states.items()})
    assert torch.equal(found.mean, expected.mean)


@pytest.mark.parametrize("strange", [0, 2, 999, 1000, 1001, -2, -250, 10**9])
def test_a_timestep_that_the_sampler_does_not_visit_is_named(make_env, make_policy, roll, strange):
    env = make_env()
    policy = make_policy(env)
    states = observe(roll(env, policy))
    del states["step"]
    states["timestep"] = torch.tensor([[751], [strange], [501], [1]])
    with pytest.raises(
        ValueError, match=rf"\['timestep'\] holds \[{strange}\]; the sampler visits \[751, 501, 251, 1\]"
    ):
        policy.distribution(states)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["Disabled", "NextStep"])
@pytest.mark.parametrize("last_timestep", [0, 1])
def test_a_terminal_state_is_refused_and_told_apart(
    make_env, make_policy, pipeline_that_ends_at, mode, last_timestep, device
):
    env = make_env(model=str(pipeline_that_ends_at(last_timestep)), autoreset_mode=mode, device=device)
    policy = make_policy(env)
    observation, _ = env.reset(seed=0)
    for _ in range(4):
        last = observation["timestep"]
        observation, *_ = env.step(policy.distribution(observation).sample())
    assert (last == last_timestep).all() and (observation["timestep"] == -1).all()
    assert env.unwrapped.single_observation_space["timestep"].contains(observation["timestep"][0].cpu().numpy())
    with pytest.raises(ValueError, match=r"holds \[-1\]; .*the episode is over"):
        policy.distribution(observation)


def test_a_terminal_state_among_others_is_refused(make_env, make_policy):
    env = make_env(autoreset_mode="NextStep")
    policy = make_policy(env)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(policy.distribution(observation).sample())
    observation, _ = env.reset(options={"reset_mask": [True, False, False, False]})
    for _ in range(3):
        observation, *_ = env.step(policy.distribution(observation).sample())
    assert observation["timestep"].flatten().tolist() == [1, -1, -1, -1]
    with pytest.raises(ValueError, match=r"holds \[-1\]"):
        policy.distribution(observation)
    going_on = {key: value[:1] for key, value in observation.items()}
    actions = observation["latents"].index_copy(0, torch.tensor([0]), policy.distribution(going_on).sample())
    observation, *_ = env.step(actions)
    assert observation["timestep"].flatten().tolist() == [-1, 751, 751, 751]
    assert torch.equal(observation["latents"][0], actions[0])


def test_a_step_that_is_given_takes_the_place_of_the_timestep(make_env, make_policy, roll):
    env = make_env()
    policy = make_policy(env)
    states = observe(roll(env, policy))
    assert states["step"].tolist() == [1] * 4
    looked_up = policy.distribution({key: value for key, value in states.items() if key != "step"})
    assert torch.equal(policy.distribution(states).mean, looked_up.mean)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trainable": "adapter"}, "trainable='adapter' must be one of lora, full"),
        ({"trainable": "lora", "lora_rank": 0}, "lora_rank=0 must be at least 1"),
        ({"trainable": "lora", "lora_rank": -4}, "lora_rank=-4 must be at least 1"),
    ],
)
def test_bad_options_are_named(make_env, options, message):
    with pytest.raises(ValueError, match=message):
        DenoisingPolicy.from_env(make_env(), **options)


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_an_environment_that_denoises_nothing_is_refused(make):
    with pytest.raises(ValueError, match="is no denoising environment"):
        DenoisingPolicy.from_env(make("CartPole-v1"))
