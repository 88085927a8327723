"""A policy's network spread over the processes: PyTorch's FSDP2, `fully_shard`, for networks that one card cannot hold.

Each process holds its part of every weight, and gathers the weights of a block for as long as it computes with them. So
all processes run the network at the same time, each on its own states. Of adapters, which are small, every process has
all; what they were added to, or all weights where all train, is spread.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Literal
from weakref import ref

import torch
from torch import nn

from diffusion_gym.agents.finite import require_choice
from diffusion_gym.agents.optimization import OptimizerOptions
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.policy_options import PolicyOptions, ShardedNetwork
from diffusion_gym.agents.processes import Processes
from diffusion_gym.devices import whole
from diffusion_gym.models.digest import remember_weights

Sharding = Literal["none", "fsdp2"]


@dataclass(frozen=True)
class ShardingOptions(OptimizerOptions, PolicyOptions):
    """Whether the network is spread, and what does not go with it."""

    sharding: Sharding = "none"
    """Spread the network over the processes with `fsdp2`, where one card cannot hold it; see docs/scale-out.md. It
    needs a micro_batch_size; of one process alone it changes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "sharding", Sharding)
        if self.sharding != "none" and not self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size=0 does not go with sharding={self.sharding!r}: the processes run the network in "
                "step, so that none can try on its own what fits; give a micro_batch_size, such as 1"
            )
        if self.sharding != "none" and self.trainable == "full" and self.mixed_precision == "fp16":
            raise ValueError(
                f"mixed_precision='fp16' does not go with trainable='full' and sharding={self.sharding!r}: no process "
                "has the whole gradient, in which overflow is looked for; use 'bf16', or LoRA"
            )


def shard(policy: DenoisingPolicy, processes: Processes) -> None:
    """Spread a policy's network, and the pretrained one, over the processes; all of them call it.

    The network of the policy's model is no longer there for others: it is a part of the policy's.

    Args:
        policy: whose weights are the same in all processes.
        processes: several, each of which gets a part.

    Raises:
        ValueError: this version of PyTorch cannot leave adapters whole; weights of several types would train.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ValueError(f"sharding='fsdp2' needs torch 2.7 or a later one, and this is {torch.__version__}; update it")
    model, network = policy.model, policy.unet
    remember_weights(model)
    empty = {id(value): _without_numbers(value) for value in (*network.parameters(), *network.buffers())}
    skeleton = copy.deepcopy(network, empty)
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    adapters = set(policy.trainable_parameters().values()) if policy.trainable == "lora" else set()

    def spread(part: nn.Module) -> None:
        for parameter in part.parameters():
            parameter.data = parameter.data.contiguous()  # convolutions have another layout on a CPU
        blocks = [block for group in part.children() if isinstance(group, nn.ModuleList) for block in group]
        for module in (*blocks, part):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)

    for parameter in adapters:
        parameter.data = parameter.data.to(processes.device)
    spread(network)
    if policy.trainable == "lora":
        from diffusion_gym.models.lora import WithoutAdapters

        model.unet.to("meta")  # its weights are the network's
        reference: nn.Module = WithoutAdapters(network)
    else:
        spread(model.unet)
        reference = model.unet
    policy.sharded = ShardedNetwork(reference, skeleton)
    model.unet.sharded_by = ref(policy)  # type: ignore[assignment]  # neither a parameter nor a module


def gathered_network(policy: DenoisingPolicy, processes: Processes) -> nn.Module | None:
    """A policy's network with whole weights on the host of the main process, None in the others; all call it.

    That of a policy that is not spread is the policy's own.
    """
    if policy.sharded is None:
        return policy.unet
    network = copy.deepcopy(policy.sharded.skeleton)
    weights = gathered(policy.unet.state_dict(), processes)
    if not processes.main:
        return None
    network.load_state_dict(weights, assign=True)
    for name, buffer in policy.unet.named_buffers():  # those that no state has too
        place, _, own = name.rpartition(".")
        setattr(network.get_submodule(place), own, buffer.cpu())
    return network.requires_grad_(False)


def gathered(tensors: dict[str, torch.Tensor], processes: Processes) -> dict[str, torch.Tensor]:
    """Tensors as whole ones on the host of the main process, one after another; none in the others, which call it too.

    Args:
        tensors: by name, the same names in the same order in all processes.
        processes: the processes.
    """
    found = {}
    for name, value in tensors.items():
        value = whole(value.detach())
        if processes.main:
            found[name] = value.contiguous().cpu()
    return found


def _without_numbers(value: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
