"""The model and the sampler that SB3 trains are the environment's, on construction and from a file."""

import shutil
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from stable_baselines3 import A2C, PPO

from diffusion_gym.agents.identity import fingerprint
from diffusion_gym.agents.sb3 import DDPOPPO, CFGUNetPolicy, SB3VecEnv, ddpo_is, ddpo_sf, policy_kwargs
from diffusion_gym.models import load_model
from diffusion_gym.storage import load_tensors, save_tensors

T = 3


@pytest.fixture(scope="module")
def with_variant(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline with a second set of weights, the variant `other`."""
    folder = tmp_path_factory.mktemp("variant") / "model"
    shutil.copytree(tiny_pipeline, folder)
    (weights,) = (folder / "unet").glob("*.safetensors")
    moved = {name: 0.9 * value for name, value in load_tensors(weights).items()}
    save_tensors(weights.with_name("diffusion_pytorch_model.other.safetensors"), moved, {"format": "pt"})
    return folder


CREATED = {
    "ddpo_is": (ddpo_is, PPO),
    "ddpo_sf": (ddpo_sf, A2C),
    "DDPOPPO": (lambda env: DDPOPPO("CFGUNetPolicy", env), DDPOPPO),
    "PPO": (lambda env: PPO("CFGUNetPolicy", SB3VecEnv(env), n_steps=T, gamma=1.0, gae_lambda=1.0), PPO),
}
OTHERS = [
    ({"guidance_scale": 2.0}, r"guidance_scale=2.0 of the environment is 5.0 in"),
    ({"eta": 0.5}, r"eta=0.5 of the environment is 1.0 in"),
    ({"sampler": "ddpm"}, r"sampler='ddpm' of the environment is 'ddim' in"),
    ({"log_prob_reduction": "sum"}, r"log_prob_reduction='sum' of the environment is 'mean' in"),
    ({"num_inference_steps": 2}, r"num_inference_steps=2 of the environment is 3 in"),
    ({"model_kwargs": {"variant": "other"}}, r"model_kwargs=\{'variant': 'other'\}.* another model"),
]


def load(algorithm, path, env):
    return algorithm.load(path, env=env if algorithm is DDPOPPO else SB3VecEnv(env))


@pytest.mark.parametrize("name", CREATED)
def test_the_environments_model_kwargs_are_the_policys(make_env, with_variant, tmp_path, observed, perturb, name):
    make, algorithm = CREATED[name]
    options = {"model": str(with_variant), "model_kwargs": {"variant": "other"}, "num_inference_steps": T}
    env = make_env(2, **options)
    model = make(env)
    assert model.policy.actor.model is env.unwrapped.model
    perturb(model.policy.actor)
    model.save(tmp_path / "saved.zip")
    model.policy.save(tmp_path / "policy.safetensors")
    states = observed(env)
    for policy in (
        load(algorithm, tmp_path / "saved.zip", make_env(2, **options)).policy,
        CFGUNetPolicy.load(tmp_path / "policy.safetensors", device="cpu"),
    ):
        assert policy.actor.model is env.unwrapped.model
        np.testing.assert_array_equal(*(p.predict(states, deterministic=True)[0] for p in (model.policy, policy)))


@pytest.mark.parametrize(
    "name, other, message", [*(("DDPOPPO", *other) for other in OTHERS), *((name, *OTHERS[-1]) for name in CREATED)]
)
def test_a_file_is_not_loaded_for_another_model_or_sampler(make_env, with_variant, tmp_path, name, other, message):
    make, algorithm = CREATED[name]
    options = {"model": str(with_variant), "num_inference_steps": T}
    make(make_env(2, **options)).save(tmp_path / "saved.zip")
    with pytest.raises(ValueError, match=f"{message}.*; make the environment as the policy's was, or train"):
        load(algorithm, tmp_path / "saved.zip", make_env(2, **{**options, **other}))


@pytest.mark.parametrize("other, message", OTHERS)
def test_policy_kwargs_and_set_env_of_another_environment_are_refused(make_env, with_variant, other, message):
    options = {"model": str(with_variant), "num_inference_steps": T}
    env, different = make_env(2, **options), SB3VecEnv(make_env(2, **{**options, **other}))
    with pytest.raises(ValueError, match=message):
        PPO("CFGUNetPolicy", different, policy_kwargs=policy_kwargs(env), gamma=1.0, gae_lambda=1.0)
    model = ddpo_is(env)
    before = model.env
    with pytest.raises(ValueError, match=message):
        model.set_env(different)
    assert model.env is before
    model.set_env(SB3VecEnv(make_env(2, **options)))


def test_a_model_that_has_changed_since_is_named(make_env, with_variant, tmp_path):
    env = make_env(2, model=str(with_variant), num_inference_steps=T)
    ddpo_is(env).policy.save(tmp_path / "policy.safetensors")
    changed = load_model(str(with_variant), "cpu", "float32", {"variant": "other"})
    with pytest.raises(ValueError, match=r"has fingerprint \w+ now, \w+ in policy_kwargs: the folder or revision has"):
        CFGUNetPolicy.load(tmp_path / "policy.safetensors", device="cpu", model=changed)
    moved = tmp_path / "moved"
    shutil.copytree(with_variant, moved)  # the same weights under another name
    model = DDPOPPO("CFGUNetPolicy", env)
    model.save(tmp_path / "run.zip")
    DDPOPPO.load(tmp_path / "run.zip", make_env(2, model=str(moved), num_inference_steps=T))


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_the_fingerprint_is_of_encoders_and_autoencoder_too(make_env, tiny_pipeline, tmp_path, part):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    save_tensors(file, {name: 0.9 * value for name, value in load_tensors(file).items()}, {"format": "pt"})
    config = make_env(2).unwrapped.sampler_config
    found = [fingerprint(load_model(str(each), "cpu", "float32"), config) for each in (tiny_pipeline, folder)]
    assert found[0] != found[1]


def test_the_fingerprint_is_of_weights_and_schedule(make_env, with_variant, exact_end_pipeline, perturb):
    env = make_env(2, model=str(with_variant), num_inference_steps=T)
    model, config = env.unwrapped.model, env.unwrapped.sampler_config
    found = fingerprint(model, config)
    for trainable in ("lora", "full"):  # training leaves the model as it was
        perturb(ddpo_is(env, policy_kwargs={"trainable": trainable}).policy.actor)
    assert fingerprint(model, config) == found
    others = [
        load_model(str(with_variant), "cpu", "float32", {"variant": "other"}),
        load_model(str(with_variant), "cpu", "bfloat16"),
        load_model(str(exact_end_pipeline), "cpu", "float32"),  # another last step
    ]
    assert len({found, *(fingerprint(other, config) for other in others)}) == 4


# --- SB3's own conventions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("kind", ["vector", "single"])
def test_the_policy_finds_its_model(make_env, make_single, tmp_path, observed, perturb, algorithm, kind):
    """Without `policy_kwargs`; with some of its options; and from the file that SB3 writes."""
    env = SB3VecEnv(make_env(2, num_inference_steps=T)) if kind == "vector" else make_single()
    discounts = {"gamma": 1.0, "gae_lambda": 1.0}
    model = algorithm("CFGUNetPolicy", env, n_steps=2 * T, policy_kwargs={"lora_rank": 2}, **discounts)
    inner = env.vector if kind == "vector" else env.unwrapped.vector
    assert model.policy.actor.model is inner.model and model.policy.actor.config == inner.sampler_config
    assert model.policy.actor.lora_rank == 2
    model.learn(2 * T)
    model.save(tmp_path / "saved.zip")
    states = observed(make_env(2, num_inference_steps=T))
    loaded = algorithm.load(tmp_path / "saved.zip")
    np.testing.assert_array_equal(*(m.predict(states, deterministic=True)[0] for m in (model, loaded)))


@pytest.mark.parametrize(
    "algorithm, options, share",
    [(PPO, {}, "0.88"), (A2C, {}, "0.98"), (A2C, {"gamma": 1.0, "gae_lambda": 0.5}, "0.25")],
)
def test_discounts_that_are_not_ddpos_are_warned_of(make_env, algorithm, options, share):
    env = SB3VecEnv(make_env(2, num_inference_steps=T))
    with pytest.warns(UserWarning, match=rf"gamma=.*the first of T=3 steps gets {share} of the picture's reward; DDPO"):
        algorithm("CFGUNetPolicy", env, n_steps=T, **options)


def test_the_discounts_of_ddpo_and_of_a_value_network_are_not(make_env):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gamma=")
        for make, _ in CREATED.values():
            make(make_env(2, num_inference_steps=T))
        ddpo_is(make_env(2), gae_lambda=0.9, vf_coef=0.5, policy_kwargs={"value_network": True})


def test_a_policy_without_the_unet_says_so(make_env, make_single):
    for env in (SB3VecEnv(make_env(2)), make_single()):
        with pytest.warns(UserWarning, match="policy='MultiInputActorCriticPolicy' is a network of its own"):
            PPO("MultiInputPolicy", env, n_steps=4, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        A2C("MlpPolicy", gym.make("Pendulum-v1"))  # other environments are SB3's business


def test_a_seeded_run_goes_on_with_new_random_numbers(make_env, tmp_path, ddpo):
    """Not with those of its beginning; the same ones at every load; and before its beginning with the seed's own."""

    def noise(model):
        state = torch.randn(3), np.random.rand(3), model.env.reset()["latents"]
        return np.concatenate([np.asarray(part).ravel() for part in state])

    def loaded(**changes):
        return noise(DDPOPPO.load(tmp_path / "run.zip", make_env(2, num_inference_steps=T), **changes))

    model = ddpo(make_env(2, num_inference_steps=T), seed=5)
    model.save(tmp_path / "run.zip")
    first = noise(model)
    np.testing.assert_array_equal(loaded(), first)
    model.learn(2 * T)
    model.save(tmp_path / "run.zip")
    again = loaded()
    assert not np.isin(again, first).any()
    np.testing.assert_array_equal(loaded(), again)
    np.testing.assert_array_equal(loaded(seed=5), first)  # asked for
