"""What a training says of itself while it runs, on a terminal and in a log."""

import io
import re
from types import SimpleNamespace

import pytest

from diffusion_gym.agents.algorithms import AGENTS, agent_class
from diffusion_gym.agents.training import progress
from diffusion_gym.agents.training.progress import ProgressLine, duration, estimated_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock.now` moves it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def test_a_log_has_a_line_a_minute_with_the_time_left(clock):
    stream = io.StringIO()
    with ProgressLine(6400, 0, stream=stream) as line:
        for _ in range(100):
            clock.now += 10
            line.update(64, 0.5, 10.0)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "64/6,400 images (1%), reward 0.500, 6.4 images/s, 16 min left"
    assert lines[1] == "448/6,400 images (7%), reward 0.500, 6.4 images/s, 16 min left"
    assert lines[-1] == "6,400/6,400 images (100%), reward 0.500, 6.4 images/s, after 17 min"
    assert len(lines) == 1 + 99 // 6 + 1


def test_a_resumed_run_is_judged_by_its_own_speed(clock):
    stream = io.StringIO()
    line = ProgressLine(1000, 900, stream=stream)
    clock.now += 20
    line.update(50, float("nan"), 20.0)
    assert stream.getvalue() == "950/1,000 images (95%), reward nan, 2.5 images/s, 20 s left\n"


def test_a_terminal_has_one_line_that_is_drawn_anew():
    stream = Terminal()
    with ProgressLine(16, 0, stream=stream) as line:
        line.update(8, 0.25, 6.0)
        line.update(8, 0.5, 2.0)
    text = stream.getvalue()
    assert text.count("\n") == 1 and "16/16 images" in text and "reward 0.500, 2.0 images/s" in text


def test_nothing_is_shown_where_nothing_is_wanted(capsys):
    with ProgressLine(8, 0, shown=False) as line:
        line.update(8, 1.0, 1.0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "seconds, text",
    [(4.4, "4 s"), (89, "89 s"), (91, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (7200, "2 h 0 min")],
)
def test_a_time_is_told_in_two_units_at_most(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("agent", AGENTS)
def test_the_estimate_counts_sampling_and_what_an_update_trains_on(agent):
    config = agent_class(agent).Config
    half, whole = (estimated_seconds(100, 0.5, config(trained_steps=(0.0, part))) for part in (0.5, 1.0))
    assert 50 < half < whole and whole - 50 == pytest.approx(2 * (half - 50))


def test_a_run_says_first_what_it_will_take(make_env, make_agent, tmp_path, capsys):
    from diffusion_gym.agents.training.trainer import Schedule, Trainer

    def trainer(total):
        env = make_env(4, autoreset_mode="Disabled", num_inference_steps=2)
        schedule = Schedule(total_reward_queries=total, samples_per_iteration=4, pictures_every=0)
        agent = make_agent(env, batch_size=4)
        pictures = make_env(2, num_inference_steps=2)
        return Trainer(env, agent, tmp_path, schedule, pictures_env=pictures, track="none")

    trainer(4).run()
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"4 images to score, 1 iteration: about \d+ s", told[0])
    assert told[1].startswith("4/4 images (100%)")
    trainer(12).run(resume=True)
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"8 images to score, 2 iterations: about \d+ s", told[0])
    assert told[-1].startswith("12/12 images")
