"""What is saved, and what of it is pickled."""

import base64
import json
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from stable_baselines3 import A2C, PPO

from diffusion_gym.agents.sb3 import (
    DDPOPPO,
    CFGUNetPolicy,
    SB3VecEnv,
    ddpo_is,
    ddpo_sf,
)
from diffusion_gym.models import load_model

T = 3


def serialized(data):
    """What SB3 has pickled of the attributes in its zip: base64 text by attribute, at any depth."""
    found = {}
    for key, value in data.items():
        if isinstance(value, dict):
            found |= {key: value[":serialized:"]} if ":serialized:" in value else serialized(value)
    return found


def require_no_pickle(content):
    """A safetensors file to its last byte: a JSON header, and numbers."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    assert not serialized({"arguments": json.loads(metadata.get("arguments", "{}"))})
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert [0, *(end for _, end in ends)] == [*(start for start, _ in ends), len(content) - 8 - size]


def refuse_torchs_files(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch's own files are pickles")

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)


def test_sb3s_save_holds_no_model(make_env, tmp_path, perturb):
    """What SB3 pickles of its own algorithms: small things; the weights in the file are those that train."""
    env = make_env(2, num_inference_steps=T)
    model = ddpo_is(env)
    model.learn(2 * T)
    perturb(model.policy.actor)
    model.save(tmp_path / "ppo")
    with zipfile.ZipFile(tmp_path / "ppo.zip") as archive:
        data = json.loads(archive.read("data"))
        weights = torch.load(archive.open("policy.pth"), weights_only=True)
    pickled = serialized(data)
    assert set(pickled) == {
        *("policy_class", "observation_space", "action_space", "lr_schedule", "clip_range", "rollout_buffer_class"),
        *("_last_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer"),
    }
    assert data["policy_kwargs"]["model"] == env.unwrapped.model.name  # as text
    for key, text in pickled.items():
        raw = base64.b64decode(text)  # classes are in it by the names of their modules
        assert not any(name in raw for name in (b"diffusers", b"peft", b"torch")), key
        assert len(raw) < 10_000, key
    assert weights.keys() == {f"actor.unet.{name}" for name in model.policy.actor.trainable_parameters()}


@pytest.mark.parametrize("algorithm, part", [(PPO, None), (PPO, (0.0, 0.5)), (A2C, None)])
def test_sb3s_load_gives_equal_predictions(make_env, tmp_path, perturb, algorithm, part, observed):
    env = make_env(2, num_inference_steps=T)
    options = {"vf_coef": 0.5, "trained_steps": part, "policy_kwargs": {"trainable": "full", "value_network": True}}
    model = {PPO: ddpo_is, A2C: ddpo_sf}[algorithm](env, **options)
    perturb(model.policy.actor)
    model.learn(2 * T)
    model.save(tmp_path / "saved.zip")
    states = observed(env)
    for loaded in (algorithm.load(tmp_path / "saved.zip"), algorithm.load(tmp_path / "saved.zip", env=SB3VecEnv(env))):
        np.testing.assert_array_equal(*(m.predict(states, deterministic=True)[0] for m in (model, loaded)))
        assert torch.equal(model.policy.predict_values(states), loaded.policy.predict_values(states))
        assert loaded.policy.actor.config == model.policy.actor.config
    loaded.learn(2 * T)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_policy_file(make_env, tmp_path, perturb, monkeypatch, trainable, observed):
    env = make_env(2, num_inference_steps=T)
    policy = ddpo_is(env, policy_kwargs={"trainable": trainable}).policy
    perturb(policy.actor)
    policy.save(tmp_path / "policy.safetensors")
    require_no_pickle((tmp_path / "policy.safetensors").read_bytes())
    refuse_torchs_files(monkeypatch)
    loaded = CFGUNetPolicy.load(tmp_path / "policy.safetensors", device="cpu")
    states = observed(env)
    np.testing.assert_array_equal(*(p.predict(states, deterministic=True)[0] for p in (policy, loaded)))
    other = ddpo_is(env, policy_kwargs={"trainable": "full" if trainable == "lora" else "lora"}).policy
    with pytest.raises(RuntimeError, match="the weights are those of another policy"):
        other.load_state_dict(loaded.state_dict())
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "policy.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        CFGUNetPolicy.load(tmp_path / "broken.safetensors")


def test_ddpoppo_file_goes_on(make_env, tmp_path, monkeypatch, observed, ddpo):
    """A run that was saved, loaded and continued is the run that went on."""

    def start():
        return ddpo(make_env(4, num_inference_steps=T), kl_weight=0.1, learning_rate=1e-2, statistics_min_count=2)

    def go_on(model):
        model.env.seed(9)
        torch.manual_seed(9)
        np.random.seed(9)
        model._last_obs = None
        return model.learn(4 * T, reset_num_timesteps=False).policy.state_dict()

    whole = start()
    whole.learn(4 * T)
    first = {name: value.clone() for name, value in whole.policy.state_dict().items()}
    expected = go_on(whole)
    assert any(not torch.equal(first[name], expected[name]) for name in first)
    part = start()
    part.learn(4 * T)
    refuse_torchs_files(monkeypatch)
    part.save(tmp_path / "run")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        assert set(archive.namelist()) == {"diffusion_gym.json", "tensors.safetensors"}
        assert not serialized(json.loads(archive.read("diffusion_gym.json")))
        require_no_pickle(archive.read("tensors.safetensors"))
    loaded = DDPOPPO.load(tmp_path / "run", make_env(4, num_inference_steps=T))
    assert loaded.num_timesteps == 4 * T and loaded.config.kl_weight == 0.1 and loaded._n_updates == 1
    assert loaded.statistics.state() == part.statistics.state()
    states = observed(make_env(2, num_inference_steps=T))
    np.testing.assert_array_equal(*(m.predict(states, deterministic=True)[0] for m in (part, loaded)))
    for name, value in go_on(loaded).items():
        assert torch.equal(value, expected[name]), name
    fresh = start()
    fresh.set_parameters(tmp_path / "run.zip")
    assert all(torch.equal(value, first[name]) for name, value in fresh.policy.state_dict().items())


def test_ddpoppo_files_that_do_not_fit(make_env, tmp_path, exact_end_pipeline, ddpo):
    model = ddpo(make_env(2, num_inference_steps=T), learning_rate=lambda left: 1e-3 * left)
    with pytest.raises(ValueError, match="DDPOPPO pickles nothing; give a number"):
        model.save(tmp_path / "run")
    with pytest.raises(ValueError, match="include=\\['env'\\]: DDPOPPO saves no other"):
        model.save(tmp_path / "run", include=["env"])
    ddpo(make_env(2, num_inference_steps=T)).save(tmp_path / "run.zip")
    with pytest.raises(ValueError, match="env=None: DDPOPPO.load needs the environment"):
        DDPOPPO.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"model=.*exact-end.* of the environment is model=.*tiny.* in path="):
        DDPOPPO.load(tmp_path / "run", make_env(2, num_inference_steps=T, model=str(exact_end_pipeline)))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "run.zip").read_bytes()[:300])
    with pytest.raises(ValueError, match="truncated or no file that this package saved"):
        DDPOPPO.load(tmp_path / "cut.zip", make_env(2, num_inference_steps=T))


def test_a_model_object_is_never_pickled(make_env, tiny_pipeline, tmp_path, observed):
    env = make_env(2, num_inference_steps=T, model=load_model(str(tiny_pipeline), "cpu", "float32"))
    model = ddpo_is(env)
    assert model.policy.actor.model is env.unwrapped.model
    with pytest.raises(TypeError, match="given as an object, which is not pickled"):
        model.save(tmp_path / "ppo")
    model.policy.save(tmp_path / "policy.safetensors")
    with pytest.raises(ValueError, match="saved with a model object; pass it"):
        CFGUNetPolicy.load(tmp_path / "policy.safetensors", device="cpu")
    loaded = CFGUNetPolicy.load(tmp_path / "policy.safetensors", device="cpu", model=env.unwrapped.model)
    states = observed(env)
    np.testing.assert_array_equal(*(p.predict(states, deterministic=True)[0] for p in (model.policy, loaded)))


@pytest.mark.gpu
def test_devices(make_env, tmp_path, observed, ddpo):
    """On a GPU the whole of DDPOPPO runs there; a policy moves by loading its model, and leaves the other in place."""
    env = make_env(2, num_inference_steps=T, device="cuda")
    model = ddpo(env, kl_weight=0.1, learning_rate=1e-2)
    model.learn(2 * 2 * T)
    assert model.rollout_buffer.latents.device.type == "cuda"
    model.save(tmp_path / "run.zip")
    moved = DDPOPPO.load(tmp_path / "run.zip", make_env(2, num_inference_steps=T))
    assert moved.policy.device.type == "cpu" and model.policy.device.type == "cuda"
    states = observed(make_env(2, num_inference_steps=T))
    ours, theirs = (m.predict(states, deterministic=True)[0] for m in (model, moved))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    crossed = ddpo_is(make_env(2, num_inference_steps=T), device="cuda")  # environment on the CPU, policy on the GPU
    assert crossed.policy.device.type == "cuda" and crossed.env.vector.model.unet.device.type == "cpu"
    crossed.learn(2 * T)
