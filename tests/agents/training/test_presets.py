"""The presets: every one valid for every agent, and equal to the tables of its source."""

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS, agent_class
from diffusion_gym.agents.cli import main, parse_train
from diffusion_gym.agents.optimization import learning_rate_at
from diffusion_gym.agents.presets_table import presets_json, presets_text
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.presets import PRESETS, Preset
from diffusion_gym.agents.training.settings import RunSettings, check_preset, starting_point
from diffusion_gym.config import SamplerConfig

ENV = "DiffusionDenoise-SD14-Aesthetic"

# The DDPO paper, table of F.6; a row is IS, SF, RWR, sparse RWR.
F6 = {
    "num_inference_steps": (50, 50, 50, 50),
    "guidance_scale": (5.0, 5.0, 5.0, 5.0),
    "learning_rate": (1e-5, 1e-5, 1e-5, 1e-5),
    "weight_decay": (1e-4, 1e-4, 1e-4, 1e-4),
    "adam_beta1": (0.9, 0.9, 0.9, 0.9),
    "adam_beta2": (0.999, 0.999, 0.999, 0.999),
    "adam_epsilon": (1e-8, 1e-8, 1e-8, 1e-8),
    "max_grad_norm": (1.0, 1.0, 1.0, 1.0),
    "inverse_temperature": (None, None, 0.2, None),
    "percentile": (None, None, None, 0.9),
    "batch_size": (64, 256, 128, 128),
    "samples_per_iteration": (256, 256, 10_000, 10_000),
    "clip_range": (1e-4, None, None, None),
    # not in the table: "ancestral" as DDIM spells it, F (the UNet's weights), F.5 (50k samples), F.3
    "sampler": ("ddim",) * 4,
    "eta": (1.0,) * 4,
    "trainable": ("full",) * 4,
    "total_reward_queries": (50_000,) * 4,
    "normalization": ("prompt", "prompt", None, None),
}

# The replication, table 1; a row is IS, SF, ISKL.
TABLE_1 = {
    "num_inference_steps": (50, 50, 50),
    "guidance_scale": (5.0, 5.0, 5.0),
    "learning_rate": (3e-4, 3e-4, 3e-4),
    "weight_decay": (1e-4, 1e-4, 1e-4),
    "adam_beta1": (0.9, 0.9, 0.9),
    "adam_beta2": (0.999, 0.999, 0.999),
    "adam_epsilon": (1e-8, 1e-8, 1e-8),
    "max_grad_norm": (1.0, 1.0, 1.0),
    "batch_size": (16, 16, 16),
    "samples_per_iteration": (8, 16, 8),
    "clip_range": (1e-4, None, 1e-4),
    # not in the table: algorithms 3 to 5
    "normalization": ("batch", "batch", "batch"),
    "kl_form": (None, None, "squared_log_ratio"),
}

# The thesis, table A.2; a row is compressibility, incompressibility, aesthetic.
A2 = {
    "num_inference_steps": (40, 40, 40),
    "sampler": ("ddim", "ddim", "ddim"),
    "learning_rate_schedule": ("constant", "constant", "warmup_cosine"),
    "learning_rate": (9e-8, 9e-8, 3.75e-6),
    "weight_decay": (1e-4, 1e-4, 1e-4),
    "adam_beta1": (0.9, 0.9, 0.9),
    "adam_beta2": (0.999, 0.999, 0.999),
    "adam_epsilon": (1e-8, 1e-8, 1e-8),
    "max_grad_norm": (1.0, 1.0, 1.0),
    "batch_size": (10, 10, 10),
    "samples_per_iteration": (100, 100, 100),
    "inner_epochs": (1, 1, 1),
    "clip_range": (1e-4, 1e-4, 1e-4),
    "advantage_clip": (4.5, 4.5, 10.0),
    # 72, 72 and 35 epochs of 100 pictures; section 4.1, point 4: standardised within the batch
    "total_reward_queries": (7_200, 7_200, 3_500),
    "normalization": ("batch", "batch", "batch"),
}

# google-research/dpok, defaults of train_online_pg.py.
DPOK = {
    "learning_rate": 1e-5,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "mixed_precision": "fp16",
    "gradient_checkpointing": True,
    "learning_rate_schedule": "constant",
    "updates": 5,
    "batch_size": 2 * 12,
    "samples_per_iteration": 6,
    "reward_weight": 100.0,
    "kl_weight": 0.01,
    "replay_iterations": 1000 // (6 * 50),
    "value_batch_size": 256,
    "value_learning_rate": 1e-4,
    "value_updates": 5,
    "max_grad_norm": 0.1,
    "trainable": "lora",
    "lora_rank": 4,
    "clip_range": 1e-4,
    "total_reward_queries": 10_000 // 5 * 6,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "eta": 1.0,
}

