"""GenEval's rules on made-up detections, each answer worked out by hand."""

import math

import pytest

from diffusion_gym.rewards.geneval_rules import (
    MOST,
    Detected,
    Task,
    Verdict,
    canonical,
    judge,
    kept,
    read_task,
    relations,
)

CLASSES = ["airplane", "apple", "cat", "dog", "mouse", "remote"]


def at(name, x, y, score=0.9, size=10, color=None):
    """An object with its centre at (x, y); its colour rides on the mask, which no rule looks at."""
    return Detected(name, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color)


def colors_of(name, objects):
    assert objects and all(one.name == name for one in objects)
    return [one.mask for one in objects]


def verdict(metadata, objects):
    task = read_task("a prompt", metadata, CLASSES)
    return judge(task, kept(objects, task.threshold), colors_of)


def wanted(name, count=1, **more):
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize(
    ("metadata", "objects", "held", "asked"),
    [
        # single object
        ({"include": [wanted("cat")]}, [], 0, 1),
        ({"include": [wanted("cat")]}, [at("cat", 5, 5)], 1, 1),
        ({"include": [wanted("cat")]}, [at("cat", 5, 5), at("cat", 50, 5), at("dog", 9, 9)], 1, 1),
        ({"include": [wanted("cat")]}, [at("cat", 5, 5, score=0.3)], 0, 1),
        ({"include": [wanted("cat")]}, [at("cat", 5, 5, score=0.31)], 1, 1),
        # two objects
        ({"include": [wanted("cat"), wanted("dog")]}, [at("dog", 5, 5)], 1, 2),
        ({"include": [wanted("cat"), wanted("dog")]}, [at("dog", 5, 5), at("cat", 6, 6)], 2, 2),
        # counting: three, and not four, at the higher confidence
        *(
            (
                {"tag": "counting", "include": [wanted("cat", 3)], "exclude": [wanted("cat", 4)]},
                [at("cat", 20 * i, 5, score=0.95) for i in range(n)] + [at("cat", 90, 90, score=0.9)],
                held,
                2,
            )
            for n, held in ((2, 1), (3, 2), (4, 1))
        ),
        # colours: as many of the colour as are asked for, among the most confident
        ({"include": [wanted("cat", color="red")]}, [at("cat", 5, 5, color="red")], 2, 2),
        ({"include": [wanted("cat", color="red")]}, [at("cat", 5, 5, color="blue")], 1, 2),
        (
            {"include": [wanted("cat", color="red")]},
            [at("cat", 5, 5, 0.5, color="red"), at("cat", 50, 5, 0.8, color="blue")],
            1,
            2,
        ),
        ({"include": [wanted("cat", color="red")]}, [], 0, 2),
        # position: the second clause to the first
        (
            {"include": [wanted("dog"), wanted("cat", position=["left of", 0])]},
            [at("cat", 5, 50), at("dog", 90, 50)],
            3,
            3,
        ),
        (
            {"include": [wanted("dog"), wanted("cat", position=["left of", 0])]},
            [at("cat", 90, 50), at("dog", 5, 50)],
            2,
            3,
        ),
        (
            {"include": [wanted("dog"), wanted("cat", position=["above", 0])]},
            [at("cat", 50, 5), at("dog", 50, 90)],
            3,
            3,
        ),
        ({"include": [wanted("dog"), wanted("cat", position=["above", 0])]}, [at("cat", 50, 5)], 1, 3),
        ({"include": [wanted("dog"), wanted("cat", position=["above", 0])]}, [at("dog", 50, 5)], 1, 3),
        # a position holds between all of them
        (
            {"include": [wanted("dog", 2), wanted("cat", position=["left of", 0])]},
            [at("cat", 50, 50), at("dog", 90, 50), at("dog", 5, 50)],
            2,
            3,
        ),
        # colour attribution
        (
            {"include": [wanted("cat", color="red"), wanted("dog", color="blue")]},
            [at("cat", 5, 5, color="red"), at("dog", 90, 5, color="blue")],
            4,
            4,
        ),
        (
            {"include": [wanted("cat", color="red"), wanted("dog", color="blue")]},
            [at("cat", 5, 5, color="blue"), at("dog", 90, 5, color="red")],
            2,
            4,
        ),
        # a clause whose colour is wrong is nothing to stand beside
        (
            {"include": [wanted("dog", color="red"), wanted("cat", position=["left of", 0])]},
            [at("cat", 5, 5), at("dog", 90, 5, color="blue")],
            2,
            4,
        ),
    ],
)
def test_verdicts(metadata, objects, held, asked):
    found = verdict(metadata, objects)
    assert found == Verdict(held, asked) and found.correct == (held == asked)


