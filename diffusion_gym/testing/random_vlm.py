"""Writes a tiny LLaVA and a tiny BERT with random weights, for tests and trials; downloads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

_WORDS: Final = """a an the is are in of and at on image picture photo what how many there answer with number happening
    going concisely this animal cat dog horse wolf wolves bird green red riding bike playing chess washing dishes
    zero one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9 USER ASSISTANT : . , ?"""
_PIXELS, _PATCH = 28, 14
# The manner of LLaVA 1.5: "USER: <image>\nquestion ASSISTANT:".
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_random_llava(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny LLaVA: CLIP vision tower of 28x28 pixels, Llama, and their processor with a chat template.

    Args:
        folder: where to.
        seed: seed of the weights.

    Returns:
        The folder.
    """
    from diffusion_gym.quiet import quiet
    from diffusion_gym.storage import write_folder

    with quiet():
        from transformers import LlavaForConditionalGeneration, LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        tokenizer = _tokenizer("<s>", "</s>", "<pad>", "<unk>", extra=["<image>"])
        processor = LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": _PIXELS}, crop_size={"height": _PIXELS, "width": _PIXELS}),
            tokenizer,
            patch_size=_PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=_CHAT_TEMPLATE,
        )
        torch.manual_seed(seed)
        write_folder(folder, LlavaForConditionalGeneration(_llava_config(tokenizer)).eval().save_pretrained)
        processor.save_pretrained(folder)
    return Path(folder)


def write_random_bert(folder: str | Path, *, seed: int = 0, max_length: int | None = 64) -> Path:
    """Write a tiny BERT of 3 layers with its tokenizer.

    Args:
        folder: where to.
        seed: seed of the weights.
        max_length: the tokenizer's limit of tokens; None for a tokenizer that states none.

    Returns:
        The folder.
    """
    from diffusion_gym.quiet import quiet
    from diffusion_gym.storage import write_folder

    with quiet():
        from transformers import BertConfig, BertModel, BertTokenizer

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = dict.fromkeys([*special, *_WORDS.lower().split(), *(f"##{letter}" for letter in "ings")])
        limit = {} if max_length is None else {"model_max_length": max_length}
        tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, **limit)
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=1.0,  # so that contexts differ by more than rounding
        )
        write_folder(folder, BertModel(config).eval().save_pretrained)
        tokenizer.save_pretrained(folder)
    return Path(folder)


def random_prompt_alignment(folder: Path, *, seed: int = 0) -> dict[str, Any]:
    """Write both under `folder`; the `reward_kwargs` of `PromptAlignment` that use them."""
    return {
        "vlm": str(write_random_llava(folder / "llava", seed=seed)),
        "max_tokens": 4,
        "bertscore_model": str(write_random_bert(folder / "bert", seed=seed)),
        "bertscore_layers": 2,
    }


def _tokenizer(bos: str, eos: str, pad: str, unk: str, extra: list[str]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = dict.fromkeys([pad, bos, eos, unk, *extra, *_WORDS.split()])
    vocab = {word: index for index, word in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=unk))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        additional_special_tokens=extra,
        model_max_length=512,
        padding_side="left",
    )


def _llava_config(tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_PIXELS,
        patch_size=_PATCH,
        initializer_range=0.5,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        **tokens,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(_PIXELS // _PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=tokenizer.pad_token_id,
    )
