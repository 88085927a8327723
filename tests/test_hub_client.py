"""The real client of the hub, against a small server on this machine that speaks the hub's protocol."""

import socket

import huggingface_hub.constants
import pytest
import torch

from diffusion_gym.agents.cli import main
from diffusion_gym.hub import located_file
from diffusion_gym.models import load_model
from diffusion_gym.testing.random_ddpm import write_random_ddpm
from hub_server import COMMIT, hub_server
from waiting import at_once

ID = "owner/tiny-ddpm"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one flat DDPM, and an empty cache; `hub.folder` are its files, `hub.asked` the requests."""
    folder = write_random_ddpm(tmp_path / "repository", flat=True)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("a card")
    with hub_server(ID, folder, tmp_path / "cache", monkeypatch) as server:
        yield server


def test_download_fills_the_cache_and_the_model_then_loads_offline(hub, monkeypatch, capsys):
    main(["download", ID])
    before, after = capsys.readouterr().out.splitlines()
    folder = after.removeprefix(f"{ID}: ")
    assert before.startswith(f"{ID}: 4 files, ") and folder.endswith(COMMIT)
    assert not [path for method, path in hub.asked if path.endswith((".bin", ".md"))]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    model = load_model(ID, "cpu", "float32")
    written = load_model(str(hub.folder), "cpu", "float32")
    assert type(model).__name__ == "PixelModel" and model.name == ID and not hub.asked
    for name, tensor in written.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], tensor)


def test_model_is_fetched_where_it_is_first_asked_for(hub):
    model = load_model(ID, "cpu", "bfloat16")
    assert model.latent_shape == (3, 8, 8)
    assert not [path for method, path in hub.asked if path.endswith(".bin")]


def test_repository_that_is_not_there_is_reported(hub, capsys):
    with pytest.raises(SystemExit):
        main(["download", "owner/other"])
    assert f"is not at {huggingface_hub.constants.ENDPOINT}/owner/other, or is private" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="model='owner/other' is not at http.*, or is private"):
        load_model("owner/other", "cpu", "float32")


def test_hub_that_takes_connections_and_never_answers_is_waited_for_as_long_as_its_setting_says(hub, monkeypatch):
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    with (
        at_once(),
        silent,
        pytest.raises(FileNotFoundError, match=r"gave nothing \(ReadTimeout: timed out\); fetch it"),
    ):
        load_model(ID, "cpu", "float32")


@pytest.mark.parametrize("revision", [None, "v2", COMMIT])
def test_without_a_network_nothing_is_tried_again(hub, monkeypatch, revision):
    free = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    free.close()
    kwargs = {"revision": revision}
    with (
        at_once(),
        pytest.raises(FileNotFoundError, match=r"gave nothing \(ConnectError: .*diffusion-gym download owner"),
    ):
        load_model(ID, "cpu", "float32", kwargs)
    with at_once(), pytest.raises(FileNotFoundError, match=r"gave nothing \(ConnectError: "):
        located_file(ID, "head.pth", argument="head", revision=revision)
