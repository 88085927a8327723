"""Whether two folders hold the same run or benchmark, bit for bit but for clocks."""

import json
from pathlib import Path

from run_folders import BENCHMARK_CLOCKS, metrics_rows, timeless


def difference(folder, whole):
    """The first thing in which a run's folder differs from that of the uninterrupted one; None where nothing does."""
    found, expected = metrics_rows(folder), metrics_rows(whole)
    if found != expected:
        number = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
        return f"metrics.jsonl has {len(found)} rows of {len(expected)}, the first other one is {number}"
    newest, other = newest_checkpoint(folder), newest_checkpoint(whole)
    if newest.name != other.name or _content(newest) != _content(other):
        return f"the checkpoint {newest.name} is not {other.name} of the uninterrupted run"
    for part in ("images", "model"):
        if _bytes(folder / part) != _bytes(whole / part):
            return f"{part}/ differs"
    left = [path.name for path in folder.rglob(".*") if path.is_file() and path.name != ".seal.json"]
    return f"{left[0]} was left behind" if left else None


def benchmark_difference(folder, whole):
    """The same of a benchmark's folder: its records and the samples at each of their points."""
    for part in ("records", "points"):
        found, expected = (_benchmark(place, part) for place in (folder, whole))
        if found != expected:
            return f"the {part} differ: {sorted(found)} there, {sorted(expected)} in the uninterrupted one"
    return None


def _benchmark(folder, part):
    if part == "points":
        files = folder.glob("runs/*/points/*")
        return {str(path.relative_to(folder)): _content(path) for path in files}
    of_this_run = BENCHMARK_CLOCKS | {"out"}
    return {path.name: timeless(json.loads(path.read_text()), of_this_run) for path in (folder / part).glob("*.json")}


def newest_checkpoint(folder):
    """The path of a run's newest checkpoint; an empty path where there is none."""
    return max((folder / "checkpoints").glob("iteration-*.safetensors"), default=Path("none"))


def half_written(folder):
    """Files that a kill left half written."""
    return [path for path in folder.rglob(".*unfinished*")] if folder.exists() else []


def _bytes(folder):
    return {path.relative_to(folder): _content(path) for path in folder.rglob("*") if path.is_file()}


def _content(path):
    """The bytes; of a safetensors file the header is parsed, since its metadata come in another order each time."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]
