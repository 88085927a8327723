"""The client of the reward server against answers that a test scripts; the real server is in `server/`."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from diffusion_gym.rewards import REWARDS, RewardError, default_prompts, evaluate, make_reward
from diffusion_gym.rewards.remote import RemoteReward
from diffusion_gym.rewards.server.wire import TOKEN
from diffusion_gym.rewards.worker import RewardWorker

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
HEALTH = {"name": "Stub", "max_batch": 64, "max_bytes": 10**6}


class Stub:
    """Answers /health, and /score with `answers` in order, the last one for ever: (status, JSON, headers)."""

    def __init__(self, health=HEALTH, answers=()):
        self.health, self.answers, self.requests, self.tokens = health, list(answers), [], []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, stub.health)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(body)
                if stub.answers:
                    self.reply(*(stub.answers.pop(0) if len(stub.answers) > 1 else stub.answers[0]))
                else:
                    self.reply(200, {"scores": [float(len(prompt)) for prompt in body["prompts"]], "info": {}})

            def reply(self, status, answer, headers=()):
                stub.tokens.append(self.headers["Authorization"])
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def stub():
    stubs = []

    def make(*args, **keywords):
        stubs.append(Stub(*args, **keywords))
        return stubs[-1]

    yield make
    for one in stubs:
        one.server.shutdown()
        one.server.server_close()


def scored(*scores, **more):
    return 200, {"scores": list(scores), "info": {}, **more}, {}


# --- pictures that are not finite ------------------------------------------------------------------------------


def test_pictures_that_are_not_finite_are_not_sent_and_score_nan(stub):
    server = stub()
    reward, images = make_reward(server.url), IMAGES.clone()
    images[1, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="1 of 3 pictures hold NaN"):
        scores = evaluate(reward, images, ["a", "bb", "ccc"]).scores
    assert [request["prompts"] for request in server.requests] == [["a", "ccc"]]
    assert scores.isnan().tolist() == [False, True, False] and scores[[0, 2]].tolist() == [1, 3]
    with pytest.raises(ValueError, match="NaN or infinite values"):
        reward(images, PROMPTS, [{}] * 3)


def test_a_worker_that_is_closed_just_before_the_call_ends_it(stub, monkeypatch):
    """`cancel` comes between the worker taking the batch and the call's first line."""
    server = stub(answers=[(503, {"detail": "busy"}, {})])
    reward, entered, cancelled = RemoteReward(server.url, patience=600.0), threading.Event(), threading.Event()
    clear = reward._cancelled.clear

    def late():
        entered.set()
        assert cancelled.wait(30)
        clear()

    monkeypatch.setattr(reward._cancelled, "clear", late)
    cancel = reward.cancel
    monkeypatch.setattr(reward, "cancel", lambda: (cancel(), cancelled.set()))
    worker = RewardWorker(reward)
    future = worker.submit(IMAGES, PROMPTS)
    assert entered.wait(30)
    worker.close()
    with pytest.raises(RewardError, match="given up before it answered"):
        future.result(1.5)


# --- finding the server ----------------------------------------------------------------------------------------


def test_it_is_made_from_its_url(stub):
    reward = make_reward(stub().url, timeout=5.0, patience=1.0)
    assert isinstance(reward, RemoteReward) and reward.background
    assert (reward.name, reward.timeout, reward.patience) == ("Stub", 5.0, 1.0)


def test_the_server_tells_which_metadata_its_reward_needs(stub):
    assert RemoteReward(stub().url).needs_metadata == ()
    assert RemoteReward(stub({**HEALTH, "needs_metadata": ["text"]}).url).needs_metadata == ("text",)


def test_the_prompts_are_those_of_the_reward_of_that_name(stub):
    url = stub({**HEALTH, "name": "Color"}).url
    assert default_prompts(url, make_reward(url)) == REWARDS.default_prompts("Color") == "shapes-color"
    assert RemoteReward(stub().url).default_prompts is None


def test_nobody_there_names_the_command():
    with pytest.raises(RewardError, match=r"127.0.0.1:9' does not answer .*diffusion-gym serve-reward NAME --port 9`"):
        RemoteReward("http://127.0.0.1:9")


@pytest.mark.parametrize("health", [{}, [], {"name": "x"}])
def test_another_service_there_is_named(stub, health):
    with pytest.raises(RewardError, match="is no reward server"):
        RemoteReward(stub(health).url)


