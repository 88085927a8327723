#!/usr/bin/env bash
# transformers 5.23.0: three calls of a tokenizer that worked with transformers 4, and that bert-score 0.3.13 makes.
# `encode(text, add_prefix_space=True)` of RoBERTa's is ignored without a word, so that the first word keeps the token of
# a word's inside; `build_inputs_with_special_tokens` is gone, with which it encodes an empty sentence; and the
# `model_max_length` of a tokenizer that states none, 1e30, overflows as the `max_length` of a truncation.
# Seen: transformers 5.23.0: with the space in the call [0, 5, 2], in the tokenizer [0, 4, 5, 2]; AttributeError; OverflowError
# Here: BERTScore's tokens are made by our own calls, with the space in the tokenizer and a limit of the model's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.23.0
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PYTHON'
import sys

import transformers
from transformers import RobertaTokenizer

words = ["<s>", "<pad>", "</s>", "<unk>", "\u0120", "a", "<mask>"]
parts = {"vocab": {word: index for index, word in enumerate(words)}, "merges": []}
plain = RobertaTokenizer(**parts)
called = plain.encode("a", add_prefix_space=True)
made = RobertaTokenizer(**parts, add_prefix_space=True).encode("a")


def raised(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "no error"


empty = raised(lambda: plain.build_inputs_with_special_tokens([]))
limit = raised(lambda: plain.encode("a", truncation=True, max_length=plain.model_max_length))
print(
    f"transformers {transformers.__version__}: with the space in the call {called}, in the tokenizer {made}; {empty}; {limit}"
)
sys.exit(not (called == plain.encode("a") != made and empty == "AttributeError" and limit == "OverflowError"))
PYTHON
