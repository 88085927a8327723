"""Answers kept on disk."""

import json

import pytest

from diffusion_gym.rewards.vlm import CachedVLM, ChatVLM, VLMError, make_vlm


class Scripted:
    """Answers with the number of the question; None where `lost` says so."""

    remote = False

    def __init__(self, name="scripted"):
        self.name, self.asked, self.lost = name, [], set()

    def describe(self, pictures, questions):
        self.asked.append((len(pictures), list(questions)))
        assert len(pictures) == len(questions)
        return [
            None if question in self.lost else f"{question}: {int(p.int().sum())}"
            for p, question in zip(pictures, questions, strict=True)
        ]


@pytest.fixture
def scripted():
    return Scripted()


def questions(pictures):
    return [f"question {index}" for index in range(len(pictures))]


def test_answers_are_kept_over_objects(scripted, pictures, tmp_path):
    first = CachedVLM(scripted, tmp_path).describe(pictures, questions(pictures))
    again = CachedVLM(scripted, tmp_path).describe(pictures, questions(pictures))
    assert first == again == Scripted().describe(pictures, questions(pictures))
    assert len(scripted.asked) == 1


def test_only_what_is_missing_is_asked(scripted, pictures, tmp_path):
    cached = CachedVLM(scripted, tmp_path)
    cached.describe(pictures[1:3], questions(pictures)[1:3])
    whole = cached.describe(pictures, questions(pictures))
    assert whole == Scripted().describe(pictures, questions(pictures))
    assert scripted.asked[1] == (4, ["question 0", "question 3", "question 4", "question 5"])


def test_key_is_made_of_model_question_and_picture(pictures, tmp_path):
    one, other = Scripted(), Scripted("another model")
    changed = pictures[:1].clone()
    changed[0, 0, 0, 0] ^= 1
    turned = pictures[:1].transpose(1, 2).contiguous().reshape(1, 10, 12, 3)
    reshaped = pictures[:1].reshape(1, 10, 12, 3)  # the same bytes
    for vlm, picture, question in [
        (one, pictures[:1], "a"),
        (one, pictures[:1], "b"),
        (one, changed, "a"),
        (one, turned, "a"),
        (one, reshaped, "a"),
        (other, pictures[:1], "a"),
    ]:
        CachedVLM(vlm, tmp_path).describe(picture, [question])
    assert (len(one.asked), len(other.asked)) == (5, 1)


def test_failures_are_not_kept(scripted, pictures, tmp_path):
    cached = CachedVLM(scripted, tmp_path)
    scripted.lost = {"question 1"}
    assert [answer is None for answer in cached.describe(pictures[:3], questions(pictures)[:3])] == [False, True, False]
    assert len(list(tmp_path.rglob("*.json"))) == 2
    scripted.lost = set()
    assert None not in cached.describe(pictures[:3], questions(pictures)[:3])
    assert scripted.asked[1] == (1, ["question 1"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"answer": 3}', '"a cat"'])
def test_file_that_cannot_be_read_is_asked_for_again(scripted, pictures, tmp_path, text):
    cached = CachedVLM(scripted, tmp_path)
    first = cached.describe(pictures[:1], ["a"])
    [file] = tmp_path.rglob("*.json")
    file.write_text(text)
    assert cached.describe(pictures[:1], ["a"]) == first
    assert len(scripted.asked) == 2
    assert json.loads(file.read_text()) == {"model": "scripted", "question": "a", "answer": first[0]}


def test_nothing_but_whole_files_is_left(scripted, pictures, tmp_path):
    CachedVLM(scripted, tmp_path).describe(pictures, questions(pictures))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6 and all(path.suffix == ".json" and not path.name.startswith(".") for path in files)


def test_hits_make_no_request(server, pictures, tmp_path):
    for _ in range(2):
        vlm = make_vlm(server.url, cache=str(tmp_path), vlm_model="llava")
        assert vlm.describe(pictures, questions(pictures)) == ["a cat"] * 6
    assert len(server.requests) == 6
    make_vlm(server.url, cache=str(tmp_path), vlm_model="other").describe(pictures, questions(pictures))
    assert len(server.requests) == 12


def test_hits_need_no_server(server, pictures, tmp_path):
    CachedVLM(ChatVLM(server.url, vlm_model="llava"), tmp_path).describe(pictures[:2], ["a", "a"])
    server.close()
    cached = CachedVLM(ChatVLM(server.url, vlm_model="llava", retries=0), tmp_path)
    assert cached.describe(pictures[:2], ["a", "a"]) == ["a cat"] * 2
    with pytest.raises(VLMError, match="described none of 1 pictures"):
        cached.describe(pictures[:3], ["a"] * 3)
