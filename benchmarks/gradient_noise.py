"""How noisy is the policy gradient of a step, from sampled transitions and from pictures noised anew?

    python benchmarks/gradient_noise.py --page docs/sample-efficiency.md

At the pretrained model the gradient of one transition, A grad log pi, is almost all noise: its mean over samples, the
signal, is far smaller. So E|grad log pi|^2 is the variance, up to the spread of A. The transitions of one picture share
its x_0 when they are noised anew, so the last line is of their mean over the noisy half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import tyro

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.renoising import fresh_noise, renoised_transitions
from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.agents.rollout import collect_many

gym.register_envs(diffusion_gym)

Transition = tuple[dict[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    env: str = "DiffusionDenoise-Shapes-Composition-v0"
    """The environment."""
    prompts: str = "shapes-composition-4"
    """Its prompts."""
    num_inference_steps: int = 10
    """T."""
    samples: int = 32
    """Trajectories."""
    device: str = "cpu"
    """Where."""
    page: Path | None = None
    """A page whose part between the markers `noise` is written anew."""


def gradient_noise(options: Options) -> list[dict[str, Any]]:
    """For each step, and for the noisy half together, mean squared norms of grad log pi, `sampled` and `renoised`."""
    env = gym.make_vec(
        options.env,
        num_envs=options.samples,
        prompts=options.prompts,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=1.0,
        device=options.device,
    )
    policy = DenoisingPolicy.from_env(env, trainable="full")
    rolled = collect_many(env, policy, options.samples, (0, 0))

    def sampled(sample: torch.Tensor, step: torch.Tensor) -> Transition:
        return rolled.states(sample, step), rolled.actions(sample, step)

    def renoised(sample: torch.Tensor, step: torch.Tensor) -> Transition:
        return renoised_transitions(policy.table, rolled, sample, step, fresh_noise(rolled, len(step), int(sample[0])))

    steps = policy.stochastic_steps
    noisy = steps[steps < len(policy.table) / 2]
    return [
        {
            "steps": chosen.tolist(),
            "sigma": float(policy.table.sigma[int(chosen[0])]),
            "sampled": _square(policy, sampled, options.samples, chosen),
            "renoised": _square(policy, renoised, options.samples, chosen),
        }
        for chosen in (*steps[:, None], noisy)
    ]


def _square(
    policy: DenoisingPolicy,
    transitions: Callable[[torch.Tensor, torch.Tensor], Transition],
    samples: int,
    steps: torch.Tensor,
) -> float:
    """The mean over samples of |grad log pi|^2, log pi a mean over steps; each sample's gradient takes a pass."""
    parameters, found = list(policy.trainable_parameters().values()), []
    for sample in range(samples):
        log_prob = policy(*transitions(torch.full_like(steps, sample).to(policy.device), steps.to(policy.device)))
        gradient = torch.autograd.grad(log_prob.mean(), parameters)
        found.append(sum(float(part.square().sum()) for part in gradient))
    return sum(found) / len(found)


def table(rows: list[dict[str, Any]]) -> str:
    """The numbers as a Markdown table."""
    lines = []
    for row in rows:
        first, *others = row["steps"]
        several = f"{first} to {others[-1]}, a picture's mean gradient" if others else ""
        place = [several, ""] if several else [str(first), f"{row['sigma']:.3f}"]
        squares = [f"{row['sampled']:.3g}", f"{row['renoised']:.3g}", f"{row['renoised'] / row['sampled']:.2g}"]
        lines.append([*place, *squares])
    return markdown_table(["step", "sigma", "sampled", "noised anew", "ratio"], lines)


def main(options: Options) -> None:
    """Measure, print the table and write it into the page."""
    found = table(gradient_noise(options))
    print(found)
    if options.page is not None:
        write_marked(options.page, {"noise": found})


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
