"""Options that would do nothing, crash or hang: each kind is refused with the option, its value and the remedy."""

import os
import re

import pytest
import torch

from benchmark_suites import write_suite
from command_line import failure, train_arguments
from diffusion_gym.agents import DenoisingPolicy, cli, demo
from diffusion_gym.agents.benchmark.suites import Suite
from diffusion_gym.agents.rollout import collect_many
from diffusion_gym.agents.train_command import parse_train
from diffusion_gym.agents.training.threads import cores
from diffusion_gym.rewards import RewardError, RewardOutput, evaluate
from diffusion_gym.storage import parse_json

HUGE = 10**15


def told(text):
    """A message without the box that tyro draws around some."""
    return re.sub(r"[│\s]+", " ", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--pictures-every": -1}, "pictures_every=-1 must be at least 0"),
        ({"--seed": -1}, "seed=-1 must be at least 0"),
        ({"--seed": 2**64}, f"seed={2**64} must be at least 0 and less than 2**63"),
        ({"--threads": HUGE}, f"threads={HUGE} must be from 1 to the {cores()} cores of this machine"),
        ({"--threads": -1}, "threads=-1 must be from 1 to"),
        ({"--rollout-batch": HUGE, "--samples-per-iteration": HUGE}, f"num_envs={HUGE} would take at least"),
        ({"--development-every": 1, "--development-samples": 4 * HUGE}, f"development_samples={4 * HUGE} would take"),
        ({"--env.eta": 1e-30}, "eta=1e-30 is noise that float32 rounds away"),
        ({"--env.sigma-min": 1e-30}, "sigma_min=1e-30 is noise that float32 rounds away"),
        ({"--env.num-inference-steps": 1, "--env.sampler": "ddpm"}, "num_inference_steps=1 makes every denoising step"),
        ({"--agent.lora-rank": HUGE}, f"lora_rank={HUGE} is above 8, the largest rank of a layer here"),
        ({"--env.dtype": "float16", "--agent.mixed-precision": "bf16"}, "mixed_precision='bf16' does not go with"),
        ({"--env.dtype": "bfloat16", "--agent.mixed-precision": "fp16"}, "mixed_precision='fp16' does not go with"),
        ({"--env.device": "meta"}, "device='meta' is not available here"),
        ({"--env.device": "cuda:99"}, "device='cuda:99' is not available here"),
        ({"--env": "CartPole-v1"}, "env='CartPole-v1' is no denoising environment"),
    ],
)
def test_an_option_out_of_bounds_is_refused_before_anything_is_written(
    tiny_pipeline, tmp_path, capsys, change, message
):
    out = tmp_path / "run"
    arguments = train_arguments(tiny_pipeline, out, **{"--agent.trainable": "lora", **change})
    assert message in told(failure(arguments, capsys))
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"--agent.lora-alpha": 64, "--agent.trainable": "full"}, "--agent.trainable lora"),
        ({"--agent.lora-targets": "to_q", "--agent.trainable": "full"}, "--agent.trainable lora"),
        ({"--agent.warmup-fraction": 0.5}, "--agent.learning-rate-schedule warmup_cosine"),
        ({"--agent.window-stride": 3, "--agent.noise-window": "random"}, "--agent.noise-window sliding"),
        ({"--agent.lora-rank": 2, "--agent.trainable": "full"}, "--agent.trainable lora"),
        ({"--agent.divergence-bound": 3}, "--agent.trust-region divergence"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(tiny_pipeline, tmp_path, capsys, change, needed):
    line = told(failure(train_arguments(tiny_pipeline, tmp_path / "run", **change), capsys))
    name, value = next(iter(change.items()))
    option = name.removeprefix("--agent.").replace("-", "_")
    assert f"error: {option}=" in line and str(value) in line and f"give {needed} too, or leave {name} out" in line


def test_what_a_preset_gives_and_nothing_reads_is_no_mistake(tiny_pipeline, tmp_path):
    given = train_arguments(tiny_pipeline, tmp_path, **{"--preset": "flow_grpo", "--agent.trainable": "full"})
    assert parse_train(given[1:]).agent_options.lora_rank == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--resume"], "--resume goes on with the run in --out, which is missing"),
        (["train", "--resume", "--env", "DiffusionDenoise-Shapes-Color"], "give --out DIR"),
        (["demo", "--total-reward-queries", "0", "--out", "OUT"], "total_reward_queries=0 must be at least 1"),
        (["eval", "OUT", "--seed", "-1"], "seed=-1 must be at least 0"),
        (["eval", "OUT", "--samples", "0"], "samples=0 must be at least 1"),
        (["bench", "--suite", "smoke", "--out", "OUT", "--gpus", "nan"], "gpus=nan must be at least 0"),
        (["bench", "--suite", "smoke", "--out", "OUT", "--seeds", str(HUGE)], f"seeds={HUGE} must be at most"),
        (["bench", "--suite", "smoke", "--out", "OUT", "--threads", str(HUGE)], f"threads={HUGE} must be from 1 to"),
        (["train", "--env", "X", "--out", "OUT", "--preset", "thesis", "--env.eta", "1"], "preset='thesis' is unknown"),
    ],
)
def test_a_command_with_a_bad_option_ends_in_one_error(tmp_path, capsys, arguments, message):
    out = tmp_path / "run"
    assert message in told(failure([str(out) if part == "OUT" else part for part in arguments], capsys))
    assert not out.exists()


