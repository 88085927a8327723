"""What a run has reached: the tuned policy against the pretrained model, from the same fresh noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.advantages import rows_by_prompt
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.training.changes import (
    Probed,
    change_interval,
    diversity,
    mean_interval,
    probed,
    rows_of,
)
from diffusion_gym.agents.training.pictures import save_grid
from diffusion_gym.agents.training.sampling import EVALUATION, finite, finite_mean, sample
from diffusion_gym.rewards import make_reward
from diffusion_gym.storage import number_or_nan

EVALUATION_SEED: Final = 1_000  # of a run, unless another is asked for
_SHOWN = 16


@dataclass(frozen=True)
class Comparison:
    """Trajectories of the tuned policy and of the pretrained model from the same noise.

    Attributes:
        tuned: the policy's.
        base: the pretrained model's.
        kl: KL(policy || pretrained) summed over the steps, for the first samples, `(M,)`.
        probed: what a reward that is not trained on makes of their pictures; None for none.
        diversity: see `changes.diversity`; empty where it is not measured.
    """

    tuned: Trajectories
    base: Trajectories
    kl: torch.Tensor
    probed: Probed | None = None
    diversity: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals, a row for each prompt, and what `save_pictures` shows."""
        rewards, base = finite(self.tuned.rewards), finite(self.base.rewards)
        result: dict[str, Any] = {
            "samples": len(self.tuned),
            "reward_mean": finite_mean(self.tuned.rewards),
            "reward_ci95": mean_interval(rewards),
            "base_reward_mean": finite_mean(self.base.rewards),
            "base_reward_ci95": mean_interval(base),
            "reward_change_ci95": change_interval(self.tuned.rewards, self.base.rewards),
            "kl_to_base": float(self.kl.double().mean()),
            **self.diversity,
        }
        if "success" in self.tuned.components:
            for prefix, part in (("", self.tuned), ("base_", self.base)):
                result[f"{prefix}success"] = finite_mean(part.components["success"])
                result[f"{prefix}success_ci95"] = share_interval(finite(part.components["success"]))
            both = (part.components["success"] for part in (self.tuned, self.base))
            result["success_change_ci95"] = change_interval(*both)
        if self.probed is not None:
            result["probe"] = self._probe(self.probed)
        result["prompts"] = self._by_prompt()
        result["shown"] = {"size": list(self.tuned.images.shape[1:3]), "pictures": self._shown()}
        return result

    @property
    def exploited(self) -> list[int]:
        """The pictures whose reward rose most while the probe fell; none without a probe."""
        return [] if self.probed is None else self.probed.exploited(self.tuned.rewards - self.base.rewards)

    def _probe(self, probed: Probed) -> dict[str, Any]:
        """What the probe says, and of the pictures that `save_pictures` shows."""
        values = {"reward": self.tuned.rewards, "base_reward": self.base.rewards}
        values |= {"probe": probed.tuned, "base_probe": probed.base}
        return {
            "name": probed.name,
            "mean": finite_mean(probed.tuned),
            "base_mean": finite_mean(probed.base),
            "change_ci95": change_interval(probed.tuned, probed.base),
            "size": list(self.tuned.images.shape[1:3]),
            "pictures": rows_of(self.exploited, self.tuned.prompts, **values),
        }

    def _shown(self) -> list[dict[str, Any]]:
        """Prompt and results of each picture in the grids, in their order."""
        rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in self.tuned.prompts[:_SHOWN]]
        for prefix, part in (("", self.tuned), ("base_", self.base)):
            for index, row in enumerate(rows):
                row[f"{prefix}reward"] = float(part.rewards[index])
                if "success" in part.components:
                    row[f"{prefix}success"] = float(part.components["success"][index])
        return rows

    def _by_prompt(self) -> dict[str, dict[str, float]]:
        rows: dict[str, dict[str, float]] = {}
        for prompt, places in sorted(rows_by_prompt(self.tuned.prompts).items()):
            chosen = torch.from_numpy(places)
            row: dict[str, float] = {"samples": len(chosen)}
            for prefix, part in (("", self.tuned), ("base_", self.base)):
                row[f"{prefix}reward"] = finite_mean(part.rewards[chosen])
                if "success" in part.components:
                    row[f"{prefix}success"] = finite_mean(part.components["success"][chosen])
            rows[prompt] = row
        return rows