@pytest.mark.parametrize(("key", "value"), [("max_batch", "64"), ("max_bytes", 0), ("max_unpacked", True)])
def test_limits_that_are_none_are_named(stub, key, value):
    with pytest.raises(RewardError, match=f"is no reward server: .*/health: {key}={value!r}: input .*; give the"):
        RemoteReward(stub({**HEALTH, key: value}).url)


@pytest.mark.parametrize(("token", "words"), [("", "is empty"), ("a\nb", "cannot carry"), ("€", "cannot carry")])
def test_a_token_that_cannot_be_sent_is_refused(stub, token, words):
    with pytest.raises(ValueError, match=f"the token, an argument or {TOKEN}, .*{words}") as refused:
        RemoteReward(stub().url, token=token)
    assert not token or token not in str(refused.value)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://user:secret@host:80"])
def test_a_url_of_another_kind_is_refused(url):
    with pytest.raises(ValueError, match="must be http://host:port"):
        RemoteReward(url)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"patience": -1}])
def test_times_are_checked(stub, options):
    with pytest.raises(ValueError, match="timeout=.*patience="):
        RemoteReward(stub().url, **options)


def test_the_token_comes_from_argument_or_environment(stub, monkeypatch):
    server = stub()
    RemoteReward(server.url)
    monkeypatch.setenv(TOKEN, "from outside")
    RemoteReward(server.url)
    RemoteReward(server.url, token="own")
    assert server.tokens == [None, "Bearer from outside", "Bearer own"]


@pytest.mark.parametrize(("token", "words"), [(None, "wants a token"), ("x", "the token was refused")])
def test_a_token_that_does_not_fit_is_told_at_once(stub, token, words):
    with pytest.raises(RewardError, match=f"{words}; set {TOKEN}"):
        RemoteReward(stub({**HEALTH, "authorized": False}).url, token=token)


# --- requests and answers --------------------------------------------------------------------------------------


def test_null_is_nan(stub):
    answer = {"scores": [1.5, None, -2], "info": {"part": [None, 1, 2]}}
    output = evaluate(RemoteReward(stub(answers=[(200, answer)]).url), IMAGES, PROMPTS)
    assert output.scores.dtype == torch.float32
    assert output.scores.isnan().tolist() == [False, True, False] and output.scores[[0, 2]].tolist() == [1.5, -2]
    assert output.info["part"].isnan().tolist() == [True, False, False]


def test_requests_hold_no_more_pictures_than_the_server_takes(stub):
    server = stub({**HEALTH, "max_batch": 2})
    prompts = ["1", "22", "333", "4444", "55555"]
    metadata = [{"number": index} for index in range(5)]
    output = evaluate(RemoteReward(server.url), IMAGES[:1].expand(5, -1, -1, -1), prompts, metadata)
    assert output.scores.tolist() == [1, 2, 3, 4, 5]
    assert [request["prompts"] for request in server.requests] == [["1", "22"], ["333", "4444"], ["55555"]]
    assert [entry for request in server.requests for entry in request["metadata"]] == metadata


def test_what_a_prompt_file_says_of_a_prompt_is_sent_with_its_picture(stub, make_env):
    server = stub()
    lines = [{"prompt": "a" * number, "wanted": [{"class": "star", "number": number}]} for number in range(1, 9)]
    env = make_env(2, reward=server.url, prompts=lines, num_inference_steps=2, autoreset_mode="Disabled")
    _, infos = env.reset(seed=0)
    for _ in range(2):
        _, rewards, *_ = env.step(torch.zeros(env.action_space.shape))
    [request] = server.requests
    assert request["metadata"] == infos["metadata"].tolist()
    assert [entry["wanted"][0]["number"] for entry in request["metadata"]] == rewards.tolist()


def test_requests_are_no_larger_than_the_server_takes(stub):
    server = stub({**HEALTH, "max_bytes": 1000})
    evaluate(RemoteReward(server.url), IMAGES[:1].repeat(6, 1, 1, 1), ["é" * 20] * 6)
    sizes = [len(json.dumps(request)) for request in server.requests]
    assert max(sizes) <= 1000 and len(sizes) > 1
    with pytest.raises(RewardError, match=r"max_bytes=1000, a single picture has \d+; .* --max-bytes"):
        evaluate(RemoteReward(server.url), torch.rand(1, 3, 32, 32), ["a"])


