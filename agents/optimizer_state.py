"""The state of an optimiser as named tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from diffusion_gym.devices import put


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors `"<parameter index>.<name>"`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, row in state.items() for name, value in row.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; learning rates and the like stay the optimiser's own.

    Raises:
        ValueError: a tensor is missing, is of no parameter, or has neither its shape nor that of a number; nothing has
            changed then.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise ValueError(f"the optimiser's {key!r} is of none of its {len(parameters)} parameters")
        if value.shape not in ((), parameters[int(index)].shape):
            wanted = tuple(parameters[int(index)].shape)
            raise ValueError(f"the optimiser's {key!r} has shape {tuple(value.shape)}, and its parameter has {wanted}")
        state.setdefault(int(index), {})[name] = _as_spread(value, parameters[int(index)])
    names = {name for row in state.values() for name in row}
    for number, row in state.items():
        if lacking := sorted(names.difference(row)):
            raise ValueError(f"the optimiser's '{number}.{lacking[0]}' is missing, which other parameters have")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _as_spread(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A state of a parameter that may be spread over processes, of which this one keeps its part then."""
    if not value.ndim or not hasattr(parameter, "to_local") or hasattr(value, "to_local"):
        return value
    spread = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    put(spread, value)
    return spread
