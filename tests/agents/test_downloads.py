"""`diffusion-gym download`, against a hub that is a dictionary."""

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest

from diffusion_gym.agents.cli import main
from diffusion_gym.agents.downloads import DownloadOptions, wanted_sources
from diffusion_gym.hub import MODEL_SOURCES, REWARD_SOURCES

PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
}
CLIP = {"config.json": 4_000, "model.safetensors": 1_710_000_000, "pytorch_model.bin": 1_710_000_000}
HUB = {
    "CompVis/stable-diffusion-v1-4": {
        "model_index.json": 500,
        "unet/config.json": 500,
        "unet/diffusion_pytorch_model.safetensors": 3_440_000_000,
        "unet/diffusion_pytorch_model.fp16.safetensors": 1_720_000_000,
        "scheduler/scheduler_config.json": 300,
        "safety_checker/model.safetensors": 1_200_000_000,
    },
    "google/ddpm-church-256": {
        "model_index.json": 200,
        "config.json": 800,
        "scheduler_config.json": 300,
        "diffusion_pytorch_model.safetensors": 455_000_000,
        "diffusion_pytorch_model.bin": 455_000_000,
    },
    "openai/clip-vit-large-patch14": CLIP,
    "trl-lib/ddpo-aesthetic-predictor": {"aesthetic-model.pth": 3_700_000, "README.md": 100},
    "THUDM/ImageReward": {"ImageReward.pt": 1_790_000_000, "med_config.json": 500, "other.pt": 1},
    "google-bert/bert-base-uncased": {"tokenizer.json": 466_000, "config.json": 570, "model.safetensors": 440_000_000},
    "llava-hf/llava-1.5-7b-hf": {"config.json": 900, "model.safetensors": 14_100_000_000, "tokenizer.model": 500_000},
    "microsoft/deberta-xlarge-mnli": {"config.json": 700, "pytorch_model.bin": 1_520_000_000, "vocab.json": 900_000},
    "owner/pickles": {"config.json": 10, "pytorch_model.bin": 100},
}


