"""Where a training is shown: TensorBoard's files, W&B on request (here a stand-in), or nowhere."""

import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training.run_files import FORMAT
from diffusion_gym.agents.training.schedule import Schedule
from diffusion_gym.agents.training.tracking import check_track, open_tracker
from diffusion_gym.agents.training.trainer import Trainer
from diffusion_gym.storage import write_json
from run_folders import file_names, metrics_rows
from trainer_runs import BATCH, SAMPLES

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


class Wandb(ModuleType):
    """Records what W&B would be told."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished, self.axes = [], [], [], []
        self.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.Settings, self.Image = dict, lambda pixels: ("image", pixels.shape)
        self.Table = lambda columns, data, dataframe: ("table", columns, data)
        self.refusal = None

    def init(self, **options):
        if self.refusal is not None:
            raise self.errors.Error(self.refusal)
        self.begun.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append(values),
            finish=lambda exit_code=0: self.finished.append(exit_code),
            define_metric=lambda name, step_metric: self.axes.append((name, step_metric)),
        )


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return module


def events(folder):
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


def test_tensorboard_has_the_finite_numbers_and_the_pictures(tmp_path):
    with open_tracker("tensorboard", tmp_path, 0) as tracker:
        tracker.scalars({"iteration": 1, "reward_queries": 8, "loss": 0.5, "kl": float("nan"), "none": None}, 8)
        tracker.scalars({"reward_mean": 2, "reward_path": [1.0]}, 8, "development/")
        tracker.picture("development/pictures", PICTURE, 8)
        tracker.table("development/samples", ["a"], iter(lambda: pytest.fail("read"), None), 8)
    found = events(tmp_path)
    assert sorted(found.Tags()["scalars"]) == ["development/reward_mean", "loss"]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(8, 0.5)]
    [image] = found.Images("development/pictures")
    assert (image.step, image.width, image.height) == (8, 6, 4)


def test_what_came_after_the_checkpoint_is_hidden(tmp_path):
    with open_tracker("tensorboard", tmp_path, 0) as tracker:
        for queries in (8, 16, 24):
            tracker.scalars({"loss": float(queries)}, queries)
    time.sleep(1.1)  # names of event files have the second and then a count, whose 10 sorts before its 9
    with open_tracker("tensorboard", tmp_path, 8) as tracker:
        tracker.scalars({"loss": -16.0}, 16)
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(8, 8.0), (16, -16.0)]


def test_none_writes_nothing(tmp_path):
    with open_tracker("none", tmp_path, 0) as tracker:
        tracker.scalars({"loss": 1.0}, 8)
        tracker.picture("a", PICTURE, 8)
    assert file_names(tmp_path) == []


def test_wandb_is_told_the_same_as_tensorboard(tmp_path, wandb):
    config = {"format": FORMAT, "settings": {"seed": 3}, "versions": {"torch": "2"}}
    write_json(tmp_path / "config.json", config)
    with open_tracker("wandb", tmp_path, 0) as tracker:
        tracker.scalars({"iteration": 1, "loss": 0.5}, 8)
        tracker.picture("development/pictures", PICTURE, 8)
        tracker.table("development/samples", ("current", "reward"), [(PICTURE, 0.25)], 8)
    assert wandb.logged == [
        {"loss": 0.5, "reward_queries": 8},
        {"development/pictures": [("image", (4, 6, 3))], "reward_queries": 8},
        {
            "development/samples": ("table", ["current", "reward"], [[("image", (4, 6, 3)), 0.25]]),
            "reward_queries": 8,
        },
    ]
    [options] = wandb.begun
    assert options["config"] == config
    assert (options["project"], options["name"], options["dir"]) == ("diffusion-gym", tmp_path.name, str(tmp_path))
    assert wandb.axes == [("*", "reward_queries")] and wandb.finished == [0]
    assert events(tmp_path).Tags()["scalars"] == ["loss"]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, wandb):
    for _ in range(2):
        with open_tracker("wandb", tmp_path / "one", 0):
            pass
    with open_tracker("wandb", tmp_path / "two", 0):
        pass
    first, again, other = (options["id"] for options in wandb.begun)
    assert first == again != other
    assert all(options["resume"] == "allow" for options in wandb.begun)


def test_a_failure_is_told_to_wandb(tmp_path, wandb):
    with pytest.raises(RuntimeError), open_tracker("wandb", tmp_path, 0):
        raise RuntimeError("reward server gone")
    assert wandb.finished == [1]


def test_without_an_account(tmp_path, wandb):
    wandb.refusal = "api_key not configured (no-tty).\ncall wandb.login(key=[your_api_key])"
    message = r"track='wandb' failed \(api_key not configured \(no-tty\). call .*\); run `wandb login`, set WANDB_MODE"
    with pytest.raises(ValueError, match=message):
        open_tracker("wandb", tmp_path, 0)


@pytest.mark.parametrize("namespace", [False, True], ids=["missing", "folder-of-earlier-runs"])
def test_wandb_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path, tiny_pipeline, capsys, monkeypatch, namespace
):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb") if namespace else None)
    options = {"--env": "DiffusionDenoise-v0", "--env.model": tiny_pipeline, "--out": tmp_path / "run"}
    options |= {"--track": "wandb", "--env.reward": "Compressibility", "--env.prompts": "a red circle"}
    with pytest.raises(SystemExit) as stop:
        main(["train", *(str(part) for pair in options.items() for part in pair)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.strip() == (
        "error: track='wandb' needs the package wandb; pip install wandb, or use --track tensorboard"
    )
    assert not (tmp_path / "run").exists()


def test_a_misspelt_tracker():
    with pytest.raises(ValueError, match="track='tensorbord' must be one of 'tensorboard', 'wandb', 'none'"):
        check_track("tensorbord")


def train(make_env, make_agent, out, track):
    env = make_env(BATCH, num_inference_steps=2, autoreset_mode="Disabled")
    schedule = Schedule(2 * SAMPLES, SAMPLES, pictures_every=0)
    trainer = Trainer(env, make_agent(env, batch_size=4), out, schedule, progress=False, track=track)
    trainer.run()
    return metrics_rows(out)


def test_the_trackers_show_the_metrics_and_do_not_change_them(make_env, make_agent, tmp_path, wandb):
    none, shown = (train(make_env, make_agent, tmp_path / track, track) for track in ("none", "wandb"))
    assert none == shown
    found = events(tmp_path / "wandb")
    rewards = [(event.step, event.value) for event in found.Scalars("reward_mean")]
    assert rewards == [(row["reward_queries"], pytest.approx(row["reward_mean"], rel=1e-6)) for row in shown]
    assert [row["reward_mean"] for row in wandb.logged] == [row["reward_mean"] for row in shown]
    assert "tensorboard" not in file_names(tmp_path / "none")


def test_wandb_itself_offline(make_env, make_agent, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed").init  # noqa: B018 - an empty folder has none
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = train(make_env, make_agent, tmp_path / "run", "wandb")
    assert rows == train(make_env, make_agent, tmp_path / "none", "none")
    [log] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert log.stat().st_size > 0
