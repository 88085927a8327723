"""Which class loads a pipeline, which weight files it takes, and what is said where there are none."""

import gc
import json
import weakref

import gymnasium as gym
import huggingface_hub.constants
import pytest
import torch

import diffusion_gym.models.latent
import diffusion_gym.models.pixel  # noqa: F401  the time of these imports is not what is measured
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.hub import MODEL_SOURCES
from diffusion_gym.models import MODELS, load_model
from diffusion_gym.testing.random_pipeline import write_pipeline
from waiting import at_once


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache of the hub's client, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def variants(tiny_pipeline, tmp_path_factory):
    """A copy of the tiny pipeline with its weights as variant fp16 only."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("models") / "fp16"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipe.to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        ("tiny", "LatentModel"),
        ("tiny-ddpm", "PixelModel"),
        ("tiny-sdxl", "SDXLModel"),
        ("tiny-sd3", "SD3Model"),
    ],
)
def test_class_is_that_of_the_pipeline(size, kind, tmp_path):
    folder = write_pipeline(tmp_path / "model", size, 0, torch.float32)
    model = load_model(folder, "cpu", "float32")
    assert type(model).__name__ == kind and model.name == str(folder)
    assert load_model(str(folder), "cpu", "float32") is model


def test_ddim_pipeline_is_a_pixel_model(tmp_path):
    from diffusion_gym.testing.random_ddpm import write_random_ddpm

    folder = write_random_ddpm(tmp_path, pipeline="DDIMPipeline")
    assert type(load_model(folder, "cpu", "float32")).__name__ == "PixelModel"


def test_another_pipeline_is_refused_with_the_list(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(ValueError, match="is a WanPipeline; use a model of StableDiffusionPipeline, ") as caught:
        load_model(str(tmp_path), "cpu", "float32")
    for name in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "DDPMPipeline", "DDIMPipeline"):
        assert name in str(caught.value)


def test_directory_of_no_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks model_index.json"):
        load_model(str(tmp_path), "cpu", "float32")


def test_variant_is_what_is_loaded(variants, tiny_pipeline):
    model = load_model(str(variants), "cpu", "float32", {"variant": "fp16"})
    whole = load_model(str(tiny_pipeline), "cpu", "float32")
    for name, tensor in whole.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], tensor.half().float())


def test_variant_that_is_needed_is_named(variants):
    with pytest.raises(FileNotFoundError, match="of variant 'fp16' only; pass variant='fp16'"):
        load_model(str(variants), "cpu", "float32")


def test_environment_and_command_line_hand_the_options_on(variants):
    options = EnvOptions(model=str(variants), variant="fp16", revision="main").keywords()
    assert (options["variant"], options["revision"]) == ("fp16", "main")
    env = gym.make_vec("DiffusionDenoise-v0", num_envs=1, **options)
    assert env.unwrapped.model is load_model(str(variants), "cpu", "float32", {"revision": "main", "variant": "fp16"})
    assert "variant" not in EnvOptions(model="SD14").keywords()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("SD14", {"varriant": "fp16"}, "model_kwargs='varriant' is unknown; did you mean 'variant'"),
        ("SD14", {"variant": 16}, r"model_kwargs\['variant'\]=16 must be a string"),
        ("Shapes", {"variant": "fp16"}, "variant='fp16' is no option of model='Shapes'"),
    ],
)
def test_other_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=model, model_kwargs=options)


def test_options_do_not_go_with_an_object(tiny_pipeline):
    model = load_model(str(tiny_pipeline), "cpu", "float32")
    assert load_model(model, "cpu", "float32", {"revision": None}) is model
    with pytest.raises(ValueError, match="not with a model object"):
        load_model(model, "cpu", "float32", {"revision": "main"})


@pytest.mark.parametrize("name", list(MODEL_SOURCES))
def test_named_model_that_is_nowhere_says_so_at_once(name, offline):
    with at_once(), pytest.raises(FileNotFoundError) as caught:
        gym.make_vec(f"DiffusionDenoise-{name}-Compressibility-v0", num_envs=1)
    message, source = str(caught.value), MODEL_SOURCES[name]
    assert message.startswith(f"model={source!r} is not in the local cache") and "\n" not in message
    assert f"`diffusion-gym download {source}`" in message and "model='PATH'" in message
    assert "GB" in message and "HF_HUB_OFFLINE" in message


def test_revision_and_variant_are_in_the_command_that_fetches_them(offline):
    with pytest.raises(FileNotFoundError, match="`diffusion-gym download google/[^ ]+ --revision v2 --variant fp16`"):
        load_model("Church", "cpu", "float32", {"revision": "v2", "variant": "fp16"})


def test_every_model_but_the_embedded_ones_has_a_source():
    assert set(MODELS) - set(MODEL_SOURCES) == {"Shapes", "ShapesFlow"}


def write_again(folder, seed, size="tiny"):
    """Other weights in the place of those that are there."""
    for path in write_pipeline(folder.with_name(f"other-{seed}"), size, seed, torch.float32).glob("*/*.safetensors"):
        path.replace(folder / path.parent.name / path.name)


@pytest.mark.parametrize("size", ["tiny", "tiny-ddpm"])
def test_a_folder_that_changed_on_disk_is_loaded_anew(size, tmp_path):
    folder = write_pipeline(tmp_path / "model", size, 0, torch.float32)
    first = load_model(folder, "cpu", "float32")
    before = {name: value.clone() for name, value in first.unet.state_dict().items()}
    write_again(folder, 1, size)
    second = load_model(folder, "cpu", "float32")
    assert second is not first and load_model(folder, "cpu", "float32") is second
    weights = first.unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in before.items())  # who holds the old one keeps it
    assert not all(torch.equal(second.unet.state_dict()[name], value) for name, value in before.items())


def test_a_relative_path_is_that_of_the_folder_where_the_process_is(tmp_path, monkeypatch):
    for seed, place in enumerate(("a", "b")):
        write_pipeline(tmp_path / place / "model", "tiny", seed, torch.float32)
    models = []
    for place in ("a", "b", "a"):
        monkeypatch.chdir(tmp_path / place)
        models.append(load_model("./model", "cpu", "float32"))
    assert models[0] is models[2] and models[0] is not models[1]


def test_only_models_in_use_and_the_last_two_stay_in_memory(tmp_path):
    folders = [write_pipeline(tmp_path / f"{seed}", "tiny", seed, torch.float32) for seed in range(4)]
    used = load_model(folders[0], "cpu", "float32")
    unused = [weakref.ref(load_model(folder, "cpu", "float32")) for folder in folders[1:]]
    gc.collect()
    assert [each() is None for each in unused] == [True, False, False]
    assert load_model(folders[0], "cpu", "float32") is used


@pytest.mark.parametrize(("alias", "device"), [("cpu:0", "cpu"), pytest.param("cuda", "cuda:0", marks=pytest.mark.gpu)])
def test_a_device_of_two_names_holds_one_model(alias, device, tiny_pipeline):
    model = load_model(tiny_pipeline, alias, "float32")
    assert load_model(tiny_pipeline, device, "float32") is model
    assert model.device == next(model.unet.parameters()).device


def test_a_model_that_cannot_be_referred_to_weakly_is_shared_too(monkeypatch):
    class Slotted:
        __slots__ = ("name",)

    monkeypatch.setitem(MODELS._entries, "Slotted", lambda *, device, dtype: Slotted())
    assert load_model("Slotted", "cpu", "float32") is load_model("Slotted", "cpu", "float32")
