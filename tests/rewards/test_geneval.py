"""`GenEval` on tiny random networks of the published classes, against transformers' own post-processing and CLIP."""

import json
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Mask2FormerForUniversalSegmentation

from diffusion_gym.images import to_uint8
from diffusion_gym.prompts import make_prompts
from diffusion_gym.prompts.geneval_like import PATH
from diffusion_gym.rewards import RewardError, evaluate, make_reward
from diffusion_gym.rewards.clip import load_clip
from diffusion_gym.rewards.detector import Detector
from diffusion_gym.rewards.geneval_rules import CATEGORIES, COLORS, Detected, read_task
from diffusion_gym.testing.random_detector import write_random_mask2former, write_random_rt_detr

CLASSES = ["cat", "dog", "tvmonitor"]
CAT = {"include": [{"class": "cat", "count": 1}]}


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    return {
        "masks": str(write_random_mask2former(folder / "masks", CLASSES)),
        "boxes": str(write_random_rt_detr(folder / "boxes", CLASSES)),
    }


@pytest.fixture
def geneval(detectors, checkpoint):
    def made(kind="masks", **keywords):
        return make_reward("GenEval", detector=detectors[kind], clip=checkpoint("CLIPScore")["clip"], **keywords)

    return made


@torch.no_grad()
def by_hand(folder, kind, pictures, threshold):
    """(class, score, box) of each picture, worked out from the network's raw outputs."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = {"masks": Mask2FormerForUniversalSegmentation, "boxes": AutoModelForObjectDetection}[kind]
    network = network.from_pretrained(folder).eval()
    output = network(pixel_values=processor(list(pictures), return_tensors="pt").pixel_values)
    height, width = pictures.shape[1:3]
    found = []
    for number in range(len(pictures)):
        rows = []
        if kind == "boxes":
            chances = output.logits[number].sigmoid().flatten()
            best = chances.topk(len(output.logits[number])).indices.tolist()
            for index in best:
                x, y, w, h = output.pred_boxes[number, index // len(CLASSES)].tolist()
                box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
                rows.append((CLASSES[index % len(CLASSES)], chances[index].item(), box))
        else:
            masks = torch.nn.functional.interpolate(
                output.masks_queries_logits[number][None], (384, 384), mode="bilinear"
            )[0]
            chances = output.class_queries_logits[number].softmax(1)[:, :-1].flatten()
            for index in chances.topk(len(masks)).indices.tolist():
                mask = masks[index // len(CLASSES)]
                inside = mask > 0
                if not inside.any():
                    continue
                score = (chances[index] * mask.sigmoid()[inside].mean()).item()
                small = torch.nn.functional.interpolate(inside[None, None].float(), (height, width))[0, 0] > 0
                y, x = (axis.tolist() for axis in small.nonzero(as_tuple=True))
                box = (min(x), min(y), max(x) + 1, max(y) + 1)
                rows.append((CLASSES[index % len(CLASSES)], score, box))
        found.append(sorted(row for row in rows if row[1] > threshold))
    return found


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_detections_are_those_of_the_networks_outputs(kind, detectors, pictures):
    shown = to_uint8(pictures(3, 48, 48)[0]).numpy()
    detector = Detector(detectors[kind], "float32")
    assert detector.classes == ["cat", "dog", "tv"]
    found = detector(shown, 0.05, torch.device("cpu"))
    expected = by_hand(detectors[kind], kind, shown, 0.05)
    assert sum(map(len, expected)) > 3
    for objects, rows in zip(found, expected, strict=True):
        got = sorted((one.name.replace("tv", "tvmonitor"), one.score, one.box) for one in objects)
        assert [name for name, *_ in got] == [name for name, *_ in rows]
        np.testing.assert_allclose([score for _, score, _ in got], [score for _, score, _ in rows], atol=1e-5)
        np.testing.assert_allclose([box for *_, box in got], [box for *_, box in rows], atol=1e-3)
        for one in objects:
            assert (one.mask is None) == (kind == "boxes")


def planted(*objects):
    """A detector that finds the same objects in every picture."""
    return lambda pictures, threshold, device: [list(objects)] * len(pictures)


@pytest.mark.parametrize("strict", [True, False])
def test_scores_follow_the_rules(strict, geneval):
    reward = geneval(strict=strict, batch_size=2)
    found = planted(Detected("cat", 0.8, (0, 0, 9, 9)), Detected("dog", 0.5, (20, 0, 29, 9)))
    found.classes = ["cat", "dog", "tv"]
    reward.detector = found
    wanted = [
        CAT,
        {"include": [{"class": "cat", "count": 2}]},
        {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]},
        {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}]},
        {"tag": "counting", **CAT},
    ]
    output = evaluate(reward, torch.rand(5, 3, 32, 32), ["a cat"] * 5, wanted)
    correct, share = [1, 0, 1, 0, 0], [1, 0, 1, 2 / 3, 0]
    assert output.info["correct"].tolist() == correct
    assert output.info["share"].tolist() == pytest.approx(share)
    assert output.scores.tolist() == pytest.approx(correct if strict else share)


def test_the_colour_is_clips_likeliest_of_the_object_alone(geneval, checkpoint, pictures):
    reward = geneval()
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:30, 5:25] = True
    objects = [Detected("cat", 0.9, (5, 10, 25, 30), mask), Detected("cat", 0.8, (12.4, 0, 39.6, 33))]
    seen = []
    for number in range(8):
        image = pictures(1, 40, 40, seed=number)[0][0]
        cut = torch.full((3, 20, 20), 0x99 / 255)
        cut[:] = image[:, 10:30, 5:25]
        tower = load_clip(checkpoint("CLIPScore")["clip"], "float32", argument="clip")
        sentences = ("a photo of a {} cat", "a photo of a {}-colored cat", "a photo of a {} object")
        with torch.no_grad():
            texts = [
                tower.text_embeddings([one.format(color) for one in sentences], image.device).mean(0)
                for color in COLORS
            ]
            texts = torch.nn.functional.normalize(torch.stack(texts), dim=1)
            expected = []
            for crop in (cut, image[:, 0:33, 12:40]):
                likeness = tower.image_embeddings(tower.preprocessing(crop[None])) @ texts.T
                expected.append(COLORS[int(likeness.argmax())])
            assert reward.colors(image, "cat", objects) == expected
        seen += expected
    assert len(set(seen)) > 1


def test_what_the_mask_hides_does_not_matter(geneval, pictures):
    reward, image = geneval(), pictures(1, 40, 40)[0][0]
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:20] = True
    other = torch.where(mask, image, 1 - image)
    whole = Detected("cat", 0.9, (0, 0, 40, 40), mask)
    assert reward.colors(image, "cat", [whole]) == reward.colors(other, "cat", [whole])


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_the_reward_runs_whole_on_both_kinds(kind, geneval, pictures):
    images, _ = pictures(3, 48, 48)
    told = [CAT, {"include": [{"class": "tv", "count": 1, "color": "red"}]}, CAT]
    output = evaluate(geneval(kind), images, ["a cat", "a red tv", "a cat"], told)
    assert set(output.scores.tolist()) <= {0.0, 1.0} and output.scores.shape == (3,)


def test_prompts_without_fitting_metadata_are_refused_before_a_model_is_loaded(geneval):
    for lines, message in (
        ([{"prompt": "a cat"}], "needs 'include' in the metadata"),
        ([{"prompt": "a yak", "include": [{"class": "yak", "count": 1}]}], "class='yak'"),
    ):
        with pytest.raises(ValueError, match=message):
            gym.make_vec("DiffusionDenoise-v0", model="no/such/model", reward=geneval(), prompts=lines)
    with pytest.raises(RewardError, match="'include' is missing"):
        evaluate(geneval(), torch.rand(1, 3, 32, 32), ["a cat"])


@pytest.mark.parametrize("broken", ["no detector", "no processor", "architecture"])
def test_other_networks_are_refused(broken, detectors, checkpoint, tmp_path):
    import shutil

    source = checkpoint("CLIPScore")["clip"] if broken == "no detector" else detectors["masks"]
    shutil.copytree(source, tmp_path / "copy")
    if broken == "no processor":
        (tmp_path / "copy" / "preprocessor_config.json").unlink()
    if broken == "architecture":
        config = json.loads((tmp_path / "copy" / "config.json").read_text())
        (tmp_path / "copy" / "config.json").write_text(
            json.dumps({**config, "architectures": ["RTDetrForObjectDetection"]})
        )
    with pytest.raises(ValueError, match=r"reward_kwargs\['detector'\]=.* is no detector that can be used"):
        make_reward("GenEval", detector=str(tmp_path / "copy"), clip=checkpoint("CLIPScore")["clip"])


def test_the_prompt_set_is_what_the_script_writes_and_has_the_six_categories(tmp_path):
    from tools.build_geneval_prompts import OBJECTS, build

    build(out=tmp_path / "geneval_like.jsonl")
    assert (tmp_path / "geneval_like.jsonl").read_bytes() == PATH.read_bytes()
    prompts = make_prompts("geneval-like")
    assert tuple(prompts.splits) == CATEGORIES
    assert len(set(OBJECTS)) == 78 and len(prompts.prompts) != 553  # the published set has 553
    tags = Counter(prompts.metadata[prompt]["tag"] for prompt in prompts.prompts)
    assert [tags[category] for category in CATEGORIES] == [53, 120, 120, 120, 120, 120]
    for prompt in (*prompts.prompts, *prompts.held_out):
        task = read_task(prompt, prompts.metadata[prompt], OBJECTS)
        words = prompt.split()
        for clause in task.include:
            assert clause.color is None or clause.color in words
            assert clause.position is None or clause.position[0] in prompt
            assert clause.count > 1 or clause.name in prompt
        assert bool(task.exclude) == (task.tag == "counting")
    assert "a photo of" in prompts.prompts[0]
