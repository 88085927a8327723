"""The trajectories of the last iterations, to be learned from again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.rollout import Trajectories


class ReplayBuffer:
    """Trajectories and returns of the last iterations; each process keeps those it sampled.

    Samples are counted over all iterations, oldest first, and within an iteration over all processes.

    Args:
        iterations: how many iterations stay.
        processes: the processes that share each iteration's samples.

    Attributes:
        trajectories: this process's, oldest first.
        local_returns: their returns, float32 on the device.
    """

    trajectories: Trajectories
    local_returns: torch.Tensor

    def __init__(self, iterations: int, processes: Processes) -> None:
        self.iterations, self.processes = iterations, processes
        self._parts: deque[Trajectories] = deque(maxlen=iterations)
        self._returns: deque[np.ndarray] = deque(maxlen=iterations)

    def add(self, trajectories: Trajectories, returns: np.ndarray) -> None:
        """Take in an iteration; the oldest one goes.

        Args:
            trajectories: this process's.
            returns: what the samples of all processes got, `(N,)`; NaN where a reward failed.
        """
        self._parts.append(replace(trajectories, images=torch.empty(len(trajectories), 0), components={}))
        self._returns.append(returns)
        self._refresh()

    def usable(self) -> np.ndarray:
        """Indices of the samples whose return is finite."""
        return np.flatnonzero(np.isfinite(np.concatenate(self._returns)))

    def local(self, pairs: torch.Tensor) -> torch.Tensor:
        """The (sample, step) pairs of this process, samples counted as in `trajectories`, on the device."""
        number = len(self._parts[0])
        slot, within = pairs[:, 0] // (number * self.processes.count), pairs[:, 0] % (number * self.processes.count)
        mine = within // number == self.processes.index
        sample = slot * number + within - self.processes.index * number
        return self.processes.own(torch.stack([sample, pairs[:, 1]], dim=1), mine).to(self.local_returns.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The iterations that the next `add` leaves in the buffer, gathered from all processes."""
        parts = list(self._parts)[1:] if len(self._parts) == self.iterations else list(self._parts)
        stored: dict[str, torch.Tensor] = {}
        for slot, part in enumerate(parts):
            rows = {"latents": part.latents.transpose(0, 1), "log_probs": part.log_probs.T, "rewards": part.rewards}
            if part.tokens is not None:
                rows["tokens"] = part.tokens
            stored |= {f"{slot}.{name}": self.processes.gather(value.contiguous()) for name, value in rows.items()}
            stored[f"{slot}.returns"] = torch.from_numpy(self._returns[slot - len(parts)])
            stored[f"{slot}.timesteps"] = part.timesteps
        return stored

    def load(self, tensors: Mapping[str, torch.Tensor], policy: DenoisingPolicy) -> None:
        """Put back what `tensors` gave; this process takes its share.

        Args:
            tensors: what `tensors` gave.
            policy: embeds the prompts anew, and says where the tensors go.
        """
        device = policy.device
        self._parts.clear()
        self._returns.clear()
        for slot in range(len({name.split(".")[0] for name in tensors})):
            row = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{slot}.")}
            share = self.processes.share(len(row["returns"]))
            local = {
                name: value[share.start : share.stop].to(device) for name, value in row.items() if name != "timesteps"
            }
            self._parts.append(
                Trajectories(
                    prompts=("",) * len(share),
                    tokens=local.get("tokens"),
                    embeddings=policy.embeddings.find(row["tokens"][share.start : share.stop])
                    if "tokens" in row
                    else None,
                    timesteps=row["timesteps"].to(device),
                    latents=local["latents"].transpose(0, 1),
                    log_probs=local["log_probs"].T,
                    rewards=local["rewards"],
                    components={},
                    images=torch.empty(len(share), 0),
                )
            )
            self._returns.append(row["returns"].numpy())
        if self._parts:
            self._refresh()

    def _refresh(self) -> None:
        self.trajectories = Trajectories.join(list(self._parts))
        number, index = len(self._parts[0]), self.processes.index
        device = self.trajectories.latents.device
        local = np.concatenate([returns[index * number : (index + 1) * number] for returns in self._returns])
        self.local_returns = torch.as_tensor(self.processes.usable(local), dtype=torch.float32, device=device)