def compare(
    env: VectorEnv[Any, Any, Any],
    policy: DenoisingPolicy,
    samples: int,
    seed: int,
    *,
    kl_samples: int = 64,
    probe: str | None = None,
) -> Comparison:
    """Sample `samples` pictures from either model.

    Args:
        env: the environment; `samples` is rounded up to a multiple of its `num_envs`.
        policy: the tuned policy.
        samples: pictures of each.
        seed: seed of the noise and the prompts; evaluation seeds never coincide with those of training.
        kl_samples: trajectories behind the KL divergence.
        probe: a reward that is not trained on, which scores the pictures too; None for none.

    Raises:
        ValueError: an unknown probe.
    """
    reward = None if probe is None else make_reward(probe)
    tuned = sample(env, policy, samples, (seed, EVALUATION))
    base = sample(env, policy, samples, (seed, EVALUATION), reference=True)
    kl = trajectory_kl(policy, tuned, min(kl_samples, len(tuned)))
    scored = None if reward is None else probed(env, reward, tuned, base)
    return Comparison(tuned, base, kl, scored, diversity(policy, tuned, base))


@torch.no_grad()
def trajectory_kl(policy: DenoisingPolicy, trajectories: Trajectories, number: int) -> torch.Tensor:
    """KL(policy || pretrained), summed over the steps of the first `number` trajectories: `(number,)`.

    The closed form between Gaussians of equal sigma along trajectories of the policy itself. Deterministic steps, which
    have none, are left out; where no step is noisy (eta = 0) it is NaN.
    """
    if not bool((policy.table.sigma > 0).any()):
        return torch.full((number,), float("nan"))
    samples = torch.arange(number, device=policy.device)
    total = torch.zeros(number, device=policy.device)
    for step in range(len(policy.table)):
        states = trajectories.states(samples, torch.full_like(samples, step))
        total += policy.distribution(states).kl(policy.reference_distribution(states))
    return total


def summary_text(result: dict[str, Any]) -> str:
    """The numbers of `eval.json` in a few lines."""
    lines = []
    for name, part in (("training prompts", result), ("held-out prompts", result.get("held_out"))):
        if part is None:
            continue
        lines.append(f"{name}, {part['samples']} samples of each model from the same noise:")
        for key in ("reward_mean", "success"):
            if key in part:
                short = key.removesuffix("_mean")
                before, after = number_or_nan(part[f"base_{key}"]), number_or_nan(part[key])
                lines.append(
                    f"  {short:8} {before:.3f} {_interval(part[f'base_{short}_ci95'])} before, "
                    f"{after:.3f} {_interval(part[f'{short}_ci95'])} after ({after - before:+.3f})"
                )
        kl = number_or_nan(part["kl_to_base"])
        nats = "not defined, no step is noisy" if math.isnan(kl) else f"{kl:.1f} nats a trajectory"
        lines.append(f"  KL to the pretrained model: {nats}")
        if "vendi" in part:
            before, after = number_or_nan(part["base_vendi"]), number_or_nan(part["vendi"])
            lines.append(f"  different pictures (Vendi score): {before:.1f} before, {after:.1f} after")
        if probe := part.get("probe"):
            before, after = number_or_nan(probe["base_mean"]), number_or_nan(probe["mean"])
            told = f"{before:.3f} before, {after:.3f} after, change {_interval(probe['change_ci95'])}"
            lines.append(f"  {probe['name']}, not trained on: {told}")
    return "\n".join(lines)


def _interval(bounds: Sequence[float | None]) -> str:
    low, high = map(number_or_nan, bounds)
    return f"[{low:.3f}, {high:.3f}]"


def save_pictures(folder: Path, comparison: Comparison, prefix: str = "") -> None:
    """Write the first pictures of both models from the same noise, and those whose reward rose while a probe fell.

    These are `before.png` and `after.png`, `exploited-before.png` and `exploited-after.png`.
    """
    places = comparison.exploited
    for name, part in (("before", comparison.base), ("after", comparison.tuned)):
        save_grid(folder / f"{prefix}{name}.png", part.images[:_SHOWN], columns=4)
        if places:
            save_grid(folder / f"{prefix}exploited-{name}.png", part.images[places], columns=4)
        else:  # those of an earlier evaluation
            (folder / f"{prefix}exploited-{name}.png").unlink(missing_ok=True)


def share_interval(hits: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion, from values in {0, 1}; all of [0, 1] without a value."""
    from scipy import stats

    if not len(hits):
        return 0.0, 1.0
    low, high = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
    return float(low), float(high)
