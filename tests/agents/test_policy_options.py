"""How a policy computes: mixed precision, gradient checkpointing, training of one branch of the guidance alone."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import AGENTS, DDPOIS
from diffusion_gym.scheduling import guide, step_gaussian

TRAINABLE = ["lora", "full"]
NUMBER = 4


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


def transitions(rolled, seed=1):
    """All states and actions of a rollout, shuffled: batches of mixed timesteps, as in training."""
    number, steps = len(rolled), len(rolled.timesteps)
    order = torch.randperm(number * steps, generator=torch.Generator().manual_seed(seed))
    samples, at = torch.arange(number).repeat(steps)[order], torch.arange(steps).repeat_interleave(number)[order]
    return rolled.states(samples, at), rolled.actions(samples, at), rolled.log_probs[at, samples]


def gradients(policy, value):
    parameters = list(policy.trainable_parameters().values())
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters)])


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.trainable_parameters().values()])


def calls(policy, run):
    """How often residual blocks begin to run while `run` runs."""
    found = []
    layers = [layer for layer in policy.unet.modules() if isinstance(layer, ResnetBlock2D)]
    hooks = [layer.register_forward_pre_hook(lambda module, inputs: found.append(module)) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return len(found)


def outputs(policy, kind, run):
    """What the UNet's layers of a kind return while `run` runs."""
    found = []
    layers = [layer for layer in policy.unet.modules() if isinstance(layer, kind)]
    hooks = [layer.register_forward_hook(lambda module, inputs, output: found.append(output)) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    assert len(layers) > 3
    return found


# --- mixed precision -------------------------------------------------------------------------------------------

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_network_computes_in_half_precision_and_the_rest_in_float32(env, make_policy, roll, trainable, precision):
    policy = make_policy(env, trainable)
    plain = roll(env, policy)
    policy.set_training(mixed_precision=precision)
    rolls = []
    for kind in (nn.Linear, nn.Conv2d):
        found = outputs(policy, kind, lambda: rolls.append(roll(env, policy)))
        # The predicted noise itself is in half precision too; what is made of it is not.
        assert {output.dtype for output in found if output.ndim > 2} == {HALVES[precision]}
    rolled = rolls[0]
    assert rolled.latents.dtype == rolled.log_probs.dtype == rolled.rewards.dtype == torch.float32
    distribution = policy.distribution(transitions(rolled)[0])
    assert distribution.mean.dtype == distribution.std.dtype == torch.float32
    assert (rolled.latents != rolled.latents.to(HALVES[precision]).float()).float().mean() > 0.9  # not rounded
    assert torch.equal(rolled.latents[0], plain.latents[0])
    change = (rolled.latents[-1] - plain.latents[-1]).norm() / plain.latents[-1].norm()
    assert 0 < change < 0.05


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_ratio_of_a_fresh_rollout_is_well_inside_the_clip_range(env, make_policy, roll, trainable, precision):
    policy = make_policy(env, trainable)
    policy.set_training(mixed_precision=precision)
    observation, action, old = transitions(roll(env, policy))
    ratios = []
    for part in torch.arange(len(old)).split(5):
        rows = {key: value[part] for key, value in observation.items()}
        ratios.append((policy(rows, action[part]) - old[part]).exp().detach())
    assert (torch.cat(ratios) - 1).abs().max() <= 1e-5  # the clip range is 1e-4


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_agents_train_in_mixed_precision(env, make_agent, roll, trainable, precision):
    """Weights, gradients and moments are float32, and the gradient is that of float32 but for rounding.

    A loss scale of 65,536 can overflow float16; such an update changes no weight and halves the scale for the next one.
    """
    found = []
    for chosen in ("no", precision):
        agent = make_agent(env, trainable, mixed_precision=chosen, max_grad_norm=1e9)
        before = weights(agent.policy)
        rolled = roll(env, agent.policy)
        for _ in range(3):
            metrics = agent.update(rolled, np.random.default_rng(0))
            if not metrics.get("overflow"):
                break
            assert torch.equal(weights(agent.policy), before)
        found.append(torch.cat([parameter.grad.flatten() for parameter in agent.parameters]))
        assert {parameter.dtype for parameter in agent.parameters} == {torch.float32}
        assert {value.dtype for value in agent.tensors().values()} == {torch.float32}
        assert (weights(agent.policy) - before).abs().max() > 1e-4
        assert np.isfinite(list(metrics.values())).all() and metrics.get("overflow", 0) == 0
    assert torch.cosine_similarity(*found, dim=0) > 0.9


def test_the_reference_computes_as_the_policy_does(env, make_policy, roll):
    """A policy that has not been trained is the reference bit for bit, in any precision."""
    for precision in ("no", *HALVES):
        policy = make_policy(env, scale=0.0)
        policy.set_training(mixed_precision=precision)
        observation, *_ = transitions(roll(env, policy))
        with torch.no_grad():
            assert policy.distribution(observation).kl(policy.reference_distribution(observation)).max() == 0


def test_mixed_precision_can_be_taken_back(env, make_policy, roll):
    policy = make_policy(env)
    plain = roll(env, policy)
    policy.set_training(mixed_precision="bf16")
    roll(env, policy)
    policy.set_training()
    assert torch.equal(roll(env, policy).latents, plain.latents)


@pytest.mark.parametrize("precision", ["float16", "", None])
def test_an_unknown_precision_is_named(env, precision):
    message = f"mixed_precision={precision!r} must be one of"
    with pytest.raises(ValueError, match=message):
        DenoisingPolicy.from_env(env).set_training(mixed_precision=precision)
    with pytest.raises(ValueError, match=message + " no, bf16, fp16"):
        DDPOIS.Config(mixed_precision=precision)


# --- gradient checkpointing ------------------------------------------------------------------------------------


def checkpointed(policy, rolled):
    """The gradient, how often residual blocks run, and the bytes that the forward pass leaves for the backward one."""
    observation, action, _ = transitions(rolled)
    results = []
    for on in (False, True):
        policy.set_training(gradient_checkpointing=on)
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        def run(results=results, pack=pack):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = policy(observation, action).sum()
            results.append(gradients(policy, value))

        number = calls(policy, run)
        results[-1] = results[-1], number, sum(kept.values())
    return results


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_checkpointing_gives_the_same_gradient_with_less_memory(env, make_policy, roll, trainable):
    policy = make_policy(env, trainable)
    (plain, once, saved), (gradient, again, less_saved) = checkpointed(policy, roll(env, policy))
    assert plain.norm() > 0.01
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)
    assert 1.5 * once < again < 2 * once  # once more in the backward pass; diffusers leaves out a block in the middle
    assert less_saved < 0.6 * saved


