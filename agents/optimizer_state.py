"""The state of an optimiser as named tensors, and back; of torch's, and of bitsandbytes' with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from diffusion_gym.devices import put

_BLOCK: Final = 256  # values of a parameter that share a scale in 8 bits


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors `"<parameter index>.<name>"`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, row in state.items() for name, value in _flat(row).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; learning rates and the like stay the optimiser's own.

    Raises:
        ValueError: a tensor is missing, is of no parameter or of an optimiser of another kind, or has not its shape;
            nothing has changed then.
    """
    state: dict[int, dict[str, Any]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise ValueError(f"the optimiser's {key!r} is of none of its {len(parameters)} parameters")
        wanted = _shape(name, parameters[int(index)])
        if value.shape not in ((), wanted):
            raise ValueError(f"the optimiser's {key!r} has shape {tuple(value.shape)}, and its parameter has {wanted}")
        state.setdefault(int(index), {})[name] = _as_spread(value, parameters[int(index)])
    _check_names(state)
    if _of_bitsandbytes(optimizer) != any("state1" in row for row in state.values()) and state:
        raise ValueError(f"the optimiser's tensors are not those of {type(optimizer).__name__}; its kind has changed")
    if _of_bitsandbytes(optimizer):
        state = {number: {**row, "step": int(row["step"])} for number, row in state.items()}  # it counts in integers
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter, without the dictionary within it that bitsandbytes keeps from FSDP."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _shape(name: str, parameter: torch.Tensor) -> tuple[int, ...]:
    """That of a tensor of a parameter's state which is more than a number."""
    if name in ("qmap1", "qmap2"):
        return (2**8,)
    return (-(-parameter.numel() // _BLOCK),) if name in ("absmax1", "absmax2") else tuple(parameter.shape)


def _check_names(state: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse a parameter that lacks what others have; those in 8 bits, which small ones are not, have more."""
    for quantised in (False, True):
        rows = {number: row for number, row in state.items() if _quantised(row) == quantised}
        names = {name for row in rows.values() for name in row}
        names |= {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"} if quantised and rows else set()
        for number, row in rows.items():
            if lacking := sorted(names.difference(row)):
                raise ValueError(f"the optimiser's '{number}.{lacking[0]}' is missing, which other parameters have")


def _quantised(row: Mapping[str, Any]) -> bool:
    return any(value.dtype == torch.uint8 for value in row.values())


def _of_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "bitsandbytes"


def _as_spread(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A state of a parameter that may be spread over processes, of which this one keeps its part then."""
    if not value.ndim or not hasattr(parameter, "to_local") or hasattr(value, "to_local"):
        return value
    spread = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    put(spread, value)
    return spread
