"""BERTScore against the bert-score package, and against its definition in NumPy."""

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch

from diffusion_gym.rewards.bertscore import TUNED_LAYERS, BERTScore, Side, greedy_match
from diffusion_gym.testing.random_vlm import write_random_bert

CANDIDATES = [
    "a dog riding a bike",
    "the picture shows two wolves.",
    "cat",
    "a cat, a cat and a dog at chess",
    "zebra!",
]
REFERENCES = ["a cat riding a bike", "four wolves", "a cat washing dishes", "a dog playing chess", "an ant"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_random_bert(tmp_path_factory.mktemp("models") / "bert"))


@pytest.fixture(scope="module")
def limitless(tmp_path_factory):
    """The same, with a tokenizer that states no limit of length."""
    return str(write_random_bert(tmp_path_factory.mktemp("models") / "bert", max_length=None))


# --- against the package ---


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_pairs_score_as_in_the_package(folder, layers):
    package = pytest.importorskip("bert_score").BERTScorer(folder, num_layers=layers, device="cpu")
    pairs_agree(package, BERTScore(folder, layers=layers)(CANDIDATES, REFERENCES))


def write_byte_level(folder, kind, special, **config):
    """A tiny encoder of class `kind` with letters for tokens."""
    import transformers

    letters = sorted(set("".join(CANDIDATES + REFERENCES)) - {" "})
    vocabulary = {token: index for index, token in enumerate([*special, "\u0120", *letters])}
    tokenizer = getattr(transformers, f"{kind}Tokenizer")
    tokenizer(vocab=vocabulary, merges=[], model_max_length=62).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(
            vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=1.0, **sizes, **config
        )
    ).save_pretrained(folder)
    return tokenizer


def pairs_agree(package, ours):
    for index, (candidate, reference) in enumerate(zip(CANDIDATES, REFERENCES, strict=True)):
        # One pair at a time: padded, the package takes 0 for a cosine that is negative everywhere.
        theirs = package.score([candidate], [reference])
        torch.testing.assert_close(torch.stack([part[index] for part in ours]), torch.cat(theirs), atol=1e-5, rtol=0)


def test_deberta_scores_as_in_the_package(tmp_path):
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    write_byte_level(
        tmp_path / "model",
        "Deberta",
        ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"],
        **relative,
        type_vocab_size=0,
        pad_token_id=1,
    )
    package = pytest.importorskip("bert_score").BERTScorer(str(tmp_path / "model"), num_layers=1, device="cpu")
    pairs_agree(package, BERTScore(str(tmp_path / "model"), layers=1)(CANDIDATES, REFERENCES))


def test_roberta_scores_as_in_the_package_with_the_space_that_it_asks_for(tmp_path):
    folder = str(tmp_path / "model")
    tokenizer = write_byte_level(folder, "Roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pad_token_id=1)
    package = pytest.importorskip("bert_score").BERTScorer(folder, num_layers=1, device="cpu")
    # It asks for a space before the first word with each sentence, which transformers 5 overhears.
    package._tokenizer = tokenizer.from_pretrained(folder, add_prefix_space=True)
    pairs_agree(package, BERTScore(folder, layers=1)(CANDIDATES, REFERENCES))


def test_layers_are_the_packages_own():
    theirs = pytest.importorskip("bert_score.utils").model2layers
    by_name = {name.rsplit("/", 1)[-1]: layers for name, layers in theirs.items()}
    assert TUNED_LAYERS == {name: by_name[name] for name in TUNED_LAYERS}


# --- against the definition ---


def by_definition(folder, layers, candidate, reference):
    """Precision and recall of one pair, in float64, from the hidden states that transformers gives."""
    from transformers import BertModel, BertTokenizer

    tokenizer, model = BertTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    sides = []
    for text in (candidate, reference):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[layers][0].double().numpy()
        sides.append(states / np.linalg.norm(states, axis=1, keepdims=True))
    cosine = sides[0] @ sides[1].T
    # The marks at both ends can be matched, but do not count themselves.
    return cosine[1:-1].max(1).mean(), cosine[:, 1:-1].max(0).mean()


def test_recall_is_the_mean_over_the_references_words_of_the_best_cosine(limitless):
    scores = BERTScore(limitless, layers=2)(CANDIDATES, REFERENCES)
    for index, pair in enumerate(zip(CANDIDATES, REFERENCES, strict=True)):
        precision, recall = by_definition(limitless, 2, *pair)
        assert scores.recall[index].item() == pytest.approx(recall, abs=1e-5)
        assert scores.precision[index].item() == pytest.approx(precision, abs=1e-5)
        assert scores.f1[index].item() == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)


def angles(*degrees):
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


def test_greedy_match_of_a_case_worked_out_by_hand():
    yes, no = True, False
    candidate = Side(torch.tensor([angles(0, 90, 0)]), torch.tensor([[yes, yes, no]]), torch.tensor([[yes, yes, no]]))
    reference = Side(
        torch.tensor([angles(60, 180, 90)]), torch.tensor([[yes, yes, yes]]), torch.tensor([[yes, yes, no]])
    )
    scores = greedy_match(candidate, reference)
    # Recall: 60 degrees is nearest to 90 (30 apart), 180 to 90. Precision: 0 to 60; 90 to the mark at 90.
    recall, precision = (math.cos(math.radians(30)) + 0) / 2, (0.5 + 1) / 2
    assert scores.recall.item() == pytest.approx(recall, abs=1e-6)
    assert scores.precision.item() == pytest.approx(precision, abs=1e-6)
    assert scores.f1.item() == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)


