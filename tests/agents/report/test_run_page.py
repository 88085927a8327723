"""The page of a run: what it shows is what the run folder holds, and it needs nothing else."""

import base64
import io
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_gym.agents.cli import parse_train
from diffusion_gym.agents.report.commands import train_command
from diffusion_gym.agents.report.numbers import change, number, percent
from diffusion_gym.agents.report.run import write_report
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.pictures import cells, grid, save_grid
from diffusion_gym.agents.training.run_files import FORMAT
from diffusion_gym.agents.training.settings import starting_point
from diffusion_gym.storage import write_json

ENV = "DiffusionDenoise-Shapes-Composition-v0"
ATTACK = "<script>alert('a')</script>"
GRIDS = ["before", "after", "held-out-before", "held-out-after"]
VOID = {"meta", "link", "img"}
PROMPTS = ["a red circle and a blue square", "a blue star and a red star", "two stars", ATTACK]


class Page(HTMLParser):
    """The elements, the words and the pictures of a page; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words += [] if self._open[-1:] == ["style"] else [data]

    @property
    def images(self):
        for tag, attributes in self.attributes:
            if tag == "img":
                kind, data = attributes["src"].split(";base64,")
                yield kind, Image.open(io.BytesIO(base64.b64decode(data, validate=True))), attributes


def evaluation(prompts, reward, base):
    rows = {
        prompt: {"samples": index + 1, "reward": reward, "base_reward": base, "success": 0.75, "base_success": 0.25}
        for index, prompt in enumerate(prompts)
    }
    shown = [{"prompt": prompt, "reward": reward, "base_reward": base} for prompt in prompts]
    shown = [row | {"success": float(index == 0), "base_success": 0.0} for index, row in enumerate(shown)]
    return {
        "samples": 64,
        "reward_mean": reward,
        "reward_ci95": [reward - 0.011, reward + 0.012],
        "base_reward_mean": base,
        "base_reward_ci95": [base - 0.013, base + 0.014],
        "kl_to_base": 1234.56,
        "success": 0.7512,
        "success_ci95": [0.61, 0.86],
        "base_success": 0.2341,
        "base_success_ci95": [0.15, 0.35],
        "prompts": rows,
        "shown": {"size": [32, 32], "pictures": shown},
    }


@pytest.fixture
def folder(tmp_path):
    """A run of ten iterations, at its end, without an evaluation."""
    settings = starting_point(ENV, "ddpo_is", None, None)
    settings = replace(settings, seed=7, total_reward_queries=640, out=tmp_path)
    config = {"format": FORMAT, "settings": settings.to_json(), "versions": {"torch": "9.8.7"}}
    write_json(tmp_path / "config.json", config)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for index in range(1, 11):
            row = {"iteration": index, "reward_queries": 64 * index, "reward_mean": 0.4 + index / 100}
            row |= {
                "success_mean": index / 20,
                "clip_fraction": 0.1,
                "approx_kl": 2e-6,
                "grad_norm": 0.5,
                "loss": -1e-3,
            }
            file.write(json.dumps(row | {"seconds": 18.0}) + "\n")
    for iteration in (0, 5, 10):
        save_grid(tmp_path / "images" / f"iteration-{iteration:06d}.png", pictures(32))
    return tmp_path


@pytest.fixture
def evaluated(folder):
    """The same run, evaluated on training and held-out prompts."""
    seen = evaluation(PROMPTS, 0.876, 0.543)
    held_out = evaluation(["a cyan star and a red circle"], 0.765, 0.432)
    common = {"env": ENV, "agent": "ddpo_is", "seed": 1000, "iteration": 10, "reward_queries": 640}
    write_json(folder / "eval.json", {**common, **seen, "held_out": held_out})
    for seed, name in enumerate(GRIDS):
        number = 1 if name.startswith("held-out") else len(PROMPTS)
        save_grid(folder / "images" / f"{name}.png", pictures(32, seed)[:number], columns=min(4, number))
    return folder


def pictures(side, seed=0):
    """Sixteen pictures of one colour each, which PNG packs at once."""
    colors = torch.randint(0, 256, (16, 1, 1, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return colors.expand(16, side, side, 3)


def read(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def rows(text):
    """The cells of the table rows of a page."""
    return [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in re.findall(r"<tr.*?</tr>", text)]


def test_everything_is_within_the_page(evaluated):
    path = write_report(evaluated)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == evaluated / "report.html"
    assert "://" not in text and str(evaluated) not in text.partition("<header>")[0]
    assert "@import" not in text and "url(" not in text
    assert not {"script", "iframe", "object", "base"} & set(page.tags)
    for _, attributes in page.attributes:
        sources = [attributes[key] for key in ("src", "href") if key in attributes]
        assert all(source.startswith(("data:", "#")) for source in sources)
        assert not any(key.startswith("on") for key in attributes)
    policy = next(attributes for _, attributes in page.attributes if "http-equiv" in attributes)
    assert policy["content"].startswith("default-src 'none'")
    assert [entry.name for entry in evaluated.iterdir() if entry.name.startswith(".")] == []


def test_pairs_are_the_pictures_of_both_grids_with_what_is_known_of_them(evaluated):
    page = read(evaluated)
    shown = list(page.images)
    assert len(shown) == 2 * (len(PROMPTS) + 1) + 3
    assert all(attributes["alt"] for _, _, attributes in shown)
    for index, (kind, image, attributes) in enumerate(shown[: 2 * len(PROMPTS)]):
        place, model = divmod(index, 2)
        assert kind == "data:image/png" and image.size == (32, 32) and attributes["class"] == "pixelated"
        assert image.getpixel((5, 5)) == tuple(pictures(32, model)[place, 0, 0].tolist())
        assert attributes["alt"] == f"{('Before', 'After')[model]}: {PROMPTS[place]}"
    assert "0.543 ✗ 0.876 ✓ a red circle and a blue square 0.543 ✗ 0.876 ✗ a blue star and a red star" in page.text


def test_an_evaluation_that_does_not_describe_its_pictures_shows_both_grids(evaluated):
    data = json.loads((evaluated / "eval.json").read_text())
    for part in (data, data["held_out"]):
        del part["shown"]
    write_json(evaluated / "eval.json", data)
    for (_, image, _), name in zip(read(evaluated).images, GRIDS, strict=False):
        assert image.tobytes() == Image.open(evaluated / "images" / f"{name}.png").tobytes()


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (64, 40), (100, 256)])
@pytest.mark.parametrize(("number", "columns"), [(16, 4), (7, 4), (1, 4), (3, 1)])
def test_the_pictures_of_a_grid_are_found_again(size, number, columns):
    made = torch.randint(0, 256, (number, *size, 3), dtype=torch.uint8)
    found = cells(grid(made, columns), size, number)
    assert all(torch.equal(torch.from_numpy(np.array(image)), each) for image, each in zip(found, made, strict=True))


def test_a_grid_of_other_pictures_is_refused(evaluated):
    save_grid(evaluated / "images" / "after.png", pictures(48), columns=4)
    with pytest.raises(ValueError, match="is no grid of 4 of 32x32; run eval again"):
        write_report(evaluated)


def test_the_same_run_gives_the_same_bytes_whatever_the_clock_says(evaluated, monkeypatch):
    first = write_report(evaluated).read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert write_report(evaluated).read_bytes() == first


def test_a_long_training_shows_its_first_and_last_pictures_and_some_between(folder):
    for iteration in range(20, 200, 10):
        save_grid(folder / "images" / f"iteration-{iteration:06d}.png", pictures(32))
    captions = re.findall(r"Grid of pictures: ([a-z]+ \w+)", write_report(folder).read_text(encoding="utf-8"))
    assert len(captions) == 6
    assert (captions[0], captions[-1]) == ("before training", "iteration 190")


def test_large_pictures_are_made_smaller(folder):
    save_grid(folder / "images" / "iteration-000010.png", pictures(512))
    kind, image, attributes = list(read(folder).images)[-1]
    assert (kind, image.width, attributes["class"]) == ("data:image/jpeg", 1200, "smooth")
    assert abs(image.height - image.width) <= 1


def test_headline_numbers_are_those_of_the_evaluation_and_the_metrics(evaluated):
    text = read(evaluated).text
    for part in ("0.543 → 0.876", "0.530 to 0.557 before, 0.865 to 0.888 after", "Change +0.333", "0.432 → 0.765"):
        assert part in text
    assert "23.4 % → 75.1 %" in text
    assert "15.0 % to 35.0 % before, 61.0 % to 86.0 % after" in text
    assert "Change +51.7 pp, 64 samples of each model" in text
    assert "1,234.6 nats" in text
    assert "3.6 images/s" in text  # 640 pictures in 180 seconds
    assert "3.0 minutes" in text
    assert f"{ENV} ddpo_is · seed 7" in text
    assert "10 iterations, 640 of 640 reward queries" in text
    assert "torch 9.8.7" in text
    assert "Not evaluated" not in text and "not at its end" not in text


def test_prompts_are_grouped_by_family_and_weighted_by_samples(evaluated):
    data = json.loads((evaluated / "eval.json").read_text())
    data["prompts"]["a red circle and a blue square"] |= {"reward": 0.3, "base_reward": 0.1}
    write_json(evaluated / "eval.json", data)
    text = write_report(evaluated).read_text(encoding="utf-8")
    found = rows(text)
    names = [cells[0] for cells in found]
    assert ["count, 1 prompt", "3", "0.543", "0.876", "+0.333"] in [cells[:5] for cells in found]
    family = found[names.index("composition, 2 prompts")]
    assert family[:5] == [
        "composition, 2 prompts",
        "3",
        number((0.1 + 2 * 0.543) / 3),
        number((0.3 + 2 * 0.876) / 3),
        "+0.289",
    ]
    assert [cell.replace("\xa0", " ") for cell in family[5:]] == ["25.0 %", "75.0 %", "+50.0 pp"]
    assert names.index("count, 1 prompt") < names.index("composition, 2 prompts") < len(names)
    assert any("script" in name for name in names)  # no Shapes caption: a row without a family
    assert "a cyan star and a red circle" in names


def test_prompts_cannot_inject_html(evaluated):
    settings = json.loads((evaluated / "config.json").read_text())
    settings["settings"]["env_options"]["prompts"] = [ATTACK, '" onload="x']
    write_json(evaluated / "config.json", settings)
    page = read(evaluated)
    assert "script" not in page.tags
    assert not any("onload" in attributes for _, attributes in page.attributes)
    assert page.text.count("<script>alert(") == 4  # under the picture, the table, the configuration, the command


def test_without_an_evaluation_it_says_how_to_add_one(folder):
    page = read(folder)
    assert f"diffusion-gym eval {folder} and then diffusion-gym report {folder} add the comparison" in page.text
    assert "0.410 → 0.500" in page.text
    assert "nan" not in page.text.lower()
    assert len(list(page.images)) == 3


def test_a_run_that_has_just_begun(folder):
    (folder / "metrics.jsonl").unlink()
    for path in (folder / "images").iterdir():
        path.unlink()
    page = read(folder)
    assert f"diffusion-gym train --resume --out {folder} goes on with it" in page.text
    assert "No iteration is complete yet." in page.text
    assert list(page.images) == []


def test_an_evaluation_of_an_older_checkpoint_is_pointed_out(evaluated):
    data = json.loads((evaluated / "eval.json").read_text())
    write_json(evaluated / "eval.json", data | {"iteration": 8})
    assert "The evaluation is of iteration 8." in read(evaluated).text


def test_a_reward_beyond_a_share_has_a_chart_of_its_own(folder):
    assert "Reward and strict success" in read(folder).text
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"reward_mean": 0.', '"reward_mean": 12.'))
    page = read(folder)
    assert "Reward and strict success" not in page.text
    assert "Strict success share of samples" in page.text


def test_a_truncated_evaluation_is_named(folder):
    (folder / "eval.json").write_text('{"samples": 6')
    with pytest.raises(ValueError, match="eval.json"):
        write_report(folder)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_report(folder / "images")


@pytest.mark.parametrize(
    "env, prompts, agent",
    [
        (ENV, None, {}),
        (
            ENV,
            ("shapes-color",),
            {"normalization": "batch", "learning_rate": 3e-5, "trainable": "lora", "lora_rank": 8},
        ),
        ("DiffusionDenoise-v0", ("a 'quoted' \"dog\" & $HOME", "two\tstars"), {"clip_range": 0.5}),
    ],
)
def test_the_command_stands_for_the_settings(tmp_path, env, prompts, agent):
    options = EnvOptions(model="some where/model", strict=True, eta=0.5, num_inference_steps=7, prompts=prompts)
    start = starting_point(env, "ddpo_is", "ddpo-paper", options.model)
    settings = replace(start, env_options=options, seed=3, out=tmp_path, rollout_batch=16, total_reward_queries=99)
    settings = replace(settings, agent_options=replace(start.agent_options, **agent))
    command = train_command(settings, shlex.quote(str(tmp_path)))
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["diffusion-gym", "train"]
    assert parse_train(words[2:]) == settings
    unread = replace(settings, agent_options=replace(settings.agent_options, divergence_bound=1.0))
    assert train_command(unread, shlex.quote(str(tmp_path))) == command


def test_numbers_for_people():
    values = (0.0, -1.5, 0.0004, 1e-7, 1234.5, float("nan"), None)
    assert [number(value) for value in values] == ["0.000", "−1.500", "0.0004", "1.0e−07", "1,234.5", "–", "–"]
    assert number(0.25, "+") == "+0.250" and number(0.0, "+") == number(-9.3e-18, "+") == "0.000"
    assert percent(0.5) == "50.0\xa0%" and percent(-0.5, "+") == "−50.0\xa0pp"
    assert change(0.1, 0.1 + 1e-9) == 0 and change(0.5, 0.25) == -0.25 and number(change(None, 1.0)) == "–"
