"""Where Python looks at the value of a tensor: on a GPU each such place waits for all the work that was queued."""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

_ROOT = Path(__file__).resolve().parents[2]
_READS = {"cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "masked_select"}


class HostReads(TorchFunctionMode):
    """Within this context `places` collects the functions of this project that look at a value."""

    def __init__(self):
        super().__init__()
        self.places = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        masked = name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool
        if name in _READS or masked:
            self.places |= self._place()
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _place():
        frame = sys._getframe(2)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if "optim" in path.parts:  # AdamW's count of its steps, which lives on the host
                return set()
            if path.is_relative_to(_ROOT) and ".venv" not in path.parts:
                return {f"{path.stem}.{frame.f_code.co_qualname.split('.<locals>')[0].rpartition('.')[2]}"}
            frame = frame.f_back
        return {"elsewhere"}
