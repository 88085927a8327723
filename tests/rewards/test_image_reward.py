"""`ImageReward` against a plain forward pass of the published architecture, weight by weight under its own name."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.rewards.image_reward import ImageRewardNetwork
from diffusion_gym.storage import load_tensors, save_tensors
from diffusion_gym.testing.random_shapes import image_reward_shapes

PROMPTS = ["a red bird", "two green horses riding a bike and playing chess", ""]
HEAD = 64  # width of an attention head: 1024 / 16 in ViT-L, 768 / 12 in BERT


class Published:
    """The scoring of Xu et al. 2023 from the published tensors: ViT, BERT with cross-attention, five linear layers."""

    def __init__(self, tensors):
        self.tensors, self.used = tensors, set()

    def __getitem__(self, name):
        self.used.add(name)
        return self.tensors[name]

    def linear(self, name, x):
        return functional.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, name, x, eps):
        return functional.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)

    @staticmethod
    def attention(q, k, v, keep=None):
        q, k, v = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (q, k, v))
        bias = None if keep is None else torch.where(keep.bool(), 0.0, -torch.inf)[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return mixed.transpose(1, 2).flatten(2)

    def see(self, pixels, layers):
        name = "blip.visual_encoder"
        weight, bias = self[f"{name}.patch_embed.proj.weight"], self[f"{name}.patch_embed.proj.bias"]
        x = functional.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([self[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1) + self[f"{name}.pos_embed"]
        for layer in range(layers):
            block = f"{name}.blocks.{layer}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            x = x + self.linear(f"{block}.attn.proj", self.attention(*qkv.chunk(3, -1)))
            hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", functional.gelu(hidden))
        return self.norm(f"{name}.norm", x, 1e-6)

    def read(self, ids, keep, seen, layers):
        name = "blip.text_encoder"
        places = self[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self[f"{name}.embeddings.word_embeddings.weight"][ids] + places
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for layer in range(layers):
            block = f"{name}.encoder.layer.{layer}"
            for part, source, mask in (("attention", None, keep), ("crossattention", seen, None)):
                memory = x if source is None else source
                q = self.linear(f"{block}.{part}.self.query", x)
                k, v = (self.linear(f"{block}.{part}.self.{one}", memory) for one in ("key", "value"))
                mixed = self.linear(f"{block}.{part}.output.dense", self.attention(q, k, v, mask))
                x = self.norm(f"{block}.{part}.output.LayerNorm", x + mixed, 1e-12)
            hidden = functional.gelu(self.linear(f"{block}.intermediate.dense", x))
            x = self.norm(f"{block}.output.LayerNorm", x + self.linear(f"{block}.output.dense", hidden), 1e-12)
        return x

    def scores(self, pixels, ids, keep, layers=2):
        x = self.read(ids, keep, self.see(pixels, layers), layers)[:, 0]
        for layer in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{layer}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def inputs(kwargs, pil, prompts):
    """Pixel values and padded tokens, as the published package makes them."""
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    pixels = processor(pil, return_tensors="pt").pixel_values
    tokenizer = AutoTokenizer.from_pretrained(kwargs["tokenizer"])
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return pixels, tokens.input_ids, tokens.attention_mask


@pytest.mark.parametrize(("size", "tolerance"), [(32, 1e-4), (48, 0.02)])
def test_score_is_that_of_the_published_network(size, tolerance, checkpoint, pictures):
    kwargs = checkpoint("ImageReward")
    images, pil = pictures(3, size, size)
    published = Published(load_tensors(kwargs["weights"]))
    expected = published.scores(*inputs(kwargs, pil, PROMPTS))
    scores = evaluate(make_reward("ImageReward", **kwargs), images, PROMPTS).scores
    np.testing.assert_allclose(scores.numpy(), expected.numpy(), atol=tolerance)
    assert published.used == set(published.tensors)
    assert expected.max() - expected.min() > 10 * tolerance


def test_score_depends_on_the_picture_and_on_the_prompt(checkpoint, pictures):
    images, _ = pictures(2, 32, 32)
    reward = make_reward("ImageReward", **checkpoint("ImageReward"))
    same_prompt = evaluate(reward, images, [PROMPTS[0]] * 2).scores
    same_picture = evaluate(reward, images[:1].repeat(2, 1, 1, 1), PROMPTS[:2]).scores
    assert (same_prompt[0] - same_prompt[1]).abs() > 1e-3 and (same_picture[0] - same_picture[1]).abs() > 1e-3


def test_published_shapes_make_vit_large_and_bert_base():
    weights = {name: torch.empty(shape, device="meta") for name, shape in image_reward_shapes().items()}
    network = ImageRewardNetwork(weights, torch.float32)
    vision, text = network.vision.config, network.text.config
    assert (vision.num_attention_heads, vision.num_hidden_layers, vision.image_size) == (16, 24, 224)
    assert (text.num_attention_heads, text.num_hidden_layers, text.vocab_size) == (12, 12, 30524)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    vit = 1024 * (3 * 16**2 + 1 + 1 + 197 + 2) + 24 * (12 * 1024**2 + 13 * 1024)
    bert = 768 * (30524 + 512 + 2) + 12 * (12 * 768**2 + 13 * 768)
    crossing = 12 * (2 * 768 * 768 + 2 * 1024 * 768 + 6 * 768)
    head = sum(out * (into + 1) for into, out in ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)))
    assert sum(parameter.numel() for parameter in network.parameters()) == vit + bert + crossing + head


def test_published_file_with_parts_that_do_not_score(checkpoint, pictures, tmp_path):
    kwargs = checkpoint("ImageReward")
    images, _ = pictures(2, 32, 32)
    unused = {
        "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None],
        "blip.vision_proj.weight": torch.zeros(4, 128),
        "blip.text_decoder.cls.bias": torch.zeros(4),
    }
    torch.save({**load_tensors(kwargs["weights"]), **unused}, tmp_path / "ImageReward.pt")
    expected = evaluate(make_reward("ImageReward", **kwargs), images, PROMPTS[:2]).scores
    reward = make_reward("ImageReward", weights=str(tmp_path), tokenizer=kwargs["tokenizer"])
    assert torch.equal(evaluate(reward, images, PROMPTS[:2]).scores, expected)


@pytest.mark.parametrize(
    ("missing", "extra"),
    [
        ("blip.visual_encoder.blocks.1.attn.qkv.bias", None),
        ("blip.text_encoder.encoder.layer.0.crossattention.self.key.weight", None),
        ("mlp.layers.7.bias", None),
        (None, "blip.visual_encoder.blocks.0.attn.gate"),
        (None, "optimizer.step"),
    ],
)
def test_weights_of_another_network_are_refused(missing, extra, checkpoint, tmp_path):
    kwargs = checkpoint("ImageReward")
    tensors = load_tensors(kwargs["weights"])
    tensors.pop(missing, None)
    save_tensors(tmp_path / "w.safetensors", tensors | ({extra: torch.zeros(1)} if extra else {}))
    with pytest.raises(ValueError, match="ImageReward"):
        make_reward("ImageReward", weights=str(tmp_path / "w.safetensors"), tokenizer=kwargs["tokenizer"])
