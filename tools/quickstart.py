"""Runs the notebook examples/quickstart.ipynb and stores its outputs in it.

    python -m tools.quickstart

It needs the extra `dev`. What belongs to the machine or the moment is left out: run folders, times, progress.
"""

from __future__ import annotations

import base64
import io
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

from diffusion_gym.storage import write_text

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_PROGRESS = re.compile(r"[\d,]+(/[\d,]+ images \(| images to score, )")  # how a line of a training's progress begins


def executed(notebook: Any, folder: Path) -> Any:
    """The notebook after a run in a fresh kernel, whose working directory is `folder`.

    Raises:
        CellExecutionError: a cell raised.
    """
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=40"],  # errors alone: the kernel would warn of its own port
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def cleaned(notebook: Any) -> Any:
    """The notebook without what differs from machine to machine; pictures are kept as small PNG.

    Raises:
        ValueError: something was written to stderr other than a training's progress.
    """
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
            for output in cell.outputs:
                if "data" in output:
                    output.metadata = {}
                    output.data.pop("image/jpeg", None)
                    if "image/png" in output.data:
                        output.data["image/png"] = _compact(output.data["image/png"])
    return notebook


def _is_progress(output: Any) -> bool:
    """Whether an output is a training's progress; any other text on stderr is refused."""
    if output.output_type != "stream" or output.name != "stderr":
        return False
    for line in re.split(r"[\r\n]+", output.text):
        if line.strip() and not _PROGRESS.match(line):
            raise ValueError(f"the notebook wrote {line!r} to stderr; mend its cause, readers would see it")
    return True


def _compact(png: str) -> str:
    """A picture with 256 colours, both in base64: less than half the size."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Run the notebook and store it."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        executed(notebook, Path(folder))
    write_text(NOTEBOOK, nbformat.writes(cleaned(notebook)) + "\n")
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