UPDATES = [
    ("ddpo-paper", "ddpo_is", 4, 64),
    ("ddpo-paper", "ddpo_sf", 1, 256),
    ("ddpo-paper", "rwr", 400, 128),
    ("ddpo-paper", "rwr_sparse", 400, 128),
    ("replication", "ddpo_is", 2, 8),
    ("replication", "ddpo_sf", 4, 16),
    ("replication", "ddpo_iskl", 2, 8),
    ("thesis-compressibility", "ddpo_is", 10, 10),
    ("thesis-incompressibility", "ddpo_is", 10, 10),
    ("thesis-aesthetic", "ddpo_is", 10, 10),
    ("dpok", "dpok", 5, 24),
]


def columns(table, names):
    """(name, what the column says) for each column; None stands for the table's dash."""
    return [
        (name, {key: row[index] for key, row in table.items() if row[index] is not None})
        for index, name in enumerate(names)
    ]


def flat(settings):
    """All options of a run by name."""
    parts = (settings, settings.env_options, settings.agent_options)
    return {entry.name: getattr(part, entry.name) for part in parts for entry in fields(part)}


def names(kind):
    return {entry.name for entry in fields(kind)}


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_for_every_agent(preset, agent, tmp_path):
    settings = starting_point(ENV, agent, preset, None)
    values = flat(settings)
    assert (settings.agent, settings.preset, settings.env) == (agent, preset, ENV)
    assert type(settings.agent_options) is agent_class(agent).Config
    left_out = {key for key, value in PRESETS[preset].of(agent).items() if values.get(key) != value}
    assert not left_out & (names(agent_class(agent).Config) | names(RunSettings) | names(EnvOptions))
    assert settings.samples_per_iteration % settings.rollout_batch == 0
    assert settings.samples_per_iteration % values.get("group_size", 1) == 0
    sampler = {key: getattr(settings.env_options, key) for key in names(SamplerConfig)}
    SamplerConfig.from_options({key: value for key, value in sampler.items() if value is not None}, {})
    stored = json.loads(json.dumps(settings.to_json(), allow_nan=False))
    again = replace(RunSettings.from_json(stored, Path("run")), out=settings.out)
    assert flat(again) == values


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_holds_known_options_only(name):
    check_preset(name, PRESETS[name])


def test_an_option_is_of_one_part_alone():
    """Presets name options without their part, so a name must not stand in two."""
    configs = set().union(*(names(agent_class(agent).Config) for agent in AGENTS))
    assert not names(RunSettings) & names(EnvOptions)
    assert not (names(RunSettings) | names(EnvOptions)) & configs


@pytest.mark.parametrize(("agent", "column"), columns(F6, ["ddpo_is", "ddpo_sf", "rwr", "rwr_sparse"]))
def test_ddpo_paper_is_the_table_of_f6(agent, column):
    values = flat(starting_point(ENV, agent, "ddpo-paper", None))
    assert {key: values[key] for key in column} == column


@pytest.mark.parametrize(("agent", "column"), columns(TABLE_1, ["ddpo_is", "ddpo_sf", "ddpo_iskl"]))
def test_replication_is_table_1(agent, column):
    values = flat(starting_point(ENV, agent, "replication", None))
    assert {key: values[key] for key in column} == column


@pytest.mark.parametrize(("task", "column"), columns(A2, ["compressibility", "incompressibility", "aesthetic"]))
def test_the_thesis_presets_are_table_a2(task, column):
    values = flat(starting_point(ENV, "ddpo_is", f"thesis-{task}", None))
    assert {key: values[key] for key in column} == column
    assert values["eta"] > 0  # DDIM's usual 0 has no policy gradient


def test_the_learning_rate_of_the_thesis_warms_up_and_decays():
    """Table A.2: 9e-8 to 3.75e-6 in the first 25 %; section 5.1.3: half a cosine down to 9e-9."""
    settings = starting_point(ENV, "ddpo_is", "thesis-aesthetic", None)
    options = settings.agent_options
    rates = [learning_rate_at(options, fraction) for fraction in (0.0, 0.25, 0.625, 1.0)]
    assert rates == pytest.approx([9e-8, 3.75e-6, (3.75e-6 + 9e-9) / 2, 9e-9], rel=1e-9)


def test_dpok_is_the_default_of_the_authors_code():
    values = flat(starting_point(ENV, "dpok", "dpok", None))
    assert {key: values[key] for key in DPOK} == DPOK
    assert values["normalization"] == "none" and values["value_function"]
    assert values["advantage_clip"] >= 1e6  # the code does not clip advantages


