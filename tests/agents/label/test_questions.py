"""What is asked next."""

from collections import Counter

import torch

from diffusion_gym.agents.label.questions import NoQuestion, Question, Questions
from diffusion_gym.rewards.preference.labels import Labels


def answered(questions, number, answer, person="anna"):
    asked = []
    for _ in range(number):
        question = questions.question(person)
        chosen = answer(question) if callable(answer) else answer
        assert questions.answer(person, question.number, chosen)
        asked.append(question)
    return asked


def test_a_tenth_is_asked_again_the_other_way_round_and_nothing_else_twice(questions):
    asked = answered(questions(), 30, "first")
    pairs = Counter(frozenset((question.first, question.second)) for question in asked)
    repeats = [question for question in asked if question.repeats]
    assert [question.number for question in asked] == list(range(1, 31))
    assert [question.number for question in repeats] == [10, 20, 30] and sorted(pairs.values()) == [1] * 24 + [2] * 3
    for question in repeats:
        earlier = asked[question.repeats - 1]
        assert (question.first, question.second) == (earlier.second, earlier.first)
        assert question.number - earlier.number > 5


def test_two_pictures_are_of_one_prompt_and_the_prompts_take_turns(questions):
    made = questions()
    asked = answered(made, 9, "second")
    for question in asked:
        assert {made.labels.pictures[name].prompt for name in (question.first, question.second)} == {question.prompt}
    assert sorted(Counter(question.prompt for question in asked).values()) == [4, 5]


def test_the_question_is_the_same_until_it_is_answered_also_after_a_restart(questions):
    first = questions()
    answered(first, 4, "first")
    question = first.question("anna")
    assert first.question("anna") == question == questions().question("anna")
    assert first.answer("anna", question.number, "equal") and not first.answer("anna", question.number, "first")
    assert first.question("anna") != question
    assert [answer.answer for answer in Labels(first.labels.folder).answers["anna"]] == ["first"] * 4 + ["equal"]


def test_people_have_questions_of_their_own(questions):
    made = questions()
    answered(made, 3, "first", "anna")
    assert made.question("ben").number == 1 and made.question("anna").number == 4
    assert not made.answer("clara", 1, "first") and "clara" not in made.labels.answers


def test_undo_asks_again_for_the_last_answers_one_after_another(questions):
    made = questions()
    asked = answered(made, 10, "first")
    for question in reversed(asked[-3:]):
        assert not made.undo("anna", question.number + 1) and made.undo("anna", question.number)
        assert made.question("anna") == question
    answered(made, 3, "second")
    answers = questions().labels.answers["anna"]
    assert [answer.answer for answer in answers] == ["first"] * 7 + ["second"] * 3
    assert not made.undo("nobody", 1)


def test_it_asks_where_the_fit_is_least_sure(folder):
    features = torch.zeros(12, 2, dtype=torch.float64)
    features[:6, 0] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])  # the first prompt's: well known after some answers
    features[6:, 1] = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 5.0])
    made = Questions(Labels(folder), features)

    def larger(question):
        rows = [int(name[:6]) - 1 for name in (question.first, question.second)]
        first, second = features[rows].sum(1).tolist()
        return "first" if first > second else "second"

    asked = answered(made, 4, larger)
    by_prompt = [question for question in asked if question.prompt == "two blue stars"]
    assert all("000012.png" in (question.first, question.second) for question in by_prompt)  # it differs most
    known = [question for question in answered(made, 5, larger) if question.prompt == "a red circle"]
    gaps = [abs(int(question.first[:6]) - int(question.second[:6])) for question in (*asked, *known)]
    assert gaps[0] > gaps[-1] or gaps[1] > gaps[-1]


def test_a_picture_whose_file_goes_is_not_asked_about(questions):
    made = questions()
    question = made.question("anna")
    made.labels.path(question.first).unlink()
    other = made.question("anna")
    assert isinstance(other, Question) and question.first not in (other.first, other.second)
    for path in sorted((made.labels.folder / "pictures").glob("*.png"))[1:]:
        path.unlink()
    try:
        made.question("anna")
    except NoQuestion as error:
        assert "no two pictures of a prompt" in str(error)
    else:
        raise AssertionError("there was nothing to ask about")


def test_when_all_pairs_were_asked_about_there_is_no_question(questions):
    made = questions()
    try:
        answered(made, 100, "equal")
    except NoQuestion:
        pairs = {answer.pair for answer in made.labels.answers["anna"]}
        assert len(pairs) == 30  # two prompts with 6 * 5 / 2 each
    else:
        raise AssertionError("there were more questions than pairs")
    assert made.question("ben").number == 1
