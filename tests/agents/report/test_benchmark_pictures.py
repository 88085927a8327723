"""The pictures and drawings of a benchmark's page, against the samples that they are made of."""

import base64
import csv
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark_folders import write_run, write_suite
from diffusion_gym.agents.report.benchmark.data import Benchmark
from diffusion_gym.agents.report.benchmark.page import write_benchmark_report
from diffusion_gym.agents.report.benchmark.samples import principal_axes
from diffusion_gym.agents.report.render import spread
from diffusion_gym.agents.training.pictures import grid
from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata

REWARDS = [0.3, 0.5, 0.8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of one agent on one task, with its page for seed 1."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_suite(folder)
    for seed in range(2):
        classes = {"p(0-2)": [0.2, 0.3, 0.4], "p(3-9)": [0.8, 0.7, 0.6]}
        write_run(folder, "ddpo_is", "color", seed, REWARDS, **classes)
    write_benchmark_report(folder, seed=1)
    return folder


def stored(folder, queries, seed=1):
    return load_tensors(folder / "runs" / f"color--ddpo_is--seed-{seed}" / "points" / f"{queries:08d}.safetensors")


def one_run(folder, change, rewards=(0.3, 0.4), **measures):
    """The page's text of one run whose stored tensors `change` has changed."""
    write_suite(folder)
    write_run(folder, "rwr", "color", 0, list(rewards), **measures)
    for path in (folder / "runs").rglob("*.safetensors"):
        save_tensors(path, change(load_tensors(path), path.stem), tensors_metadata(path))
    return write_benchmark_report(folder).read_text(encoding="utf-8")


def rows(folder, name):
    with (folder / "figures" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def opened(folder, name):
    with Image.open(folder / "figures" / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_before_and_after_are_of_the_chosen_seed(folder):
    before, after = (stored(folder, queries)["images"][:8] for queries in (0, 64))
    wanted = grid(torch.stack([before, after], 1).flatten(0, 1), 4)
    np.testing.assert_array_equal(opened(folder, "before-after--color--ddpo_is"), np.asarray(wanted))
    text = (folder / "report.html").read_text(encoding="utf-8")
    first, last = (float(stored(folder, queries)["rewards"][0]) for queries in (0, 64))
    assert re.search(rf"<p>{first:.3f}</p></div><div><img[^>]*><p>{last:.3f}</p>", text)
    assert ", seed 1;" in text and ", seed 0;" not in text


def test_the_page_holds_the_same_pixels(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    for alt, queries in (("Before", 0), ("After", 64)):
        data = re.search(rf'src="data:image/png;base64,([^"]*)" alt="{alt}: a red circle"', text)[1]
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            np.testing.assert_array_equal(np.asarray(image), stored(folder, queries)["images"][0].numpy())


def test_a_reward_of_two_values_marks_strict_successes(tmp_path):
    def strict(tensors, queries):
        return tensors | {"rewards": torch.zeros(24) if int(queries) == 0 else torch.tensor([1.0, 0.0] * 12)}

    marks = re.findall("[✓✗]", one_run(tmp_path, strict, success=[0.3, 0.4]))
    assert marks == ["✗", "✓", "✗", "✗"] * 4
    assert not re.findall("[✓✗]", one_run(tmp_path, lambda tensors, _: tensors, success=[0.3, 0.4]))


def test_strips_over_the_training_have_a_column_for_each_measurement(folder):
    columns = [stored(folder, queries)["images"][:4] for queries in (0, 32, 64)]
    wanted = grid(torch.stack(columns, 1).flatten(0, 1), 3)
    np.testing.assert_array_equal(opened(folder, "over-training--color--ddpo_is"), np.asarray(wanted))


def test_trajectories_show_the_lowest_and_the_highest_reward(folder):
    strips = []
    for queries in (0, 64):
        found = stored(folder, queries)
        order = found["path_rewards"][-1].argsort()
        steps = [0, 1, 3, 4, 6, 7, 9, 10]
        strips += [found["path_images"][steps, int(sample)] for sample in (order[0], order[-1])]
    wanted = grid(torch.cat(strips), 8)
    np.testing.assert_array_equal(opened(folder, "trajectories--color--ddpo_is"), np.asarray(wanted))
    found = rows(folder, "trajectory-rewards--color--ddpo_is")
    tuned = [float(row["reward"]) for row in found if row["model"] == "tuned" and row["sample"] == "2"]
    assert tuned == pytest.approx(stored(folder, 64)["path_rewards"][:, 2].tolist())


def test_the_spread_has_every_picture_of_every_seed(folder):
    found = rows(folder, "spread--color--ddpo_is")
    assert len(found) == 2 * 3 * 24
    for seed in range(2):
        last = [float(row["reward"]) for row in found if (row["seed"], row["reward_queries"]) == (str(seed), "64")]
        assert last == pytest.approx(stored(folder, 64, seed)["rewards"].tolist())


def test_the_map_is_the_pretrained_models_principal_plane(folder):
    before, after = (stored(folder, queries)["features"].double() for queries in (0, 64))
    center = before.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(before.T))
    plane = vectors[:, values.argsort(descending=True)[:2]]
    found = rows(folder, "map--color--ddpo_is")
    for model, part in (("pretrained", before), ("tuned", after)):
        places = np.array([[float(row["first"]), float(row["second"])] for row in found if row["model"] == model])
        wanted = ((part - center) @ plane).numpy()
        np.testing.assert_allclose(np.abs(places), np.abs(wanted), atol=1e-9)  # the sign of an axis is free


def test_principal_axes_do_not_depend_on_the_order_of_the_pictures():
    features = np.random.default_rng(0).normal(size=(20, 5))
    (center, axes), (other, others) = principal_axes(features), principal_axes(features[::-1])
    np.testing.assert_allclose(center, other)
    np.testing.assert_allclose(axes, others, atol=1e-12)


def test_classes_are_shares_before_and_after(folder):
    found = {row["model"]: row for row in rows(folder, "classes--color")}
    assert [float(found["pretrained model"][name]) for name in ("0-2", "3-9")] == pytest.approx([0.2, 0.8])
    assert [float(found["ddpo_is"][name]) for name in ("0-2", "3-9")] == pytest.approx([0.4, 0.6])


def test_the_same_records_and_samples_give_the_same_files(folder):
    paths = [folder / "report.html", *sorted((folder / "figures").iterdir())]
    before = [path.read_bytes() for path in paths]
    write_benchmark_report(folder, seed=1)
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("rewards", [[0.0, 1.0], [-1.0, float("nan")]])
def test_rewards_of_two_values_or_fewer_have_no_spread(tmp_path, rewards):
    text = one_run(tmp_path, lambda tensors, _: tensors | {"rewards": torch.tensor(rewards * 12)})
    assert 'id="spread"' not in text and 'id="pictures"' in text and 'id="maps"' in text


def test_models_without_features_have_no_map(tmp_path):
    text = one_run(tmp_path, lambda tensors, _: {key: tensors[key] for key in tensors if key != "features"})
    assert 'id="maps"' not in text and 'id="pictures"' in text and 'id="spread"' in text


def test_large_pictures_are_small_in_the_page_and_whole_in_their_files(tmp_path):
    large = torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2)
    text = one_run(tmp_path, lambda tensors, _: tensors | {"images": large})
    pairs = re.findall(r'<img src="data:image/(\w+);[^"]*" alt="After:[^"]*" width="(\d+)" height="(\d+)"', text)
    assert pairs == [("jpeg", "200", "200")] * 8
    assert opened(tmp_path, "before-after--color--rwr").shape == (4 * 256 + 3 * 8, 4 * 256 + 3 * 8, 3)


def test_a_truncated_file_is_named(tmp_path):
    write_suite(tmp_path)
    write_run(tmp_path, "rwr", "color", 0, [0.3, 0.4])
    path = next((tmp_path / "runs").rglob("00000032.safetensors"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="00000032.safetensors is truncated"):
        write_benchmark_report(tmp_path)


def test_samples_of_an_earlier_training_are_not_shown(tmp_path):
    write_suite(tmp_path)
    write_run(tmp_path, "rwr", "color", 0, [0.3, 0.4, 0.5])
    stray = next((tmp_path / "runs").rglob("00000032.safetensors"))
    stray.rename(stray.with_name("00000048.safetensors"))
    found = Benchmark.read(tmp_path).samples("rwr", "color", 0)
    assert [entry.reward_queries for entry in found] == [0, 64]


def test_cfg_training_is_shown_where_all_else_is_equal(tmp_path):
    write_suite(tmp_path)
    same = ("ddpo_is", 1e-4)
    chosen = {"both": (True, *same), "alone": (False, *same), "other": (False, "ddpo_is", 1e-3)}
    chosen["library"] = (False, "sb3/ppo", 1e-4)  # reads the settings of ddpo_is, and is another algorithm
    for agent, (cfg_training, trained, rate) in chosen.items():
        options = {"cfg_training": cfg_training, "learning_rate": rate}
        for seed in range(2):
            settings = {"seed": seed, "total_reward_queries": 32, "agent_options": options}
            write_run(tmp_path, agent, "color", seed, [0.3, 0.4], samples=False, settings=settings, trained=trained)
    text = write_benchmark_report(tmp_path).read_text(encoding="utf-8")
    assert "both: both branches; alone: the conditional one" in text
    assert "other: the conditional one" not in text and "library: the conditional one" not in text
    assert {row["agent"] for row in rows(tmp_path, "cfg-training-reward-queries--color")} == {"both", "alone"}


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 51])
def test_spread_begins_and_ends_at_the_ends(length):
    found = spread(length, 8)
    assert found[0] == 0 and found[-1] == length - 1 and len(found) == min(8, length)
