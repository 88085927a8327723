"""`HPSv2` against a forward pass of open_clip's architecture, written here from the published names."""

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.rewards.hpsv2 import _blank, _renamed
from diffusion_gym.storage import load_tensors
from diffusion_gym.testing.random_shapes import open_clip_shapes

PROMPTS = ["a red circle", "two blue stars and a green square", ""]


def transformer(weights, name, states, head_width, mask=None):
    """Pre-norm blocks as `open_clip.transformer.ResidualAttentionBlock`."""
    depth = len({key.split(".resblocks.")[1].split(".")[0] for key in weights if key.startswith(f"{name}.resblocks.")})
    for layer in range(depth):
        block = {
            key.removeprefix(f"{name}.resblocks.{layer}."): value
            for key, value in weights.items()
            if key.startswith(f"{name}.resblocks.{layer}.")
        }
        width = states.shape[-1]
        normed = functional.layer_norm(states, (width,), block["ln_1.weight"], block["ln_1.bias"])
        q, k, v = functional.linear(normed, block["attn.in_proj_weight"], block["attn.in_proj_bias"]).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (-1, head_width)).transpose(-2, -3) for part in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(-1, -2) / head_width**0.5
        mixed = (scores if mask is None else scores + mask).softmax(-1) @ heads[2]
        joined = mixed.transpose(-2, -3).flatten(-2)
        states = states + functional.linear(joined, block["attn.out_proj.weight"], block["attn.out_proj.bias"])
        normed = functional.layer_norm(states, (width,), block["ln_2.weight"], block["ln_2.bias"])
        hidden = functional.gelu(functional.linear(normed, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]))
        states = states + functional.linear(hidden, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    return states


def norm(weights, name, states):
    return functional.layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def reference(weights, pixels, tokens):
    """cos of `encode_image` and `encode_text`, for one picture and one prompt's tokens."""
    patches = functional.conv2d(pixels[None], weights["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)[0]
    states = torch.cat([weights["visual.class_embedding"][None], patches]) + weights["visual.positional_embedding"]
    seen = transformer(weights, "visual.transformer", norm(weights, "visual.ln_pre", states), 80)
    image = norm(weights, "visual.ln_post", seen)[0] @ weights["visual.proj"]
    states = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][: len(tokens)]
    mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)
    read = norm(weights, "ln_final", transformer(weights, "transformer", states, 64, mask))
    text = read[tokens.argmax()] @ weights["text_projection"]  # the end-of-text token has the highest number
    return functional.cosine_similarity(image, text, dim=0)


def test_score_is_the_cosine_of_open_clips_embeddings(checkpoint, pictures):
    kwargs = checkpoint("HPSv2")
    images, pil = pictures(3, 32, 32)
    weights = load_tensors(kwargs["weights"])
    tokenizer = AutoTokenizer.from_pretrained(kwargs["processor"])
    processor = AutoImageProcessor.from_pretrained(kwargs["processor"], backend="pil")
    expected = []
    for picture, prompt in zip(pil, PROMPTS, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"][0]
        assert int(tokens.argmax()) == len(tokens) - 1
        expected.append(reference(weights, processor(picture, return_tensors="pt").pixel_values[0], tokens))
    output = evaluate(make_reward("HPSv2", **kwargs), images, PROMPTS)
    torch.testing.assert_close(output.scores, torch.stack(expected), atol=2e-5, rtol=0)
    assert output.scores.std() > 0.01


def test_published_file_is_read_as_it_is(checkpoint, pictures, tmp_path):
    kwargs = checkpoint("HPSv2")
    images, _ = pictures(2, 32, 32)
    stored = {**load_tensors(kwargs["weights"]), "attn_mask": torch.zeros(4, 4)}
    torch.save({"state_dict": stored, "epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    expected = evaluate(make_reward("HPSv2", **kwargs), images, PROMPTS[:2]).scores
    scores = evaluate(make_reward("HPSv2", **{**kwargs, "weights": str(tmp_path)}), images, PROMPTS[:2]).scores
    assert torch.equal(scores, expected)


def test_published_shape_is_vit_huge(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("HPSv2")["processor"])
    with torch.device("meta"):
        blank = {name: torch.empty(shape) for name, shape in open_clip_shapes().items()}
        network = _blank(dict(_renamed(blank)), tokenizer)
    assert isinstance(network, CLIPModel)
    assert sum(value.numel() for value in network.parameters()) == 986_109_441  # open_clip's ViT-H-14, with the scale
    vision, text = network.config.vision_config, network.config.text_config
    assert (vision.num_attention_heads, text.num_attention_heads, vision.image_size) == (16, 16, 224)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_of_another_network_are_refused(change, checkpoint, tmp_path):
    kwargs = checkpoint("HPSv2")
    stored = load_tensors(kwargs["weights"])
    if change == "missing":
        del stored["transformer.resblocks.1.mlp.c_fc.bias"]
    elif change == "unknown":
        stored["visual.extra"] = torch.zeros(1)
    else:
        stored["ln_final.bias"] = torch.zeros(3)
    torch.save(stored, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match="does not hold the weights of HPSv2"):
        make_reward("HPSv2", **{**kwargs, "weights": str(tmp_path)})


@pytest.mark.parametrize("size", [(32, 20), (20, 32)])
def test_pictures_that_are_not_square_get_black_bars(size, checkpoint, pictures):
    reward = make_reward("HPSv2", **checkpoint("HPSv2"))
    images, (picture,) = pictures(1, *size)
    square = Image.new("RGB", (32, 32))
    square.paste(picture, ((32 - picture.width) // 2, (32 - picture.height) // 2))
    padded = (
        torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(1, 32, 32, 3).permute(0, 3, 1, 2) / 255
    )
    scores = [evaluate(reward, shown, ["a star"]).scores for shown in (images, padded)]
    assert torch.equal(*scores)
