"""The tokenizer of the `Shapes` model: CLIP's byte-pair algorithm, learned until every word is one token."""

from __future__ import annotations

import json
import string
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from diffusion_gym.shapes.captions import words
from tools.shapes.networks import MAX_TOKENS

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def learn_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until each word is a single symbol."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for symbols in spelled for pair in zip(symbols, symbols[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files to `folder` and return it.

    transformers 5 saves only `tokenizer.json`; `vocab.json` and `merges.txt` are kept for older readers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(words())
    letters = list(string.ascii_lowercase)
    symbols = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), BOS, EOS]
    vocab = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = "\n".join(" ".join(pair) for pair in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token=EOS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
