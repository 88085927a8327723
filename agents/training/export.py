"""The result of a run as files that plain diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from torch import nn

from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.sharding import gathered_network
from diffusion_gym.hub import MODEL_SOURCES
from diffusion_gym.models.fields import absent_parts
from diffusion_gym.schemas import Schema, read_checked
from diffusion_gym.storage import read_json, write_json

LORA_WEIGHTS: Final = "pytorch_lora_weights.safetensors"  # what diffusers calls a file of adapters
_FILE: Final = "export.json"


class Export(Schema):
    """`export.json` beside the weights: what loads them.

    Attributes:
        adapters: whether the weights are adapters, for the pipeline of `base`; else they are a whole pipeline.
        pipeline: its class in diffusers; empty where a model of one's own is no pipeline.
        base: the pretrained model: a hub id, or where its folder was.
        dtype: of the weights, as torch calls it.
        absent: the parts that the pipeline goes without, such as `text_encoder_3`.
    """

    adapters: bool
    pipeline: str
    base: str
    dtype: str
    absent: list[str] = []

    def line(self, folder: str, base: str | None = None) -> str:
        """The Python that loads it.

        Args:
            folder: where the weights are, a folder or a hub id.
            base: the Python for the pretrained model, in place of its own.
        """
        # Without it diffusers would load its networks as float32, and transformers its own as they are stored.
        options = "" if self.dtype == "float32" else f", torch_dtype=torch.{self.dtype}"
        # Diffusers refuses a folder whose index says null for these, unless they are named.
        options += "".join(f", {part}=None" for part in self.absent)
        if not self.adapters:
            return f"{self.pipeline}.from_pretrained({folder!r}{options})"
        made = f"pipe = {self.pipeline}.from_pretrained({base or repr(self.base)}{options}); " if self.pipeline else ""
        # Without the name diffusers asks the hub for a list of files, and refuses where it may not ask.
        return f"{made}pipe.load_lora_weights({folder!r}, weight_name={LORA_WEIGHTS!r})"


def exported_network(policy: DenoisingPolicy, processes: Processes) -> nn.Module | None:
    """The network that `export_policy` writes in the main process; where it is spread over several, all of them call.

    It is the policy's own, as long as adapters alone are written or the policy has it whole.
    """
    if policy.trainable == "lora" and hasattr(policy.model, "save_lora"):
        return policy.unet
    return gathered_network(policy, processes)


def export_policy(policy: DenoisingPolicy, folder: Path, network: nn.Module | None = None) -> str:
    """Write what the policy has learned to `folder`: the adapters, or a full pipeline.

    Args:
        policy: the policy.
        folder: where to.
        network: of `exported_network`, where the policy's own is spread over processes.

    A model whose pipeline in diffusers loads no adapters, such as `DDPMPipeline`, is saved with them merged into its
    weights.

    Returns:
        The line of Python that loads it: the pretrained pipeline and `load_lora_weights` for adapters,
            `from_pretrained` for a full pipeline, with the dtype of the weights where that is not float32.
    """
    unet, model = network or policy.unet, policy.model
    dtype = str(next(unet.parameters()).dtype).removeprefix("torch.")
    # A model of one's own has no files; that of a name is in the package or in the hub's cache.
    source = str(getattr(model, "files", ("",))[0])
    base = MODEL_SOURCES.get(model.name) or (source if Path(source, "model_index.json").is_file() else model.name)
    if model.name.count("/") == 1 and not Path(model.name).exists():
        base = model.name
    save_lora = getattr(model, "save_lora", None)
    if policy.trainable == "lora" and save_lora is not None:
        save_lora(folder, unet)
        index = Path(source, "model_index.json")
        pipeline = read_json(index)["_class_name"] if index.is_file() else ""
        adapters, dtype = True, str(model.dtype).removeprefix("torch.")
    else:
        if policy.trainable == "lora":
            from diffusion_gym.models.lora import merged

            unet = merged(unet)
            dtype = str(next(unet.parameters()).dtype).removeprefix("torch.")
        model.save_pipeline(str(folder), unet)
        adapters, pipeline = False, read_json(folder / "model_index.json")["_class_name"]
    absent = absent_parts(getattr(model, "OPTIONAL", ()), getattr(model, "index", {}))  # one of one's own has neither
    export = Export(adapters=adapters, pipeline=pipeline, base=base, dtype=dtype, absent=absent)
    write_json(folder / _FILE, export.model_dump())
    return export.line(str(folder))


def read_export(folder: Path) -> Export:
    """What `export_policy` wrote into a folder.

    Raises:
        FileNotFoundError: nothing was exported there.
        ValueError: the file is truncated or of something else.
    """
    path = folder / _FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no exported model ({_FILE}); let the training come to its end")
    return read_checked(Export, path, "export again: `diffusion-gym train --resume` with the run's own budget")
