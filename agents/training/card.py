"""The model card of a run: what the hub shows of the exported weights, with the run's own numbers and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from diffusion_gym import models
from diffusion_gym.agents.training.export import LORA_WEIGHTS, Export, read_export
from diffusion_gym.agents.training.run_files import read_config, read_evaluation
from diffusion_gym.hub import MODEL_SOURCES
from diffusion_gym.storage import write_bytes, write_text

CARD: Final = "README.md"
PICTURES: Final = ("before.png", "after.png")
# Of the pretrained models that have names here, as far as we know; that of a tuned model follows from it.
LICENCES: Final = {
    MODEL_SOURCES["SD14"]: "creativeml-openrail-m",
    MODEL_SOURCES["SD15"]: "creativeml-openrail-m",
    **dict.fromkeys((MODEL_SOURCES[name] for name in ("CelebaHQ", "Church", "Bedroom")), "apache-2.0"),
}


def write_card(run: Path, hub_id: str | None = None) -> Path:
    """Write the card of a run beside its exported weights, with the pictures of its evaluation where there is one.

    It names no path and no address of this machine.

    Args:
        run: the run folder.
        hub_id: where the weights will be; by default the card says `.`, the folder itself.

    Returns:
        The card.

    Raises:
        FileNotFoundError: the run has exported nothing yet.
        ValueError: one of its files is truncated or of something else.
    """
    folder = run / "model"
    export, settings, result = read_export(folder), read_config(run).settings, _evaluation(run)
    shown = result is not None and all((run / "images" / name).is_file() for name in PICTURES)
    for name in PICTURES:
        if shown:
            write_bytes(folder / name, (run / "images" / name).read_bytes())
        else:
            (folder / name).unlink(missing_ok=True)
    text = f"---\n{_metadata(export, settings, result)}\n---\n\n{_body(export, settings, result, shown, hub_id)}"
    write_text(folder / CARD, text)
    return folder / CARD


def _evaluation(run: Path) -> dict[str, Any] | None:
    """The run's evaluation; None where there is none, or one of an earlier iteration than that of the weights."""
    result = read_evaluation(run)
    iterations = [int(path.stem.rpartition("-")[2]) for path in (run / "checkpoints").glob("iteration-*.safetensors")]
    return result if result is None or not iterations or result["iteration"] == max(iterations) else None


def _hub_base(export: Export) -> str | None:
    """The hub id of the pretrained model; None where it is a folder, whose name is nobody's business."""
    known = export.base in MODEL_SOURCES.values()
    return export.base if known or (export.base.count("/") == 1 and not Path(export.base).exists()) else None


def _embedded(export: Export) -> str | None:
    """The module of the model that ships in the package, if that is the pretrained one; its weights are ours."""
    base = Path(export.base)
    ships = base.name == "weights" and base.parent.parent == Path(models.__file__).parent
    return f"{models.__name__}.{base.parent.name}" if ships else None


def _metadata(export: Export, settings: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    """The YAML that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    base = _hub_base(export)
    task = "unconditional-image-generation" if export.pipeline.startswith(("DDPM", "DDIM")) else "text-to-image"
    results = []
    for part, numbers in (("training", result), ("held-out", (result or {}).get("held_out"))):
        for key in ("reward_mean", "success"):
            if numbers is not None and numbers.get(key) is not None:
                low, high = numbers[f"{key.removesuffix('_mean')}_ci95"]
                results.append(
                    EvalResult(
                        task_type=task,
                        dataset_type="diffusion-gym",
                        dataset_name=f"{settings['env']}, {part} prompts",
                        metric_type=key,
                        metric_value=round(numbers[key], 4),
                        metric_name=f"{key}, 95 % interval {_number(low)} to {_number(high)}",
                    )
                )
    tags = ["reinforcement-learning", "diffusion-gym", str(settings["agent"]), "lora" if export.adapters else "full"]
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if export.adapters else "finetune",
        license="mit" if _embedded(export) else LICENCES.get(base or ""),
        library_name="diffusers",
        pipeline_tag=task,
        tags=tags,
        weight_name=LORA_WEIGHTS if export.adapters else None,
        model_name=f"{settings['agent']} on {settings['env']}" if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _body(
    export: Export, settings: Mapping[str, Any], result: Mapping[str, Any] | None, shown: bool, hub_id: str | None
) -> str:
    """What a person reads."""
    agent, env = settings["agent"], settings["env"]
    base = _hub_base(export) or ("the model that ships in diffusion_gym" if _embedded(export) else "a model of its own")
    kind = "LoRA adapters" if export.adapters else "A full fine-tune"
    lines = [
        f"# {agent} on {env}",
        "",
        f"{kind} of {base}, trained by reinforcement learning on its denoising process with `diffusion_gym`.",
        "",
        f"- agent `{agent}`, environment `{env}`, preset `{settings.get('preset')}`, seed {settings.get('seed')}",
    ]
    if result is None:
        lines += ["- not evaluated: `diffusion-gym eval RUN` adds the numbers and the pictures"]
    else:
        lines += [f"- {result['reward_queries']:,} reward queries", "", *_numbers(result)]
    if shown:
        lines += ["", "| before | after |", "|---|---|", f"| ![before]({PICTURES[0]}) | ![after]({PICTURES[1]}) |", ""]
        lines += ["The same noise and prompts: the pretrained model on the left, these weights on the right."]
    lines += ["", "## How to load it", "", "```python", *_loading(export, hub_id), "```"]
    if export.adapters:
        lines += ["", f"The weights are `{LORA_WEIGHTS}`."]
    if not LICENCES.get(_hub_base(export) or "") and not _embedded(export):
        lines += ["", "No licence is stated here: that of the pretrained model holds."]
    return "\n".join(lines) + "\n"


def _loading(export: Export, hub_id: str | None) -> list[str]:
    """Python that loads the weights in diffusers."""
    folder, lines = hub_id or ".", list[str]()
    if export.dtype != "float32":
        lines.append("import torch")
    base = None
    if export.adapters and _embedded(export):
        base = "WEIGHTS"
        lines.append(f"from {_embedded(export)} import WEIGHTS")
    elif export.adapters and _hub_base(export) is None:
        base = '"PRETRAINED"'
        lines.append('# "PRETRAINED" stands for the folder of the pretrained model')
    if export.pipeline:
        lines.append(f"from diffusers import {export.pipeline}")
    made = export.line(folder, base).split("; ")
    return [*sorted(lines, key=lambda line: line.startswith("#")), "", *made]


def _numbers(result: Mapping[str, Any]) -> list[str]:
    """The table of the evaluation."""
    lines = ["| prompts | measure | before | after |", "|---|---|---|---|"]
    for part, numbers in (("training", result), ("held-out", result.get("held_out"))):
        if numbers is None:
            continue
        for key, name in (("reward_mean", "reward"), ("success", "strict success")):
            if key in numbers and numbers[key] is not None:
                cells = [
                    f"{_number(numbers[f'{prefix}{key}'])} "
                    f"({' to '.join(_number(bound) for bound in numbers[_interval(prefix, key)])})"
                    for prefix in ("base_", "")
                ]
                lines.append(f"| {part} | {name} | {cells[0]} | {cells[1]} |")
        lines.append(
            f"| {part} | KL to the pretrained model, nats a trajectory | 0 | {_number(numbers['kl_to_base'])} |"
        )
    return [*lines, "", f"Means over {result['samples']} samples of each model, with 95 % intervals."]


def _interval(prefix: str, key: str) -> str:
    return f"{prefix}{key.removesuffix('_mean')}_ci95"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"