@pytest.mark.parametrize(("preset", "agent", "updates", "behind"), UPDATES)
def test_an_iteration_takes_as_many_updates_as_the_source_says(
    make_env, make_policy, roll, monkeypatch, preset, agent, updates, behind
):
    """Gradient updates an iteration, and the samples (DPOK: the transitions) behind each, counted in the agent."""
    settings = starting_point(ENV, agent, preset, None)
    env, steps = make_env(4), 4
    learner = agent_class(agent)(make_policy(env, settings.agent_options.trainable), settings.agent_options)
    number = min(256, settings.samples_per_iteration)  # RWR's minibatches do not depend on it
    few = roll(env, learner.policy)
    many = Trajectories.join([few] * math.ceil(number / 4))
    keep = slice(0, number)
    sampled = Trajectories(
        many.prompts[keep],
        many.tokens[keep],
        many.timesteps,
        many.latents[:, keep],
        many.log_probs[:, keep],
        torch.linspace(0, 1, number),
        {},
        many.images[keep],
    )
    taken = []

    def count(items, losses, number):
        taken.append(number)
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(learner, "minimize", count)
    if agent == "dpok":
        monkeypatch.setattr(learner.value_optimizer, "step", lambda *arguments: {"loss": torch.zeros(())})
    learner.update(sampled, np.random.default_rng(0))
    per_sample = steps if agent.startswith("ddpo") else 1
    assert taken == [behind * per_sample] * updates


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (Preset("s", {"guidence_scale": 5.0}), "option='guidence_scale' is unknown; did you mean 'guidance_scale'?"),
        (Preset("s", {"clip_rnage": 1e-4}), "did you mean 'clip_range'?"),
        (Preset("s", {"out": "runs"}), "option='out' is unknown"),
        (Preset("s", {}, {"rwr": {"updtes": 4}}), "agent 'rwr': option='updtes' is unknown; did you mean 'updates'?"),
        (Preset("s", {}, {"rwr": {"clip_range": 1e-4}}), "agent 'rwr': option='clip_range' is unknown"),
        (Preset("s", {}, {"ddpo_iss": {}}), "agent='ddpo_iss' is unknown; did you mean 'ddpo_is'?"),
    ],
)
def test_a_misspelt_key_is_an_error(monkeypatch, preset, message):
    monkeypatch.setitem(PRESETS, "mine", preset)
    with pytest.raises(ValueError, match=re.escape(message)):
        starting_point(ENV, "ddpo_is", "mine", None)


