#!/usr/bin/env bash
# stable-baselines3 2.9.2: PPO.load of a model made with a seed seeds Python, NumPy, PyTorch and the environment with
# that seed again, so training that goes on after a load draws the random numbers of the first run a second time: the
# same exploration noise, the same resets. The same model trained on without saving goes on with new ones. Without an
# environment, too, a load sets the process's generators. load(..., seed=other) or set_random_seed(other) avoids it.
# Seen: the noise and resets after the load equal the first run's, those of the model that went on differ
# Here: `DDPOPPO.load` seeds anew, from the seed and the steps taken.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 stable-baselines3==2.9.2 gymnasium==1.4.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback


class OneStep(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, True, False, {}


class Recorder(BaseCallback):
    def _init_callback(self):
        self.noise, self.resets = [], []

    def _on_step(self):
        policy = self.model.policy.get_distribution(self.locals["obs_tensor"]).distribution
        noise = (torch.as_tensor(self.locals["actions"]) - policy.mean) / policy.stddev
        self.noise.append(noise.item())
        self.resets.append(self.locals["obs_tensor"].item())
        return True


def train(model, *, first=False):
    recorder = Recorder()
    model.learn(8, callback=recorder, reset_num_timesteps=first)
    print(np.round(recorder.noise[:3], 4), np.round(recorder.resets[:3], 4), model.num_timesteps, "steps")
    return np.array([recorder.noise, recorder.resets])


print("stable-baselines3", stable_baselines3.__version__, "noise, resets")
model = PPO("MlpPolicy", OneStep(), seed=0, n_steps=8, batch_size=8, n_epochs=1, device="cpu")
first = train(model, first=True)
model.save("model")
went_on = train(model)
loaded = train(PPO.load("model", env=OneStep(), device="cpu"))
reseeded = train(PPO.load("model", env=OneStep(), device="cpu", seed=1))
repeats = np.allclose(loaded, first, atol=1e-4)
others = [bool(np.isclose(run, first, atol=1e-4).any()) for run in (went_on, reseeded)]
torch.manual_seed(123)
before = torch.get_rng_state()
PPO.load("model", device="cpu")
seeds = not torch.equal(before, torch.get_rng_state())
print("repeats after load:", repeats, "otherwise:", others, "load sets torch's generator:", seeds)
sys.exit(not (repeats and not any(others) and seeds))
PYTHON
