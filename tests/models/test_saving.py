"""What leaves in diffusers' layout must be read by others: plain diffusers, older transformers, and colleagues."""

import os
import shutil

import diffusers
import pytest
import torch
from safetensors import safe_open

from diffusion_gym.models import load_model
from diffusion_gym.models.lora import full_copy, merged, with_lora
from diffusion_gym.models.saving import export_pipeline, rename_weights
from diffusion_gym.models.shapes import WEIGHTS
from diffusion_gym.storage import load_tensors, save_tensors, write_json
from diffusion_gym.testing.random_pipeline import write_pipeline

SIZES = ["tiny", "tiny-sdxl", "tiny-sd3", "tiny-ddpm"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {size: write_pipeline(root / size, size, 0, torch.float32) for size in SIZES}


def trained(model, trainable):
    network = with_lora(model.unet, 2) if trainable == "lora" else full_copy(model.unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def compiled(network, where):
    if where == "whole":
        return torch.compile(network)
    if where == "block":
        name = next(name for name, _ in network.named_children() if "block" in name)
        setattr(network, name, torch.compile(getattr(network, name)))
    return network


def output(model, network):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *model.latent_shape, generator=generator)
    embeddings = model.embed(model.tokenize(["a red circle", "two blue stars"])) if model.prompt_length else None
    with torch.no_grad():
        return model.predict(network, x, torch.tensor([400, 700]), embeddings)


def network_of(pipe):
    return (pipe.transformer if hasattr(pipe, "transformer") else pipe.unet).eval()


@pytest.mark.parametrize("where", ["nothing", "whole", "block"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_a_compiled_network_is_exported_under_the_names_that_diffusers_knows(size, trainable, where, folders, tmp_path):
    model = load_model(folders[size], "cpu", "float32")
    network = trained(model, trainable)
    expected = output(model, network)
    network = compiled(network, where)
    if trainable == "lora" and hasattr(model, "save_lora"):
        model.save_lora(tmp_path / "out", network)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folders[size])
        pipe.load_lora_weights(str(tmp_path / "out"))
    else:
        model.save_pipeline(str(tmp_path / "out"), merged(network) if trainable == "lora" else network)
        pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(output(model, network_of(pipe)), expected)
    assert (expected - output(model, model.unet)).abs().max() > 1e-3


def test_names_of_shards_are_renamed_with_their_index(tmp_path):
    save_tensors(tmp_path / "model-00001-of-00001.safetensors", {"_orig_mod.a._orig_mod.w": torch.ones(1)})
    index = {"metadata": {}, "weight_map": {"_orig_mod.a._orig_mod.w": "model-00001-of-00001.safetensors"}}
    write_json(tmp_path / "model.safetensors.index.json", index)
    rename_weights(tmp_path)
    assert list(load_tensors(tmp_path / "model-00001-of-00001.safetensors")) == ["a.w"]
    assert '"a.w": "model' in (tmp_path / "model.safetensors.index.json").read_text()


@pytest.mark.parametrize("size", SIZES)
def test_an_export_is_what_any_reader_may_read(size, folders, tmp_path):
    """Permissions of the umask, the tokenizers' own files, and text encoders' names of transformers 4."""
    folder = shutil.copytree(folders[size], tmp_path / "base")
    for path in folder.glob("tokenizer*"):
        (path / "special_tokens_map.json").write_text("{}")  # as transformers 4 writes, and 5 does not
    model = load_model(folder, "cpu", "float32")
    before = os.umask(0o022)
    model.save_pipeline(str(tmp_path / "out"), model.unet)
    os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    handed_on = {path.relative_to(folder): path.read_bytes() for path in folder.glob("tokenizer*/*")}
    written = {p.relative_to(tmp_path / "out"): p.read_bytes() for p in (tmp_path / "out").glob("tokenizer*/*")}
    assert written == handed_on and (handed_on or size == "tiny-ddpm")
    for path in (tmp_path / "out").glob("text_encoder*/*.safetensors"):
        if path.parent.name != "text_encoder_3":
            assert all(name.startswith(("text_model.", "text_projection.")) for name in load_tensors(path))


def test_an_export_over_the_model_in_use_leaves_it_as_it_is(folders, tmp_path):
    """On a CPU the networks of diffusers are a mapping of their file."""
    folder = shutil.copytree(folders["tiny"], tmp_path / "base")
    model = load_model(folder, "cpu", "float32")
    before = output(model, model.unet)
    network = trained(model, "full")
    model.save_pipeline(str(folder), network)
    assert torch.equal(output(model, model.unet), before)
    anew = load_model(folder, "cpu", "float32")
    torch.testing.assert_close(output(anew, anew.unet), output(model, network))


def test_an_export_that_fails_leaves_the_older_one(folders, tmp_path):
    class Broken:
        def save_pretrained(self, place):
            (place / "unet").mkdir()
            raise OSError("No space left on device")

    folder = shutil.copytree(folders["tiny"], tmp_path / "base")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="No space left"):
        export_pipeline(folder, Broken())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_embedded_model_loads_plainly_and_is_read_by_transformers_4():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", num_inference_steps=5, output_type="np").images
    assert picture.shape == (1, 32, 32, 3) and picture.std() > 0.05
    with safe_open(WEIGHTS / "text_encoder" / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        tensors = [file.get_tensor(name) for name in names]
    assert len(names) == 36 and all(name.startswith("text_model.") for name in names)
    assert all(torch.equal(tensor, tensor.half().float()) for tensor in tensors)  # no digit was lost or added
