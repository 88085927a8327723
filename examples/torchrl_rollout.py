"""TorchRL on the denoising process: `GymWrapper`, a rollout, and an update with TorchRL's own PPO loss.

pip install torchrl tensordict
python examples/torchrl_rollout.py
"""

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss

import diffusion_gym
from diffusion_gym.agents import DenoisingDistribution, DenoisingPolicy

gym.register_envs(diffusion_gym)


@dataclass
class Args:
    """A few iterations of PPO through TorchRL."""

    env_id: str = "DiffusionDenoise-Shapes-Location-v0"
    """the environment"""
    num_envs: int = 32
    """denoising processes side by side; each gives one episode an iteration"""
    num_inference_steps: int = 10
    """T, the length of an episode"""
    iterations: int = 4
    """rollouts"""
    updates: int = 2
    """gradient steps on a rollout"""
    learning_rate: float = 1e-4
    """of AdamW"""
    clip_epsilon: float = 1e-2
    """PPO's clip range"""
    seed: int = 0
    """of the environments and the actions"""


class StepGaussian(torch.distributions.Distribution):
    """The policy's Gaussian as a torch distribution.

    TorchRL's own normal would sum the log-probability over the dimensions and divide by sigma = 0.
    """

    arg_constraints = {}

    def __init__(self, mean, std, reduction="mean"):
        self.gaussian = DenoisingDistribution(mean, std, reduction)
        super().__init__(mean.shape[:-3], mean.shape[-3:], validate_args=False)

    def sample(self, sample_shape=()):
        """Actions x_{t-1}."""
        return self.gaussian.sample()

    def log_prob(self, value):
        """Log-probabilities, reduced as the sampler's config says."""
        return self.gaussian.log_prob(value)

    @property
    def deterministic_sample(self):
        """The action without noise, for those who ask for it."""
        return self.gaussian.mean


class MeanAndStd(torch.nn.Module):
    """The policy as a module from the observation's entries to mean and standard deviation."""

    def __init__(self, policy: DenoisingPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, prompt, timestep, latents):
        """Mean `(N, C, H, W)` and standard deviation `(N, 1, 1, 1)`."""
        step = self.policy.distribution({"prompt": prompt, "timestep": timestep, "latents": latents})
        return step.mean, step.std


def advantages(rollout: TensorDict) -> torch.Tensor:
    """The final reward of each episode, normalised within its prompt, for each of its steps: `(N, T, 1)`."""
    rewards = rollout["next", "reward"].sum(1)  # gamma = 1, and only the last step has one
    prompts = rollout["prompt"][:, 0].unique(dim=0, return_inverse=True)[1]
    result = torch.zeros_like(rewards)
    for prompt in prompts.unique():
        own = rewards[prompts == prompt]
        result[prompts == prompt] = (own - own.mean()) / own.std(correction=0).clamp(min=1e-6)
    return result[:, None].expand_as(rollout["next", "reward"])


def main(args: Args) -> None:
    """Sample and update, with TorchRL's parts."""
    torch.manual_seed(args.seed)
    envs = gym.make_vec(
        args.env_id,
        num_envs=args.num_envs,
        autoreset_mode="Disabled",  # what TorchRL prefers: it resets by `reset_mask`
        prompts="shapes-demo",
        reward_kwargs={"strict": True},
        num_inference_steps=args.num_inference_steps,
        guidance_scale=1.0,
    )
    env = GymWrapper(envs)
    env.set_seed(args.seed)
    policy = DenoisingPolicy.from_env(envs, trainable="full")
    actor = ProbabilisticActor(
        TensorDictModule(MeanAndStd(policy), in_keys=["prompt", "timestep", "latents"], out_keys=["mean", "std"]),
        in_keys=["mean", "std"],
        distribution_class=StepGaussian,
        distribution_kwargs={"reduction": policy.config.log_prob_reduction},
        default_interaction_type=InteractionType.RANDOM,  # TorchRL's default is the mean: no noise, nothing to learn
        return_log_prob=True,
    )
    # No critic and no entropy bonus: the baseline is the prompt's mean, and sigma is fixed.
    loss = ClipPPOLoss(actor, None, clip_epsilon=args.clip_epsilon, entropy_bonus=False, functional=False)
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=args.learning_rate)
    steps = policy.stochastic_steps  # sigma = 0 has no policy gradient

    for iteration in range(1, args.iterations + 1):
        with torch.no_grad():
            rollout = env.rollout(args.num_inference_steps, actor)  # (N, T)
        rollout["advantage"] = advantages(rollout)
        batch = rollout.exclude("mean", "std")[:, steps].reshape(-1)
        ratios = []
        for _ in range(args.updates):
            out = loss(batch)
            optimizer.zero_grad()
            out["loss_objective"].backward()
            torch.nn.utils.clip_grad_norm_(policy.trainable_parameters().values(), 1.0)
            optimizer.step()
            ratios.append(f"{out['max_ratio'].item():.6f}")
        reward = rollout["next", "reward"].sum(1).mean().item()
        noise = ((rollout["action"] - rollout["mean"]) / rollout["std"])[:, steps].std().item()
        print(f"iteration={iteration} reward={reward:.3f} noise={noise:.3f} max_ratio={','.join(ratios)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
