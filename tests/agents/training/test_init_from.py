"""Training that begins from exported weights: what is read is what diffusers and peft make of the same files."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training.export import export_policy
from diffusion_gym.models.initial import begin_from
from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def env(make_env):
    return make_env(2, prompts=["a red circle"], autoreset_mode="Disabled")


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 16, 16, generator=generator)
    return unet(latents, torch.tensor([400, 700]), encoder_hidden_states=text).sample


def pipeline(path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(path, safety_checker=None, dtype=torch.float32)


@pytest.fixture
def adapted(tiny_pipeline, tmp_path):
    """`adapted(how, **config)`: adapters by peft in a folder of diffusers or of peft, and the output with them."""

    def made(how, folder=tmp_path / "adapters", **config):
        pipe = pipeline(tiny_pipeline)
        torch.manual_seed(3)
        options = {"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **config}
        model = get_peft_model(pipe.unet, LoraConfig(**options))
        expected = output(model)
        if how == "peft":
            model.save_pretrained(folder)
        else:
            told = {"unet_lora_adapter_metadata": model.peft_config["default"].to_dict()} if how == "diffusers" else {}
            told = json.loads(json.dumps(told, default=lambda value: sorted(value)))
            layers = {
                name.removeprefix("base_model.model."): value
                for name, value in get_peft_model_state_dict(model).items()
            }
            pipe.save_lora_weights(folder, unet_lora_layers=layers, **told)
        return folder, expected

    return made


def agent_of(env, **options):
    config = DDPOIS.Config(**options)
    return DDPOIS(DenoisingPolicy.from_env(env, config.trainable, config.lora_rank), config)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("how", ["diffusers", "peft"])
@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 2},
        {"lora_alpha": 7},
        {"lora_alpha": 3, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"to_k": 1}},
        {"lora_alpha": 2, "target_modules": ["to_v"]},
    ],
    ids=["plain", "alpha", "rslora", "pattern", "fewer-layers"],
)
def test_adapters_begin_as_peft_computes_them(env, adapted, how, config, trainable):
    folder, expected = adapted(how, **config)
    policy = agent_of(env, trainable=trainable, lora_rank=2, init_from=str(folder)).policy
    before = output(policy.model.unet)
    torch.testing.assert_close(output(policy.unet), expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(before, output(pipeline(policy.model.name).unet))  # the reference is as it was


@pytest.mark.parametrize("how", ["diffusers", "peft"])
def test_a_full_network_takes_adapters_of_convolutions(env, adapted, how):
    folder, expected = adapted(how, lora_alpha=1, r=3, target_modules=["conv1", "conv_in", "proj_in", "linear_1"])
    policy = agent_of(env, trainable="full", init_from=str(folder)).policy
    torch.testing.assert_close(output(policy.unet), expected, rtol=1e-4, atol=1e-5)
    assert (expected - output(policy.model.unet)).abs().max() > 1e-2


def test_files_that_do_not_tell_alpha_are_read_as_diffusers_reads_them(env, adapted, tiny_pipeline):
    folder, _ = adapted("without metadata", lora_alpha=7)
    pipe = pipeline(tiny_pipeline)
    pipe.load_lora_weights(str(folder))
    policy = agent_of(env, lora_rank=2, init_from=str(folder)).policy
    torch.testing.assert_close(output(policy.unet), output(pipe.unet), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_what_a_policy_exports_another_begins_from(env, perturb, tmp_path, trainable):
    policy = perturb(DenoisingPolicy.from_env(env, trainable), 0.3)
    export_policy(policy, tmp_path / "model")
    begun = agent_of(env, trainable=trainable, init_from=str(tmp_path / "model"), ema_decay=0.9)
    torch.testing.assert_close(output(begun.policy.unet), output(policy.unet), rtol=0, atol=1e-6)
    for parameter, average in zip(begun.parameters, begun.average.average, strict=True):
        assert torch.equal(parameter, average)
    states = {"prompt": torch.zeros(2, 16, dtype=torch.int64), "timestep": begun.policy.table.timesteps[:2, None]}
    states["latents"] = torch.ones(2, 4, 4, 4)
    states["prompt"] = begun.policy.model.tokenize(["a red circle"] * 2)
    assert begun.policy.distribution(states).kl(begun.policy.reference_distribution(states)).min() > 1e-3


def test_adapters_of_a_transformer(make_env, tmp_path, perturb):
    write_random_sd3(tmp_path / "sd3")
    env = make_env(2, model=str(tmp_path / "sd3"), num_inference_steps=2)
    policy = perturb(DenoisingPolicy.from_env(env), 0.3)
    export_policy(policy, tmp_path / "model")
    begun = agent_of(env, init_from=str(tmp_path / "model")).policy
    for name, value in policy.trainable_parameters().items():
        assert torch.equal(value, begun.trainable_parameters()[name]), name


# --- what does not fit -------------------------------------------------------------------------------------------


def test_alpha_of_peft_is_read_whatever_the_file_is_called_and_required(env, adapted):
    folder, expected = adapted("peft", lora_alpha=7)
    file = (folder / "adapter_model.safetensors").rename(folder / "mine.safetensors")
    torch.testing.assert_close(output(agent_of(env, lora_rank=2, init_from=str(file)).policy.unet), expected)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"tells alpha in adapter_config\.json"):
        agent_of(env, lora_rank=2, init_from=str(file))


def test_a_pipeline_that_says_nothing_predicts_what_its_scheduler_does_by_default(env, exact_end_pipeline, tmp_path):
    other = shutil.copytree(exact_end_pipeline, tmp_path / "other")
    scheduler = other / "scheduler" / "scheduler_config.json"
    stored = {name: value for name, value in json.loads(scheduler.read_text()).items() if name != "prediction_type"}
    scheduler.write_text(json.dumps(stored))
    network = DenoisingPolicy.from_env(env, "full").unet
    begin_from(other, network, None, "epsilon")
    with pytest.raises(ValueError, match="predicts 'epsilon' and the model 'v_prediction'"):
        begin_from(other, network, None, "v_prediction")


def edited(folder, change):
    (file,) = folder.glob("*.safetensors")
    save_tensors(file, change(load_tensors(file)), {"format": "pt"})
    return folder


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {f"text_encoder.{k}": v for k, v in t.items()}, "adapters of a text encoder"),
        (lambda t: {k.replace("down_blocks", "blocks"): v for k, v in t.items()}, "adapts layer 'blocks"),
        (lambda t: {**t, "unet.conv_in.lora_magnitude_vector": torch.ones(4)}, "is no low-rank product"),
        (lambda t: {k: v for k, v in t.items() if "lora_A" in k or "down.weight" in k}, "no matching lora_B"),
        (lambda t: {k: torch.cat([v, v], -1) if v.shape[0] == 2 else v for k, v in t.items()}, "has shape"),
        (lambda t: {"weight": torch.ones(1)}, "which is no low-rank product"),
    ],
    ids=["text-encoder", "layer", "dora", "half", "shape", "nothing"],
)
def test_adapters_that_do_not_fit_change_nothing(env, adapted, trainable, change, message):
    folder = edited(adapted("without metadata")[0], change)
    policy = DenoisingPolicy.from_env(env, trainable, 2)
    before = output(policy.unet)
    with pytest.raises(ValueError, match=f"init_from='{folder}' .*{message}"):
        policy.begin_from(folder)
    assert torch.equal(output(policy.unet), before)


@pytest.mark.parametrize("name, value", [("beta_end", 0.02), ("beta_schedule", "linear"), ("num_train_timesteps", 500)])
def test_a_pipeline_of_other_noise_is_refused(env, exact_end_pipeline, tmp_path, name, value):
    other = shutil.copytree(exact_end_pipeline, tmp_path / "other")
    scheduler = other / "scheduler" / "scheduler_config.json"
    policy = DenoisingPolicy.from_env(env, "full")
    policy.begin_from(other)
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), name: value}))
    with pytest.raises(
        ValueError, match=rf"has {name}={value!r} in its scheduler and the model .*; use a pipeline with"
    ):
        policy.begin_from(other)


@pytest.mark.parametrize("how", ["diffusers", "peft"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensor: tensor * torch.nan, "holds NaN or infinite numbers at layer"),
        (lambda tensor: tensor.to(torch.int8), "holds whole numbers at .*; save the adapters in a type of floats"),
    ],
)
def test_adapters_that_are_not_finite_floats_are_refused(env, adapted, how, spoil, message):
    folder, _ = adapted(how)
    (file,) = folder.glob("*.safetensors")
    tensors, metadata = load_tensors(file), tensors_metadata(file)
    name = min(name for name in tensors if "lora_A" in name)
    save_tensors(file, {**tensors, name: spoil(tensors[name])}, metadata)
    policy = DenoisingPolicy.from_env(env, "lora", 2)
    before = output(policy.unet)
    with pytest.raises(ValueError, match=f"init_from='{folder}' {message}"):
        policy.begin_from(folder)
    assert torch.equal(output(policy.unet), before)


def test_other_paths_that_are_refused(env, adapted, tmp_path, make_env, exact_end_pipeline):
    folder, _ = adapted("peft")
    with pytest.raises(ValueError, match="has rank 2 at layer .*, and lora_rank=4; make them equal"):
        agent_of(env, init_from=str(folder))
    with pytest.raises(ValueError, match="is a full pipeline, and adapters cannot hold it; use trainable='full'"):
        agent_of(env, init_from=str(exact_end_pipeline))
    with pytest.raises(FileNotFoundError, match="init_from='nowhere' does not exist"):
        agent_of(env, init_from="nowhere")
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds neither .* nor model_index.json; give '.*run/model'"):
        agent_of(env, init_from=str(tmp_path / "run"))
    dora, _ = adapted("peft", tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match="has use_dora=True"):
        agent_of(env, lora_rank=2, init_from=str(dora))
    other = tmp_path / "other"
    shutil.copytree(exact_end_pipeline, other)
    scheduler = other / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match="predicts 'v_prediction' and the model 'epsilon'"):
        agent_of(env, trainable="full", init_from=str(other))
    write_random_sd3(tmp_path / "sd3")
    with pytest.raises(ValueError, match="has no UNet2DConditionModel"):
        agent_of(env, trainable="full", init_from=str(tmp_path / "sd3"))


# --- a run -------------------------------------------------------------------------------------------------------


def test_a_run_begins_there_and_goes_on_without_the_folder(tiny_pipeline, adapted, tmp_path, capsys):
    folder, _ = adapted("diffusers", lora_alpha=7)

    def train(out, queries, *more):
        main(["train", "--out", str(tmp_path / out), "--total-reward-queries", str(queries), *more])

    def new(*more):
        options = ["--env", "DiffusionDenoise-v0", "--env.model", str(tiny_pipeline), "--env.reward", "Compressibility"]
        sampled = ["--env.prompts", "a red circle", "--env.num-inference-steps", "3", "--env.guidance-scale", "1"]
        size = ["--samples-per-iteration", "4", "--rollout-batch", "4", "--agent.batch-size", "4", "--track", "none"]
        learned = ["--agent.lora-rank", "2", "--agent.trainable", "lora", "--agent.learning-rate", "1e-3"]
        return [*options, *sampled, *size, *learned, "--development-every", "0", *more]

    def weights(out):
        return load_tensors(max((tmp_path / out / "checkpoints").iterdir()))

    begin = ["--agent.init-from", str(folder)]
    train("whole", 8, *new(*begin))
    train("part", 4, *new(*begin))
    train("plain", 4, *new())
    shutil.rmtree(folder)
    stored = json.loads((tmp_path / "part" / "config.json").read_text())["settings"]["agent_options"]
    assert stored["init_from"] == str(folder)
    train("part", 8, "--resume")
    whole, part = weights("whole"), weights("part")
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
    capsys.readouterr()
    main(["eval", str(tmp_path / "part"), "--samples", "4", "--json"])
    begun = json.loads(capsys.readouterr().out)["kl_to_base"]
    main(["eval", str(tmp_path / "plain"), "--samples", "4", "--json"])
    assert begun > 100 * json.loads(capsys.readouterr().out)["kl_to_base"]  # the base is the pretrained model
