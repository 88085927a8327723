#!/usr/bin/env bash
# torch 2.13.0 on the CPU: F.linear of a 3-D input that is not contiguous (a transposed or sliced one) rounds in another
# way when its weight has requires_grad=False than when it has True: ATen then calls bmm in place of copying the input
# and calling mm. So a frozen copy of a network and the network itself differ in the last bits, and the importance ratio
# of one to the other is not exactly 1. The grad mode (no_grad, inference_mode) changes nothing, nor is there a
# difference for contiguous inputs. How many shapes differ depends on the processor's kernels.
# Seen (AVX512, one thread): transposed 16 of 64 shapes, by up to 4.2e-05; sliced 2 of 64; contiguous 0 of 64
# Here: equality to the last bit is asked only of two runs of one computation; elsewhere tests have a tolerance.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import itertools
import sys

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)


class Products(TorchDispatchMode):
    """Keep the names of the matrix products called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in str(function):
            self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def inputs(batch, tokens, features):
    return {
        "transposed": torch.randn(batch, features, tokens).transpose(1, 2),
        "sliced": torch.randn(batch, tokens + 1, features)[:, 1:],
        "contiguous": torch.randn(batch, tokens, features),
    }


torch.manual_seed(0)
shapes = list(itertools.product((2, 4), (4, 64), (8, 16, 64, 320), (8, 16, 64, 320)))
errors, modes_agree, called = {}, True, {}
for batch, tokens, features, outputs in shapes:
    frozen = torch.randn(outputs, features)
    trained = frozen.clone().requires_grad_()
    for kind, x in inputs(batch, tokens, features).items():
        with Products() as first:
            expected = linear(x, trained).detach()
        with Products() as second:
            found = linear(x, frozen)
        called[kind] = first.names, second.names
        errors.setdefault(kind, []).append((found - expected).abs().max().item())
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                modes_agree &= torch.equal(linear(x, trained), expected)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability(), "grad modes agree:", modes_agree)
counts = {kind: sum(error > 0 for error in found) for kind, found in errors.items()}
for kind, found in errors.items():
    print(kind, f"{counts[kind]} of {len(shapes)} differ, by up to {max(found):.1e}, calls", *called[kind])
sys.exit(not (counts["transposed"] and counts["contiguous"] == 0))
PYTHON
