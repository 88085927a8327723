"""Which files of a repository are fetched, on the layouts of the ids that the project names."""

import pytest

from diffusion_gym.hub_files import needed_files

STABLE_DIFFUSION = """.gitattributes README.md v1-4.ckpt feature_extractor/preprocessor_config.json model_index.json
    safety_checker/config.json safety_checker/model.safetensors safety_checker/pytorch_model.bin
    scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.fp16.safetensors
    text_encoder/model.safetensors text_encoder/pytorch_model.bin tokenizer/merges.txt tokenizer/vocab.json
    tokenizer/tokenizer_config.json tokenizer/special_tokens_map.json unet/config.json
    unet/diffusion_pytorch_model.bin unet/diffusion_pytorch_model.fp16.safetensors
    unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.non_ema.safetensors vae/config.json
    vae/diffusion_pytorch_model.safetensors""".split()
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

GOOGLE = """README.md config.json diffusion_pytorch_model.bin diffusion_pytorch_model.safetensors model_index.json
    scheduler_config.json images/generated_image_0.png""".split()

CLIP = """README.md config.json flax_model.msgpack merges.txt model.safetensors preprocessor_config.json
    pytorch_model.bin special_tokens_map.json tf_model.h5 tokenizer.json tokenizer_config.json vocab.json
    onnx/config.json open_clip_model.safetensors""".split()

SHARDED = """config.json chat_template.jinja tokenizer.model model-00001-of-00002.safetensors
    model-00002-of-00002.safetensors model.safetensors.index.json model.safetensors.index.fp16.json
    model.fp16-00001-of-00002.safetensors model.fp16-00002-of-00002.safetensors
    model-00001-of-00001.bf16.safetensors model.safetensors.index.bf16.json""".split()


def weights(files):
    return {file for file in files if file.endswith(".safetensors")}


def test_of_a_pipeline_only_the_parts_and_the_plain_weights_are_fetched():
    chosen = needed_files(STABLE_DIFFUSION, PARTS)
    assert weights(chosen) == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert {"model_index.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json"} <= set(chosen)
    assert not [file for file in chosen if file.endswith((".bin", ".ckpt")) or file.startswith("safety")]


def test_variant_is_fetched_where_a_part_has_it():
    assert weights(needed_files(STABLE_DIFFUSION, PARTS, variant="fp16")) == {
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_flat_ddpm_is_fetched_with_its_scheduler():
    expected = {"config.json", "diffusion_pytorch_model.safetensors", "model_index.json", "scheduler_config.json"}
    assert set(needed_files(GOOGLE, optional=("unet", "scheduler"))) == expected
    nested = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "other/x.json"]
    assert set(needed_files(nested, optional=("unet", "scheduler"))) == set(nested) - {"other/x.json"}


def test_of_a_model_of_transformers_one_copy_of_the_weights_is_fetched():
    chosen = needed_files(CLIP)
    assert weights(chosen) == {"model.safetensors"}
    assert {"tokenizer.json", "merges.txt", "preprocessor_config.json"} <= set(chosen)
    assert not [file for file in chosen if "/" in file or file.endswith((".bin", ".h5", ".msgpack", ".md"))]


def test_tokenizer_is_fetched_without_weights():
    assert set(needed_files(CLIP, weights=False)) == {file for file in CLIP if file.endswith((".json", ".txt"))} - {
        "onnx/config.json"
    }


def test_shards_are_fetched_with_their_index():
    small = {"config.json", "chat_template.jinja", "tokenizer.model"}
    plain = {file for file in SHARDED if file.startswith("model") and "16" not in file}
    assert set(needed_files(SHARDED)) == small | plain
    half = {file for file in SHARDED if "fp16" in file}
    assert set(needed_files(SHARDED, variant="fp16")) == small | half
    old = needed_files(SHARDED, variant="bf16")
    assert weights(old) == {"model-00001-of-00001.bf16.safetensors"}


@pytest.mark.parametrize("weights", [True, False])
def test_pickles_are_refused_only_where_weights_are_needed(weights):
    deberta = ["config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.json", "merges.txt"]
    if weights:
        with pytest.raises(FileNotFoundError, match=r"as a pickle only \(pytorch_model.bin\)"):
            needed_files(deberta)
    else:
        assert set(needed_files(deberta, weights=False)) == set(deberta) - {"pytorch_model.bin"}


def test_pickle_is_taken_where_it_is_asked_for_and_there_are_no_safetensors():
    files = ["config.json", "pytorch_model.bin", "other.bin"]
    assert set(needed_files(files, pickled=True)) == {"config.json", "pytorch_model.bin"}
    assert set(needed_files([*files, "model.safetensors"], pickled=True)) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("gone", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"])
def test_shards_are_refused_where_one_of_them_or_their_index_is_missing(gone):
    with pytest.raises(FileNotFoundError, match=r"has \d of 2 shards in its top folder, or not their index"):
        needed_files([file for file in SHARDED if file != gone])
