"""What a benchmark is: how much was run, the command that runs it again, versions, hardware, time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_gym.agents.benchmark.records import Record
from diffusion_gym.agents.benchmark.suites import suite_file, suites
from diffusion_gym.agents.report.benchmark.data import Benchmark
from diffusion_gym.agents.report.commands import quoted


def header(benchmark: Benchmark) -> dict[str, Any]:
    """What was run, in numbers, and what a reader should know first."""
    records, results = every_record(benchmark), benchmark.results
    seeds = sorted({seed for _, _, seed in results.records})
    counted = {"agent": len(benchmark.agents), "task": len(benchmark.tasks), "seed": len(seeds)}
    counted["run"] = len(results.records)
    facts = [f"{number} {name}{'' if number == 1 else 's'}" for name, number in counted.items()]
    minutes = sum(record.get("total_seconds", 0.0) for record in records) / 60
    tried = {(record["agent"], record["task"], record["seed"]) for record in records}
    return {
        "facts": [*facts, f"{_budget(benchmark):,} reward queries a run"],
        "took": f"{minutes / 60:,.1f} hours" if minutes >= 120 else f"{minutes:.1f} minutes",
        "tried": len(records),
        "missing": len({*itertools.product(benchmark.agents, benchmark.tasks, seeds)} - tried),
        "one_seed": len(seeds) == 1,
        "on_held_out": [task for task in benchmark.tasks if results.suite.tasks[task].on_held_out],
    }


def provenance(benchmark: Benchmark) -> dict[str, dict[str, str]]:
    """What the runs ran on, and what they cost."""
    records = every_record(benchmark)
    return {
        "Versions": _values(record.get("versions", {}) for record in records),
        "Hardware": _values(_machine(record) for record in records),
        "Costs": {agent: _cost(benchmark, agent) for agent in benchmark.agents},
    }


def commands(benchmark: Benchmark) -> str:
    """The commands that make a benchmark like this one, in a folder of its own."""
    results, suite = benchmark.results, benchmark.results.suite
    records, out = every_record(benchmark), quoted(f"{results.folder.resolve().name}-again")
    agents = list(dict.fromkeys(record["agent"] for record in records))
    words = [f"diffusion-gym bench --suite {quoted(_suite_option(benchmark))}", f"--agents {quoted(','.join(agents))}"]
    words.append(f"--seeds {1 + max(record['seed'] for record in records)}")
    if (budget := _budget(benchmark)) != suite.budget:
        words.append(f"--budget {budget}")
    threads = {record.get("threads", 1) for record in records}
    if len(threads) == 1 and threads != {1}:
        words.append(f"--threads {threads.pop()}")
    words.append(f"--out {out}")
    return " \\\n  ".join(words) + f"\ndiffusion-gym report {out}"


def every_record(benchmark: Benchmark) -> list[Record]:
    """The records of all runs, failed ones too."""
    return [*benchmark.results.records.values(), *benchmark.results.failures]


def _suite_option(benchmark: Benchmark) -> str:
    """The suite's name where the package has the same, else the file in the folder."""
    suite = next(benchmark.folder.glob("*.toml"))
    if suite.stem in suites() and suite_file(suite.stem).read_bytes() == suite.read_bytes():
        return suite.stem
    return str(suite)


def _budget(benchmark: Benchmark) -> int:
    asked = [record.get("settings", {}).get("total_reward_queries") for record in every_record(benchmark)]
    return max((budget for budget in asked if budget), default=benchmark.results.suite.budget)


def _values(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Each name with its value, or with all of them where runs differ."""
    values: dict[str, dict[str, None]] = {}
    for entry in entries:
        for name, value in entry.items():
            values.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(different) for name, different in values.items()}


def _machine(record: Record) -> Mapping[str, Any]:
    device = record.get("settings", {}).get("env_options", {}).get("device")
    return {**record.get("hardware", {}), **({"device": device} if device else {})}


def _cost(benchmark: Benchmark, agent: str) -> str:
    """The mean minutes of training, and the peak memory."""
    records = [record for (name, _, _), record in benchmark.results.records.items() if name == agent]
    training = sum(record["points"][-1]["seconds"] for record in records) / len(records) / 60
    memory = [record["peak_memory_mb"] for record in records if "peak_memory_mb" in record]
    return f"{training:.1f} minutes of training" + (f", {max(memory) / 1000:.1f} GB" if memory else "")
