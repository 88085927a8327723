"""Environments that break one rule on purpose must be caught by the conformance suite, each by the rule it breaks."""

import functools

import pytest
from gymnasium.vector import VectorWrapper

from broken_envs import BROKEN, NamesAnotherMode
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.testing import conformance
from diffusion_gym.testing.conformance import RULES, check_vector_env


@pytest.fixture
def keywords(tiny_pipeline):
    return {"model": str(tiny_pipeline), "num_inference_steps": 3}


@pytest.mark.parametrize(("kind", "rule"), BROKEN)
def test_broken_env_is_caught_by_the_rule_that_it_breaks(kind, rule, keywords, monkeypatch):
    monkeypatch.setattr(conformance, "RULES", (rule,))
    with pytest.raises(AssertionError, match=f"^rule {rule.__name__}: .+"):
        check_vector_env(functools.partial(kind, **keywords))


def test_every_rule_can_be_broken():
    assert {parameters.values[1] for parameters in BROKEN} == set(RULES)


def test_message_names_the_rule_and_what_was_seen(keywords):
    with pytest.raises(AssertionError) as caught:
        check_vector_env(functools.partial(NamesAnotherMode, **keywords))
    message = str(caught.value)
    assert message.startswith("rule metadata_names_the_mode: ")
    assert "AutoresetMode.SAME_STEP" in message and "AutoresetMode.NEXT_STEP" in message


def test_an_env_that_raises_fails_the_rule(keywords):
    class Raises(DenoisingVectorEnv):
        def _observe(self):
            raise KeyError("lost")

    with pytest.raises(AssertionError, match=r"rule results_fit_the_spaces: raised KeyError\('lost'\)"):
        check_vector_env(functools.partial(Raises, **keywords))


def test_what_make_raises_passes_through(keywords):
    with pytest.raises(FileNotFoundError, match="no weights here"):
        check_vector_env(lambda **more: (_ for _ in ()).throw(FileNotFoundError("no weights here")))


def test_a_faithful_wrapper_conforms(keywords):
    check_vector_env(lambda **more: VectorWrapper(DenoisingVectorEnv(**keywords, **more)))
