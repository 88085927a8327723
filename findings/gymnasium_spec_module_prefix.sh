#!/usr/bin/env bash
# gymnasium 1.4.0: an id with its module, "package:Id-v0", which gym.make takes so that nobody has to import for the sake
# of registering, is no id for gym.spec: NameNotFound, also after gym.make has made the environment. The spec of what was
# made has the id without the module, and its JSON makes it again in a new process by way of the entry point.
# Seen: gym.make made Line-v0; gym.spec raised NameNotFound; the spec's id was Line-v0
# Here: examples that look a spec up import the package first and name the id alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q gymnasium==1.4.0
cd "$work"
cat > lines.py <<'PYTHON'
import gymnasium as gym


class Line(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


gym.register("Line-v0", "lines:Line")
PYTHON
"$work/venv/bin/python" - <<'PYTHON'
import subprocess
import sys

import gymnasium as gym

env = gym.make("lines:Line-v0")
try:
    found = gym.spec("lines:Line-v0").id
except gym.error.NameNotFound as error:
    found = type(error).__name__
text = env.spec.to_json()
CODE = "import sys, gymnasium as gym; gym.make(gym.envs.registration.EnvSpec.from_json(sys.argv[1]))"
again = subprocess.run([sys.executable, "-c", CODE, text], capture_output=True, text=True)
print("made:", env.spec.id, "| gym.spec:", found, "| from its JSON elsewhere:", (again.stderr.splitlines() or ["made"])[-1])
if (found, env.spec.id, again.returncode) != ("NameNotFound", "Line-v0", 0):
    sys.exit("gymnasium behaves otherwise now")
PYTHON
