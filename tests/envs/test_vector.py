"""What the vector environment does beyond the conformance suite: options, errors, rewards, infos and rendering."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

from diffusion_gym.images import to_uint8
from diffusion_gym.models.random_pipeline import write_random_pipeline
from diffusion_gym.rewards import RewardError, RewardOutput

SHAPE = (4, 4, 4)


@pytest.fixture
def env(make_env):
    return make_env(3, output="numpy", autoreset_mode="Disabled")


def zeros(env):
    return np.zeros(env.action_space.shape, np.float32)


def to_the_end(env, seed=0):
    """The last step of an episode of zeros."""
    env.reset(seed=seed)
    for _ in range(env.unwrapped.horizon):
        results = env.step(zeros(env))
    return results


# --- options of a reset ---


def test_fixed_prompt_keeps_the_noise_of_the_seed(env):
    drawn, drawn_info = env.reset(seed=3)
    fixed, info = env.reset(seed=3, options={"prompt": "a yellow star"})
    assert list(info["prompt"]) == ["a yellow star"] * 3 != list(drawn_info["prompt"])
    np.testing.assert_array_equal(fixed["latents"], drawn["latents"])
    assert (fixed["prompt"] != drawn["prompt"]).any()
    again, _ = env.reset(options={"prompt": "a yellow star"})
    assert (again["latents"] != fixed["latents"]).all()


def test_fixed_prompt_leaves_the_episode_after_it_as_it_was(env):
    env.reset(seed=3)
    _, wanted = env.reset()
    env.reset(seed=3, options={"prompt": "a yellow star"})
    _, info = env.reset()
    assert list(info["prompt"]) == list(wanted["prompt"])


def test_prompts_can_be_given_one_each(env):
    prompts = ["a red star", "two circles", "a cyan square"]
    observation, info = env.reset(seed=0, options={"prompt": prompts})
    assert list(info["prompt"]) == prompts
    np.testing.assert_array_equal(observation["prompt"], env.unwrapped.model.tokenize(prompts).numpy())


def test_prompts_given_one_each_follow_the_reset_mask(env):
    env.reset(seed=0)
    mask = np.array([False, True, False])
    _, before = env.reset(seed=0)
    _, info = env.reset(options={"prompt": ["a red star", "two circles", "a cyan square"], "reset_mask": mask})
    assert list(info["prompt"]) == [before["prompt"][0], "two circles", before["prompt"][2]]


@pytest.mark.parametrize("prompt", [5, ["a", "b"], ["a"], ["a", "b", 3], []])
def test_prompts_of_wrong_kind_or_number_are_refused(env, prompt):
    with pytest.raises(ValueError, match=r"options\['prompt'\]="):
        env.reset(options={"prompt": prompt})


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_latents_can_be_given_for_all_or_one_each(env, kind):
    each = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    observation, _ = env.reset(options={"latents": kind(each)})
    np.testing.assert_array_equal(observation["latents"], each)
    observation, _ = env.reset(options={"latents": kind(each[0])})
    np.testing.assert_array_equal(observation["latents"], np.stack([each[0]] * 3))


def test_given_latents_are_copied(env):
    given = np.zeros(SHAPE, np.float32)
    env.reset(options={"latents": given})
    given[...] = 7
    observation, _ = env.reset(options={"latents": np.ones(SHAPE), "reset_mask": np.array([True, False, False])})
    assert observation["latents"].max(axis=(1, 2, 3)).tolist() == [1, 0, 0]


def test_fixed_latents_keep_the_prompt_of_the_seed(env):
    _, wanted = env.reset(seed=3)
    _, info = env.reset(seed=3, options={"latents": np.zeros(SHAPE)})
    assert list(info["prompt"]) == list(wanted["prompt"])


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((4, 4, 5)), r"\(4, 4, 5\).*\(4, 4, 4\)"),
        (np.full(SHAPE, np.nan), "NaN"),
        (np.full(SHAPE, np.inf), "inf"),
    ],
)
def test_latents_of_wrong_shape_or_not_finite_are_refused(env, latents, message):
    with pytest.raises(ValueError, match=rf"options\['latents'\].*{message}"):
        env.reset(options={"latents": latents})


def test_unknown_option_is_refused_with_the_closest(env):
    with pytest.raises(ValueError, match="'promt' is unknown; did you mean 'prompt'"):
        env.reset(options={"promt": "a star"})


@pytest.mark.parametrize("mask", [np.zeros(3, bool), np.ones(2, bool), np.array([1, 0, 0]), "all"])
def test_bad_reset_mask_is_refused(env, mask):
    with pytest.raises(ValueError, match=r"options\['reset_mask'\]=.*shape \(3,\) with at least one True"):
        env.reset(options={"reset_mask": mask})


def test_reset_mask_may_be_a_tensor(env):
    env.reset(seed=0)
    _, info = env.reset(options={"reset_mask": torch.tensor([False, True, False])})
    assert info["_prompt"].tolist() == [False, True, False]


@pytest.mark.parametrize("seed", [1.5, "abc", -1, [1, 2], [1, 2, "3"], [1, 2, -3], {1, 2, 3}])
def test_bad_seed_is_refused(env, seed):
    with pytest.raises(ValueError, match="seed="):
        env.reset(seed=seed)


def test_seeds_may_be_numpy_integers(env):
    wanted, _ = env.reset(seed=4)
    for seed in (np.int64(4), np.array([4, 5, 6])):
        np.testing.assert_array_equal(env.reset(seed=seed)[0]["latents"], wanted["latents"])


def test_a_seed_of_none_in_a_list_goes_on(env):
    env.reset(seed=0)
    wanted, _ = env.reset()
    env.reset(seed=0)
    observation, _ = env.reset(seed=[None, 9, None])
    same = (observation["latents"] == wanted["latents"]).all(axis=(1, 2, 3))
    assert same.tolist() == [True, False, True]


def test_latents_are_standard_normal(make_env):
    latents = make_env(256, output="numpy").reset(seed=0)[0]["latents"]
    assert abs(latents.mean()) < 4 / np.sqrt(latents.size)
    assert latents.std() == pytest.approx(1, abs=4 / np.sqrt(2 * latents.size))


# --- keywords ---

BAD_KEYWORDS = {
    "keyword": ({"guidence_scale": 3.0}, TypeError, "'guidence_scale' is unknown; did you mean 'guidance_scale'"),
    "reward": ({"reward": "Compresibility"}, ValueError, "reward='Compresibility' .* did you mean 'Compressibility'"),
    "reward-5": ({"reward": 5}, ValueError, "reward=5 is neither a name nor a callable; .*Compressibility"),
    "reward-kwargs": ({"reward_kwargs": {"strict": True}}, ValueError, "reward_kwargs=.*strict"),
    "reward-kwargs-name": ({"reward": "Color", "reward_kwargs": {"strikt": True}}, TypeError, "strikt"),
    "prompts": ({"prompts": "comon-animals"}, ValueError, "prompts='comon-animals' .*did you mean 'common-animals'"),
    "prompts-empty": ({"prompts": []}, ValueError, "prompts=.* is empty"),
    "prompts-file": ({"prompts": "missing.txt"}, FileNotFoundError, "prompts='missing.txt'"),
    "model": ({"model": "Shape"}, ValueError, "model='Shape' is unknown; did you mean 'Shapes'.*directory or a hub id"),
    "model-directory": ({"model": "/nowhere/at/all"}, FileNotFoundError, "model='/nowhere/at/all'"),
    "dtype": ({"dtype": "fp16"}, ValueError, "dtype='fp16' must be one of float32, bfloat16, float16"),
    "autoreset_mode": ({"autoreset_mode": "Same"}, ValueError, "autoreset_mode='Same' must be one of .*'SameStep'"),
    "autoreset_mode-none": ({"autoreset_mode": None}, ValueError, "autoreset_mode=None must be one of"),
    "output": ({"output": "jax"}, ValueError, "output='jax' must be one of 'torch', 'numpy'"),
    "render_mode": ({"render_mode": "human"}, ValueError, "render_mode='human' must be one of None, 'rgb_array'"),
    "num_envs": ({"num_envs": 0}, ValueError, "num_envs=0 must be a whole number of at least 1"),
    "num_envs-2.5": ({"num_envs": 2.5}, ValueError, "num_envs=2.5 must be a whole number"),
    "eta": ({"eta": 1.5}, ValueError, r"eta=1.5 must lie in \[0, 1\]"),
    "eta-negative": ({"eta": -0.1}, ValueError, r"eta=-0.1 must lie in \[0, 1\]"),
    "eta-nan": ({"eta": float("nan")}, ValueError, r"eta=nan must lie in \[0, 1\]"),
    "steps": ({"num_inference_steps": 1001}, ValueError, "num_inference_steps=1001 is larger .* at most 999"),
    "steps-0": ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0 must be"),
    "sampler": ({"sampler": "euler"}, ValueError, "sampler='euler' must be one of ddim, ddpm"),
}


@pytest.mark.parametrize(("keywords", "error", "message"), BAD_KEYWORDS.values(), ids=BAD_KEYWORDS)
def test_bad_keyword_is_refused_by_name_value_and_remedy(make_env, keywords, error, message):
    with pytest.raises(error, match=message):
        make_env(**keywords)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(make_env):
    with pytest.raises(ValueError, match="device='cuda' is not available here; use device='cpu'"):
        make_env(device="cuda")


def test_unknown_device_is_refused(make_env):
    with pytest.raises(ValueError, match="device='gpu'"):
        make_env(device="gpu")


def test_number_of_steps_that_the_error_advises_is_taken(make_env):
    with pytest.raises(ValueError, match="use at most") as caught:
        make_env(1, num_inference_steps=1001)
    most = int(str(caught.value).split()[-1])
    assert make_env(1, num_inference_steps=most).unwrapped.horizon == most


def test_steps_may_be_nearly_as_many_as_the_schedule_has(make_env):
    env = make_env(1, num_inference_steps=999)
    assert env.unwrapped.horizon == len(env.unwrapped.step_table) == 999


def test_cheap_checks_come_before_the_model(make_env):
    with pytest.raises(ValueError, match="eta=2"):
        make_env(model="no-one/has-this", eta=2)


def test_keywords_reach_the_sampler(make_env):
    config = make_env(1, guidance_scale=2.5, eta=0.5).unwrapped.sampler_config
    assert (config.guidance_scale, config.eta, config.num_inference_steps) == (2.5, 0.5, 4)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_autoreset_mode_may_be_its_name_as_a_string(make_env, mode):
    assert make_env(1, autoreset_mode=mode.value).metadata["autoreset_mode"] is mode


def test_default_is_same_step_and_torch(make_env):
    env = make_env(2)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert isinstance(env.reset(seed=0)[0]["latents"], torch.Tensor)


def test_envs_of_one_model_share_its_weights(make_env, tmp_path):
    one, other = make_env(1).unwrapped, make_env(2, reward="Compressibility", eta=0.5).unwrapped
    assert one.model is other.model
    assert one.model.unet is other.model.unet
    assert make_env(1, model=str(write_random_pipeline(tmp_path, seed=1))).unwrapped.model is not one.model


def test_model_may_be_an_object(make_env):
    model = make_env(1).unwrapped.model
    assert make_env(2, model=model).unwrapped.model is model


def test_closing_one_env_leaves_another_of_the_same_model(make_env, play):
    one, other = make_env(2, output="numpy"), make_env(2, output="numpy")
    one.reset(seed=0)
    one.close()
    assert len(play(other)) == 5


# --- actions ---


def test_timesteps_descend_to_zero(env):
    seen = [env.reset(seed=0)[0]["timestep"]]
    seen += [env.step(zeros(env))[0]["timestep"] for _ in range(4)]
    table = env.unwrapped.step_table.timesteps.tolist()
    np.testing.assert_array_equal(np.stack(seen), np.tile(np.reshape([*table, 0], (5, 1, 1)), (3, 1)))
    assert table == sorted(table, reverse=True)


def test_action_becomes_the_latents(env):
    env.reset(seed=0)
    action = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    np.testing.assert_array_equal(env.step(action)[0]["latents"], action)


def test_read_only_and_reversed_arrays_are_actions_too(env, recwarn):
    env.reset(seed=0)
    action = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    np.testing.assert_array_equal(env.step(action[:, ::-1])[0]["latents"], action[:, ::-1])
    action.flags.writeable = False
    np.testing.assert_array_equal(env.step(action)[0]["latents"], action)
    assert not recwarn.list


@pytest.mark.parametrize("actions", [[[1.0]], 5, None])
def test_actions_of_another_type_are_refused(env, actions):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions=.* must be a torch tensor or a NumPy array"):
        env.step(actions)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, *SHAPE), np.float32), r"shape \(2, 4, 4, 4\); .* \(3, 4, 4, 4\)"),
        (np.zeros((3, *SHAPE)), "dtype float64; convert them to float32"),
        (torch.zeros(3, *SHAPE, dtype=torch.float16), "dtype torch.float16; convert them to float32"),
        (torch.zeros(3, *SHAPE, device="meta"), "on meta, the environment is on cpu; move them there"),
    ],
)
def test_refused_actions_leave_the_episode_as_it_was(env, actions, message):
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    observation, *_ = env.step(before["latents"])
    np.testing.assert_array_equal(observation["latents"], before["latents"])
    assert (observation["timestep"] == env.unwrapped.step_table.timesteps[1].item()).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_that_are_not_finite_name_their_env_and_need_a_reset(env, value):
    env.reset(seed=0)
    actions = zeros(env)
    actions[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"NaN or infinite values in env \[1\]; reset before going on"):
        env.step(actions)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([False, True, False])})
    env.step(zeros(env))


def test_gradients_do_not_enter_the_environment(make_env):
    env = make_env(2)
    env.reset(seed=0)
    observation, *_ = env.step(torch.zeros(2, *SHAPE, requires_grad=True))
    assert not observation["latents"].requires_grad


# --- rewards ---


def test_reward_sees_the_decoded_pictures_and_their_prompts(make_env):
    seen = []

    def reward(images, prompts, metadata):
        seen.append((images.clone(), list(prompts), len(metadata)))
        return torch.arange(len(prompts))

    env = make_env(3, reward=reward, output="numpy", autoreset_mode="Disabled")
    _, info = env.reset(seed=0)
    for _ in range(4):
        assert not seen
        _, rewards, *_ = env.step(zeros(env))
    [(images, prompts, metadata)] = seen
    assert (prompts, metadata) == (list(info["prompt"]), 3)
    assert images.shape == (3, 3, 8, 8) and 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images, env.unwrapped.model.decode(torch.zeros(3, *SHAPE)))
    assert rewards.dtype == np.float32 and rewards.tolist() == [0, 1, 2]


def test_reward_gets_only_the_episodes_that_end(make_env):
    sizes = []

    def reward(images, prompts, metadata):
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    env = make_env(3, reward=reward, output="numpy")
    env.reset(seed=0)
    env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([True, False, False])})
    for _ in range(4):
        env.step(zeros(env))
    assert sizes == [2, 1]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_reward_that_raises_is_named_and_the_env_goes_on_after_a_reset(make_env, mode):
    fails = [True]

    def flaky(images, prompts, metadata):
        if fails:
            raise KeyError("no such server")
        return images.mean((1, 2, 3))

    env = make_env(2, reward=flaky, output="numpy", autoreset_mode=mode)
    with pytest.raises(RewardError, match="reward='flaky' raised KeyError: 'no such server'"):
        to_the_end(env)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(zeros(env))
    fails.clear()
    assert to_the_end(env)[2].all()


@pytest.mark.parametrize(
    ("answer", "shape"),
    [
        (lambda n: torch.zeros(n, 1), r"scores of shape \(2, 1\)"),
        (lambda n: torch.zeros(n + 1), r"scores of shape \(3,\)"),
        (lambda n: 0.5, r"scores of shape \(\)"),
        (lambda n: RewardOutput(torch.zeros(n), {"part": torch.zeros(1)}), r"part of shape \(1,\)"),
    ],
)
def test_reward_of_wrong_shape_is_refused(make_env, answer, shape):
    def wrong(images, prompts, metadata):
        return answer(len(images))

    with pytest.raises(RewardError, match=rf"reward='wrong' returned {shape} for 2 images; .* shape \(2,\)"):
        to_the_end(make_env(2, reward=wrong))


def test_reward_that_is_not_finite_passes_through(make_env):
    def partial(images, prompts, metadata):
        return [float("nan"), float("-inf"), 1.0]

    rewards = to_the_end(make_env(3, reward=partial, output="numpy"))[1]
    np.testing.assert_array_equal(rewards, [np.nan, -np.inf, 1])


# --- infos and rendering ---


def test_info_of_the_last_step_has_picture_and_components(make_env):
    env = make_env(3, reward="Compressibility", output="numpy", autoreset_mode="Disabled")
    env.reset(seed=0)
    for _ in range(3):
        assert env.step(zeros(env))[4].keys() == {"prompt", "_prompt"}
    _, rewards, _, _, infos = env.step(zeros(env))
    assert infos["image"].dtype == np.uint8 and infos["image"].shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(infos["image"], to_uint8(env.unwrapped.model.decode(torch.zeros(3, *SHAPE))).numpy())
    np.testing.assert_array_equal(infos["reward_components"]["jpeg_kb"], -rewards)
    assert (rewards < 0).all()
    for mask in (infos["_image"], infos["_reward_components"], infos["reward_components"]["_jpeg_kb"]):
        assert mask.tolist() == [True] * 3


def test_info_belongs_to_the_ended_alone(make_env):
    env = make_env(3, reward="Compressibility", output="numpy", autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([True, False, False])})
    for _ in range(3):
        infos = env.step(zeros(env))[4]
    assert infos["_image"].tolist() == [False, True, True]
    assert infos["reward_components"]["_jpeg_kb"].tolist() == [False, True, True]
    assert (infos["reward_components"]["jpeg_kb"] > 0).tolist() == [False, True, True]
    assert infos["_prompt"].tolist() == [True] * 3


def test_same_step_moves_picture_and_prompt_to_final_info(make_env):
    env = make_env(3, output="numpy")
    env.reset(seed=0, options={"prompt": "a yellow star"})
    for _ in range(4):
        infos = env.step(zeros(env))[4]
    assert list(infos["final_info"]["prompt"]) == ["a yellow star"] * 3
    assert infos["final_info"]["image"].shape == (3, 8, 8, 3)
    assert "a yellow star" not in infos["prompt"] and "image" not in infos


def test_render_decodes_the_present_latents(make_env):
    env = make_env(2, render_mode="rgb_array", output="numpy")
    env.reset(seed=0)
    observation, *_ = env.step(np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32))
    frames = env.render()
    assert isinstance(frames, tuple) and [frame.shape for frame in frames] == [(8, 8, 3)] * 2
    wanted = to_uint8(env.unwrapped.model.decode(torch.from_numpy(observation["latents"]))).numpy()
    np.testing.assert_array_equal(np.stack(frames), wanted)


def test_render_needs_a_mode_and_a_reset(make_env):
    assert make_env(2).render() is None
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        make_env(2, render_mode="rgb_array").render()


# --- Gymnasium's wrappers ---


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_record_episode_statistics_works(make_env, mode):
    env = RecordEpisodeStatistics(make_env(3, output="numpy", autoreset_mode=mode))
    env.reset(seed=0)
    returns, lengths = [], []
    for _ in range(10):
        _, rewards, terminations, _, infos = env.step(zeros(env))
        if terminations.any():
            np.testing.assert_array_equal(infos["_episode"], terminations)
            np.testing.assert_allclose(infos["episode"]["r"], rewards)
            returns += infos["episode"]["r"].tolist()
            lengths += infos["episode"]["l"].tolist()
    assert lengths == [4] * 6
    assert list(env.return_queue) == returns and env.episode_count == 6


def test_record_episode_statistics_takes_partial_resets(make_env):
    env = RecordEpisodeStatistics(make_env(2, output="numpy", autoreset_mode="Disabled"))
    env.reset(seed=0)
    env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([True, False])})
    for _ in range(3):
        infos = env.step(zeros(env))[4]
    assert infos["_episode"].tolist() == [False, True] and infos["episode"]["l"].tolist() == [0, 4]


def test_dict_info_to_list_works(make_env):
    env = DictInfoToList(make_env(2, reward="Compressibility", output="numpy", autoreset_mode="Disabled"))
    _, *_, infos = to_the_end(env)
    assert [info["image"].shape for info in infos] == [(8, 8, 3)] * 2
    assert all(info["reward_components"]["jpeg_kb"] > 0 for info in infos)
