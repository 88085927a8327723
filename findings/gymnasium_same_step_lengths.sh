#!/usr/bin/env bash
# gymnasium 1.2.3: the vector wrapper RecordEpisodeStatistics, in the autoreset mode SAME_STEP, counts every episode
# but the first one step short: its counters are cleared at the step after an end, which is the next episode's first.
# Every episode here has 3 steps of reward 1. Right in 1.4.0 (3, 3, 3).
# Seen: gymnasium 1.2.3 lengths [3, 2, 2] returns [3.0, 2.0, 2.0]
# Here: gymnasium 1.4 is the lowest version that the package takes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q gymnasium==1.2.3 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import sys

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics


class ThreeSteps(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == 3, False, {}


envs = RecordEpisodeStatistics(SyncVectorEnv([ThreeSteps], autoreset_mode=AutoresetMode.SAME_STEP))
envs.reset(seed=0)
lengths, returns = [], []
for _ in range(9):
    *_, terminations, _, infos = envs.step(np.zeros(1, int))
    if terminations[0]:
        lengths.append(int(infos["episode"]["l"][0]))
        returns.append(float(infos["episode"]["r"][0]))
print("gymnasium", gym.__version__, "lengths", lengths, "returns", returns)
sys.exit(lengths == [3, 3, 3])
PYTHON
