"""The prompts of a training encoded ahead of it, so that the text encoders can leave memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.models import null_embedding

_AT_ONCE = 64  # prompts, of which as many embeddings are in memory


def encode_ahead(policy: DenoisingPolicy, prompts: Sequence[str], processes: Processes) -> None:
    """Have a model with an `embedding_cache` put the embeddings of prompts there; then its text encoders go.

    Each of several processes encodes a part, then reads what the others have made. Of another model nothing changes.

    Args:
        policy: of the model.
        prompts: which; another one makes the encoders come back, and go again.
        processes: the processes, all of which call it.

    Raises:
        ValueError: a file of the cache is damaged or of something else.
        OSError: a file cannot be written.
    """
    model: Any = policy.model
    if getattr(model, "store", None) is None:
        return

    def encode() -> None:
        null_embedding(model)
        own = list(prompts[processes.index :: processes.count])
        for start in range(0, len(own), _AT_ONCE):
            policy.embed_prompts(own[start : start + _AT_ONCE])

    processes.together(encode)  # so that what is there is there for all
    model.text_encoders.release(model)
