"""The model card of a run, and `diffusion-gym push`: what it would upload, and what a hub that refuses is told as."""

import json
import re
from types import SimpleNamespace

import gymnasium as gym
import pytest
import yaml
from PIL import Image

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.publishing import uploads
from diffusion_gym.agents.training.card import write_card
from diffusion_gym.agents.training.export import Export, export_policy, read_export

EVALUATION = {
    "env": "DiffusionDenoise-Shapes-Color-v0",
    "agent": "ddpo_is",
    "seed": 1000,
    "iteration": 2,
    "reward_queries": 1280,
    "samples": 256,
    "reward_mean": 0.95,
    "reward_ci95": [0.93, 0.97],
    "base_reward_mean": 0.5,
    "base_reward_ci95": [0.45, 0.55],
    "success": 0.9,
    "success_ci95": [0.86, 0.93],
    "base_success": 0.4,
    "base_success_ci95": [0.34, 0.46],
    "kl_to_base": 1234.5,
    "prompts": {},
}


@pytest.fixture
def run(tmp_path, request):
    """A run of an embedded model with adapters, evaluated."""
    folder = tmp_path / "secret-folder"
    env = gym.make_vec(f"DiffusionDenoise-{getattr(request, 'param', 'Shapes')}-Color-v0", num_envs=1)
    export_policy(DenoisingPolicy.from_env(env, trainable="lora"), folder / "model")
    settings = {"env": EVALUATION["env"], "agent": "ddpo_is", "preset": "shapes", "seed": 7, "out": str(folder)}
    (folder / "config.json").write_text(
        json.dumps({"format": "diffusion-gym-run-2", "settings": settings, "versions": {}})
    )
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    (folder / "images").mkdir()
    for name in ("before", "after"):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{name}.png")
    return folder


def parts(card):
    head, body = re.fullmatch(r"---\n(.*?)\n---\n\n(.*)", card.read_text(), flags=re.S).groups()
    return yaml.safe_load(head), body


def rewritten(run, **fields):
    path = run / "model" / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return parts(write_card(run))


def test_the_card_has_the_hubs_metadata_numbers_and_pictures(run):
    head, body = parts(write_card(run, "owner/name"))
    assert head["license"] == "mit" and head["library_name"] == "diffusers" and "base_model" not in head
    assert head["pipeline_tag"] == "text-to-image" and {"ddpo_is", "lora"} <= set(head["tags"])
    assert head["weight_name"] == "pytorch_lora_weights.safetensors"
    metrics = head["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in metrics} == {"reward_mean": 0.95, "success": 0.9}
    assert "| training | strict success | 0.4 (0.34 to 0.46) | 0.9 (0.86 to 0.93) |" in body and "1,280" in body
    assert "![before](before.png) | ![after](after.png)" in body and (run / "model" / "after.png").is_file()
    assert "secret-folder" not in body + str(head)


@pytest.mark.parametrize("run", ["Shapes", "ShapesFlow"], indirect=True)
def test_the_python_of_the_card_loads_the_weights(run):
    head, body = parts(write_card(run, str(run / "model")))
    assert head["license"] == "mit" and "the model that ships in diffusion_gym" in body
    code = re.search(r"```python\n(.*?)```", body, flags=re.S)[1]
    scope = {}
    exec(code, scope)
    assert scope["pipe"].get_active_adapters()


def test_the_printed_line_makes_its_pipe(run):
    import diffusers

    line = read_export(run / "model").line(str(run / "model"))
    scope = {"StableDiffusionPipeline": diffusers.StableDiffusionPipeline}
    exec(line, scope)
    assert scope["pipe"].get_active_adapters()


def test_a_hub_model_is_named_and_a_folder_is_not(run, tmp_path):
    head, body = rewritten(run, base="CompVis/stable-diffusion-v1-4", dtype="bfloat16")
    assert head["base_model"] == "CompVis/stable-diffusion-v1-4" and head["base_model_relation"] == "adapter"
    assert head["license"] == "creativeml-openrail-m" and "torch_dtype=torch.bfloat16" in body
    (tmp_path / "mine").mkdir()
    head, body = rewritten(run, base=str(tmp_path / "mine"))
    assert "base_model" not in head and "license" not in head and "mine" not in body.replace("determined", "")
    assert "PRETRAINED" in body and "No licence is stated here" in body


def test_a_run_without_an_evaluation_has_a_card_that_says_so(run):
    write_card(run)
    (run / "eval.json").unlink()
    head, body = parts(write_card(run))
    assert "model-index" not in head and "diffusion-gym eval RUN" in body
    assert not (run / "model" / "before.png").exists()


def test_an_evaluation_of_an_earlier_iteration_is_not_on_the_card(run):
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "iteration-000002.safetensors").touch()
    assert "model-index" in parts(write_card(run))[0]
    (run / "checkpoints" / "iteration-000003.safetensors").touch()
    head, body = parts(write_card(run))
    assert "model-index" not in head and "not evaluated" in body


def test_a_full_pipeline_is_loaded_by_one_line():
    export = Export(adapters=False, pipeline="DDPMPipeline", base="google/ddpm-church-256", dtype="float16")
    assert export.line("x") == "DDPMPipeline.from_pretrained('x', torch_dtype=torch.float16)"


def test_a_dry_run_says_each_file_and_uploads_none(run, capsys, monkeypatch):
    monkeypatch.setattr("diffusion_gym.agents.publishing._upload", lambda *given: pytest.fail("uploaded"))
    main(["push", str(run), "owner/name", "--dry-run"])
    first, *lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines]
    assert first.startswith("would upload 5 files, ") and first.endswith(" to owner/name:")
    assert named == ["README.md", "after.png", "before.png", "export.json", "pytorch_lora_weights.safetensors"]


def test_what_is_told_is_what_is_uploaded(run, capsys, monkeypatch):
    asked = []
    api = SimpleNamespace(
        create_repo=lambda hub_id, **given: asked.append((hub_id, given)),
        upload_folder=lambda **given: asked.append(given) or "https://hub/owner/name/commit/1",
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    main(["push", str(run), "owner/name", "--private"])
    out = capsys.readouterr().out.splitlines()
    assert asked[0] == ("owner/name", {"private": True, "exist_ok": True})
    assert asked[1]["repo_id"] == "owner/name" and asked[1]["folder_path"] == run / "model"
    assert asked[1]["allow_patterns"] == [line.split()[0] for line in out[1:-1]] == uploads(run / "model")
    assert out[-1] == "https://hub/owner/name/commit/1"


def failing(capsys, *args):
    with pytest.raises(SystemExit) as error:
        main(["push", *map(str, args)])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_hub_that_is_not_there_is_an_error_that_says_how_to_go_on(run, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    said = failing(capsys, run, "owner/name")
    assert said.startswith("error: hub_id='owner/name': ") and "run the same command again" in said


def test_mistakes_are_refused_before_anything_is_uploaded(run, capsys, tmp_path):
    assert "no hub id of the form 'owner/name'" in failing(capsys, run, "name")
    assert "holds no exported model" in failing(capsys, tmp_path / "none", "owner/name")
    (run / "model" / "link.txt").symlink_to(run / "config.json")
    assert "link.txt is a link, which may lead anywhere" in failing(capsys, run, "owner/name", "--dry-run")