def test_rollouts_recompute_nothing(env, make_policy, roll):
    policy = make_policy(env)
    plain = calls(policy, lambda: roll(env, policy))
    policy.set_training(gradient_checkpointing=True)
    assert calls(policy, lambda: roll(env, policy)) == plain > 0


def test_a_network_that_cannot_checkpoint_is_refused_only_if_asked_to(env, make_policy):
    policy = make_policy(env, "full")
    policy.unet = nn.Conv2d(4, 4, 1)
    policy.set_training()
    with pytest.raises(ValueError, match=r"gradient_checkpointing=True .*; Conv2d has no enable_gradient_check"):
        policy.set_training(gradient_checkpointing=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_agent_that_checkpoints_takes_the_same_step(env, make_agent, roll, precision):
    """Adam's epsilon is large, so that rounding of gradients near 0 does not turn into a whole step."""
    ends = []
    for on in (False, True):
        agent = make_agent(env, gradient_checkpointing=on, mixed_precision=precision, adam_epsilon=1e-3)
        before = weights(agent.policy)
        rolled = roll(env, agent.policy)
        number = calls(agent.policy, partial(agent.update, rolled, np.random.default_rng(0)))
        ends.append((weights(agent.policy) - before, number))
    (plain, once), (move, again) = ends
    assert again > 1.5 * once
    assert (move - plain).norm() <= 1e-4 * plain.norm()


# --- training of the conditional branch alone ------------------------------------------------------------------


def predictions(policy, observation):
    """The conditional and the unconditional output of the network, each by a call of its own."""
    model, latents, timesteps = policy.model, observation["latents"], observation["timestep"][:, 0]
    null = model.embed(model.tokenize([""] * len(latents)))
    texts = (policy.embed(observation["prompt"]), null)
    return [model.predict(policy.unet, latents, timesteps, text) for text in texts]


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_without_cfg_training_the_unconditional_branch_is_held_fixed(env, make_policy, roll, trainable):
    """DDPO, appendix G.1: the same distribution, with the gradient of one branch."""
    policy = make_policy(env, trainable)
    observation, action, old = transitions(roll(env, policy))
    both = policy.distribution(observation)
    policy.set_training(cfg_training=False)
    one = policy.distribution(observation)
    torch.testing.assert_close(one.mean, both.mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(one.std, both.std)
    assert (one.log_prob(action) - old).abs().max() <= 1e-5
    conditional, unconditional = predictions(policy, observation)
    steps = policy.table.step_of[observation["timestep"][:, 0]]
    hand = []
    for fixed in (unconditional.detach(), unconditional):
        guided = guide(conditional, fixed, policy.config.guidance_scale)
        mean, std = step_gaussian(policy.table, steps, observation["latents"], guided)
        log_prob = -(((action - mean) / std) ** 2).flatten(1).mean(1) / 2
        hand.append(gradients_kept(policy, log_prob.sum()))
    found = [gradients(policy, each.log_prob(action).sum()) for each in (one, both)]
    for ours, wanted in zip(found, hand, strict=True):
        assert (ours - wanted).norm() <= 1e-4 * wanted.norm()
    assert (found[0] - found[1]).norm() > 0.1 * found[1].norm()


def gradients_kept(policy, value):
    parameters = list(policy.trainable_parameters().values())
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters, retain_graph=True)])


def test_without_cfg_training_rollouts_are_the_same_bit_for_bit(env, make_policy, roll):
    policy = make_policy(env)
    plain = roll(env, policy)
    policy.set_training(cfg_training=False)
    again = roll(env, policy)
    assert torch.equal(again.latents, plain.latents) and torch.equal(again.log_probs, plain.log_probs)


def test_without_guidance_there_is_one_branch_to_train(make_env, make_policy, roll):
    env = make_env(NUMBER, guidance_scale=1.0)
    policy = make_policy(env)
    observation, action, _ = transitions(roll(env, policy))
    found = []
    for on in (True, False):
        policy.set_training(cfg_training=on)
        found.append(gradients(policy, policy(observation, action).sum()))
    assert torch.equal(found[0], found[1]) and found[0].norm() > 0.01


# --- agents hand the options on --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_every_agent_sets_its_policys_options(env, make_agent, name):
    agent = make_agent(env, agent=AGENTS[name], cfg_training=False, mixed_precision="bf16", gradient_checkpointing=True)
    assert agent.policy.cfg_training is False and agent.policy.mixed_precision == "bf16"
    assert agent.policy.unet.is_gradient_checkpointing
    plain = make_agent(env, agent=AGENTS[name])
    assert plain.policy.cfg_training is True and plain.policy.mixed_precision == "no"
    assert not plain.policy.unet.is_gradient_checkpointing
