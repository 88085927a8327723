#!/usr/bin/env bash
# torch 2.13.0: Optimizer.load_state_dict checks how many parameters there are and nothing of their state. A state that
# lacks a parameter's moments is taken without a word: that parameter goes on with fresh ones, step 1 beside the others'
# step 4. Moments of another shape are taken too, and fail in the next step with a message about broadcasting that names
# neither the parameter nor the file.
# Seen: loaded a state without one of two parameters, steps then 4 and 1; loaded moments (2,) for a weight (3, 4)
# Here: checkpoints carry a checksum of their tensors; moments that are misshapen or incomplete are refused by name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch


def trained(steps, optimizer, weights):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(weight.square().sum() for weight in weights).backward()
        optimizer.step()


def made():
    weights = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(2))]
    return weights, torch.optim.AdamW(weights, lr=1e-2)


weights, optimizer = made()
trained(3, optimizer, weights)
stored = optimizer.state_dict()

weights, optimizer = made()
optimizer.load_state_dict({**stored, "state": {0: stored["state"][0]}})
trained(1, optimizer, weights)
steps = [int(optimizer.state[weight]["step"]) for weight in weights]

weights, optimizer = made()
moments = {name: value[0, :2] if value.ndim else value for name, value in stored["state"][0].items()}
optimizer.load_state_dict({**stored, "state": {**stored["state"], 0: moments}})
shape = tuple(optimizer.state[weights[0]]["exp_avg"].shape)
print("steps after one more:", steps, "moments of the (3, 4) weight:", shape)
try:
    trained(1, optimizer, weights)
    raised = None
except RuntimeError as error:
    raised = str(error)
print("the next step:", raised)
if steps != [4, 1] or shape != (2,) or raised is None:
    sys.exit("torch behaves otherwise now")
PYTHON
