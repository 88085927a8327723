"""Finished pictures on disk: a PNG each, and a line with its prompt and reward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv

from diffusion_gym.images import as_png
from diffusion_gym.storage import json_text, parse_json, remove_unfinished, write_bytes, write_text
from diffusion_gym.wrappers.episodes import EpisodesVectorEnv
from diffusion_gym.wrappers.single import SingleWrapper

LOG_NAME = "pictures.jsonl"


class RecordPicturesVectorEnv(EpisodesVectorEnv):
    """Saves the picture of every k-th episode as `episode-NNNNNNNN.png`, and a line of `pictures.jsonl` for it.

    A line has `episode` (counted over all environments, in the order in which they end), `env`, `prompt`, `reward` as
    this wrapper sees it (null where it is not finite), the reward's `components`, and `file`. A picture is in place
    before its line is written. A folder that holds recordings is gone on with, from the next multiple of k.

    Args:
        env: a denoising vector environment, wrapped or not.
        folder: where to; made if it is not there.
        every: k; episodes 0, k, 2k and so on are saved.

    Raises:
        ValueError: `every` is less than 1, or `pictures.jsonl` is none.
        OSError: the folder cannot be written to.

    Example:
        >>> import gymnasium as gym, diffusion_gym, os, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> env = gym.make_vec("DiffusionDenoise-Shapes-Color-v0", num_envs=3, num_inference_steps=1)
        >>> env = RecordPicturesVectorEnv(env, folder, every=2)
        >>> observation, infos = env.reset(seed=0)
        >>> _ = env.step(observation["latents"])
        >>> sorted(os.listdir(folder))
        ['episode-00000000.png', 'episode-00000002.png', 'pictures.jsonl']
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], folder: str | Path, every: int = 1) -> None:
        self.recorder = PictureRecorder(folder, every)
        super().__init__(env)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the wrapped environment's; saves the pictures that are finished and due."""
        results = super().step(actions)
        _, rewards, _, _, infos = results
        final = infos.get("final_info", infos)
        for index in np.flatnonzero(self.events.ended):
            if self.recorder.due():
                parts = {key: part[index] for key, part in final["reward_components"].items() if key[0] != "_"}
                self.recorder.save(final["image"][index], final["prompt"][index], rewards[index], parts, int(index))
        return results


class RecordPictures(SingleWrapper[RecordPicturesVectorEnv], RecordConstructorArgs):
    """`RecordPicturesVectorEnv` for a single environment; its spec makes it again."""

    kind = RecordPicturesVectorEnv


class PictureRecorder:
    """Numbers the episodes and writes those that are due.

    Args:
        folder: where to.
        every: episodes 0, `every`, 2 `every` and so on are due.
    """

    def __init__(self, folder: str | Path, every: int) -> None:
        if not isinstance(every, int | np.integer) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every={every!r} must be a whole number of at least 1")
        self.folder, self.every = Path(folder), int(every)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        self._log = self.folder / LOG_NAME
        self._next = self._episodes_before()
        self._now = self._next

    def due(self) -> bool:
        """Count one more finished episode, and say whether it is to be saved."""
        self._now, self._next = self._next, self._next + 1
        return self._now % self.every == 0

    def save(self, image: Any, prompt: str, reward: Any, components: Mapping[str, Any], env: int) -> None:
        """Write the episode that `due` has counted last.

        Args:
            image: uint8 `(H, W, 3)`, a tensor or an array.
            prompt: its prompt.
            reward: its reward.
            components: the reward's components.
            env: which environment made it.
        """
        from PIL import Image

        picture = Image.fromarray(torch.as_tensor(image).cpu().numpy())
        name = f"episode-{self._now:08d}.png"
        write_bytes(self.folder / name, as_png(picture))
        parts = {key: float(value) for key, value in components.items()}
        row = {"episode": self._now, "env": env, "prompt": str(prompt), "reward": float(reward)}
        line = json_text({**row, "components": parts, "file": name}) + "\n"
        with self._log.open("ab", buffering=0) as file:
            file.write(line.encode("ascii"))  # in one call, so that readers see whole lines

    def _episodes_before(self) -> int:
        """The number of the first episode: the next one that is due. Cuts off a line that a kill left torn."""
        if not self._log.exists():
            return 0
        text = self._log.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self._log, whole)
        try:
            last = max((int(parse_json(line)["episode"]) for line in whole.splitlines()), default=-1)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._log} holds no recordings of pictures; choose another folder") from error
        return (last // self.every + 1) * self.every
