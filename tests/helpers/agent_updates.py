"""What the agents' tests do with an update: rollouts with other rewards, weights, gradients, references by autograd."""

from dataclasses import replace

import numpy as np
import torch
from torch.distributions import Normal, kl_divergence


def rewarded(rolled, seed=5, mean=0.0, spread=1.0):
    """The rollout with rewards of a wide spread."""
    generator = torch.Generator().manual_seed(seed)
    return replace(rolled, rewards=mean + spread * torch.randn(len(rolled), generator=generator))


def part_of(rolled, kept):
    """The rollout of some samples only, in the order of `kept`."""
    return replace(
        rolled,
        prompts=tuple(rolled.prompts[index] for index in kept),
        tokens=rolled.tokens[kept],
        embeddings=rolled.embeddings.part(kept),
        latents=rolled.latents[:, kept],
        log_probs=rolled.log_probs[:, kept],
        rewards=rolled.rewards[kept],
        images=rolled.images[kept],
    )


def update(agent, rolled, seed=0):
    return agent.update(rolled, np.random.default_rng(seed))


def weights(agent):
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters])


def gradients(agent):
    """Of the last update, after the gradient's norm was clipped."""
    return torch.cat([parameter.grad.flatten() for parameter in agent.parameters])


def slope(value, parameters):
    """Autograd of a number, as one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(parameters))])


def close(ours, reference, tolerance):
    """Whether two vectors agree, relative to a reference that is not 0."""
    assert reference.norm() > 1e-6
    assert (ours - reference).norm() <= tolerance * reference.norm()


# --- transitions: pairs (sample, step) of a rollout ------------------------------------------------------------


def every_pair(rolled):
    return [(sample, step) for sample in range(len(rolled)) for step in range(len(rolled.timesteps))]


def places(actions, rolled):
    """The pairs of transitions, found by their actions `(M, C, H, W)`."""
    known = rolled.latents[1:].flatten(2)
    found = [(known == row).all(2).nonzero()[0].tolist() for row in actions.flatten(1)]
    return [(sample, step) for step, sample in found]


def transitions(rolled, pairs=None):
    """States and actions of pairs; by default of all."""
    samples, steps = torch.as_tensor(every_pair(rolled) if pairs is None else pairs).unbind(1)
    return rolled.states(samples, steps), rolled.actions(samples, steps)


def record(agent):
    """The batches of transitions that the policy is updated on from now on, one an update."""
    batches, losses = [], agent.losses

    def recorded(batch):
        batches.append(batch)
        return losses(batch)

    agent.losses = recorded
    return batches


# --- references, by torch.distributions and autograd -----------------------------------------------------------


def log_prob(policy, states, actions, reduction="mean"):
    """`(M,)`, reduced over dimensions."""
    gaussian = policy.distribution(states)
    density = Normal(gaussian.mean, gaussian.std).log_prob(actions).flatten(1)
    return density.mean(1) if reduction == "mean" else density.sum(1)


def ascent(agent, rolled, advantages, pairs=None, reduction="mean"):
    """The policy gradient: autograd of the mean of A log p over transitions, by default all."""
    pairs = every_pair(rolled) if pairs is None else pairs
    samples, _ = torch.as_tensor(pairs).unbind(1)
    advantages = torch.as_tensor(advantages, dtype=torch.float32)[samples]
    objective = advantages * log_prob(agent.policy, *transitions(rolled, pairs), reduction)
    return slope(objective.mean(), agent.parameters)


def penalties(policy, pretrained, states, actions, form):
    """The KL penalty of each transition, `(M,)`, in nats a dimension."""
    ours = policy.distribution(states)
    with torch.no_grad():
        reference = pretrained.distribution(states)
    ours, reference = Normal(ours.mean, ours.std), Normal(reference.mean, reference.std)
    if form == "squared_log_ratio":
        ratio = ours.log_prob(actions).flatten(1).sum(1) - reference.log_prob(actions).flatten(1).sum(1)
        return ratio**2 / 2 / actions[0].numel()
    divergence = kl_divergence(ours, reference)
    return (divergence if form == "closed_form" else divergence * 2 * ours.stddev**2).flatten(1).mean(1)
