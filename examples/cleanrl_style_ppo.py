"""PPO on the denoising process in CleanRL's manner: one file, one dataclass of arguments, one plain loop.

python examples/cleanrl_style_ppo.py --total-reward-queries 3200

It needs nothing of this package but the environment and the policy; docs/bring-your-own-algorithm.md has the contract.
"""

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.training.export import export_policy

gym.register_envs(diffusion_gym)


@dataclass
class Args:
    """PPO for a diffusion model, with the values of the preset `shapes-demo`."""

    env_id: str = "DiffusionDenoise-Shapes-Location-v0"
    """the environment"""
    prompts: str | None = "shapes-demo"
    """a prompt set, or a .txt file with one prompt a line; None takes the environment's own"""
    strict: bool = True
    """score success in {0, 1} (the Shapes rewards alone have this; switch it off for others)"""
    num_inference_steps: int = 10
    """T, the length of an episode"""
    guidance_scale: float = 1.0
    """classifier-free guidance, the same in rollout and training; 1 is none"""
    seed: int = 0
    """of the environments, the actions and the minibatches"""
    device: str = "cpu"
    """where the model, the latents and the storage live"""
    total_reward_queries: int = 3_200
    """pictures to score in the whole training"""
    num_envs: int = 128
    """denoising processes side by side"""
    num_episodes: int = 1
    """episodes of each environment between updates"""
    trainable: str = "full"
    """`full`, all weights of the UNet, or `lora`"""
    learning_rate: float = 2e-4
    """of AdamW"""
    max_grad_norm: float = 1.0
    """a longer gradient is scaled down to this norm"""
    clip_coef: float = 1e-2
    """PPO's clip range; it goes with log-probabilities that are means over 256 dimensions (docs/shapes-preset.md)"""
    update_epochs: int = 1
    """passes over a rollout"""
    num_minibatches: int = 4
    """updates in a pass"""
    micro_batch: int = 128
    """transitions in one backward pass; limits the memory and does not change the result"""
    trained_part: float = 0.5
    """share of the steps that is trained on, from the noisy end: there the layout of a picture is settled"""
    log_dir: Path | None = None
    """write TensorBoard logs here"""
    save_dir: Path | None = None
    """write the fine-tuned model here, as files that diffusers loads"""


def normalize(rewards: np.ndarray, prompts: list[str], history: dict[str, deque]) -> np.ndarray:
    """Rewards `(M,)` to advantages, by the running statistics of each prompt: DDPO's substitute for a critic.

    A prompt with fewer than 16 rewards so far is normalised by the batch. A reward that failed (NaN) teaches nothing.
    """
    usable = np.isfinite(rewards)
    for prompt, reward in zip(np.array(prompts)[usable], rewards[usable], strict=True):
        history[prompt].append(reward)
    advantages = np.zeros(len(rewards))
    for i in np.flatnonzero(usable):
        known = history[prompts[i]] if len(history[prompts[i]]) >= 16 else rewards[usable]
        advantages[i] = (rewards[i] - np.mean(known)) / max(np.std(known), 1e-6)
    return advantages.clip(-5, 5)


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """The denoising processes, side by side in one batch."""
    return gym.make_vec(
        args.env_id,
        num_envs=args.num_envs,
        prompts=args.prompts,
        reward_kwargs={"strict": True} if args.strict else {},
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        device=args.device,
    )


def trained_steps(args: Args, policy: DenoisingPolicy) -> torch.Tensor:
    """The steps to train on, bool `(T,)`: deterministic ones (sigma = 0) have no policy gradient and are left out."""
    horizon = args.num_inference_steps
    trained = torch.zeros(horizon, dtype=torch.bool)
    trained[policy.stochastic_steps] = True
    trained[int(args.trained_part * horizon) :] = False
    if not trained.any():
        raise SystemExit(f"--trained-part {args.trained_part} leaves no stochastic step of T={horizon}")
    return trained


@torch.no_grad()
def rollout(args: Args, envs, policy: DenoisingPolicy, generator: torch.Generator, next_obs: dict) -> tuple:
    """`num_episodes` episodes of each environment: storage `(steps, num_envs, ...)`, their prompts, the next states.

    Storage is float32 like the latents, since a rounded action has another log-probability.
    """
    obs, actions, logprobs, rewards, prompts = [], [], [], [], []
    for _ in range(args.num_inference_steps * args.num_episodes):
        obs.append(next_obs)
        distribution = policy.distribution(next_obs)
        actions.append(distribution.sample(generator))
        logprobs.append(distribution.log_prob(actions[-1]))
        next_obs, reward, terminations, _, infos = envs.step(actions[-1])
        rewards.append(reward)
        if terminations.all():  # all together, every T steps; next_obs is already that of the next episodes
            prompts += list(infos["final_info"]["prompt"])
    storage = {key: torch.stack([state[key] for state in obs]) for key in next_obs}
    return storage, torch.stack(actions), torch.stack(logprobs), torch.stack(rewards), prompts, next_obs


