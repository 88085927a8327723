"""A folder of labels: what is written is read back, and what is wrong is named and not lost."""

import json

import pytest
import torch

from diffusion_gym.rewards.preference.labels import Agreement, Labels, Source


def test_pictures_and_answers_are_read_back(labels, say):
    given = [say(1), say(2, "equal", 5, 6), say(1, "second", 3, 4, person="Ben Ö")]
    for line in given:
        labels.append(line)
    found = Labels(labels.folder)
    assert found.answers == {"anna": given[:2], "Ben Ö": given[2:]} and found.all_answers() == given
    assert found.source == Source(model="Shapes") and list(found.pictures) == [f"{n:06}.png" for n in range(1, 9)]
    assert torch.equal((found.images(["000003.png"]) * 255).round(), labels.given[2:3].permute(0, 3, 1, 2).float())
    found.add_pictures(labels.given[:1], ["a red circle"], "a later round")
    again = Labels(labels.folder)
    assert again.pictures["000009.png"].made_by == "a later round" and again.all_answers() == given


def test_an_answer_that_is_taken_back_is_a_further_line(labels, say):
    for line in (say(1), say(2, "second"), say(2, "undone"), say(2, "equal")):
        labels.append(line)
    assert [answer.answer for answer in Labels(labels.folder).answers["anna"]] == ["first", "equal"]
    assert len((labels.folder / "answers.jsonl").read_text().splitlines()) == 4


def test_a_line_that_a_kill_cut_off_was_no_answer_and_the_next_one_takes_its_place(labels, say):
    labels.append(say(1))
    file = labels.folder / "answers.jsonl"
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole + whole[:cut].replace(b"\n", b""))
        assert Labels(labels.folder).all_answers() == [say(1)]
    found = Labels(labels.folder)
    found.append(say(2, "equal"))
    assert file.read_bytes().startswith(whole) and Labels(labels.folder).all_answers() == [say(1), say(2, "equal")]


def test_an_answer_that_cannot_be_written_does_not_count(labels, say, monkeypatch):
    labels.append(say(1))

    def full(handle):
        raise OSError(28, "No space left on device")

    for line in (say(2), say(1, "undone")):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(OSError, match="No space"):
                labels.append(line)
        assert labels.all_answers() == Labels(labels.folder).all_answers() == [say(1)]
    labels.append(say(2))
    assert len(Labels(labels.folder).all_answers()) == 2


def test_how_far_people_agree_with_themselves(labels, say):
    lines = [say(1), say(2, "equal", 5, 6), say(3, "second", 2, 1, repeats=1), say(4, "first", 6, 5, repeats=2)]
    for line in lines:
        labels.append(line)
    assert labels.agreement() == labels.agreement(["anna"]) == Agreement(2, 1)
    assert labels.agreement(["nobody"]) == Agreement(0, 0)


WRONG = {
    "another folder's picture": ({"number": 1, "first": "000099.png"}, "'000099.png' is no picture of pictures.jsonl"),
    "two prompts": ({"number": 1, "second": "000005.png"}, "two prompts"),
    "a gap": ({"number": 3}, "number=3 of 'anna' comes after 0 answers"),
    "undone twice": ({"number": 1, "answer": "undone"}, "takes back number=1, which is not the last"),
    "repeats another": ({"number": 1, "repeats": 1}, "repeats=1 is no earlier answer"),
    "an unknown answer": ({"number": 1, "answer": "left"}, "answer"),
    "an unknown field": ({"number": 1, "stars": 5}, "stars"),
    "no person": ({"number": 1, "person": " "}, "person"),
    "a path": ({"number": 1, "first": "../../1.png"}, "first"),
}


@pytest.mark.parametrize(("change", "told"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_line_is_named_and_stays_where_it_is(labels, say, change, told):
    file = labels.folder / "answers.jsonl"
    file.write_text(json.dumps({**say(1).model_dump(exclude_none=True), **change}) + "\n")
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"answers\.jsonl, line 1: .*{told}"):
        Labels(labels.folder)
    assert file.read_bytes() == before


def test_other_damage_is_named(labels, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no labels"):
        Labels(tmp_path)
    (labels.folder / "answers.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1 is not JSON"):
        Labels(labels.folder)
    (labels.folder / "answers.jsonl").unlink()
    labels.path("000002.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000002\.png' is no picture"):
        labels.images(["000001.png", "000002.png"])
    labels.path("000002.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"000002\.png' is missing"):
        labels.images(["000002.png"])
    (labels.folder / "labels.json").write_text('{"format": "another", "model": "Shapes"}')
    with pytest.raises(ValueError, match="format"):
        Labels(labels.folder)


def test_a_folder_is_of_one_model_and_of_labels_alone(labels, tmp_path):
    assert Labels.begin(labels.folder, Source(model="Shapes")).pictures == labels.pictures
    with pytest.raises(ValueError, match="holds labels of model='Shapes'.*model='SD14'.*another --out"):
        Labels.begin(labels.folder, Source(model="SD14"))
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files than labels"):
        Labels.begin(tmp_path, Source(model="Shapes"))
    assert (tmp_path / "note.txt").read_text() == "mine" and not (tmp_path / "labels.json").exists()
