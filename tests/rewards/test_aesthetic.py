"""`Aesthetic` against transformers' CLIP and a head in NumPy; the public head, where it is at hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPModel

import diffusion_gym
from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.rewards.score_mlp import ScoreMLP, read_weights, score_mlp
from diffusion_gym.storage import load_tensors, save_tensors

PUBLIC_HEAD = Path(diffusion_gym.__file__).parents[2] / "shared" / "data" / "laion_aesthetic_vit_l14_head.pth"
LAYERS = ("0", "2", "4", "6", "7")


def numpy_head(weights, embeddings):
    """The five linear layers in float64: `(N, D)` -> `(N,)`."""
    values = embeddings.astype(np.float64)
    for layer in LAYERS:
        weight, bias = (weights[f"layers.{layer}.{part}"].double().numpy() for part in ("weight", "bias"))
        values = values @ weight.T + bias
    return values[:, 0]


def unit_embeddings(folder, pil):
    """CLIP's normalised picture embeddings, as its own forward pass returns them: `(N, D)`."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(pil, return_tensors="pt").pixel_values
    with torch.no_grad():
        return model(pixel_values=pixels, input_ids=torch.tensor([[0, 1]])).image_embeds.numpy()


@pytest.mark.parametrize(("size", "tolerance"), [(32, 1e-5), (50, 0.02), (12, 0.02)])
def test_score_is_the_head_on_the_normalised_embedding(size, tolerance, checkpoint, pictures):
    kwargs = checkpoint("Aesthetic")
    images, pil = pictures(3, size, size)
    expected = numpy_head(load_tensors(kwargs["head"]), unit_embeddings(kwargs["clip"], pil))
    scores = evaluate(make_reward("Aesthetic", **kwargs), images, [""] * 3).scores
    np.testing.assert_allclose(scores.numpy(), expected, atol=tolerance)
    assert np.ptp(expected) > 10 * tolerance


@pytest.mark.skipif(not PUBLIC_HEAD.is_file(), reason="the public head is not at hand")
def test_public_head_loads_strictly_and_agrees_with_numpy():
    weights = torch.load(PUBLIC_HEAD, map_location="cpu", weights_only=True)
    embeddings = np.random.default_rng(0).standard_normal((8, 768)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    head = score_mlp(read_weights(PUBLIC_HEAD), source=str(PUBLIC_HEAD)).eval()
    with torch.no_grad():
        scores = head(torch.from_numpy(embeddings)).numpy()
    np.testing.assert_allclose(scores, numpy_head(weights, embeddings), atol=1e-4)
    assert set(head.state_dict()) == set(weights) == {f"layers.{n}.{p}" for n in LAYERS for p in ("weight", "bias")}


def test_head_is_found_as_file_or_folder_in_both_formats(checkpoint, pictures, tmp_path):
    kwargs = checkpoint("Aesthetic")
    images, _ = pictures(2, 32, 32)
    torch.save(load_tensors(kwargs["head"]), tmp_path / "aesthetic-model.pth")
    expected = evaluate(make_reward("Aesthetic", **kwargs), images, [""] * 2).scores
    for head in (tmp_path, tmp_path / "aesthetic-model.pth"):
        scores = evaluate(make_reward("Aesthetic", clip=kwargs["clip"], head=str(head)), images, [""] * 2).scores
        assert torch.equal(scores, expected)


def test_head_that_would_run_code_is_refused(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"layers.0.weight": Evil()}, tmp_path / "aesthetic-model.pth")
    with pytest.raises(ValueError, match="no file of tensors that can be read safely"):
        make_reward("Aesthetic", clip=checkpoint("Aesthetic")["clip"], head=str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 40])
def test_damaged_head_is_refused(content, checkpoint, tmp_path):
    (tmp_path / "head.pth").write_bytes(content)
    with pytest.raises(ValueError, match="head.pth"):
        make_reward("Aesthetic", clip=checkpoint("Aesthetic")["clip"], head=str(tmp_path / "head.pth"))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_head_of_other_layers_is_refused(change):
    weights = dict(ScoreMLP(8).state_dict())
    if change == "missing":
        del weights["layers.4.bias"]
    elif change == "unknown":
        weights["layers.9.bias"] = torch.zeros(1)
    else:
        weights["layers.2.weight"] = torch.zeros(128, 128)
    with pytest.raises(ValueError, match="some/head does not hold the weights"):
        score_mlp(weights, source="some/head")


def test_head_for_another_clip_is_refused(checkpoint, tmp_path):
    save_tensors(tmp_path / "head.safetensors", ScoreMLP(24).state_dict())
    with pytest.raises(ValueError, match="embeddings of 24 numbers, but clip=.* gives 16"):
        make_reward("Aesthetic", clip=checkpoint("Aesthetic")["clip"], head=str(tmp_path / "head.safetensors"))