def update(args: Args, policy: DenoisingPolicy, optimizer, obs: dict, actions, logprobs, advantages, b_inds) -> dict:
    """PPO's passes over the transitions `b_inds` of a flattened rollout; what happened to the ratios."""
    parameters = list(policy.trainable_parameters().values())
    clipfracs, approx_kls, ratio_errors = [], [], []
    for _ in range(args.update_epochs):
        for mb_inds in b_inds[torch.randperm(len(b_inds))].chunk(args.num_minibatches):
            optimizer.zero_grad()
            for part in mb_inds.to(args.device).split(args.micro_batch):
                newlogprob = policy({key: value[part] for key, value in obs.items()}, actions[part])
                logratio = newlogprob - logprobs[part]
                ratio = logratio.exp()
                pg_loss1 = -advantages[part] * ratio
                pg_loss2 = -advantages[part] * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                # no value loss: no critic; no entropy bonus: sigma is fixed, and so is the entropy
                (torch.max(pg_loss1, pg_loss2).sum() / len(mb_inds)).backward()
                with torch.no_grad():
                    clipfracs.append(((ratio - 1).abs() > args.clip_coef).float().mean().item())
                    approx_kls.append((ratio - 1 - logratio).mean().item())
                    ratio_errors.append((ratio - 1).abs().max().item())
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
    return {
        "clipfrac": float(np.mean(clipfracs)),
        "approx_kl": float(np.mean(approx_kls)),
        "first_ratio_error": ratio_errors[0],  # before the first update the ratio must be 1
    }


def main(args: Args) -> None:
    """Train."""
    horizon, batch_size = args.num_inference_steps, args.num_envs * args.num_episodes  # pictures an iteration
    if args.total_reward_queries < batch_size:
        raise SystemExit(f"--total-reward-queries must be at least the {batch_size} of one iteration")
    torch.manual_seed(args.seed)  # the minibatches, and the first values of LoRA's adapters
    generator = torch.Generator(args.device).manual_seed(args.seed)  # the actions
    envs = make_envs(args)
    policy = DenoisingPolicy.from_env(envs, trainable=args.trainable)
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=args.learning_rate, weight_decay=1e-4)
    rows = torch.arange(horizon * batch_size).view(-1, args.num_envs)
    b_inds = rows[trained_steps(args, policy).repeat(args.num_episodes)].flatten()  # the steps to train on
    writer = SummaryWriter(str(args.log_dir)) if args.log_dir is not None else None
    history: dict[str, deque] = defaultdict(lambda: deque(maxlen=32))
    next_obs, _ = envs.reset(seed=args.seed)
    start_time = time.time()

    for iteration in range(1, args.total_reward_queries // batch_size + 1):
        obs, actions, logprobs, rewards, prompts, next_obs = rollout(args, envs, policy, generator, next_obs)
        # gamma = 1 and the reward comes with the last step: every step of an episode has the same return
        episode_rewards = rewards[horizon - 1 :: horizon].cpu().numpy()  # (num_episodes, num_envs)
        advantages = torch.as_tensor(normalize(episode_rewards.ravel(), prompts, history)).to(rewards)
        advantages = advantages.view(-1, args.num_envs).repeat_interleave(horizon, 0)
        b_obs = {key: value.flatten(0, 1) for key, value in obs.items()}
        flat = actions.flatten(0, 1), logprobs.flatten(), advantages.flatten()
        changes = update(args, policy, optimizer, b_obs, *flat, b_inds)
        queries = iteration * batch_size
        row = {"reward": float(np.nanmean(episode_rewards)), **changes, "seconds": time.time() - start_time}
        print(f"iteration={iteration} reward_queries={queries}", *(f"{k}={v:.3g}" for k, v in row.items()), flush=True)
        for key, value in row.items() if writer is not None else ():
            writer.add_scalar(f"charts/{key}", value, queries)

    if args.save_dir is not None:
        print(export_policy(policy, args.save_dir))
    if writer is not None:
        writer.close()
    envs.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
