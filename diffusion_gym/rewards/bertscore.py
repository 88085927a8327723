"""BERTScore: how well the words of one sentence find their like in another (Zhang et al. 2020).

Of our own, which gives the published numbers, and by the bert-score package, where somebody wants its very numbers.
The package 0.3.13 fails with transformers 5 on an empty candidate and on a tokenizer without a length limit, asks for a
space before RoBERTa's first word in a way that transformers 5 does not hear, and batches sentences in the order of a
set, so that the last bits differ from run to run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from diffusion_gym.hub import located
from diffusion_gym.pretrained import Fingerprint, fingerprint, load_network
from diffusion_gym.quiet import quiet

# The layer whose embeddings agree best with human judgement on WMT16, as the bert-score package has it.
TUNED_LAYERS: Final = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "distilbert-base-uncased": 5,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
    "deberta-base-mnli": 9,
    "deberta-large-mnli": 18,
    "deberta-xlarge-mnli": 40,
    "deberta-v3-base": 9,
    "deberta-v3-large": 12,
}
_MOST_TOKENS: Final = 512  # where neither the tokenizer nor the model states a limit


class Scores(NamedTuple):
    """Precision, recall and F1 of N pairs, float32 `(N,)` on the CPU."""

    precision: torch.Tensor
    recall: torch.Tensor
    f1: torch.Tensor


def make_bertscore(kind: str, source: str, layers: int | None = None) -> BERTScore:
    """BERTScore by `kind`: `native`, or `package` for the bert-score package.

    Raises:
        FileNotFoundError: the encoder's files are not here and cannot be fetched.
        ValueError: another kind; the package is not installed; or no layer is tuned for the encoder, and none given.
    """
    if kind not in ("native", "package"):
        raise ValueError(f"bertscore={kind!r} must be 'native' or 'package'")
    if kind == "package" and find_spec("bert_score") is None:
        raise ValueError("bertscore='package' needs bert-score; pip install bert-score, or use bertscore='native'")
    return (PackageBERTScore if kind == "package" else BERTScore)(source, layers=layers)


class BERTScore:
    """Scores candidate sentences against reference sentences, without idf weights and without baseline rescaling.

    Args:
        source: a hub id or directory of an encoder such as BERT, RoBERTa or DeBERTa.
        layers: how many of its layers to run; by default the number in `TUNED_LAYERS`.
        batch_size: sentences, and pairs, at once.

    Raises:
        FileNotFoundError: the encoder's files are not here and cannot be fetched.
        ValueError: `layers` is not given and `TUNED_LAYERS` does not know the encoder.
    """

    def __init__(self, source: str, *, layers: int | None = None, batch_size: int = 64) -> None:
        known = TUNED_LAYERS.get(source.rstrip("/").rsplit("/", 1)[-1])
        if layers is None and known is None:
            raise ValueError(
                f"bertscore_model={source!r} has no layer tuned for BERTScore; say which one with bertscore_layers=N, "
                f"or use one of {', '.join(TUNED_LAYERS)}"
            )
        self.layers = known if layers is None else layers
        self.batch_size = batch_size
        self.folder = located(source, argument="bertscore_model", pickled=True)  # read as tensors only
        self._files = fingerprint(self.folder)

    def __call__(
        self, candidates: Sequence[str], references: Sequence[str], device: torch.device | str = "cpu"
    ) -> Scores:
        """Score N pairs; a sentence without a word scores 0, as candidate and as reference.

        Raises:
            ValueError: the encoder has fewer layers than asked for, or is no plain encoder.
        """
        encoder = _load(self.folder, self.layers, torch.device(device), self._files)
        sentences = {text: encoder.tokens(text) for text in dict.fromkeys([*candidates, *references])}
        scores = torch.zeros(3, len(candidates))
        scored = [
            index
            for index, pair in enumerate(zip(candidates, references, strict=True))
            if all(encoder.is_word(sentences[text]).any() for text in pair)
        ]
        pairs = [(candidates[index], references[index]) for index in scored]
        if pairs:
            scores[:, scored] = self._scored(encoder, pairs, sentences)
        return Scores(*scores)

    def _scored(
        self, encoder: _Encoder, pairs: Sequence[tuple[str, str]], sentences: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Precision, recall and F1, `(3, N)`, of pairs with words, whose token ids `sentences` holds."""
        needed = dict.fromkeys(text for pair in pairs for text in pair)
        vectors = self._embed(encoder, {text: sentences[text] for text in needed})
        found = []
        for start in range(0, len(pairs), self.batch_size):
            sides = [
                _pad([vectors[text] for text in side], [encoder.is_word(sentences[text]) for text in side])
                for side in zip(*pairs[start : start + self.batch_size], strict=True)
            ]
            found.append(torch.stack(greedy_match(*sides)).cpu())
        return torch.cat(found, 1)

    def _embed(self, encoder: _Encoder, sentences: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contextual embeddings of token ids, `(L, D)` a sentence; long sentences first, so that little is padded."""
        texts = sorted(sentences, key=lambda text: -len(sentences[text]))
        found: dict[str, torch.Tensor] = {}
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            embedded = encoder.embed([sentences[text] for text in part])
            found.update({text: row[: len(sentences[text])] for text, row in zip(part, embedded, strict=True)})
        return found


class PackageBERTScore(BERTScore):
    """The scores of the bert-score package, with its tokens, on a network that is loaded and checked as ours.

    The package is spared what it fails on: sentences without words, and tokenizers without a limit of length.
    """

    def _scored(
        self, encoder: _Encoder, pairs: Sequence[tuple[str, str]], sentences: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        from bert_score.utils import bert_cos_score_idf, get_tokenizer

        tokenizer = get_tokenizer(str(Path(self.folder).resolve()))  # a path, by which it takes no model of its own
        tokenizer.model_max_length = encoder.limit
        weights = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0.0, tokenizer.cls_token_id: 0.0})
        candidates, references = zip(*pairs, strict=True)
        scores = bert_cos_score_idf(
            encoder.model, references, candidates, tokenizer, weights, device=encoder.device, batch_size=self.batch_size
        )
        return scores.cpu().T


class Side(NamedTuple):
    """One side of N pairs.

    Attributes:
        vectors: embeddings of length 1, `(N, L, D)`.
        tokens: bool `(N, L)`, false where padded.
        words: bool `(N, L)`, false where padded and for the marks of beginning and end.
    """

    vectors: torch.Tensor
    tokens: torch.Tensor
    words: torch.Tensor


def greedy_match(candidate: Side, reference: Side) -> Scores:
    """BERTScore of embeddings: the mean over one side's words of the largest cosine on the other side.

    R = 1/|x| sum_{x_i in x} max_{y_j in y} x_i . y_j for a reference x and a candidate y, P the other way about
    (Zhang et al. 2020, section 3). The marks of beginning and end can be found, but do not count in the mean.
    """
    cosine = candidate.vectors @ reference.vectors.transpose(1, 2)
    recall = _mean(cosine.masked_fill(~candidate.tokens[:, :, None], -2).amax(1), reference.words)
    precision = _mean(cosine.masked_fill(~reference.tokens[:, None, :], -2).amax(2), candidate.words)
    total = precision + recall
    return Scores(precision, recall, torch.where(total == 0, 0, 2 * precision * recall / total))


def _mean(values: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    return (values * words).sum(1) / words.sum(1)


def _pad(vectors: Sequence[torch.Tensor], words: Sequence[torch.Tensor]) -> Side:
    padded = torch.nn.functional.normalize(pad_sequence(list(vectors), batch_first=True), dim=-1)
    tokens = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in vectors], batch_first=True)
    return Side(padded, tokens.to(padded.device), pad_sequence(list(words), batch_first=True).to(padded.device))


class _Encoder:
    """The first layers of an encoder and its tokenizer."""

    def __init__(self, folder: str, layers: int, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.from_pretrained(folder)
        if config.is_encoder_decoder:
            raise ValueError(
                f"bertscore_model={folder!r} is {config.model_type}, no plain encoder; use one such as BERT"
            )
        if not 0 < layers <= config.num_hidden_layers:
            raise ValueError(f"bertscore_layers={layers} must be 1 to {config.num_hidden_layers} for {folder!r}")
        # The deeper layers are never built. A pytorch_model.bin is read as tensors only, so it can run no code.
        model = load_network(
            AutoModel,
            folder,
            argument=f"bertscore_model={folder!r}",
            unused=".",  # deeper layers, and heads
            absent="pooler",  # which BERTScore does not use
            num_hidden_layers=layers,
            dtype=torch.float32,
            weights_only=True,
        )
        self.model = model.to(device).requires_grad_(False).eval()
        # RoBERTa marks a word by the space before it; the first word of a sentence is to be a word like the others.
        space = {"add_prefix_space": True} if config.model_type == "roberta" else {}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **space)
        self.device = device
        # A tokenizer that states no limit says 1e30, which overflows in its own truncation. Two positions fewer than
        # the model has, as RoBERTa's begin at 2.
        positions = getattr(config, "max_position_embeddings", None) or _MOST_TOKENS + 2
        self.limit = min(self.tokenizer.model_max_length, max(positions - 2, 1))
        marks = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        self._marks = torch.tensor([mark for mark in marks if mark is not None], dtype=torch.int64)

    def tokens(self, text: str) -> torch.Tensor:
        """Token ids of a sentence with the marks of beginning and end, int64 `(L,)` on the CPU, cut to the limit."""
        ids = self.tokenizer(text.strip(), truncation=True, max_length=self.limit)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def is_word(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of the token ids `(L,)` count."""
        return ~torch.isin(tokens, self._marks)

    @torch.no_grad()
    def embed(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embeddings of token ids, float32 `(N, L, D)`, padded."""
        padding = self.tokenizer.pad_token_id or 0
        ids = pad_sequence(list(rows), batch_first=True, padding_value=padding)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return self.model(ids.to(self.device), attention_mask=mask.to(self.device))[0].float()


@lru_cache(maxsize=2)
def _load(folder: str, layers: int, device: torch.device, files: Fingerprint) -> _Encoder:
    with quiet():
        return _Encoder(folder, layers, device)
