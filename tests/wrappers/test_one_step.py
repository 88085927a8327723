"""The one-step view: a proper environment of its own, with the rewards of the T-step one."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics, TransformReward

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import collect
from diffusion_gym.testing.conformance import check_vector_env
from diffusion_gym.wrappers import OneStep, OneStepVectorEnv

SHAPE = (4, 4, 4)
MODES = list(AutoresetMode)
NUMBER = 3


def brightness(images, prompts, metadata):
    """Depends on the prompt too, so that a reward of the wrong one shows."""
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.fixture
def make_one_step(make_env):
    """`make_one_step(num_envs, **keywords)`, the view of an environment of T = 4 with many prompts."""

    def make(num_envs=NUMBER, **keywords):
        return OneStepVectorEnv(make_env(num_envs, **{"reward": brightness, "prompts": "shapes-location", **keywords}))

    return make


@pytest.fixture
def unconditional(make_env):
    model = copy.copy(make_env(1).unwrapped.model)
    model.prompt_length = model.vocab_size = 0
    return model


def noise(number=NUMBER, seed=0):
    return torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(seed))


# --- a proper environment --------------------------------------------------------------------------------------


def test_the_vector_view_conforms(make_one_step):
    check_vector_env(lambda **keywords: make_one_step(**keywords))


def test_the_view_of_one_step_conforms_too(make_one_step):
    check_vector_env(lambda **keywords: make_one_step(num_inference_steps=1, **keywords))


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_the_state_is_the_prompt_and_the_action_the_picture(make_one_step, output):
    env = make_one_step(output=output)
    inner = env.unwrapped
    assert env.horizon == 1 and inner.horizon == 4
    assert env.single_observation_space == spaces.Dict({"prompt": inner.single_observation_space["prompt"]})
    assert env.observation_space == spaces.Dict({"prompt": inner.observation_space["prompt"]})
    assert env.single_action_space == inner.single_action_space and env.action_space == inner.action_space
    observation, infos = env.reset(seed=0)
    wanted = inner.model.tokenize(list(infos["prompt"]))
    assert observation.keys() == {"prompt"} and torch.equal(torch.as_tensor(observation["prompt"]), wanted)
    kind = np.ndarray if output == "numpy" else torch.Tensor
    assert isinstance(observation["prompt"], kind) and isinstance(infos["latents"], kind)


def test_an_unconditional_model_has_an_empty_observation(make_one_step, make_single, unconditional):
    env = make_one_step(model=unconditional, output="numpy")
    assert env.single_observation_space == env.observation_space == spaces.Dict({})
    observation, infos = env.reset(seed=0)
    assert observation == {} and infos["latents"].shape == (NUMBER, *SHAPE)
    observation, rewards, terminations, _, infos = env.step(noise().numpy())
    assert observation == {} and (rewards > 0).all() and terminations.all()
    assert infos["final_obs"].tolist() == [{}] * NUMBER
    single = OneStep(make_single(model=unconditional))
    assert single.observation_space == spaces.Dict({}) and single.reset(seed=0)[0] == {}


def test_a_policy_of_the_view_is_that_of_the_environment(make_one_step, make_single):
    for env in (make_one_step(), OneStep(make_single())):
        policy = DenoisingPolicy.from_env(env)
        assert len(policy.table) == 4 and policy.config.num_inference_steps == 4


# --- the noise of an episode -----------------------------------------------------------------------------------


@pytest.fixture
def starts(make_one_step):
    """x_T of the first and the second episode of seed 5, and their prompts, by the T-step environment."""
    inner = make_one_step(output="numpy", autoreset_mode="Disabled").unwrapped
    return [inner.reset(seed=seed) for seed in (5, None)]


def test_reset_tells_the_noise(make_one_step, starts):
    _, infos = make_one_step(output="numpy").reset(seed=5)
    np.testing.assert_array_equal(infos["latents"], starts[0][0]["latents"])
    assert infos["_latents"].tolist() == [True] * NUMBER


def test_same_step_tells_the_noise_of_the_next_episode(make_one_step, starts):
    env = make_one_step(output="numpy")
    env.reset(seed=5)
    observation, _, terminations, _, infos = env.step(noise().numpy())
    assert terminations.all() and infos["_latents"].all()
    np.testing.assert_array_equal(infos["latents"], starts[1][0]["latents"])
    np.testing.assert_array_equal(observation["prompt"], starts[1][0]["prompt"])
    assert list(infos["prompt"]) == list(starts[1][1]["prompt"])
    assert list(infos["final_info"]["prompt"]) == list(starts[0][1]["prompt"])
    assert "latents" not in infos["final_info"]
    for index, last in enumerate(infos["final_obs"]):
        assert last.keys() == {"prompt"}
        np.testing.assert_array_equal(last["prompt"], starts[0][0]["prompt"][index])


def test_next_step_tells_the_noise_with_the_step_that_resets(make_one_step, starts):
    env = make_one_step(output="numpy", autoreset_mode="NextStep")
    env.reset(seed=5)
    observation, rewards, terminations, _, infos = env.step(noise().numpy())
    assert terminations.all() and (rewards > 0).all() and "latents" not in infos
    np.testing.assert_array_equal(observation["prompt"], starts[0][0]["prompt"])
    observation, rewards, terminations, _, infos = env.step(noise().numpy())
    assert not terminations.any() and not rewards.any() and infos["_latents"].all()
    np.testing.assert_array_equal(infos["latents"], starts[1][0]["latents"])
    assert env.step(noise().numpy())[2].all()


def test_next_step_with_a_partial_reset_tells_whose_noise_is_new(make_one_step):
    env = make_one_step(output="numpy", autoreset_mode="NextStep")
    env.reset(seed=5)
    env.step(noise().numpy())
    mask = np.array([True, False, False])
    _, infos = env.reset(options={"reset_mask": mask})
    assert infos["_latents"].tolist() == mask.tolist()
    _, rewards, terminations, _, infos = env.step(noise().numpy())
    assert terminations.tolist() == (rewards > 0).tolist() == mask.tolist()
    assert infos["_latents"].tolist() == (~mask).tolist()


def test_without_autoreset_a_step_begins_nothing(make_one_step):
    env = make_one_step(output="numpy", autoreset_mode="Disabled")
    env.reset(seed=5)
    assert "latents" not in env.step(noise().numpy())[4]
    with pytest.raises(gym.error.ResetNeeded, match="are over; reset them first"):
        env.step(noise().numpy())
    env.reset()
    assert env.step(noise().numpy())[2].all()


# --- the rewards of T steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_the_same_noise_gives_the_reward_of_t_steps(make_one_step, moved_policy, mode, output):
    """DDPO, section C.2 against C.3, bit for bit, over two seeds."""
    env = make_one_step(output=output, autoreset_mode=mode)
    policy = moved_policy(env)
    for seed in (5, 8):
        rolls = []
        for view in (env.unwrapped, env):
            rolls.append(collect(view, policy, torch.Generator().manual_seed(seed), seed=seed))
        steps, once = rolls
        assert torch.equal(once.finished, steps.finished) and torch.equal(once.rewards, steps.rewards)
        assert once.prompts == steps.prompts and torch.equal(once.images, steps.images)
        assert once.latents.shape == (1, NUMBER, *SHAPE) and len(once.timesteps) == once.log_probs.numel() == 0
        wanted = brightness(env.unwrapped.model.decode(once.finished), once.prompts, None)
        torch.testing.assert_close(once.rewards, wanted)


def test_with_several_episodes_on_end(make_one_step, moved_policy):
    """Autoreset goes on alike in both: the noise that step 1 tells leads to the T-step reward of episode 2."""
    once, steps = make_one_step(), make_one_step().unwrapped
    policy = moved_policy(once)
    observation, infos = once.reset(seed=1)
    state, _ = steps.reset(seed=1)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    for _ in range(3):
        x = infos["latents"]
        with torch.no_grad():
            for step in range(4):
                x = policy.distribution(policy.observation(x, step, observation["prompt"])).sample(generators[0])
                action = policy.distribution(state).sample(generators[1])
                state, wanted, *_ = steps.step(action)
        observation, rewards, *_, infos = once.step(x)
        assert torch.equal(rewards, wanted)


def test_wrappers_in_between_see_the_step(make_env):
    env = make_env(NUMBER, output="numpy")
    x = noise().numpy()
    env.reset(seed=0)
    env.unwrapped.skip_to_last_step()
    plain = env.step(x)[1]
    view = OneStepVectorEnv(RecordEpisodeStatistics(TransformReward(env, lambda rewards: 10 * rewards)))
    view.reset(seed=0)
    _, rewards, _, _, infos = view.step(x)
    np.testing.assert_array_equal(rewards, 10 * plain)
    assert infos["episode"]["l"].tolist() == [1] * NUMBER


# --- what it rests on: DenoisingVectorEnv.skip_to_last_step -----------------------------------------------------


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_the_step_after_the_skip_is_the_last(make_env, taken):
    env, x = make_env(NUMBER, output="numpy", autoreset_mode="Disabled"), noise().numpy()
    env.reset(seed=0)
    for _ in range(taken):
        assert not env.step(x)[2].any()
    env.unwrapped.skip_to_last_step()
    observation, rewards, terminations, *_ = env.step(x)
    assert terminations.all() and (rewards > 0).all() and (observation["timestep"] == -1).all()
    env.reset()
    assert not env.step(x)[2].any()


def test_the_skip_leaves_episodes_that_are_over(make_env):
    env, x = make_env(NUMBER, output="numpy", autoreset_mode="NextStep"), noise().numpy()
    env.reset(seed=0)
    env.unwrapped.skip_to_last_step()
    env.step(x)
    env.unwrapped.skip_to_last_step()
    observation, _, terminations, *_ = env.step(x)
    assert not terminations.any()
    assert (observation["timestep"] == env.unwrapped.step_table.timesteps[0].item()).all()


# --- misuse ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_step_before_reset_is_refused(make_one_step, mode):
    env = make_one_step(output="numpy", autoreset_mode=mode)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(noise().numpy())
    env.reset(seed=0)
    assert env.step(noise().numpy())[2].all()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (noise(2).numpy(), r"shape \(2, 4, 4, 4\); .* \(3, 4, 4, 4\)"),
        (noise().double().numpy(), "dtype float64; convert them to float32"),
        ([0.0], "must be a torch tensor or a NumPy array"),
    ],
)
def test_a_refused_action_changes_nothing(make_one_step, action, message):
    env, x = make_one_step(output="numpy"), noise().numpy()
    results = []
    for bad in (False, True):
        env.reset(seed=0)
        if bad:
            with pytest.raises(ValueError, match=message):
                env.step(action)
        results.append(env.step(x))
    np.testing.assert_array_equal(results[1][1], results[0][1])
    np.testing.assert_array_equal(results[1][0]["prompt"], results[0][0]["prompt"])


def test_a_picture_that_is_not_finite_names_its_env(make_one_step):
    env, x = make_one_step(output="numpy"), noise().numpy()
    env.reset(seed=0)
    x[1, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinite values in env \[1\]; no env was stepped"):
        env.step(x)
    assert env.step(noise().numpy())[2].all()


def test_what_is_no_denoising_environment_is_refused(make_single, make_env):
    for kind, env in (
        (OneStepVectorEnv, gym.make_vec("CartPole-v1", num_envs=1)),
        (OneStep, gym.make("CartPole-v1")),
        (OneStepVectorEnv, make_single()),
        (OneStep, make_env(1)),
        (OneStepVectorEnv, 5),
        (OneStep, None),
    ):
        with pytest.raises(ValueError, match="is not made by gym.make"):
            kind(env)


def test_the_view_of_a_view_is_refused(make_one_step, make_single):
    for kind, env in ((OneStepVectorEnv, make_one_step()), (OneStep, OneStep(make_single()))):
        with pytest.raises(ValueError, match="shows no latents, .* is it a one-step view already"):
            kind(env)


def test_closed_is_closed(make_one_step):
    env = make_one_step(output="numpy")
    env.reset(seed=0)
    env.close()
    with pytest.raises(gym.error.ClosedEnvironmentError, match="make a new one"):
        env.step(noise().numpy())
