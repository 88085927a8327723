"""A fitted reward: how it is made, read, and what it scores."""

import json

import pytest
import torch

from diffusion_gym.models import load_model
from diffusion_gym.rewards import RewardError, evaluate, make_reward
from diffusion_gym.rewards.preference import reward as module
from diffusion_gym.rewards.preference.features import (
    ClipFeatures,
    DenoiserFeatures,
    FeatureSource,
    feature_source,
    load_features,
)
from diffusion_gym.rewards.preference.fitting import LEAST_ANSWERS, fit_labels, picture_features
from diffusion_gym.rewards.preference.labels import Answer, Labels, Source
from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata
from diffusion_gym.testing.random_checkpoints import CHECKPOINTS

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "two blue stars"]


def brightness(images, prompts):
    """A feature that tells the answers, one that tells nothing, and one that is constant."""
    flat = images.flatten(1)
    return torch.stack([flat.mean(1), flat[:, 0], torch.ones(len(flat))], dim=1)


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """Labels of 24 pictures; the brighter one is chosen."""
    labels = Labels.begin(tmp_path_factory.mktemp("bright") / "labels", Source(model="Shapes"))
    generator = torch.Generator().manual_seed(0)
    levels = torch.rand(24, 1, 1, 1, generator=generator) * 200
    pictures = (levels + 50 * torch.rand(24, 32, 32, 3, generator=generator)).to(torch.uint8)
    labels.add_pictures(pictures, [PROMPTS[number // 12] for number in range(24)], "a test")
    names, means = list(labels.pictures), pictures.float().mean((1, 2, 3))
    number = 0
    for row, first in enumerate(names):
        for place in range(row + 1, 24):
            if row // 12 == place // 12 and number < 2 * LEAST_ANSWERS:
                number += 1
                answer = "first" if means[row] > means[place] else "second"
                labels.append(Answer(person="anna", number=number, first=first, second=names[place], answer=answer))
    return labels


@pytest.fixture(scope="module")
def fitted(bright):
    return fit_labels(bright, brightness, CPU)


@pytest.fixture
def file(fitted, tmp_path):
    path = tmp_path / "labels.safetensors"
    module.save_fitted(path, fitted, FeatureSource("denoiser", "Shapes"), [32, 32])
    return path


def test_the_fit_predicts_what_it_has_not_seen_and_says_how_well(bright, fitted):
    low, high = fitted.interval
    assert fitted.choices == fitted.answers == 2 * LEAST_ANSWERS and fitted.accuracy > 0.9
    assert 0.5 < low < fitted.accuracy <= high <= 1 and fitted.posterior.weights[0] > 0
    scaled = fitted.scaling(picture_features(bright, list(bright.pictures), brightness, CPU))
    torch.testing.assert_close(scaled[:, :2].std(0, correction=0), torch.ones(2, dtype=torch.float64))
    assert (scaled[:, 2] == 0).all()


def test_too_few_choices_are_refused(labels, say):
    for number in range(1, LEAST_ANSWERS + 5):
        labels.append(say(number, "equal" if number > LEAST_ANSWERS - 1 else "first"))
    with pytest.raises(
        ValueError, match=f"holds {LEAST_ANSWERS - 1} answers that choose .* needs {LEAST_ANSWERS}; go on"
    ):
        fit_labels(labels, brightness, CPU)


def test_a_file_scores_as_the_fit_that_it_holds_in_any_batch(file, fitted, monkeypatch):
    monkeypatch.setattr(module, "load_features", lambda source, device: brightness)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prompts = ["a red circle"] * 5
    output = evaluate(make_reward(str(file), batch_size=2), images, prompts)
    stored = (images * 255).round() / 255  # as its PNG has it
    scaled = fitted.scaling(brightness(stored, prompts))
    torch.testing.assert_close(output.scores, (scaled @ fitted.posterior.weights).float())
    torch.testing.assert_close(output.info["uncertainty"], fitted.posterior.spread(scaled).float())
    wary = evaluate(make_reward(str(file), pessimism=0.5), images, prompts)
    torch.testing.assert_close(wary.scores, output.scores - 0.5 * output.info["uncertainty"])
    both = make_reward(f"{file}=2,Compressibility=0")
    torch.testing.assert_close(evaluate(both, images, prompts).scores, 2 * output.scores)
    assert make_reward(str(file)).accuracy == fitted.accuracy


def test_a_larger_picture_is_of_another_model(file):
    with pytest.raises(RewardError, match="fitted to pictures of 32 x 32 pixels of 'Shapes', and these have 64 x 64"):
        evaluate(make_reward(str(file)), torch.rand(1, 3, 64, 64), ["a cat"])


def test_a_file_of_something_else_is_named(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file; make it with `diffusion-gym fit-preferences"):
        make_reward(str(tmp_path / "none.safetensors"))
    for keyword, value in (("device", "tpu9"), ("batch_size", 0), ("pessimism", -1.0)):
        with pytest.raises(ValueError, match=f"{keyword}={value!r}"):
            make_reward(str(file), **{keyword: value})
    with pytest.raises(TypeError, match="'batch'.*did you mean 'batch_size'"):
        make_reward(str(file), batch=3)
    tensors, (key, told) = load_tensors(file), *tensors_metadata(file).items()
    header = json.loads(told)
    wrong = [
        (tensors, {}, "file of other tensors"),
        (tensors, {key: "{"}, "not JSON"),
        (tensors, {key: json.dumps({**header, "features": "guess"})}, "features"),
        (tensors, {key: json.dumps({**header, "layers": 3})}, "layers"),
        ({**tensors, "weights": tensors["weights"][:1]}, {key: told}, "holds tensors"),
        ({**tensors, "std": tensors["std"] * torch.nan}, {key: told}, "not finite"),
        ({"weights": tensors["weights"]}, {key: told}, "holds tensors"),
    ]
    for content, metadata, reason in wrong:
        save_tensors(file, content, metadata)
        with pytest.raises(ValueError, match=f"labels.safetensors.*{reason}.*fit-preferences"):
            make_reward(str(file))
    file.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        make_reward(str(file))


@pytest.mark.parametrize("name, width", [("Shapes", 96), ("ShapesFlow", None)])
def test_denoiser_features_depend_on_picture_and_prompt_and_not_on_the_batch(name, width):
    """Of a UNet's middle block, and of a transformer's middle one of its blocks."""
    width = width or load_model(name, "cpu", "float32").unet.inner_dim
    features = load_features(feature_source("denoiser", Source(model=name)), CPU)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "two blue stars", "a red circle"]
    found = features(images, prompts)
    assert found.shape == (3, 8 * width) and found.isfinite().all() and not found.requires_grad
    for row in range(3):
        alone = features(images[row : row + 1], prompts[row : row + 1])[0]
        torch.testing.assert_close(alone, found[row], rtol=1e-3, atol=1e-4)
    other = features(images, ["a green square", *prompts[1:]])
    assert not torch.allclose(other[0], found[0], atol=1e-3) and torch.allclose(other[1:], found[1:], atol=1e-5)
    again = features(images[:1].roll(8, 3), prompts[:1])
    assert not torch.allclose(again[0], found[0], atol=1e-3)


def test_a_picture_that_is_encoded_decodes_to_itself():
    model = load_model("Shapes", "cpu", "float32")
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0)) * 0.5
    images = model.decode(latents)
    again = model.decode(model.encode(images))
    assert (again - images).abs().mean() < 0.05 < (images[0] - images[1]).abs().mean()


def test_a_model_without_prompts_has_no_such_features():
    class Unconditional:
        name, prompt_length = "Church", 0

    class Unencoded:
        """Its autoencoder has no distribution of latents, as Sana's has none."""

        name, prompt_length, image_shape, latent_shape = "Sana", 4, (8, 8, 3), (4, 2, 2)
        unet = torch.nn.Module()
        unet.layers = torch.nn.ModuleList([torch.nn.Identity()])

        def encode(self, images):
            return images.latent_dist

    for model in (Unconditional(), Unencoded()):
        with pytest.raises(ValueError, match=f"'{model.name}' is not; give a CLIPModel"):
            DenoiserFeatures(model)


def test_clip_features_are_the_embedding_and_its_product_with_the_prompt(tmp_path):
    clip = CHECKPOINTS["CLIPScore"](tmp_path)["clip"]
    assert feature_source(clip, Source(model="Shapes")) == FeatureSource("clip", clip)
    features, images = load_features(FeatureSource("clip", clip), CPU), torch.rand(2, 3, 32, 32)
    assert isinstance(features, ClipFeatures)
    found = features(images, PROMPTS)
    width = found.shape[1] // 2
    torch.testing.assert_close(found[:, :width].norm(dim=1), torch.ones(2))
    cosine = evaluate(make_reward("CLIPScore", clip=clip), images, PROMPTS).info["cosine"]
    torch.testing.assert_close(found[:, width:].sum(1), cosine)
