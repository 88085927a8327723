"""benchmarks/layout.py: the two layouts compute the same, and their times are divided within a round."""

import itertools
from types import SimpleNamespace

import layout
import pytest
import torch


@pytest.fixture
def models(tiny_pipeline):
    return layout.layouts(str(tiny_pipeline))


def test_the_layouts_differ_and_compute_the_same(models):
    first, last = (model.unet.conv_in.weight for model in (models["first"], models["last"]))
    assert first.is_contiguous() and not last.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(first, last)
    found = {}
    for name, model in models.items():
        torch.manual_seed(0)
        work = layout.works(model, 2)
        work["training"]()
        found[name] = [work["rollout"](), work["decoding"](), model.unet.conv_in.weight.grad]
    torch.testing.assert_close(found["first"], found["last"], rtol=1e-4, atol=1e-5)
    assert found["last"][0].shape[0] == 4 and found["last"][1].shape[0] == 2


def test_a_ratio_is_of_seconds_within_a_round_and_the_first_is_left_out(models, monkeypatch):
    """A clock that gives channels-last work 3 seconds and the other 2, and the first round ten times as much."""
    running, now, calls = [], [0.0], itertools.count()

    def works(model, number):
        def work():
            running.append(model)
            now[0] += (3 if model is models["last"] else 2) * (10 if next(calls) < 2 else 1)

        return {"rollout": work}

    monkeypatch.setattr(layout, "works", works)
    monkeypatch.setattr(layout, "time", SimpleNamespace(process_time=lambda: now[0]))
    assert layout.ratios(models, 1, rounds=3) == {"rollout": [1.5] * 3}
    order = ["last" if model is models["last"] else "first" for model in running]
    assert order == ["last", "first", "first", "last"] * 2


def test_a_line_for_each_pipeline_and_batch(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(layout, "ratios", lambda models, number, rounds: {"rollout": [number, number + 1, number + 2]})
    text = layout.table(layout.Options(batches=(1, 4)), {"`tiny`": str(tiny_pipeline)})
    assert text.splitlines()[2:] == ["| `tiny` | 1 | 2.00 (1.00 to 3.00) |", "| `tiny` | 4 | 5.00 (4.00 to 6.00) |"]