def test_requests_unpack_to_no_more_than_the_server_takes(stub):
    server = stub({**HEALTH, "max_unpacked": 2 * 3 * 8 * 8 + 1})
    output = evaluate(RemoteReward(server.url), IMAGES[:1].repeat(5, 1, 1, 1), ["1", "22", "333", "4444", "55555"])
    assert output.scores.tolist() == [1, 2, 3, 4, 5]
    assert [len(request["images"]) for request in server.requests] == [2, 2, 1]
    with pytest.raises(RewardError, match=r"max_unpacked=385 .*a single one has 768; .* --max-memory"):
        evaluate(RemoteReward(server.url), torch.rand(1, 3, 16, 16), ["a"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({}, "the answer: the field 'scores' is missing"),
        ({"scores": [1, 2, 3]}, "the answer: the field 'info' is missing"),
        ({"scores": [1], "info": {}}, "the answer holds 1 scores for 3 pictures"),
        ({"scores": [1, 2, 3], "info": {"a": [1]}}, "the answer holds 1 a for 3 pictures"),
        ({"scores": [1, "2", 3], "info": {}}, "the answer: scores.1='2': input should be a valid number"),
        ({"scores": [1, True, 3], "info": {}}, "the answer: scores.1=True: "),
        ({"scores": [1, 2, 3], "info": {"a": 1}}, "the answer: info.a=1: "),
        ({"scores": [1, 2, 3], "info": {}, "name": 5}, "the answer: name=5: "),
        ({"scores": [1, 2, float("nan")], "info": {}}, "the answer: scores.2=nan: "),
        ([], r"the answer: \[\]: "),
        ("text", "the answer: 'text': "),
    ],
)
def test_an_answer_of_another_shape_is_named_by_its_field(stub, answer, words):
    with pytest.raises(RewardError, match=words):
        evaluate(RemoteReward(stub(answers=[(200, answer)]).url), IMAGES, PROMPTS)


# --- when to try again -----------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again(stub):
    server = stub(answers=[(503, {}, {"Retry-After": "0"}), (503, {}, {}), scored(1, 2, 3)])
    assert evaluate(RemoteReward(server.url), IMAGES, PROMPTS).scores.tolist() == [1, 2, 3]
    assert server.requests[0] == server.requests[1] == server.requests[2]


def test_a_gateway_without_its_server_is_asked_again_with_a_warning(stub):
    server = stub(answers=[(502, {}), scored(1, 2, 3)])
    with pytest.warns(UserWarning, match="does not answer .*trying again for up to 600 s"):
        assert evaluate(RemoteReward(server.url), IMAGES, PROMPTS).scores.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("status", "words"),
    [(500, "the reward raised"), (401, TOKEN), (413, "too large"), (422, "no PNG"), (404, "nothing here")],
)
def test_what_would_fail_again_fails_at_once(stub, status, words):
    server = stub(answers=[(status, {"detail": words})])
    with pytest.raises(RewardError, match=words):
        evaluate(RemoteReward(server.url), IMAGES, PROMPTS)
    assert len(server.requests) == 1


def test_patience_ends(stub):
    server = stub(answers=[(503, {"detail": "full"})])
    with pytest.raises(RewardError, match="has not answered for patience=0.4 s .*503.*full.*--resume"):
        evaluate(RemoteReward(server.url, patience=0.4), IMAGES, PROMPTS)
    assert len(server.requests) > 1


def test_another_reward_after_a_restart_is_not_mixed_in(stub):
    server = stub(answers=[scored(1, 2, 3, name="Stub"), scored(1, 2, 3, name="Other")])
    reward = RemoteReward(server.url)
    evaluate(reward, IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="serves 'Other' now, and 'Stub' when the run began"):
        evaluate(reward, IMAGES, PROMPTS)


def test_cancel_ends_the_waiting(stub):
    server = stub(answers=[(503, {})])
    reward, caught = RemoteReward(server.url), []

    def score():
        try:
            evaluate(reward, IMAGES, PROMPTS)
        except RewardError as error:
            caught.append(str(error))

    thread = threading.Thread(target=score)
    thread.start()
    while not server.requests:
        pass
    reward.cancel()
    thread.join(30)
    assert not thread.is_alive() and "given up" in caught[0]
    server.answers = [scored(1, 2, 3)]
    assert evaluate(reward, IMAGES, PROMPTS).scores.tolist() == [1, 2, 3]  # the next call is not cancelled