def test_a_value_out_of_range_is_an_error(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", Preset("s", {}, {"ddpo_is": {"clip_range": -1.0}}))
    with pytest.raises(ValueError, match="clip_range=-1.0 must be larger than 0"):
        starting_point(ENV, "ddpo_is", "mine", None)


def test_common_values_reach_every_agent_and_its_own_win(monkeypatch):
    common = {"batch_size": 12, "samples_per_iteration": 24, "clip_range": 0.3, "eta": 0.5}
    own = {"batch_size": 6, "samples_per_iteration": 48, "eta": 0.25}
    monkeypatch.setitem(PRESETS, "mine", Preset("s", common, {"ddpo_is": own}))
    named = flat(starting_point(ENV, "ddpo_is", "mine", None))
    assert {key: named[key] for key in common} == {**own, "clip_range": 0.3}
    other = flat(starting_point(ENV, "ddpo_iskl", "mine", None))
    assert {key: other[key] for key in common} == common
    without = flat(starting_point(ENV, "rwr", "mine", None))
    assert "clip_range" not in without and without["batch_size"] == 12


def test_a_preset_speaks_to_an_agent_of_the_user(monkeypatch, tmp_path):
    (tmp_path / "my_preset_agent.py").write_text(
        "from dataclasses import dataclass\n"
        "from diffusion_gym.agents.algorithms import DDPOSF\n"
        "@dataclass(frozen=True)\n"
        "class Options(DDPOSF.Config):\n"
        "    best_of: int = 4\n"
        "class Mine(DDPOSF):\n"
        "    Config = Options\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    agent = "my_preset_agent:Mine"
    monkeypatch.setitem(PRESETS, "mine", Preset("s", {"learning_rate": 0.5}, {agent: {"best_of": 7}}))
    values = flat(starting_point(ENV, agent, "mine", None))
    assert (values["learning_rate"], values["best_of"]) == (0.5, 7)
    monkeypatch.setitem(PRESETS, "mine", Preset("s", {"best_of": 9}))
    assert flat(starting_point(ENV, agent, "mine", None))["best_of"] == 9
    assert flat(starting_point(ENV, agent, "ddpo-paper", None))["learning_rate"] == 1e-5
    monkeypatch.delitem(PRESETS, "mine")
    assert agent in presets_text([agent])


def test_train_takes_the_values_of_its_agent_and_the_command_line_wins():
    base = ["--env", ENV, "--out", "unused", "--preset", "ddpo-paper"]
    asked = parse_train([*base, "--agent", "rwr"])
    assert (asked.samples_per_iteration, asked.agent_options.batch_size) == (10_000, 128)
    asked = parse_train([*base, "--agent", "ddpo_sf"])
    assert (asked.samples_per_iteration, asked.agent_options.batch_size) == (256, 256)
    asked = parse_train([*base, "--agent", "rwr", "--agent.batch-size", "32", "--samples-per-iteration", "64"])
    assert (asked.samples_per_iteration, asked.agent_options.batch_size) == (64, 32)
    assert asked.agent_options.updates == 400


def cell(lines, row, column):
    """The text of a table's row that ends where the `column`-th one does; columns are right-aligned."""
    found = [line for line in lines if line.startswith(f"{row} ")]
    assert len(found) == 1, found
    return re.split(r"\s{2,}", found[0])[column]


def test_the_table_shows_values_and_defaults(capsys, monkeypatch):
    for name in [name for name in PRESETS if name.startswith("shapes")]:
        monkeypatch.delitem(PRESETS, name)  # so that one block of columns holds the others
    monkeypatch.setitem(PRESETS, "mine", Preset("s", {"strict": True, "trained_steps": (0.25, 0.75)}))
    main(["presets", "--agent", "rwr"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    header = re.split(r"\s{2,}", next(line for line in lines if line.strip().startswith("ddpo-paper")).strip())
    column = 1 + header.index("ddpo-paper")
    assert cell(lines, "samples_per_iteration", column) == "10000"
    assert cell(lines, "updates", column) == "400"
    assert cell(lines, "inverse_temperature", column) == "0.2"
    assert cell(lines, "learning_rate", column) == "1e-05"
    assert cell(lines, "strict", column) == "(env's)"  # `mine` alone sets it
    assert cell(lines, "trained_steps", column) == "(0 1)"  # the default of the agent
    assert cell(lines, "trained_steps", 1 + header.index("mine")) == "0.25 0.75"
    assert "rwr" in lines and "rwr_sparse" not in lines and "ddpo_is" not in lines


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_names_every_preset_and_source_and_fits(width):
    lines = presets_text(AGENTS.names(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(agent in lines for agent in AGENTS)
    joined = " ".join(" ".join(line.split()) for line in lines)
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.source}" in joined
        assert preset.choices in joined
    for agent in AGENTS:
        start = lines.index(agent)
        block = " ".join(lines[start : start + 200]).split("=" * len(agent))[1]
        for name, preset in PRESETS.items():
            if agent in preset.agents:
                assert name.split("-")[-1] in block


def test_json_holds_what_the_presets_set(capsys):
    main(["presets", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert list(told) == list(PRESETS)
    for name, preset in PRESETS.items():
        assert told[name]["source"] == preset.source
        assert list(told[name]["agents"]) == AGENTS.names()
    assert told["ddpo-paper"]["agents"]["rwr"]["updates"] == 400
    assert told["ddpo-paper"]["agents"]["ddpo_is"]["samples_per_iteration"] == 256
    assert "clip_range" not in told["shapes"]["agents"]["ddpo_sf"]
    main(["presets", "--agent", "dpok", "--json"])
    assert list(json.loads(capsys.readouterr().out)["dpok"]["agents"]) == ["dpok"]
    assert presets_json(["dpok"])["dpok"]["agents"]["dpok"]["kl_weight"] == 0.01


def test_an_unknown_agent_gets_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["presets", "--agent", "dpoc"])
    assert stop.value.code == 2
    assert "agent='dpoc' is unknown; did you mean 'dpok'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "model", "agent", "preset"),
    [
        ("DiffusionDenoise-Shapes-Color-v0", None, "dpok", "shapes"),
        ("DiffusionDenoise-v0", "Shapes", "ddpo_is", "shapes"),
        ("DiffusionDenoise-SD14-Compressibility-v0", None, "ddpo_sf", "ddpo-paper"),
        ("DiffusionDenoise-SD14-Compressibility-v0", None, "dpok", "dpok"),
        ("DiffusionDenoise-Shapes-Color-v0", "some/other-model", "rwr", "ddpo-paper"),
    ],
)
def test_without_a_preset_the_model_and_the_agent_decide(env, model, agent, preset):
    assert starting_point(env, agent, None, model).preset == preset