@pytest.mark.parametrize("turn", range(16))
def test_relations_are_those_of_the_direction(turn):
    """Objects on a circle: |cos| or |sin| of the shortened offset above 1/2, as in the authors' code."""
    angle = turn * math.pi / 8
    x, y = 100 * math.cos(angle), 100 * math.sin(angle)
    found = relations(at("cat", x, y), at("dog", 0, 0))
    across, down = (math.copysign(max(abs(part) - 2.0, 0), part) / 100 for part in (x, y))
    expected = {
        name
        for name, holds in {
            "left of": across < -0.5,
            "right of": across > 0.5,
            "above": down < -0.5,
            "below": down > 0.5,
        }.items()
        if holds
    }
    assert found == expected and found


@pytest.mark.parametrize(("distance", "expected"), [(0.0, set()), (2.0, set()), (4.1, {"right of"})])
def test_objects_that_are_too_close_have_no_relation(distance, expected):
    """A tenth of both widths of ten is 2; at 4.1 more than half of the distance is beyond it."""
    assert relations(at("cat", distance, 0), at("dog", 0, 0)) == expected


def test_the_most_confident_are_kept_up_to_a_bound_and_under_one_name():
    many = [at("aeroplane", 0, 0, score=0.31 + number / 100) for number in range(MOST + 4)]
    found = kept([*many, at("cat", 0, 0, score=0.2)], 0.3)
    assert list(found) == ["airplane"] and len(found["airplane"]) == MOST
    assert [one.score for one in found["airplane"]] == sorted((one.score for one in many), reverse=True)[:MOST]


def test_published_names_of_classes_are_understood():
    assert [canonical(name) for name in ("computer mouse", "tv remote", "cat")] == ["mouse", "remote", "cat"]
    assert verdict({"include": [wanted("computer mouse")]}, [at("mouse", 0, 0)]).correct


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "'include' is missing"),
        ({"include": []}, "include"),
        ({"include": [{"class": "cat"}]}, "include.0.count"),
        ({"include": [wanted("cat", 0)]}, "include.0.count=0"),
        ({"include": [wanted("cat", colour="red")]}, "include.0.colour"),
        ({"include": [wanted("cat", color="grey")]}, "include.0.color='grey'"),
        ({"include": [wanted("cta")]}, "class='cta' .*did you mean 'cat'"),
        ({"include": [wanted("cat")], "exclude": [wanted("lion", 2)]}, "class='lion'"),
        ({"include": [wanted("cat", position=["beside", 0])]}, "include.0.position"),
        (
            {"include": [wanted("cat", position=["above", 0])]},
            r"position=\['above', 0\] of include\[0\] must name an earlier",
        ),
    ],
)
def test_other_metadata_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        read_task("a prompt", metadata, CLASSES)


def test_the_task_of_published_metadata():
    line = {"tag": "colors", "include": [wanted("cat", color="red")], "prompt": "a photo of a red cat"}
    task = read_task("a photo of a red cat", line, CLASSES)
    assert isinstance(task, Task) and task.threshold == 0.3 and task.exclude == []
