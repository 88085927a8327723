"""Random pipelines: the command that writes them, and that their shapes are those of the published models."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from diffusion_gym.storage import read_json
from diffusion_gym.testing.random_ddpm import celebahq_ddpm
from diffusion_gym.testing.random_pipeline import main
from diffusion_gym.testing.random_sd14 import _spelling_tokenizer, sd14_networks, write_random_sd14

# The sum over the tensors of the published checkpoints.
PARAMETERS = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}


@pytest.mark.parametrize("part", list(PARAMETERS))
def test_sd14_has_the_published_number_of_parameters(part):
    with torch.device("meta"):
        network = sd14_networks()[part]()
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[part]


def test_celebahq_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = celebahq_ddpm()
    assert sum(parameter.numel() for parameter in network.parameters()) == 113_673_219


def test_tokenizer_of_sd14_is_as_large_as_clips_and_spells(tmp_path):
    from transformers import CLIPTokenizer

    _spelling_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert (len(tokenizer), tokenizer.model_max_length) == (49_408, 77)
    ids = tokenizer(["a cat!"], padding="max_length", truncation=True).input_ids[0]
    assert (ids[0], ids[-1], len(ids)) == (49_406, 49_407, 77)
    assert tokenizer.convert_ids_to_tokens(ids[1:7]) == ["a</w>", "c", "a", "t</w>", "!</w>", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("size", "pipeline"),
    [
        ("tiny", "StableDiffusionPipeline"),
        ("tiny-ddpm", "DDPMPipeline"),
        ("tiny-sdxl", "StableDiffusionXLPipeline"),
        ("tiny-sd3", "StableDiffusion3Pipeline"),
    ],
)
def test_command_writes_what_diffusers_loads(size, pipeline, tmp_path, capsys):
    out = tmp_path / "model"
    main([str(out), "--size", size, "--dtype", "bfloat16"])
    assert capsys.readouterr().out.strip() == str(out)
    assert read_json(out / "model_index.json")["_class_name"] == pipeline
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__name__ == pipeline
    files = list(out.rglob("*.safetensors"))
    kinds = {tensor.dtype for file in files for tensor in load_file(file).values() if tensor.is_floating_point()}
    assert files and kinds == {torch.bfloat16}


def test_seed_decides_the_weights(tmp_path):
    def weights(name, seed):
        main([str(tmp_path / name), "--size", "tiny-ddpm", "--seed", str(seed)])
        return load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"]

    first = weights("a", 0)
    assert torch.equal(first, weights("b", 0)) and not torch.equal(first, weights("c", 1))


def test_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path), "--size", "tiny-ddpm"])
    assert caught.value.code == 2
    assert f"out={str(tmp_path)!r} is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow  # 2 GB on disk, about 10 GB of memory
def test_sd14_is_loaded_by_the_models_own_class(tmp_path):
    from diffusion_gym.models import load_model

    folder = write_random_sd14(tmp_path, dtype=torch.bfloat16)
    model = load_model(str(folder), "cpu", "bfloat16")
    assert (model.latent_shape, model.image_shape, model.prompt_length) == ((4, 64, 64), (512, 512, 3), 77)
    embeddings = model.embed(model.tokenize(["a cat"]))
    assert embeddings.shape == (1, 77, 768)
    with torch.no_grad():
        predicted = model.predict(model.unet, torch.randn(1, 4, 64, 64), torch.tensor([500]), embeddings)
    assert predicted.shape == (1, 4, 64, 64) and predicted.isfinite().all()
    assert model.scheduler_config["clip_sample"] is False and model.scheduler_config["steps_offset"] == 1