def test_padding_does_not_hide_a_negative_cosine():
    token = torch.ones(1, 1, dtype=torch.bool)
    one = Side(torch.tensor([angles(0)]), token, token)
    other = Side(torch.tensor([angles(120)]), token, token)
    padded = Side(
        torch.tensor([[*angles(120), [0.0, 0.0]]]), torch.tensor([[True, False]]), torch.tensor([[True, False]])
    )
    for pair in ((one, other), (one, padded), (padded, one)):
        scores = greedy_match(*pair)
        assert scores.recall.item() == scores.precision.item() == pytest.approx(-0.5, abs=1e-6)


# --- what breaks the package ---


@pytest.mark.parametrize("empty", ["", "   ", "\n"])
def test_sentence_without_words_scores_zero(folder, empty):
    score = BERTScore(folder, layers=2)
    scores = score([empty, "a cat", "a cat"], ["a cat", empty, "a cat"])
    for part in scores:
        assert part[:2].tolist() == [0, 0] and part[2].item() == pytest.approx(1, abs=1e-5)
    assert [part.tolist() for part in score([empty], [empty])] == [[0], [0], [0]]


def test_no_pairs_give_no_scores(folder):
    assert [tuple(part.shape) for part in BERTScore(folder, layers=2)([], [])] == [(0,)] * 3


def test_tokenizer_without_a_limit_scores_like_one_with(folder, limitless):
    limited, unlimited = (BERTScore(path, layers=2)(CANDIDATES, REFERENCES) for path in (folder, limitless))
    for one, other in zip(limited, unlimited, strict=True):
        assert torch.equal(one, other)


def test_text_longer_than_the_model_is_cut(limitless):
    words = "a cat riding a bike and a dog playing chess " * 40  # the model has 64 positions
    scores = BERTScore(limitless, layers=2)([words, words + "wolves"], ["a cat", "a cat"])
    assert scores.recall.isfinite().all() and scores.recall[0] == scores.recall[1]


# --- where its files are ---


def as_pickle(folder, target):
    """The same encoder with its weights as `pytorch_model.bin`."""
    from safetensors.torch import load_file

    shutil.copytree(folder, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    return str(target)


def test_encoder_published_as_a_pickle_is_read_as_tensors(folder, tmp_path):
    expected = BERTScore(folder, layers=2)(CANDIDATES, REFERENCES)
    found = BERTScore(as_pickle(folder, tmp_path / "bert"), layers=2)(CANDIDATES, REFERENCES)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class Intruder:
    def __reduce__(self):
        return os.system, ("true",)


def test_pickle_that_would_run_code_is_refused(folder, tmp_path):
    score = BERTScore(as_pickle(folder, tmp_path / "bert"), layers=2)
    torch.save({"weights": Intruder()}, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        score(["a cat"], ["a cat"])


@pytest.mark.parametrize("pickled", [False, True])
def test_cached_encoder_is_found_offline(folder, tmp_path, monkeypatch, pickled):
    repository = tmp_path / "models--microsoft--deberta-base-mnli"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    if pickled:
        as_pickle(folder, snapshot)
    else:
        shutil.copytree(folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    score = BERTScore("microsoft/deberta-base-mnli", layers=2)
    for one, other in zip(
        score(CANDIDATES, REFERENCES), BERTScore(folder, layers=2)(CANDIDATES, REFERENCES), strict=True
    ):
        assert torch.equal(one, other)


def test_encoder_that_the_hub_has_as_a_pickle_is_fetched(folder, tmp_path, monkeypatch):
    there = Path(as_pickle(folder, tmp_path / "downloaded"))
    fetched = []

    def snapshot_download(source, *, local_files_only=False, allow_patterns=None, **others):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        fetched.extend(allow_patterns)
        return str(there)

    def hf_hub_download(source, filename, **others):
        fetched.append(filename)
        return str(there / filename)

    files = [SimpleNamespace(rfilename=path.name, size=1) for path in there.iterdir()]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert BERTScore("microsoft/deberta-base-mnli", layers=2).folder == str(there)
    assert {"config.json", "tokenizer.json", "pytorch_model.bin"} <= set(fetched)


# --- batches, devices, errors ---


def test_batches_leave_the_scores(folder):
    together = BERTScore(folder, layers=2)(CANDIDATES * 3, REFERENCES * 3)
    for size in (1, 2):
        for one, other in zip(
            BERTScore(folder, layers=2, batch_size=size)(CANDIDATES, REFERENCES), together, strict=True
        ):
            torch.testing.assert_close(one.repeat(3), other, atol=1e-6, rtol=0)


def test_unknown_encoder_needs_its_layer(folder):
    with pytest.raises(
        ValueError, match=r"bertscore_model='.*' has no layer tuned for BERTScore; .*bertscore_layers=N"
    ):
        BERTScore(folder)


@pytest.mark.parametrize("layers", [0, 4])
def test_layer_that_is_not_there_is_named(folder, layers):
    with pytest.raises(ValueError, match=f"bertscore_layers={layers} must be 1 to 3"):
        BERTScore(folder, layers=layers)(["a"], ["a"])


def test_model_with_a_decoder_is_refused(tmp_path):
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no plain encoder"):
        BERTScore(str(tmp_path), layers=1)(["a"], ["a"])
