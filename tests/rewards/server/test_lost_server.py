"""The client and a real server that is killed and started again: nothing is lost, a run goes on to the same bits."""

import json
import os
import threading

import numpy as np
import pytest
import torch

from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training.checkpoint import Checkpoints
from diffusion_gym.images import to_uint8
from diffusion_gym.rewards import RewardError, evaluate, make_reward
from diffusion_gym.storage import load_tensors
from diffusion_gym.testing.conformance import check_vector_env

IMAGES = torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BRIGHTNESS = to_uint8(IMAGES).double().numpy().mean((1, 2, 3)) / 255


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--max-batch", 4)


@pytest.fixture(autouse=True)
def unsteered(server):
    yield
    for path in server.folder.iterdir():
        if path.is_file() and path.suffix != ".py":
            path.unlink()


def test_scores_of_several_requests_are_in_order(server):
    output = evaluate(make_reward(server.url), IMAGES, ["a"] * 11, [{"weight": index} for index in range(11)])
    np.testing.assert_allclose(output.scores.numpy(), BRIGHTNESS, rtol=1e-6)
    assert output.info["weight"].tolist() == list(range(11))
    assert output.info["batch"].tolist() == [4] * 8 + [3] * 3


def test_an_error_of_the_reward_says_what_was_wrong_there(server):
    with pytest.raises(RewardError, match="raised ValueError: this prompt is not to be scored"):
        evaluate(make_reward(server.url), IMAGES[:1], ["raise"])


def test_environment_conforms(server, make_env):
    check_vector_env(lambda **kwargs: make_env(reward=server.url, num_inference_steps=2, **kwargs))


@pytest.mark.filterwarnings("ignore:.*does not answer")
def test_killed_in_mid_request_the_client_waits_and_loses_nothing(server):
    reward, outputs = make_reward(server.url, patience=120.0), []
    prompts = ["a"] * 5 + ["hold door"] + ["a"] * 5  # in the second of three requests
    thread = threading.Thread(target=lambda: outputs.append(evaluate(reward, IMAGES, prompts)))
    thread.start()
    server.wait_until_at("door")
    server.kill()
    (server.folder / "door").touch()
    server.restart()
    thread.join(120)
    np.testing.assert_allclose(outputs[0].scores.numpy(), BRIGHTNESS, rtol=1e-6)


def run(folder, pipeline, server, *more):
    """A training of four iterations of two batches, by the command line."""
    main(
        [
            *["train", "--out", str(folder), "--env", "DiffusionDenoise-v0", "--env.model", str(pipeline)],
            *["--env.reward", server.url, "--env.reward-kwargs", "patience", "0.3"],
            *["--env.prompts", "a", "b", "--env.num-inference-steps", "2", "--agent", "ddpo_is"],
            *["--total-reward-queries", "32", "--samples-per-iteration", "8", "--rollout-batch", "4"],
            *["--checkpoint-every", "1", "--agent.batch-size", "4", "--agent.learning-rate", "1e-3", *more],
        ]
    )


def final(folder):
    """The last checkpoint's tensors, and the rewards on the way."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [(row["iteration"], row["reward_mean"], row["batch_mean"]) for row in rows]
    return load_tensors(Checkpoints(folder / "checkpoints").paths()[-1]), rewards


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not answer")
def test_a_run_whose_server_dies_stops_with_its_checkpoint_and_resumes_to_the_same_bits(
    server, tiny_pipeline, tmp_path, capsys
):
    if server.process.poll() is not None:
        server.restart()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, tiny_pipeline, server)
    (server.folder / "lives").write_text("9")  # 4 requests for the pictures and 2 an iteration: in the third one
    with pytest.raises(SystemExit) as ended:
        run(broken, tiny_pipeline, server)
    server.wait()
    assert ended.value.code == 2
    assert "has not answered for patience=0.3 s" in capsys.readouterr().err
    assert [path.name for path in Checkpoints(broken / "checkpoints").paths()][-1] == "iteration-000002.safetensors"
    with pytest.raises(SystemExit):  # without a server it does not begin, and harms nothing
        main(["train", "--resume", "--out", str(broken)])
    assert "does not answer" in capsys.readouterr().err
    (server.folder / "lives").unlink()
    server.restart()
    main(["train", "--resume", "--out", str(broken)])
    (expected, metrics), (found, found_metrics) = final(whole), final(broken)
    assert metrics == found_metrics and len(metrics) == 4
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_the_token_is_not_written_to_the_run(start_server, tiny_pipeline, tmp_path, monkeypatch):
    server = start_server(token="do not write this down")
    monkeypatch.setenv("DIFFUSION_GYM_REWARD_TOKEN", "do not write this down")
    run(tmp_path / "run", tiny_pipeline, server, "--total-reward-queries", "8")
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"do not write this down" not in path.read_bytes(), path
    assert os.environ["DIFFUSION_GYM_REWARD_TOKEN"]
