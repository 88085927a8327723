"""The embeddings that a model keeps on disk: who shares them, what is refused, and what a training makes of them."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.encoding import encode_ahead
from diffusion_gym.agents.processes import Processes
from diffusion_gym.config import SamplerConfig
from diffusion_gym.models import load_model
from diffusion_gym.models.latent import LatentModel
from diffusion_gym.testing.random_pipeline import write_random_pipeline

PROMPTS = ["a red circle", "two blue stars", "a green square"]


@pytest.fixture
def load(tiny_pipeline, tmp_path):
    """`load(folder)`: a model whose embeddings are in `tmp_path`."""

    def make(folder=tiny_pipeline):
        return load_model(str(folder), "cpu", "float32", {"embedding_cache": str(tmp_path)})

    return make


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("spoil", ["cut", "changed", "foreign", "other encoders"])
def test_a_file_that_is_no_embedding_is_refused(load, tmp_path, spoil):
    model = load()
    known = model.embed(model.tokenize(PROMPTS[:1]))
    [name] = files(tmp_path)
    path, content = tmp_path / name, (tmp_path / name).read_bytes()
    if spoil == "foreign":
        save_file({"embedding": torch.zeros(1, 2, 3)}, path)
    elif spoil == "other encoders":
        path.write_bytes(content.replace(model.store.encoders.encode(), b"0" * 64))
    else:
        path.write_bytes(content[:-4] if spoil == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=f"^embedding_cache: .*{path.name} .*; delete that file, and the prompt is enc"
    ):
        model.embed(model.tokenize(PROMPTS[:1]))
    path.unlink()
    for _ in range(2):
        assert torch.equal(model.embed(model.tokenize(PROMPTS[:1])), known) and path.is_file()


def test_models_of_the_same_encoders_share_embeddings_and_others_do_not(load, tiny_pipeline, tmp_path):
    first = load()
    first.embed(first.tokenize(PROMPTS))
    assert len(files(tmp_path)) == 3
    wide = first.with_options(width=64, negative_prompt="fog")
    wide.embed(wide.tokenize(PROMPTS))
    assert len(files(tmp_path)) == 3
    other = load(write_random_pipeline(tmp_path.with_name("other"), seed=5))
    assert not torch.equal(other.embed(other.tokenize(PROMPTS)), first.embed(first.tokenize(PROMPTS)))
    assert len(files(tmp_path)) == 6


def test_a_pipeline_is_exported_with_the_encoders_that_had_left(load, tmp_path):
    model = load()
    weights = {name: value.clone() for name, value in model.text_encoder.state_dict().items()}
    model.text_encoders.release(model)
    model.save_pipeline(str(tmp_path / "exported"), model.unet)
    assert model.text_encoders.released
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "exported")
    found = pipe.text_encoder.state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], value) for name, value in weights.items())


def test_encoders_do_not_come_back_from_files_that_have_changed(tmp_path):
    folder = write_random_pipeline(tmp_path / "model")
    model = load_model(str(folder), "cpu", "float32", {"embedding_cache": str(tmp_path / "cache")})
    model.text_encoders.release(model)
    (folder / "text_encoder" / "config.json").touch()
    with pytest.raises(ValueError, match="its files in .* have changed; begin anew with them"):
        model.embed(model.tokenize(PROMPTS[:1]))


def test_processes_encode_a_part_each(load, in_processes, tmp_path):
    model = load()

    def child(processes):
        encoded, own = [], LatentModel._encode
        LatentModel._encode = lambda self, *ids: encoded.append(len(ids[0])) or own(self, *ids)
        policy = DenoisingPolicy(model, SamplerConfig(num_inference_steps=3))
        encode_ahead(policy, PROMPTS, processes)
        before = len(encoded)
        found = policy.embed_prompts(PROMPTS)
        return [before, len(encoded) - before, model.text_encoders.released, float(found.sum())]

    (one, *rest), (other, *more) = in_processes(2, child)
    assert rest == more and rest[:2] == [0, True]
    assert {one, other} <= {1, 2, 3} and len(files(tmp_path)) == 4  # the empty prompt too, by whoever came first


def test_a_model_without_a_cache_is_left_as_it_is(tiny_pipeline):
    model = load_model(str(tiny_pipeline), "cpu", "float32")
    encode_ahead(DenoisingPolicy(model, SamplerConfig(num_inference_steps=3)), PROMPTS, Processes())
    assert model.store is None and not model.text_encoders.released
