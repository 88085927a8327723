"""A window of noisy steps in training: fixed, at random places, sliding; what is trained on; exact resuming."""

import pytest
import torch

from diffusion_gym.agents.algorithms import DDPOIS, DPOK
from diffusion_gym.agents.noise_window import NoiseWindowOptions, window_at, window_places
from diffusion_gym.agents.rollout import collect
from diffusion_gym.agents.training.trainer import Schedule, Trainer
from trainer_runs import Snapshot

STEPS = torch.arange(10)


def windows(place, noisy_steps, steps=STEPS, iterations=40, seed=0, **options):
    chosen = NoiseWindowOptions(noise_window=place, **options)
    places = window_places(chosen, noisy_steps, steps)
    return [window_at(chosen, places, (seed, 0, iteration)) for iteration in range(iterations)]


def test_a_sliding_window_moves_after_some_iterations_and_begins_again():
    """MixGRPO: one step every so many iterations, and back to where it began."""
    found = windows("sliding", (2, 4), window_every=3, window_stride=2)
    assert [start for start, _ in found[:12]] == [2, 2, 2, 4, 4, 4, 6, 6, 6, 2, 2, 2]
    assert {length for _, length in found} == {4}


@pytest.mark.parametrize("steps", [STEPS, torch.arange(3, 8)])
def test_a_random_window_is_anywhere_among_the_steps_that_can_be_trained_on(steps):
    found = windows("random", (0, 2), steps, iterations=200)
    assert {start for start, _ in found} == set(range(int(steps[0]), int(steps[-1])))
    assert found == windows("random", (0, 2), steps, iterations=200) != windows("random", (0, 2), steps, 200, seed=1)


@pytest.mark.parametrize(
    "place, noisy_steps, message",
    [
        ("random", None, "noise_window='random' moves a window that the environment does not have"),
        ("sliding", None, "noise_window='sliding' moves a window that the environment does not have"),
        ("random", (0, 6), r"noisy_steps=\(0, 6\) has no room among the steps 2 to 6"),
        ("sliding", (0, 2), r"noisy_steps=\(0, 2\) has no room among the steps 2 to 6"),
        ("sliding", (6, 2), r"noisy_steps=\(6, 2\) has no room among the steps 2 to 6"),
    ],
)
def test_a_window_without_room_is_refused(place, noisy_steps, message):
    with pytest.raises(ValueError, match=message):
        window_places(NoiseWindowOptions(noise_window=place), noisy_steps, torch.arange(2, 7))


@pytest.mark.parametrize("name, value", [("noise_window", "left"), ("window_every", 0), ("window_stride", 0)])
def test_an_option_out_of_its_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must"):
        NoiseWindowOptions(**{name: value})


def test_only_noisy_steps_have_log_probabilities_and_are_trained_on(make_env, make_agent):
    agent = make_agent(make_env(num_inference_steps=5, noisy_steps=(1, 2)), noise_window="sliding", window_every=1)
    env = make_env(4, num_inference_steps=5, noisy_steps=(1, 2))
    own = agent.policy.table
    for iteration, expected in enumerate(([1, 2], [2, 3], [3, 4], [1, 2])):
        with agent.noise_window((0, 0, iteration)):
            assert agent.steps.tolist() == expected
            rolled = agent.sample(env, 4, (0, 0, iteration))
            noisy = (rolled.log_probs != 0).any(1).nonzero().flatten().tolist()
            assert noisy == expected
            for step in range(5):  # the ratio of a fresh rollout
                samples, steps = torch.arange(4), torch.full((4,), step)
                scored = agent.policy(rolled.states(samples, steps), rolled.actions(samples, steps))
                assert ((scored - rolled.log_probs[step]).exp() - 1).abs().max() <= 1e-6
        assert agent.policy.table is own and agent.steps.tolist() == [1, 2]


def test_steps_before_the_window_do_not_depend_on_the_noise(make_env, make_policy):
    env = make_env(4, num_inference_steps=5, noisy_steps=(2, 2))
    policy = make_policy(env)
    first, second = (collect(env, policy, torch.Generator().manual_seed(noise), seed=0).latents for noise in (0, 1))
    assert torch.equal(first[:3], second[:3]) and not torch.equal(first[3], second[3])


@pytest.fixture(scope="module")
def build(make_env, make_agent):
    def make(out, init=0, **options):
        env = make_env(4, num_inference_steps=4, noisy_steps=(0, 2), autoreset_mode="Disabled")
        agent = make_agent(env, "lora", scale=0.02, batch_size=4, trained_steps=(0.0, 0.75), **options)
        if init:
            with torch.no_grad():
                for parameter in agent.parameters:
                    parameter.mul_(1.5)
        return Trainer(env, agent, out, Schedule(16, 4, checkpoint_every=1, pictures_every=0), progress=False)

    return make


@pytest.mark.parametrize("place", ["random", "sliding"])
def test_a_resumed_run_has_its_window_where_the_uninterrupted_one_has(build, tmp_path, place):
    options = {"noise_window": place, "window_every": 1}
    whole = build(tmp_path / "whole", **options)
    whole.run()
    build(tmp_path / "cut", **options).run(until=8)
    resumed = build(tmp_path / "cut", init=1, **options)
    resumed.run(resume=True)
    found, expected = Snapshot.of(resumed), Snapshot.of(whole)
    assert found.rows == expected.rows and found.done == expected.done
    assert all(torch.equal(value, expected.tensors[key]) for key, value in found.tensors.items())
    fixed = build(tmp_path / "fixed")
    fixed.run()
    assert Snapshot.of(fixed).rows != expected.rows


def test_an_agent_that_learns_from_older_iterations_is_refused():
    with pytest.raises(ValueError, match="noise_window='random' is not for DPOK, whose replay buffer"):
        DPOK.Config(noise_window="random")


@pytest.mark.parametrize("eta, window", [(0.0, (0, 2)), (1.0, (3, 1))])
def test_a_policy_gradient_without_any_noisy_step_is_refused(make_env, make_agent, exact_end_pipeline, eta, window):
    """The last step of this pipeline is deterministic, also where the window is."""
    env = make_env(model=str(exact_end_pipeline), eta=eta, noisy_steps=window)
    named = "eta=0.0" if eta == 0 else r"noisy_steps=\(3, 1\)"
    with pytest.raises(ValueError, match=f"{named} makes every denoising step deterministic"):
        make_agent(env, agent=DDPOIS)
