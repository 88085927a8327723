"""Options that are refused, and Tianshou that is not installed."""

import importlib
import sys

import pytest

pytest.importorskip("tianshou")

from diffusion_gym.agents.optimization import OptimizerOptions
from diffusion_gym.agents.tianshou import (
    AdamWFactory,
    GuidedPolicy,
    TrajectoryCollector,
    ddpo_is,
    ddpo_sf,
)


def test_wrong_options(make):
    env = make(2)
    with pytest.raises(ValueError, match="eta=0"):
        ddpo_sf(make(2, eta=0.0))
    with pytest.raises(ValueError, match="mixed_precision='fp16'.*loss scaling"):
        GuidedPolicy.from_env(env, mixed_precision="fp16")
    with pytest.raises(ValueError, match="micro_batch_size=-1"):
        GuidedPolicy.from_env(env, micro_batch_size=-1)
    with pytest.raises(ValueError, match="value_network=True is not trained"):
        ddpo_is(env, value_network=True)
    with pytest.raises(ValueError, match="recompute_advantage=True"):
        ddpo_is(env, recompute_advantage=True)
    for build in (ddpo_sf, ddpo_is):
        with pytest.raises(ValueError, match="normalization='running'"):
            build(env, normalization="running")
        with pytest.raises(ValueError, match="advantage_clip=0"):
            build(env, advantage_clip=0)
        with pytest.raises(ValueError, match="learning_rate=-1"):
            build(env, learning_rate=-1)
        with pytest.raises(ValueError, match="optimizer='adamw8bit' needs device='cuda'"):  # not AdamW in its place
            build(env, optim=AdamWFactory(OptimizerOptions(optimizer="adamw8bit")))
    algorithm = ddpo_sf(env)
    with pytest.raises(ValueError, match="episodes=0"):
        TrajectoryCollector(algorithm, env, 0)
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 of the environment is 5.0 in the policy"):
        TrajectoryCollector(algorithm, make(2, guidance_scale=2.0), 2)
    with pytest.raises(ValueError, match="autoreset_mode"):
        TrajectoryCollector(algorithm, make(2, autoreset_mode="SameStep"), 2)


def test_tianshou_that_is_not_installed(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffusion_gym.agents.tianshou")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tianshou", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion-denoise-gym\[tianshou\]'"):
        importlib.import_module("diffusion_gym.agents.tianshou")
