"""A tiny random LLaVA in this process."""

import huggingface_hub
import pytest
import torch
from PIL import Image

from diffusion_gym.rewards.vlm import LocalVLM
from diffusion_gym.testing.random_vlm import write_random_llava
from waiting import at_once

QUESTIONS = [
    "what is happening in this image?",
    "how many cat are there in this image? answer with a number.",
    "what is this?",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_random_llava(tmp_path_factory.mktemp("models") / "llava"))


@pytest.fixture(scope="module")
def plain(folder):
    """The model asked by hand, one picture at a time: `plain(picture, question, tokens)`."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    processor = LlavaProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()

    def answer(picture, question, tokens):
        text = f"USER: <image>\n{question} ASSISTANT:"  # LLaVA 1.5's prompt, spelt out
        inputs = processor(text=text, images=Image.fromarray(picture.numpy()), return_tensors="pt")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        written = []
        with torch.no_grad():
            for _ in range(tokens):  # greedy decoding, by hand
                logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
                token = logits[0, -1].argmax()
                if token == processor.tokenizer.eos_token_id:
                    break
                written.append(int(token))
                ids = torch.cat([ids, token.view(1, 1)], 1)
                mask = torch.ones_like(ids)
        return processor.tokenizer.decode(written, skip_special_tokens=True).strip()

    return answer


def test_answers_are_greedy_decoding_of_each_picture_alone(folder, plain, pictures):
    questions = QUESTIONS * 2
    answers = LocalVLM(folder, max_tokens=5, batch_size=4).describe(pictures, questions)
    assert answers == [plain(picture, question, 5) for picture, question in zip(pictures, questions, strict=True)]
    assert len(set(answers)) > 2  # they depend on picture and question


@pytest.mark.parametrize("batch_size", [1, 5, 6])
def test_batch_size_leaves_the_answers(folder, pictures, batch_size):
    questions = QUESTIONS * 2
    expected = LocalVLM(folder, max_tokens=4, batch_size=2).describe(pictures, questions)
    assert LocalVLM(folder, max_tokens=4, batch_size=batch_size).describe(pictures, questions) == expected


def test_weights_are_loaded_once(folder, pictures, monkeypatch):
    LocalVLM(folder, max_tokens=1).describe(pictures[:1], QUESTIONS[:1])
    import transformers

    monkeypatch.setattr(
        transformers.AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("again")
    )
    LocalVLM(folder, max_tokens=2).describe(pictures[:1], QUESTIONS[:1])


def test_bfloat16_answers(folder, pictures):
    answers = LocalVLM(folder, max_tokens=3, dtype="bfloat16").describe(pictures[:2], QUESTIONS[:2])
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)


def test_model_that_is_not_here_is_named_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with at_once(), pytest.raises(FileNotFoundError, match="vlm='no-such-owner/no-such-llava'"):
        LocalVLM("no-such-owner/no-such-llava")


def test_model_without_a_chat_template_is_named(folder, pictures, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "llava")
    (tmp_path / "llava" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        LocalVLM(str(tmp_path / "llava")).describe(pictures[:1], QUESTIONS[:1])


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"batch_size": 0}, {"max_tokens": 0}])
def test_option_out_of_range_is_named(options, folder):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        LocalVLM(folder, **options)


@pytest.mark.parametrize(
    "device", ["gpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"))]
)
def test_a_device_that_is_not_here_is_refused_before_the_weights(device):
    with pytest.raises(ValueError, match=f"device='{device}'"):
        LocalVLM("no-one/has-this", device=device)
