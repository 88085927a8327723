"""`Over50` and `Under30` against transformers' ViT classifier on PIL images."""

import json
import shutil

import pytest
import torch
from transformers import AutoImageProcessor, ViTForImageClassification

from diffusion_gym.rewards import evaluate, make_reward

# Of the thesis, section 5.1.4, with their places among the nine classes of the classifier's config.
OVER_50 = {"50-59": 6, "60-69": 7, "more than 70": 8}
UNDER_30 = {"0-2": 0, "3-9": 1, "10-19": 2, "20-29": 3}


def logits(folder, pil):
    """The classifier's logits `(N, 9)`, one picture at a time."""
    model = ViTForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**processor(picture, return_tensors="pt")).logits for picture in pil])


@pytest.mark.parametrize(("name", "classes"), [("Over50", OVER_50), ("Under30", UNDER_30)])
@pytest.mark.parametrize(("size", "tolerance"), [(32, 1e-4), (48, 0.05)])
def test_score_is_the_sum_of_the_logits(name, classes, size, tolerance, checkpoint, pictures):
    kwargs = checkpoint(name)
    images, pil = pictures(4, size, size)
    expected = logits(kwargs["classifier"], pil)
    output = evaluate(make_reward(name, **kwargs), images, [""] * 4)
    torch.testing.assert_close(output.scores, expected[:, list(classes.values())].sum(1), atol=tolerance, rtol=0)
    for label, column in classes.items():
        torch.testing.assert_close(output.info[f"p({label})"], expected.softmax(1)[:, column], atol=tolerance, rtol=0)


def test_most_probable_class_is_in_info(checkpoint, pictures):
    kwargs = checkpoint("Over50")
    images, pil = pictures(8, 32, 32)
    info = evaluate(make_reward("Over50", **kwargs), images, [""] * 8).info
    assert info["age_class"].tolist() == logits(kwargs["classifier"], pil).argmax(1).tolist()
    chances = torch.stack([value for key, value in info.items() if key.startswith("p(")])
    assert len(chances) == 9
    torch.testing.assert_close(chances.sum(0), torch.ones(8))


def test_classes_are_found_by_name_not_by_place(checkpoint, pictures, tmp_path):
    kwargs = checkpoint("Over50")
    images, pil = pictures(3, 32, 32)
    folder = shutil.copytree(kwargs["classifier"], tmp_path / "reversed")
    config = json.loads((folder / "config.json").read_text())
    labels = list(reversed([config["id2label"][str(index)] for index in range(9)]))
    config |= {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config))
    scores = evaluate(make_reward("Over50", classifier=str(folder)), images, [""] * 3).scores
    expected = logits(kwargs["classifier"], pil)[:, :3].sum(1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_classifier_of_other_classes_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("Over50")["classifier"], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["0"] = "cat"
    config["label2id"] = {label: int(index) for index, label in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has the classes .*'cat'.* not the ages .*nateraw/vit-age-classifier"):
        make_reward("Over50", classifier=str(folder))
