"""Gymnasium's own wrappers on the environments, single and vectorised, and ours among them."""

import sys
import types

import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector

from diffusion_gym.wrappers import (
    KLPenaltyVectorEnv,
    OneStepVectorEnv,
    PreviewRewardVectorEnv,
    PromptNormalizationVectorEnv,
    RecordPicturesVectorEnv,
)

NUMBER, T = 3, 4
MODES = list(AutoresetMode)


class Doubling:
    def normalize(self, prompts, rewards):
        return 2 * rewards


def drive(env, actions, seed=0):
    """One episode of a single environment: rewards and the last info."""
    env.reset(seed=seed)
    results = [env.step(actions(step, 1)[0]) for step in range(T)]
    assert [terminated for _, _, terminated, _, _ in results] == [False] * (T - 1) + [True]
    return [reward for _, reward, *_ in results], results[-1][-1]


# --- vectorised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_vector_record_episode_statistics(make_env, play, toy, mode):
    """Around the KL penalty, so that every step has a reward; over two episodes where the mode goes on."""
    steps = {AutoresetMode.SAME_STEP: 2 * T, AutoresetMode.NEXT_STEP: 2 * T + 1, AutoresetMode.DISABLED: T}[mode]
    kinds = {"output": "numpy", "autoreset_mode": mode}
    plain = play(KLPenaltyVectorEnv(make_env(NUMBER, **kinds), toy, 0.1), steps)
    env = vector.RecordEpisodeStatistics(KLPenaltyVectorEnv(make_env(NUMBER, **kinds), toy, 0.1))
    end = play(env, steps)[-1].infos
    returns = sum(now.rewards.astype(np.float64) for now in plain[-T:])
    np.testing.assert_allclose(end["episode"]["r"], returns, rtol=1e-6)
    assert end["episode"]["l"].tolist() == [T] * NUMBER and end["_episode"].all()
    assert len(env.return_queue) == NUMBER * (1 if mode == AutoresetMode.DISABLED else 2)


def test_vector_record_episode_statistics_survives_a_masked_reset(make_env, actions, toy):
    """It takes `reset_mask` out of the options; our wrappers around it must not need it there."""
    env = vector.RecordEpisodeStatistics(make_env(NUMBER, output="numpy", autoreset_mode="NextStep"))
    env = KLPenaltyVectorEnv(env, toy, 0.1)
    env.reset(seed=0)
    for step in range(T):
        env.step(actions(step))
    env.reset(options={"reset_mask": np.array([True, True, False])})
    infos = env.step(actions(0))[4]
    assert infos["_kl"].tolist() == [True, True, False]


@pytest.mark.parametrize("mode", MODES)
def test_vector_normalize_reward(make_env, play, mode):
    """By hand: the rewards over the deviation of the running returns, with gamma = 1."""
    kinds = {"output": "numpy", "autoreset_mode": mode}
    plain = play(make_env(NUMBER, **kinds), T)
    end = play(vector.NormalizeReward(make_env(NUMBER, **kinds), gamma=1.0), T)[-1]
    raw = plain[-1].rewards
    seen = np.concatenate([np.zeros(NUMBER * (T - 1)), raw])
    # Gymnasium begins with a mean of 0 and a variance of 1 that count for 1e-4 samples.
    np.testing.assert_allclose(end.rewards, raw / np.sqrt(seen.var() + 1e-8), rtol=1e-2)
    assert (end.rewards > raw).all()


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_vector_transform_reward(make_env, play, output):
    """Which takes torch as it is."""
    plain = play(make_env(NUMBER, output=output), T)[-1].rewards
    env = vector.TransformReward(make_env(NUMBER, output=output), lambda rewards: 3 * rewards)
    np.testing.assert_array_equal(play(env, T)[-1].rewards, 3 * plain)


def test_vector_clip_reward(make_env, play):
    env = vector.ClipReward(make_env(NUMBER, output="numpy"), max_reward=0.1)
    assert play(env, T)[-1].rewards.tolist() == [np.float32(0.1)] * NUMBER


def test_all_of_ours_compose(make_env, play, toy, tmp_path):
    """Recorded raw, normalised, penalised: each sees what it should."""
    plain = play(make_env(NUMBER, output="numpy"), T)[-1].rewards
    env = RecordPicturesVectorEnv(make_env(NUMBER, output="numpy"), tmp_path)
    env = PromptNormalizationVectorEnv(env, Doubling())
    env = KLPenaltyVectorEnv(PreviewRewardVectorEnv(env, toy), toy, 0.1)
    played = play(vector.RecordEpisodeStatistics(env), T)
    kl = sum(now.infos["kl"] for now in played[1:])
    wanted = 2 * plain - played[0].infos["preview"] - 0.1 * kl
    np.testing.assert_allclose(played[-1].infos["episode"]["r"], wanted, rtol=1e-4)
    assert len(list(tmp_path.glob("*.png"))) == NUMBER


