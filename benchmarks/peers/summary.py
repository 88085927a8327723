"""Medians of measurements and ratios within a round, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from diffusion_gym.agents.report.marked import markdown_table

Record = Mapping[str, Any]

_AGAINST: Final = (  # diffusion_gym at equal batches, and at its best, beside the peer
    ("diffusion_gym", "TRL"),
    ("diffusion_gym, larger batches", "TRL, its largest batches"),
    ("diffusion_gym, at its best", "TRL, its default batches"),
    ("diffusion_gym, at its best", "TRL, its largest batches"),
)
_SETTINGS: Final = ("samples", "steps", "guidance", "precision", "device", "threads", "warmup", "epochs", "pipeline")


def measures(record: Record) -> list[dict[str, float]]:
    """What is compared, of each round: seconds of sampling (rollout less decoding and reward) and so on; MB of memory.

    On a CPU the seconds are CPU seconds, which a busy machine changes less, and the memory is the process's peak, of
    which `work` is what came after loading; on a GPU they are seconds, sampling is the whole rollout, and both are
    the device's peak.
    """
    cpu = _on_cpu(record)
    kind, memory = ("_cpu_s", record["peak_rss_mb"]) if cpu else ("_s", record["peak_cuda_mb"])
    work = memory - record["loaded_rss_mb"] if cpu else memory
    rows = []
    for iteration in record["iterations"]:
        rollout, decode, reward, train = (
            iteration.get(x + kind, 0.0) for x in ("rollout", "decode", "reward", "train")
        )
        seconds = {"sampling": rollout - decode - reward, "rollout": rollout, "training": train}
        rows.append({**seconds, "total": rollout + train, "memory": memory, "work": work})
    return rows


def ratio(one: Record, other: Record, measure: str) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of two programs within a round.

    Raises:
        ValueError: they have not run the same rounds.
    """
    pairs = zip(measures(one), measures(other), strict=True)
    ratios = [first[measure] / second[measure] for first, second in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def summary(records: Sequence[Record]) -> str:
    """A table, the comparisons with peers and the settings, for each device and each thing that trains.

    Raises:
        ValueError: the records are of different workloads.
    """
    kinds = sorted({(record["workload"]["device"], record["trainable"]) for record in records})
    parts = []
    for device, trainable in kinds:
        own = [row for row in records if (row["workload"]["device"], row["trainable"]) == (device, trainable)]
        title = "LoRA, rank 4" if trainable == "lora" else "All weights"
        parts += [f"### {title}, {device.upper()}", _table(own), *_findings(own), _settings(own)]
    return "\n\n".join(parts)


def headline(records: Sequence[Record]) -> str:
    """One sentence for each thing that trains, of the totals on a CPU: medians, with the smallest and the largest."""
    lines = []
    for trainable, name in (("full", "all weights"), ("lora", "LoRA")):
        own = {row["name"]: row for row in records if row["trainable"] == trainable and _on_cpu(row)}
        pairs = [("diffusion_gym", "floor"), *_AGAINST]
        if all(one in own and other in own for one, other in pairs):
            bare, same, _, default, largest = (_ratio(own[one], own[other], "total") for one, other in pairs)
            lines.append(
                f"- {name}: {bare} times the seconds of the bare UNet work; {same} times TRL's at the same "
                f"batches, {default} times at its default ones, {largest} times at its largest."
            )
    return "\n".join(lines)


def _on_cpu(record: Record) -> bool:
    return bool(record["workload"]["device"] == "cpu")


def _table(records: Sequence[Record]) -> str:
    head = ["program", "sampling, s", "/ floor", "rollout, s", "training, s", "/ floor", "total, s", "/ floor"]
    head += ["peak memory, MB", "/ floor", "beyond loading, MB"]
    rows = []
    floor = next(record for record in records if record["name"] == "floor")
    for record in sorted(records, key=_order):
        own = measures(record)
        middle = {key: statistics.median(row[key] for row in own) for key in own[0]}
        over = {key: _ratio(record, floor, key) for key in ("sampling", "training", "total")}
        cells = [f"{middle['sampling']:.2f}", over["sampling"], f"{middle['rollout']:.2f}"]
        cells += [f"{middle['training']:.2f}", over["training"], f"{middle['total']:.2f}", over["total"]]
        memory = [f"{middle['memory']:,.0f}", f"{ratio(record, floor, 'memory')[0]:.2f}", f"{middle['work']:,.0f}"]
        rows.append([record["name"], *cells, *memory])
    return markdown_table(head, rows)


def _order(record: Record) -> tuple[int, str]:
    """The floor, then diffusion_gym, then the peer."""
    known = ("floor", "diffusion_gym", "TRL")
    return next(index for index, name in enumerate(known) if record["name"].startswith(name)), record["name"]


def _ratio(one: Record, other: Record, measure: str) -> str:
    middle, least, most = ratio(one, other, measure)
    return f"{middle:.2f} ({least:.2f} to {most:.2f})"


def _findings(records: Sequence[Record]) -> list[str]:
    by_name = {record["name"]: record for record in records}
    lines = []
    for name, other in _AGAINST:
        if {name, other} <= by_name.keys():
            pair = by_name[name], by_name[other]
            seconds = ", ".join(f"{measure} {_ratio(*pair, measure)}" for measure in ("total", "rollout", "training"))
            memory, work = (ratio(*pair, measure)[0] for measure in ("memory", "work"))
            lines.append(f"- {name} / {other}: {seconds}, peak memory {memory:.2f}, of it beyond loading {work:.2f}.")
    return ["\n".join(lines)] if lines else []


def _settings(records: Sequence[Record]) -> str:
    first = records[0]["workload"]
    for record in records:
        if differing := [key for key in _SETTINGS if record["workload"][key] != first[key]]:
            raise ValueError(f"{record['name']!r} ran with another {differing[0]} than the others; run them together")
    if len({record["trained_parameters"] for record in records}) > 1:
        raise ValueError("the programs train different numbers of parameters; compare like with like")
    versions = {_is_peer(record): record["versions"] for record in records}
    said = [", ".join(f"{name} {number}" for name, number in versions[peer].items()) for peer in sorted(versions)]
    places = sorted({record["card"] or record["processor"] for record in records})
    return (
        f"{first['samples']} pictures, T = {first['steps']}, guidance {first['guidance']:g}, precision "
        f"`{first['precision']}`, pipeline `{first['pipeline']}`, {records[0]['trained_parameters']:,} trained "
        f"parameters; threads: {first['threads']}, rounds: {first['epochs']}; "
        f"{', '.join(places)}. With {'; for TRL '.join(said)}."
    )


def _is_peer(record: Record) -> bool:
    return str(record["name"]).startswith("TRL")
