"""The page's answers, and who is refused."""

import pytest
from starlette.testclient import TestClient

from diffusion_gym.agents.label.app import make_app
from diffusion_gym.rewards.preference.labels import Labels


def ask(client, person="anna"):
    return client.get("/question", params={"person": person}).json()


def post(client, path="/answer", headers=None, **body):
    return client.post(path, json={"person": "anna", "number": 1, "answer": "first", **body}, headers=headers or {})


def test_the_page_comes_with_its_own_script_alone(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert "://" not in page.text and "<style" not in page.text and "onclick" not in page.text
    for name, kind in (("page.js", "text/javascript"), ("page.css", "text/css")):
        assert name in page.text
        found = client.get(f"/{name}")
        assert found.headers["content-type"].startswith(kind) and "://" not in found.text


def test_question_and_answer(client, folder):
    told = ask(client)
    question = told["question"]
    assert told["answered"] == 0 and told["goal"] == 20 and question["number"] == 1
    for side in ("first", "second"):
        picture = client.get(f"/pictures/{question[side]}")
        assert picture.headers["content-type"] == "image/png" and picture.content.startswith(b"\x89PNG")
    after = post(client).json()
    assert after["answered"] == 1 and after["question"]["number"] == 2
    [answer] = Labels(folder).answers["anna"]  # on the disk before the next question is shown
    assert (answer.first, answer.second, answer.answer) == (question["first"], question["second"], "first")


def test_a_second_tab_is_told_the_present_question(client, folder):
    ask(client)
    post(client)
    late = post(client, answer="second")
    assert late.status_code == 409 and late.json()["question"]["number"] == 2
    assert [answer.answer for answer in Labels(folder).answers["anna"]] == ["first"]


def test_undo(client, folder):
    question = ask(client)["question"]
    post(client)
    back = client.post("/undo", json={"person": "anna", "number": 1})
    assert back.status_code == 200 and back.json()["question"] == question and back.json()["answered"] == 0
    assert client.post("/undo", json={"person": "anna", "number": 1}).status_code == 409
    assert Labels(folder).all_answers() == []


def test_agreement_with_oneself_is_told(client):
    ask(client)
    for number in range(1, 11):
        told = post(client, number=number, answer="equal").json()
    assert (told["repeated"], told["same"]) == (1, 1)


def test_an_answer_that_the_disk_does_not_take_is_asked_for_again(client, folder, monkeypatch):
    question = ask(client)["question"]

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        failed = post(client)
    assert failed.status_code == 507 and "No space left" in failed.json()["detail"]
    assert ask(client)["question"] == question and Labels(folder).all_answers() == []
    assert post(client).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.7:8765", "", "localhost:80:80"])
@pytest.mark.parametrize("path", ["/", "/question?person=anna", "/pictures/000001.png"])
def test_a_foreign_host_is_refused(client, host, path):
    assert client.get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "localhost", "[::1]:8765", "[::1]"])
def test_names_of_this_machine_are_not(client, host):
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"host": "evil.example"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/answer", "/undo"])
def test_posts_from_elsewhere_are_refused_and_change_nothing(client, folder, path, headers, status):
    ask(client)
    assert post(client, path, headers).status_code == status
    assert Labels(folder).all_answers() == []
    same = {"origin": "http://127.0.0.1:8765", "sec-fetch-site": "same-origin"}
    assert post(client, "/answer", same).status_code == 200


@pytest.mark.parametrize(
    "body", [{"answer": "left"}, {"person": ""}, {"person": "x" * 41}, {"number": 0}, {"number": "1"}, {"more": 1}]
)
def test_a_wrong_request_is_named(client, folder, body):
    ask(client)
    refused = post(client, **body)
    assert refused.status_code == 422 and next(iter(body)) in refused.json()["detail"]
    assert Labels(folder).all_answers() == []


def test_other_wrong_requests(client):
    assert client.get("/question").status_code == client.get("/question?person=%0a").status_code == 422
    assert client.post("/answer", json={"person": "anna", "number": 1}).status_code == 422
    assert post(client, person="x" * 5000).status_code == 413
    assert client.post("/answer", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    assert client.get("/answer").status_code == 405


def test_nothing_but_the_pictures_is_served(client, folder):
    (folder / "pictures" / "secret.txt").write_text("mine")
    for name in ("secret.txt", "..%2flabels.json", "%2e%2e/labels.json", "000099.png"):
        assert client.get(f"/pictures/{name}").status_code == 404
    (folder / "pictures" / "000001.png").unlink()
    assert "missing" in client.get("/pictures/000001.png").json()["detail"]


def test_no_more_questions(questions, folder):
    made = questions()
    for path in (folder / "pictures").glob("*.png"):
        path.unlink()
    told = ask(TestClient(make_app(made, goal=5), base_url="http://127.0.0.1"))
    assert told["question"] is None and "no two pictures" in told["why"]
