"""The model card of a run, and `diffusion-gym push`: what it would upload, and what a hub that refuses is told as."""

import json
import re

import gymnasium as gym
import pytest
import yaml
from PIL import Image

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training.card import write_card
from diffusion_gym.agents.training.export import Export, export_policy, read_export
from hub_server import COMMIT, hub_server

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


@pytest.fixture
def hub(run, tmp_path, monkeypatch):
    """A hub on this machine that has no repository yet."""
    with hub_server("owner/name", tmp_path / "repository", tmp_path / "cache", monkeypatch) as server:
        yield server


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("large", [(".safetensors", ".png"), (".none",)], ids=["lfs", "git"])
def test_what_the_dry_run_says_is_what_arrives(run, hub, large, capsys, monkeypatch):
    hub.large = large
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", large != (".none",))
    (run / "model" / "a [1] *.txt").write_text("a name that would be a pattern")
    main(["push", str(run), "owner/name", "--dry-run"])
    told = capsys.readouterr().out.splitlines()
    assert not hub.asked and not hub.folder.exists()
    main(["push", str(run), "owner/name", "--private"])
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == told[0].replace("would upload", "uploads") and lines == told[1:]
    assert contents(hub.folder) == contents(run / "model") and len(hub.commits) == 1 and hub.private
    assert bool(hub.stored) == (".png" in large)
    assert {line.split("  ")[1]: line.split("  ")[2] for line in lines} == {
        name: f"{len(body):,} bytes" for name, body in contents(hub.folder).items()
    }
    assert last == f"{hub.endpoint}/owner/name/commit/{COMMIT}"


def test_what_was_pushed_is_loaded_from_the_hub_by_the_python_of_its_card(run, hub):
    main(["push", str(run), "owner/name"])
    assert not hub.private
    scope = {}
    exec(re.search(r"```python\n(.*?)```", parts(hub.folder / "README.md")[1], flags=re.S)[1], scope)
    assert scope["pipe"].get_active_adapters()
    assert ("GET", "/owner/name/resolve/main/pytorch_lora_weights.safetensors") in hub.asked


def test_a_repository_that_is_there_is_said_and_keeps_its_other_files(run, hub, capsys):
    hub.folder.mkdir()
    (hub.folder / "notes.md").write_text("theirs")
    (hub.folder / "README.md").write_text("old")
    main(["push", str(run), "owner/name"])
    assert "owner/name is there: files of these names are replaced, its others stay" in capsys.readouterr().out
    assert contents(hub.folder) == {**contents(run / "model"), "notes.md": b"theirs"}
    assert not [path for _, path in hub.asked if path == "/api/repos/create"]


def failing(capsys, *args):
    with pytest.raises(SystemExit) as error:
        main(["push", *map(str, args)])
    assert error.value.code == 2
    # Before it, there may be the client's progress.
    *progress, line = capsys.readouterr().err.splitlines()
    assert not [each for each in progress if each.startswith("error") or "Traceback" in each]
    return line


def test_a_private_upload_to_a_public_repository_is_refused(run, hub, capsys):
    hub.folder.mkdir()
    said = failing(capsys, run, "owner/name", "--private")
    assert said.startswith("error: private=True, but hub_id='owner/name' is there and public")
    assert not hub.commits and not hub.stored


@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_token_that_the_hub_refuses_is_one_sentence(run, hub, there, capsys, monkeypatch):
    hub.folder.mkdir() if there else None
    monkeypatch.setenv("HF_TOKEN", "another")
    said = failing(capsys, run, "owner/name")
    assert "the hub did not take it (401: Invalid credentials in Authorization header); log in with" in said
    assert "HF_TOKEN" in said and "another" not in said and not hub.commits


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        ("/api/repos/create", 403, "you may not make a repository for owner"),
        ("/preupload/main", 403, "your token may only read"),
        ("/commit/main", 400, "a file is too large"),
        ("/info/lfs/objects/batch", 404, "no such repository"),
    ],
)
def test_a_request_that_the_hub_refuses_is_one_sentence(run, hub, end, status, reason, capsys):
    hub.refused[end] = (status, reason)
    said = failing(capsys, run, "owner/name")
    assert said.startswith(f"error: hub_id='owner/name': the hub did not take it ({status}: {reason}); ")
    assert ("HF_TOKEN" in said) == (status != 400) and "run the same command again" in said and not hub.commits


def test_a_file_that_the_hub_ignores_is_not_passed_over(run, hub, capsys):
    hub.ignored = ("after.png",)
    said = failing(capsys, run, "owner/name")
    assert "the hub ignored after.png; remove what names it from the .gitignore there" in said


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
