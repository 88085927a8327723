"""Where files come from: a local path, the hub's cache, the hub; and what is said where they are not."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from diffusion_gym.hub import MODEL_SOURCES, REWARD_SOURCES, located, located_file
from diffusion_gym.hub_sources import NAMED_FILES, TOKENIZER_ONLY, size_text
from diffusion_gym.models import MODELS
from waiting import at_once

PARTS = ("unet", "vae")
ID = "no-such-owner/no-such-model"
COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client, and no way to the hub."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def online(monkeypatch):
    """`online(files)`: the hub is asked, and has `files`, or `files()` is what comes of it; gives the calls."""

    def switched(files):
        calls = []

        def model_info(self, source, **keywords):
            calls.append((source, keywords))
            names = files() if callable(files) else files
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=1) for name in names])

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        return calls

    return switched


@pytest.fixture
def downloads(monkeypatch):
    """What `snapshot_download` is asked for; the cache is empty."""
    asked = []

    def snapshot_download(source, *, local_files_only=False, **keywords):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        asked.append((source, keywords))
        return "/downloaded"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def fill(cache: Path, *files: str, revision: str = "main") -> Path:
    """Put `ID` into the cache, with `files`; its snapshot folder."""
    repository = cache / f"models--{ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    write(snapshot, *files)
    return snapshot


def write(folder: Path, *files: str) -> str:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    return str(folder)


WHOLE = [f"{part}/{file}" for part in PARTS for file in ("config.json", "diffusion_pytorch_model.safetensors")]


# --- directories -------------------------------------------------------------------------------------------


def test_directory_with_all_parts_is_taken_as_it_is(tmp_path):
    folder = write(tmp_path / "model", *WHOLE)
    assert located(folder, PARTS) == located(folder, optional=PARTS) == folder


def test_directory_that_lacks_parts_names_them(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").write_text("a file, not a folder")
    with pytest.raises(FileNotFoundError) as caught:
        located(str(tmp_path), ("unet", "vae", "scheduler"), argument="reward_kwargs['x']")
    message = str(caught.value)
    assert f"reward_kwargs['x']={str(tmp_path)!r} lacks vae, scheduler/" in message
    assert "unet" not in message.split("lacks")[1] and "save_pretrained" in message


@pytest.mark.parametrize(("parts", "where"), [((), "its top folder"), (("unet",), "unet/")])
def test_directory_with_pickled_weights_only_is_refused(parts, where, tmp_path):
    prefix = f"{parts[0]}/" if parts else ""
    folder = write(tmp_path / "model", f"{prefix}config.json", f"{prefix}pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=rf"{where} as a pickle only \(pytorch_model.bin\).*use_safetensors=F"):
        located(folder, parts)
    write(tmp_path / "model", f"{prefix}model.safetensors")
    assert located(folder, parts) == folder


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "~/nowhere", "a/b/c", "/model", "model"])
@pytest.mark.parametrize("find", [located, lambda source: located_file(source, "head.pth", argument="model")])
def test_what_is_neither_path_nor_id_is_refused(source, find, online):
    calls = online([])
    with pytest.raises(FileNotFoundError, match=f"model={source!r} is no path here and no hub id"):
        find(source)
    assert not calls


# --- the cache ---------------------------------------------------------------------------------------------


def test_cached_model_is_found_without_asking_the_hub(cache, online):
    snapshot = fill(cache, *WHOLE)
    assert located(ID, PARTS) == str(snapshot)
    calls = online([])
    assert located(ID, PARTS) == str(snapshot) and not calls


@pytest.mark.parametrize(
    "files",
    [
        WHOLE[:2],  # one part of two
        [*WHOLE[:3]],  # a config without its weights
        [*WHOLE[:3], "vae/diffusion_pytorch_model.bin"],
        [*WHOLE[:3], "vae/diffusion_pytorch_model.fp16.safetensors"],
    ],
)
def test_half_a_cached_model_is_not_taken(files, cache):
    fill(cache, *files)
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        located(ID, PARTS)


def test_cached_variant_is_taken_for_that_variant(cache):
    snapshot = fill(cache, *WHOLE[:3], "vae/diffusion_pytorch_model.fp16.safetensors")
    assert located(ID, PARTS, variant="fp16") == str(snapshot)


def test_cached_shards_must_all_be_there(cache):
    snapshot = fill(cache, "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        located(ID)
    write(snapshot, "model-00002-of-00002.safetensors")
    assert located(ID) == str(snapshot)


def test_cached_tokenizer_suffices_where_no_weights_are_needed(cache):
    snapshot = fill(cache, "config.json")
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        located(ID, weights=False)
    write(snapshot, "tokenizer.json")
    assert located(ID, weights=False) == str(snapshot)
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        located(ID)


def test_cached_revision_is_taken_for_that_revision(cache):
    snapshot = fill(cache, *WHOLE, revision="v2")
    assert located(ID, PARTS, revision="v2") == located(ID, PARTS, revision=COMMIT) == str(snapshot)
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        located(ID, PARTS)


def test_cached_flat_model_is_taken_and_so_is_one_with_folders(cache):
    snapshot = fill(cache, "model_index.json")
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        located(ID, optional=PARTS)
    write(snapshot, "config.json", "diffusion_pytorch_model.safetensors")
    assert located(ID, optional=PARTS) == str(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "diffusion_pytorch_model.safetensors").unlink()
    write(snapshot, *WHOLE[:2])
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        located(ID, optional=PARTS)
    write(snapshot, *WHOLE)
    assert located(ID, optional=PARTS) == str(snapshot)


# --- no hub ------------------------------------------------------------------------------------------------


def test_offline_and_not_cached_says_what_to_do_at_once():
    with at_once(), pytest.raises(FileNotFoundError) as caught:
        located(ID, PARTS, argument="clip")
    message = str(caught.value)
    assert f"clip={ID!r}" in message and "HF_HUB_OFFLINE" in message and "(size unknown)" in message
    assert f"`diffusion-gym download {ID}`" in message and "clip='PATH'" in message


def test_hub_that_cannot_be_reached_is_named_with_its_reason(online):
    def refuse():
        raise ConnectionError("no route to host\nand a long story")

    calls = online(refuse)
    with pytest.raises(FileNotFoundError, match=r"\(ConnectionError: no route to host\); .*diffusion-gym download"):
        located(ID, PARTS, revision="v2")
    [(source, keywords)] = calls
    assert (
        source == ID
        and keywords["timeout"] == huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT
        and keywords["revision"] == "v2"
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", f"is gated: accept its terms at https://huggingface.co/{ID}, and log in"),
        ("RepositoryNotFoundError", f"is not at https://huggingface.co/{ID}, or is private: check the name, or log in"),
        ("RevisionNotFoundError", "has no revision='v2'; pass a branch, tag or commit"),
        ("HfHubHTTPError", r"the hub gave nothing \(HfHubHTTPError: told\)"),
        ("OfflineModeIsEnabled", r"the hub gave nothing \(OfflineModeIsEnabled: told\)"),
    ],
)
def test_each_of_the_clients_errors_has_its_remedy(kind, message, online):
    class Response:
        headers, request = {}, None

    def refuse():
        error = getattr(huggingface_hub.errors, kind)
        raise error(
            "told", **({"response": Response()} if issubclass(error, huggingface_hub.errors.HfHubHTTPError) else {})
        )

    online(refuse)
    with pytest.raises(FileNotFoundError, match=f"model={ID!r} .*{message}") as caught:
        located(ID, revision="v2")
    assert "\n" not in str(caught.value)


# --- the hub -----------------------------------------------------------------------------------------------


def test_hub_that_has_the_model_is_downloaded_from(online, downloads):
    online([*WHOLE, "model_index.json", "unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors"])
    assert located(ID, PARTS, revision="v2") == "/downloaded"
    [(source, keywords)] = downloads
    assert source == ID and keywords["revision"] == "v2"
    assert sorted(keywords["allow_patterns"]) == sorted([*WHOLE, "model_index.json"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["unet/config.json"], f"model={ID!r} lacks vae/"),
        ([*WHOLE[:3], "vae/diffusion_pytorch_model.bin"], "holds its weights in vae/ as a pickle only"),
        ([*WHOLE[:3], "vae/diffusion_pytorch_model.fp16.safetensors"], "pass variant='fp16'"),
    ],
)
def test_hub_that_has_other_files_is_not_downloaded_from(files, message, online, downloads):
    online(files)
    with pytest.raises(FileNotFoundError, match=message):
        located(ID, PARTS)
    assert not downloads


def test_download_that_breaks_off_is_reported(online, downloads, monkeypatch):
    def broken(source, *, local_files_only=False, **keywords):
        kind = huggingface_hub.errors.LocalEntryNotFoundError if local_files_only else ConnectionError
        raise kind("cut off")

    online(WHOLE)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(FileNotFoundError, match=r"the hub gave nothing \(ConnectionError: cut off\)"):
        located(ID, PARTS)


# --- single files ------------------------------------------------------------------------------------------


def test_file_is_found_by_its_path_or_its_directory(tmp_path):
    write(tmp_path / "head", "head.pth")
    expected = str(tmp_path / "head" / "head.pth")
    assert located_file(expected, "anything", argument="head") == expected
    assert located_file(str(tmp_path / "head"), "head.pth", argument="head") == expected
    with pytest.raises(FileNotFoundError, match="head='.*' lacks other.pth"):
        located_file(str(tmp_path / "head"), "other.pth", argument="head")


def test_file_is_found_in_the_cache_or_on_the_hub(cache, online, downloads, monkeypatch):
    online(["head.pth"])
    assert located_file(ID, "head.pth", argument="head") == "/downloaded/head.pth"
    assert downloads == [(ID, {"revision": None, "allow_patterns": ["head.pth"]})]
    with pytest.raises(FileNotFoundError, match=f"head={ID!r} has no other.pth"):
        located_file(ID, "other.pth", argument="head")
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"fetch it \(size unknown\) .*`diffusion-gym download"):
        located_file(ID, "head.pth", argument="head")
    snapshot = fill(cache, "head.pth")
    assert located_file(ID, "head.pth", argument="head") == str(snapshot / "head.pth")


# --- the table ---------------------------------------------------------------------------------------------


def test_every_id_that_the_project_names_has_a_size():
    named = {*MODEL_SOURCES.values(), *(source for sources in REWARD_SOURCES.values() for source in sources)}
    assert all(source.count("/") == 1 and size_text(source).startswith("about") for source in named)
    assert named >= TOKENIZER_ONLY | set(NAMED_FILES)
    assert set(MODEL_SOURCES) <= set(MODELS)


def test_sizes_are_those_of_the_parameters():
    networks = 859_520_964 + 123_060_480 + 83_653_863  # UNet, text encoder and VAE, 4 bytes each
    assert size_text(MODEL_SOURCES["SD14"]) == f"about {4 * networks / 1e9:.1f} GB"
    assert size_text(MODEL_SOURCES["SD14"], "fp16") == f"about {4.3 / 2:.1f} GB"
    assert size_text(MODEL_SOURCES["Church"]) == f"about {4 * 113_673_219 / 1e9:.1f} GB"
    assert size_text("someone/something") == "size unknown"


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (REWARD_SOURCES["Aesthetic"][1], "`diffusion-gym download Aesthetic` (all of that reward's weights)"),
        (
            REWARD_SOURCES["CLIPScore"][0],
            "`diffusion-gym download Aesthetic` (or CLIPScore, GenEval: all of that reward's weights)",
        ),
        (MODEL_SOURCES["SD14"], f"`diffusion-gym download {MODEL_SOURCES['SD14']}`, or"),
    ],
)
def test_weights_of_a_reward_are_to_be_fetched_by_its_name(source, advice):
    with pytest.raises(FileNotFoundError) as caught:
        located(source)
    assert advice in str(caught.value)
