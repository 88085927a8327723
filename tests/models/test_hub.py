"""Where a model's files come from: a directory, the hub's cache, the hub; and what is said where they are not."""

import time
from pathlib import Path

import huggingface_hub
import pytest

import diffusion_gym.models.latent  # noqa: F401  the time of its imports is not what is measured
from diffusion_gym.models import load_model
from diffusion_gym.models.hub import located

PARTS = ("unet", "vae")
ID = "no-such-owner/no-such-model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client, and no way to the hub."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def online(monkeypatch):
    """`online(answer)`: the hub is asked, and `answer(id, **keywords)` is what it says; returns the list of calls."""

    def switched(answer):
        calls = []

        def model_info(self, source, **keywords):
            calls.append((source, keywords))
            return answer()

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        return calls

    return switched


def fill(cache: Path, *parts: str) -> Path:
    """Put `ID` into the cache, with `parts`; its snapshot folder."""
    repository = cache / f"models--{ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    for part in parts:
        (snapshot / part).mkdir(parents=True)
        (snapshot / part / "config.json").write_text("{}")
    return snapshot


def test_directory_with_all_parts_is_taken_as_it_is(tmp_path):
    for part in PARTS:
        (tmp_path / "model" / part).mkdir(parents=True)
    assert located(str(tmp_path / "model"), PARTS) == str(tmp_path / "model")


def test_directory_that_lacks_parts_names_them(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").write_text("a file, not a folder")
    with pytest.raises(FileNotFoundError) as caught:
        located(str(tmp_path), ("unet", "vae", "scheduler"))
    message = str(caught.value)
    assert f"model={str(tmp_path)!r} lacks vae, scheduler/" in message and "unet" not in message.split("lacks")[1]
    assert "save_pretrained" in message


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "~/nowhere", "a/b/c", "/model"])
def test_what_is_neither_directory_nor_id_is_refused(source, online):
    calls = online(lambda: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match=f"model={source!r} is no directory here and no hub id"):
        located(source, PARTS)
    assert not calls


def test_offline_and_not_cached_says_so_at_once():
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        located(ID, PARTS)
    assert time.perf_counter() - start < 2
    message = str(caught.value)
    assert f"model={ID!r}" in message and "HF_HUB_OFFLINE" in message
    assert f"`hf download {ID}`" in message and "model='PATH'" in message


def test_offline_model_by_its_registered_name_says_so_at_once():
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="CompVis/stable-diffusion-v1-4.*hf download CompVis"):
        load_model("SD14", "cpu", "float32")
    assert time.perf_counter() - start < 2


def test_cached_model_is_found_offline(cache):
    snapshot = fill(cache, *PARTS)
    assert located(ID, PARTS) == str(snapshot)


def test_cached_model_is_found_without_asking_the_hub(cache, online):
    snapshot = fill(cache, *PARTS)
    calls = online(lambda: pytest.fail("the hub was asked"))
    assert located(ID, PARTS) == str(snapshot) and not calls


def test_half_a_cached_model_is_not_taken(cache):
    fill(cache, "unet")
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        located(ID, PARTS)


def test_hub_that_cannot_be_reached_is_named_with_its_reason(online):
    def refuse():
        raise ConnectionError("no route to host\nand a long story")

    calls = online(refuse)
    with pytest.raises(FileNotFoundError, match=r"\(ConnectionError: no route to host\); .*hf download"):
        located(ID, PARTS)
    [(source, keywords)] = calls
    assert source == ID and keywords["timeout"] <= 2


def test_hub_that_has_the_model_is_downloaded_from(online, monkeypatch):
    wanted = []

    def snapshot_download(source, *, local_files_only=False, **keywords):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        wanted.append(keywords)
        return "/downloaded"

    online(lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert located(ID, PARTS) == "/downloaded"
    [keywords] = wanted
    assert set(keywords["allow_patterns"]) == {"model_index.json", "unet/*", "vae/*"}
    assert {"*.bin", "*.ckpt"} <= set(keywords["ignore_patterns"])  # no pickles