@pytest.fixture(autouse=True)
def fetched(tmp_path, monkeypatch):
    """The hub of this module; what is fetched from it, as (id, revision, files)."""
    asked = []

    def model_info(self, source, *, revision=None, **keywords):
        if source not in HUB:
            raise ConnectionError(f"404, {source}\nand more")
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in HUB[source].items()]
        )

    def snapshot_download(source, *, revision=None, allow_patterns):
        folder = tmp_path / source.replace("/", "--")
        folder.mkdir(exist_ok=True)
        index = PIPELINE if "CompVis" in source else {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2D"]}
        Path(folder, "model_index.json").write_text(json.dumps(index))
        if allow_patterns != ["model_index.json"]:
            asked.append((source, revision, set(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_model_by_name_is_fetched_without_what_is_never_loaded(fetched, capsys, tmp_path):
    main(["download", "SD14"])
    source = "CompVis/stable-diffusion-v1-4"
    unet, scheduler = "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
    assert fetched == [(source, None, {"model_index.json", "unet/config.json", unet, scheduler})]
    before, after = capsys.readouterr().out.splitlines()
    assert before == f"{source}: 4 files, 3.4 GB on disk"
    assert after == f"{source}: {tmp_path / 'CompVis--stable-diffusion-v1-4'}"


def test_variant_and_revision_are_the_models(fetched, capsys):
    main(["download", "SD14", "--variant", "fp16", "--revision", "v2"])
    [(_, revision, files)] = fetched
    assert revision == "v2" and "unet/diffusion_pytorch_model.fp16.safetensors" in files and len(files) == 4
    assert "1.7 GB" in capsys.readouterr().out


def test_flat_pipeline_is_fetched_by_its_hub_id(fetched):
    main(["download", "google/ddpm-church-256"])
    [(_, _, files)] = fetched
    assert files == set(HUB["google/ddpm-church-256"]) - {"diffusion_pytorch_model.bin"}


@pytest.mark.parametrize("name", ["DiffusionDenoise-SD14-Aesthetic", "DiffusionDenoise-SD14-Aesthetic-v0"])
def test_environment_is_its_model_and_its_rewards_weights(name, fetched, capsys):
    main(["download", name])
    files = {source: names for source, _, names in fetched}
    assert list(files) == ["CompVis/stable-diffusion-v1-4", *REWARD_SOURCES["Aesthetic"]]
    assert files["openai/clip-vit-large-patch14"] == {"config.json", "model.safetensors"}
    assert files["trl-lib/ddpo-aesthetic-predictor"] == {"aesthetic-model.pth"}
    assert [line.partition(": ")[2][:1] for line in capsys.readouterr().out.splitlines()[:3]] == ["4", "2", "1"]


def test_reward_is_fetched_by_its_name_and_of_some_the_tokenizer_alone(fetched):
    main(["download", "ImageReward"])
    assert [(source, files) for source, _, files in fetched] == [
        ("THUDM/ImageReward", {"ImageReward.pt"}),
        ("google-bert/bert-base-uncased", {"tokenizer.json", "config.json"}),
    ]
    fetched.clear()
    main(["download", "google-bert/bert-base-uncased"])  # for its own sake: all of it
    assert fetched[0][2] == set(HUB["google-bert/bert-base-uncased"])


def test_pickle_is_fetched_of_an_id_whose_reader_can_do_without_safetensors(fetched, monkeypatch):
    main(["download", "PromptAlignment"])
    files = {source: names for source, _, names in fetched}
    assert files["microsoft/deberta-xlarge-mnli"] == {"config.json", "vocab.json", "pytorch_model.bin"}
    fetched.clear()
    monkeypatch.setitem(HUB["microsoft/deberta-xlarge-mnli"], "model.safetensors", 3_000_000_000)
    main(["download", "PromptAlignment"])
    files = {source: names for source, _, names in fetched}
    assert files["microsoft/deberta-xlarge-mnli"] == {"config.json", "vocab.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["Shapes", "Compressibility", "DiffusionDenoise-Shapes-Color"])
def test_what_ships_with_the_package_needs_nothing(name, fetched, capsys):
    main(["download", name])
    assert capsys.readouterr().out == f"{name} needs no files from the hub\n" and not fetched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Aesthetics"], "id='Aesthetics' is unknown; did you mean 'Aesthetic'?"),
        (["DiffusionDenoise-SD14-Estetic"], "did you mean 'DiffusionDenoise-SD14-Aesthetic-v0'?"),
        (["a/b/c"], "id='a/b/c' is unknown"),
        (["Aesthetic", "--variant", "fp16"], "--revision and --variant are for a model"),
        (["owner/pickles"], "id='owner/pickles' holds its weights in its top folder as a pickle only"),
        (
            ["owner/nothing"],
            "id='owner/nothing' is not in the local cache and the hub gave nothing (ConnectionError: 404, ",
        ),
        (["SD15"], "where there is a network the same command goes on (about 4.3 GB); copy the cache "),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(arguments, message, fetched, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["download", *arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not fetched


def test_nothing_is_fetched_where_a_part_cannot_be_had(fetched, capsys):
    with pytest.raises(SystemExit):
        main(["download", "DiffusionDenoise-SD14-PickScore"])  # the model is there, the reward is not
    assert not fetched and "yuvalkirstain/PickScore_v1" in capsys.readouterr().err


def test_download_that_breaks_off_says_how_it_goes_on(monkeypatch, capsys):
    def broken(source, **keywords):
        raise ConnectionError("cut off")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(SystemExit) as caught:
        main(["download", "openai/clip-vit-large-patch14"])
    assert (
        caught.value.code == 2
        and "(ConnectionError: cut off); where there is a network the same command goes on" in capsys.readouterr().err
    )


def test_offline_is_said(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as caught:
        main(["download", "SD14"])
    assert caught.value.code == 2 and "HF_HUB_OFFLINE" in capsys.readouterr().err


def test_every_name_with_a_source_is_understood():
    for name, source in MODEL_SOURCES.items():
        assert [wanted.source for wanted in wanted_sources(DownloadOptions(name))] == [source]
    for name, sources in REWARD_SOURCES.items():
        assert tuple(wanted.source for wanted in wanted_sources(DownloadOptions(name))) == sources