@pytest.mark.parametrize("value", ["no", "1", "null", '"false"'])
def test_a_switch_of_a_reward_is_true_or_false(tmp_path, capsys, value):
    arguments = ["train", "--env", "DiffusionDenoise-Shapes-Color", "--out", str(tmp_path / "run")]
    assert "must be True or False" in failure([*arguments, "--env.reward-kwargs", "strict", value], capsys)


def test_samples_whose_latents_memory_does_not_hold_are_refused_before_the_first_batch(make_env, monkeypatch):
    env = make_env()
    monkeypatch.setattr(env.unwrapped, "reset", None)
    with pytest.raises(ValueError, match=f"number={4 * HUGE} trajectories would take .*; lower samples_per_iteration"):
        collect_many(env, DenoisingPolicy.from_env(env), 4 * HUGE, (0, 0))


def test_the_least_noise_leaves_a_gradient(make_env):
    policy = DenoisingPolicy.from_env(make_env(eta=1e-6))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    state = policy.observation(torch.randn(4, *policy.model.latent_shape), 1, policy.model.tokenize(["a cat"] * 4))
    found = policy.distribution(state)
    found.log_prob(found.sample(generator)).sum().backward()
    assert all(part.grad.abs().max() > 0 for part in policy.trainable_parameters().values())


def test_a_refused_precision_changes_nothing(make_env):
    policy = DenoisingPolicy.from_env(make_env(dtype="float16"))
    with pytest.raises(ValueError, match="mixed_precision='bf16' does not go with weights of dtype='float16'"):
        policy.set_training(mixed_precision="bf16", cfg_training=False)
    assert policy.mixed_precision == "no" and policy.cfg_training
    policy.set_training(mixed_precision="fp16")


def test_a_rank_up_to_the_widest_layer_is_taken(make_env):
    env = make_env()
    most = 8  # of the tiny pipeline's attention
    assert DenoisingPolicy.from_env(env, lora_rank=most).lora_rank == most
    with pytest.raises(ValueError, match=f"lora_rank={most + 1} is above {most}"):
        DenoisingPolicy.from_env(env, lora_rank=most + 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"learning_rate": "1e-3\ntotal_reward_queries = 4"},
            "total_reward_queries=4 is not read in a benchmark; write",
        ),
        ({"learning_rate": "1e-3\ncheckpoint_every = 2"}, "overrides: checkpoint_every=2 is not read in a benchmark"),
        ({"cfg_training": "false\ndevelopment_every = 1"}, "agents.frozen_null: development_every=1 is not read"),
        ({"ceiling": "nan"}, "tasks.size.ceiling=nan: input should be a finite number"),
        ({"ceiling": "inf"}, "tasks.size.ceiling=inf: input should be a finite number"),
        ({"ceiling": "1.0\nprobe_kwargs = 3"}, "tasks.size.probe_kwargs=3: input should be an object"),
        ({"description": "[" * 100_000}, "is nested too deep to be read"),
    ],
)
def test_a_suite_with_a_value_that_nothing_reads_is_refused(tiny_pipeline, tmp_path, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Suite.load(str(write_suite(tmp_path, tiny_pipeline, **changed)))


@pytest.mark.parametrize("depth", [101, 100_000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")], ids=["list", "object"])
def test_json_nested_too_deep_is_refused(depth, brackets):
    opening, closing = brackets
    with pytest.raises(ValueError, match="nested more than 100 levels deep"):
        parse_json(opening * depth + "1" + closing * depth)
    assert parse_json(opening * 100 + "1" + closing * 100)


@pytest.mark.parametrize(
    "value", [10**400, [10**400, 1], [1j, 1], torch.tensor([1j, 1]).numpy(), torch.tensor([1j, 1])]
)
@pytest.mark.parametrize("part", ["scores", "info"])
def test_numbers_of_a_reward_that_no_float_holds_are_refused(value, part):
    output = RewardOutput(value) if part == "scores" else RewardOutput(torch.zeros(2), {"parts": value})
    with pytest.raises(RewardError, match="return one number an image"):
        evaluate(lambda images, prompts, metadata: output, torch.rand(2, 3, 8, 8), ["a", "b"])


@pytest.mark.parametrize("kind", [TypeError, KeyError, AttributeError, IndexError, RuntimeError])
def test_what_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch, kind):
    def broken(args):
        raise kind("inside")

    monkeypatch.setitem(cli._COMMANDS, "envs", broken)
    with pytest.raises(kind, match="inside") as caught:
        cli.main(["envs"])
    assert caught.traceback[-1].name == "broken"
    assert "this is a fault of diffusion-gym" in caught.value.__notes__[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="errors of POSIX")
def test_an_error_of_the_system_is_told_without_its_number(monkeypatch, capsys):
    monkeypatch.setitem(cli._COMMANDS, "envs", lambda args: open("/nowhere/at/all"))
    assert failure(["envs"], capsys) == "error: '/nowhere/at/all': No such file or directory\n"


def test_the_demo_takes_the_budget_that_it_is_given(monkeypatch, tmp_path):
    found = []

    class Stop(Exception):
        pass

    def train(settings):
        found.append(settings.total_reward_queries)
        raise Stop

    monkeypatch.setattr(demo.runs, "train", train)
    for asked in (5, None):
        with pytest.raises(Stop):
            demo.run_demo(demo.DemoOptions(out=tmp_path / "run", total_reward_queries=asked))
    assert found[0] == 5 and found[1] > 5


def test_skipping_equal_groups_needs_groups(tiny_pipeline, tmp_path, capsys):
    arguments = [*train_arguments(tiny_pipeline, tmp_path / "run"), "--agent.skip-equal-groups"]
    assert "skip_equal_groups=True is read with normalization=group alone" in told(failure(arguments, capsys))
