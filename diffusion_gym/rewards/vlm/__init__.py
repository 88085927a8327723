"""Vision-language models that answer questions about pictures: in process, or behind an OpenAI-compatible server."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_gym.registry import WrongKeyword, unknown_name
from diffusion_gym.rewards.vlm.base import VLM, VLMError
from diffusion_gym.rewards.vlm.cache import CachedVLM
from diffusion_gym.rewards.vlm.chat import ChatVLM
from diffusion_gym.rewards.vlm.llava import LocalVLM


def make_vlm(source: str | VLM, *, cache: str | None = None, **options: Any) -> VLM:
    """A vision-language model by its address, hub id or directory.

    Args:
        source: the base URL of a server, such as `http://127.0.0.1:8000/v1`; a hub id or a directory of a model for
            transformers; or a `VLM`, which is passed through.
        cache: folder in which answers are kept; None for no cache.
        **options: keywords of `ChatVLM` for a URL, of `LocalVLM` for an id or a directory.

    Raises:
        TypeError: an option that this kind of model does not take.
    """
    check_vlm_options(source, options)
    model: VLM = _kind(source)(source, **options) if isinstance(source, str) else source
    return model if cache is None else CachedVLM(model, cache)


def check_vlm_options(source: str | VLM, options: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """Check the names of `make_vlm`'s options, before anything is loaded.

    Args:
        source: as for `make_vlm`.
        options: the options.
        others: what else the user may have meant, the keywords of the reward.

    Raises:
        TypeError: an option that this kind of model does not take.
    """
    if not isinstance(source, str):
        if options:
            raise WrongKeyword(f"reward_kwargs={options!r} go with the vlm's name or URL, not with a VLM object")
        return
    own = list(inspect.signature(_kind(source)).parameters)[1:]
    for option in options:
        if option not in own:
            raise WrongKeyword(f"with vlm={source!r}: " + unknown_name("reward_kwargs", option, [*others, *own]))


def _kind(source: str) -> type[ChatVLM] | type[LocalVLM]:
    return ChatVLM if source.startswith(("http://", "https://")) else LocalVLM


__all__ = ["VLM", "CachedVLM", "ChatVLM", "LocalVLM", "VLMError", "check_vlm_options", "make_vlm"]
