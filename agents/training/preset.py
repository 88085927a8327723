"""What a preset is, and the values that many of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """Values that stand in for the defaults of a training run.

    Keys are fields of `RunSettings`, of `EnvOptions` or of an agent's config; `settings.check_preset` refuses others.

    Attributes:
        source: where the values come from, down to the table.
        values: what every agent gets; options that it does not have, but another agent has, are left out.
        agents: by agent, what it alone gets, in place of the common values where both name an option.
        choices: what the source leaves open, and what stands here for it.
    """

    source: str
    values: Values
    agents: Mapping[str, Values] = field(default_factory=dict)
    choices: str = ""

    def of(self, agent: str) -> dict[str, Any]:
        """The values for an agent; the common ones alone for an agent that the preset does not name."""
        return {**self.values, **self.agents.get(agent, {})}


# AdamW and gradient clipping, the same in the DDPO paper, in the replication and in the thesis.
OPTIMIZER: Final[Values] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
}
