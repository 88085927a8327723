"""What a pipeline folder may lack or hold: it is taken as diffusers takes it, or refused in one clear line."""

import json
import re
import shutil

import pytest
import torch

from diffusion_gym.models import load_model
from diffusion_gym.models.base import ADAPTER_FILES
from diffusion_gym.storage import load_tensors, read_json, save_tensors, write_json
from diffusion_gym.testing.random_pipeline import write_pipeline

NETWORKS = {
    "tiny": ["unet", "vae", "text_encoder"],
    "tiny-sdxl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "tiny-sd3": ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"],
    "tiny-ddpm": ["unet"],
}
PARTS = [(size, part) for size, parts in NETWORKS.items() for part in parts]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(size)`: a folder that nobody changes."""
    root, sizes = tmp_path_factory.mktemp("whole"), set()

    def folder(size):
        if size not in sizes:
            write_pipeline(root / size, size, 0, torch.float32)
            sizes.add(size)
        return root / size

    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """`copied(size)`: a folder to change."""
    return lambda size: shutil.copytree(whole(size), tmp_path / "model")


def change(path, **values):
    """Set values in a JSON file; `...` removes one."""
    config = {**read_json(path), **values}
    write_json(path, {name: value for name, value in config.items() if value is not ...})


def refused(folder, message, error=ValueError, **model_kwargs):
    with pytest.raises(error, match=message) as caught:
        load_model(str(folder), "cpu", "float32", model_kwargs)
    assert str(caught.value).startswith(f"model={str(folder)!r}") and "\n" not in str(caught.value)
    assert type(caught.value) is error


def first_weights(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_tensors(path)
    return path, tensors, min(tensors)


@pytest.mark.parametrize(("size", "part"), PARTS)
def test_weights_that_are_missing_unknown_or_misshapen_are_named(size, part, copied):
    folder = copied(size)
    path, tensors, name = first_weights(folder, part)
    changed = {
        "lacks '": {key: value for key, value in tensors.items() if key != name},
        "holds for nothing 'zz'": {**tensors, "zz": torch.ones(1)},
        r"holds in another shape '.* \(.*\) for \(": {**tensors, name: torch.cat([tensors[name]] * 2)},
        "lacks '.* and [0-9]+ more; it holds for nothing 'other.": {f"other.{key}": v for key, v in tensors.items()},
    }
    for message, weights in changed.items():
        save_tensors(path, weights, {"format": "pt"})
        refused(folder, f": {part}/ holds not the weights of [A-Za-z0-9]+: it {message}")
    save_tensors(path, {**tensors, name: tensors[name] / 0}, {"format": "pt"})
    refused(folder, f": {part}/ holds NaN or infinite numbers at '.*', as float32; take files that are whole")
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, f": {part}/ cannot be loaded as ")


def test_positions_that_older_files_hold_are_no_weights(copied):
    folder = copied("tiny")
    path, tensors, _ = first_weights(folder, "text_encoder")
    old = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}
    save_tensors(path, {**old, "text_model.embeddings.position_ids": torch.arange(16)[None]}, {"format": "pt"})
    assert load_model(str(folder), "cpu", "float32")


@pytest.mark.parametrize(("size", "part"), PARTS)
def test_a_network_without_config_or_weights_is_refused(size, part, copied):
    folder = copied(size)
    path, _, _ = first_weights(folder, part)
    path.rename(path.with_name("elsewhere"))
    refused(folder, f" has no weights in {part}/; pass another", FileNotFoundError)
    path.with_name("elsewhere").rename(path)
    (folder / part / "config.json").write_text("{")
    refused(folder, f": {part}/(config.json cannot be read| cannot be loaded as) ")
    (folder / part / "config.json").unlink()
    refused(folder, f": {part}/ cannot be loaded as ")


@pytest.mark.parametrize(
    ("part", "kind"), [("vae", "AutoencoderTiny"), ("unet", "UNet3DConditionModel"), ("text_encoder", "BertModel")]
)
def test_a_part_of_another_class_is_refused(part, kind, copied):
    folder = copied("tiny")
    change(folder / "model_index.json", **{part: ["diffusers", kind]})
    refused(folder, f" has '{kind}' as {part}; use a pipeline with a ")
    change(folder / "model_index.json", **{part: [None, None]})
    refused(folder, f" has None as {part}; use a pipeline with a ")
    if part != "text_encoder":  # without an entry the part's own config says it
        change(folder / "model_index.json", **{part: ...})
        change(folder / part / "config.json", _class_name=kind)
        refused(folder, f" has '{kind}' as {part}; use a pipeline with a ")


@pytest.mark.parametrize("variant", ["fp61", "fp16"])
def test_a_variant_that_no_part_has_is_refused(variant, copied):
    for size in ("tiny", "tiny-ddpm"):
        folder = copied(size)
        refused(
            folder, f" has no weights of variant='{variant}'; it has plain weights", FileNotFoundError, variant=variant
        )
        shutil.rmtree(folder)
    folder = copied("tiny")
    path, _, _ = first_weights(folder, "vae")
    shutil.copy(path, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    if variant == "fp16":
        assert load_model(str(folder), "cpu", "float32", {"variant": "fp16"})
    else:
        refused(folder, " has no weights of variant='fp61'; it has 'fp16'", FileNotFoundError, variant="fp61")


@pytest.mark.parametrize("size", ["tiny", "tiny-sdxl", "tiny-ddpm"])
def test_sample_size_is_a_number_or_height_and_width(size, copied):
    folder = copied(size)
    if size != "tiny-ddpm":
        change(folder / "unet" / "config.json", sample_size=[4, 8])
        model = load_model(str(folder), "cpu", "float32")
        assert model.latent_shape == (4, 4, 8) and model.image_shape == (8, 16, 3)
        assert model.decode(torch.zeros(1, *model.latent_shape)).shape == (1, 3, 8, 16)
    for wrong in (None, [4], [4, 4, 4], "four", 0, [4, None]):
        change(folder / "unet" / "config.json", sample_size=wrong)
        refused(
            folder, rf" has sample_size={re.escape(repr(wrong))} in its network's config.json; |unet/ cannot be loaded"
        )


def test_a_picture_that_is_not_square_is_that_of_diffusers(copied):
    from diffusers import StableDiffusionPipeline

    folder = copied("tiny")
    change(folder / "unet" / "config.json", sample_size=[4, 8])
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", num_inference_steps=1, output_type="pt").images
    assert tuple(picture.shape[2:]) == load_model(str(folder), "cpu", "float32").image_shape[:2]


@pytest.mark.parametrize("size", ["tiny", "tiny-sdxl", "tiny-sd3"])
def test_a_tokenizer_that_states_no_length_gets_the_encoders(size, copied, whole):
    folder = copied(size)
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        if path.parent.name != "tokenizer_3":
            change(path, model_max_length=...)
    model, stated = (load_model(str(each), "cpu", "float32") for each in (folder, whole(size)))
    assert model.prompt_length == stated.prompt_length
    assert torch.equal(model.tokenize(["a red circle"]), stated.tokenize(["a red circle"]))


@pytest.mark.parametrize("size", ["tiny", "tiny-sdxl", "tiny-sd3"])
def test_a_tokenizer_without_vocabulary_or_of_another_class_is_refused(size, copied):
    folder = copied(size)
    change(folder / "model_index.json", tokenizer=["transformers", "BertTokenizer"])
    refused(folder, " has 'BertTokenizer' as tokenizer; use a pipeline with a CLIPTokenizer")
    change(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizerFast"])
    assert load_model(str(folder), "cpu", "float32")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    refused(folder, " has no vocabulary in tokenizer/")


def test_a_tokenizer_of_more_tokens_than_the_encoder_knows_is_refused(copied):
    folder = copied("tiny")
    path, tensors, _ = first_weights(folder, "text_encoder")
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    save_tensors(path, {**tensors, name: tensors[name][:50].clone()}, {"format": "pt"})
    change(folder / "text_encoder" / "config.json", vocab_size=50)
    refused(folder, ": a tokenizer of 123 tokens stands before a text encoder of 50")


def test_a_network_whose_channels_are_not_the_autoencoders_is_refused(copied):
    folder = copied("tiny")
    path, tensors, _ = first_weights(folder, "unet")
    weight = tensors["conv_in.weight"]
    save_tensors(path, {**tensors, "conv_in.weight": torch.zeros(len(weight), 9, 3, 3)}, {"format": "pt"})
    change(folder / "unet" / "config.json", in_channels=9)
    refused(folder, "its network has 9 channels in and 4 out, its autoencoder 4; use a text-to-image model")


@pytest.mark.parametrize("size", list(NETWORKS))
def test_a_scheduler_that_states_no_length_has_that_of_diffusers(size, copied):
    folder = copied(size)
    change(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=...)
    assert load_model(str(folder), "cpu", "float32").num_train_timesteps == 1000


@pytest.mark.parametrize("index", ["[]", '{"_diffusers_version": "0.35.0"}'])
def test_an_index_that_names_no_pipeline_is_refused(index, tmp_path):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match="model_index.json names no pipeline in _class_name"):
        load_model(str(tmp_path), "cpu", "float32")


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_single_file_is_refused_with_the_way_to_convert_it(name, tmp_path):
    save_tensors(tmp_path / name, {"w": torch.zeros(1)})
    refused(tmp_path / name, r" is a single file; .*from_single_file\(.*\)\.save_pretrained\('DIR'\)")


def test_adapters_and_the_index_are_no_models(tmp_path):
    for name in ADAPTER_FILES:
        (tmp_path / name).mkdir()
        save_tensors(tmp_path / name / name, {"w": torch.zeros(1)})
        refused(tmp_path / name, r" holds adapters alone; pass the model that they adapt, and init_from=.* to an agent")
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path / "model_index.json", " is a file of a pipeline directory; pass the directory ")


def test_the_tests_change_what_is_read(whole):
    """The folders hold what the tests take out of them."""
    assert "sample_size" in json.loads((whole("tiny") / "unet" / "config.json").read_text())
    for size in ("tiny", "tiny-sdxl", "tiny-sd3"):
        assert "model_max_length" in read_json(whole(size) / "tokenizer" / "tokenizer_config.json")
    for size in NETWORKS:
        assert "num_train_timesteps" in read_json(whole(size) / "scheduler" / "scheduler_config.json")


@pytest.mark.parametrize("size", NETWORKS)
@pytest.mark.parametrize("content", ["[]", "{", "null", None])
def test_a_config_that_is_no_object_is_refused(size, content, copied):
    folder = copied(size)
    for part, name in (("scheduler", "scheduler_config.json"), (NETWORKS[size][0], "config.json")):
        path = folder / part / name
        before = path.read_text()
        path.unlink() if content is None else path.write_text(content)
        refused(folder, f": {part}/")
        path.write_text(before)