def test_the_one_step_view_goes_around_normalisation_and_recording(make_env, actions, tmp_path):
    env = RecordPicturesVectorEnv(make_env(NUMBER, output="numpy"), tmp_path)
    env = OneStepVectorEnv(PromptNormalizationVectorEnv(env, Doubling()))
    env.reset(seed=0)
    plain = OneStepVectorEnv(make_env(NUMBER, output="numpy"))
    plain.reset(seed=0)
    np.testing.assert_array_equal(env.step(actions(0))[1], 2 * plain.step(actions(0))[1])
    assert len(list(tmp_path.glob("*.png"))) == NUMBER


# --- single ----------------------------------------------------------------------------------------------------


def test_there_is_no_time_limit(make_single):
    """T steps are the whole process: episodes terminate and are never cut off."""
    env = make_single()
    assert env.spec.max_episode_steps is None
    while env is not env.unwrapped:
        assert not isinstance(env, wrappers.TimeLimit)
        env = env.env


def test_record_episode_statistics(make_single, actions):
    rewards, info = drive(wrappers.RecordEpisodeStatistics(make_single()), actions)
    assert info["episode"]["l"] == T and info["episode"]["r"] == pytest.approx(sum(rewards))
    assert rewards[-1] != 0


def test_normalize_reward(make_single, actions):
    plain, _ = drive(make_single(), actions)
    rewards, _ = drive(wrappers.NormalizeReward(make_single()), actions)
    assert rewards[:-1] == [0] * (T - 1)
    assert rewards[-1] == pytest.approx(plain[-1] / np.std(plain), rel=1e-2)


def test_transform_reward(make_single, actions):
    plain, _ = drive(make_single(), actions)
    rewards, _ = drive(wrappers.TransformReward(make_single(), lambda reward: reward + 1), actions)
    assert rewards == pytest.approx([reward + 1 for reward in plain])


# --- videos ----------------------------------------------------------------------------------------------------


@pytest.fixture
def films(monkeypatch):
    """In place of moviepy, which is no dependency: the frames and the file of each video that is written."""
    made = []

    class ImageSequenceClip:
        def __init__(self, frames, fps):
            self.frames, self.fps = [np.array(frame) for frame in frames], fps

        def write_videofile(self, path, **keywords):
            made.append((path, self.fps, self.frames))

    parts = ["moviepy", "moviepy.video", "moviepy.video.io", "moviepy.video.io.ImageSequenceClip"]
    modules = {name: types.ModuleType(name) for name in parts}
    modules[parts[-1]].ImageSequenceClip = ImageSequenceClip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos")
def test_record_video_shows_the_denoising_process(make_single, actions, films, tmp_path):
    """x_T to x_0, T + 1 frames an episode, of which the last is the picture."""
    env = wrappers.RecordVideo(make_single(render_mode="rgb_array"), str(tmp_path), episode_trigger=lambda index: True)
    ends = [drive(env, actions, seed)[1]["image"] for seed in (0, 1)]
    env.close()
    assert [path.rsplit("/", 1)[1] for path, _, _ in films] == ["rl-video-episode-0.mp4", "rl-video-episode-1.mp4"]
    for (_, fps, frames), end in zip(films, ends, strict=True):
        assert len(frames) == T + 1 and fps == env.metadata["render_fps"]
        assert all(frame.shape == end.shape and frame.dtype == np.uint8 for frame in frames)
        np.testing.assert_array_equal(frames[-1], end)
        assert all((one != other).any() for one, other in zip(frames, frames[1:], strict=False))


@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos")
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_vector_record_video_with_next_step_has_the_last_frame(make_env, play, films, tmp_path, output):
    env = make_env(NUMBER, output=output, autoreset_mode="NextStep", render_mode="rgb_array")
    env = vector.RecordVideo(env, str(tmp_path), episode_trigger=lambda index: index == 0)
    end = play(env, T + 1)[T].infos["image"]
    env.close()
    frames = films[0][2]
    assert len(frames) == T + 1
    height, width = end.shape[1:3]
    assert frames[-1].shape == (height, NUMBER * width, 3)
    np.testing.assert_array_equal(frames[-1], np.concatenate(list(end), axis=1))


@pytest.mark.filterwarnings("ignore:.*Overwriting existing videos")
def test_record_video_writes_a_file(make_single, actions, tmp_path):
    """With the real moviepy, where it is installed: `pip install "gymnasium[other]"`."""
    pytest.importorskip("moviepy")
    env = wrappers.RecordVideo(make_single(render_mode="rgb_array"), str(tmp_path))
    drive(env, actions)
    env.close()
    (path,) = tmp_path.glob("*.mp4")
    assert path.stat().st_size > 0


def test_record_video_needs_a_render_mode(make_single, films, tmp_path):
    with pytest.raises(ValueError, match="Render mode is None"):
        wrappers.RecordVideo(make_single(), str(tmp_path))
