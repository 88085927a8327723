"""What a benchmark is: its suite, the command that runs it again, versions, hardware, time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_gym.agents.benchmark.records import Record
from diffusion_gym.agents.benchmark.suites import suite_file, suites
from diffusion_gym.agents.reporting.benchmark.data import Benchmark
from diffusion_gym.agents.reporting.commands import quoted
from diffusion_gym.agents.reporting.markup import Html, definitions, element, join, note


def header(benchmark: Benchmark) -> Html:
    """Title, what was run, and what a reader should know first."""
    results, suite = benchmark.results, benchmark.results.suite
    runs, failed = len(results.records), len(results.failures)
    seeds = sorted({seed for _, _, seed in results.records})
    counted = {"agent": len(benchmark.agents), "task": len(benchmark.tasks), "seed": len(seeds), "run": runs}
    facts = [f"{number} {name}{'' if number == 1 else 's'}" for name, number in counted.items()]
    facts.append(f"{_budget(benchmark):,} reward queries a run")
    minutes = sum(record.get("total_seconds", 0.0) for record in every_record(benchmark)) / 60
    took = f"{minutes / 60:,.1f} hours" if minutes >= 120 else f"{minutes:.1f} minutes"
    text = f"All runs one after the other took {took}, measurements included."
    parts = [element("h1", f"Benchmark {suite.name}"), element("p", suite.description, class_="lead")]
    parts += [element("p", " · ".join(facts)), element("p", text, class_="muted")]
    if failed:
        link = element("a", "the list", href="#failures")
        parts.append(note(f"Failed: {failed} of {runs + failed} runs; see ", link, "."))
    tried = {(record["agent"], record["task"], record["seed"]) for record in every_record(benchmark)}
    if missing := len({*itertools.product(benchmark.agents, benchmark.tasks, seeds)} - tried):
        text = f"Runs that are still missing: {missing}. The agents' scores are not of the same tasks and seeds. "
        parts.append(note(text, "Pairs are compared on what both have; the same command goes on."))
    if len(seeds) == 1:
        parts.append(note("One seed: there are no intervals, and nothing can be called better. Run it with --seeds 5."))
    return element("header", *parts)


def provenance(benchmark: Benchmark) -> Html:
    """The command, and what the runs ran on."""
    records = every_record(benchmark)
    shown = [
        definitions("Versions", _values(record.get("versions", {}) for record in records)),
        definitions("Hardware", _values(_machine(record) for record in records)),
        definitions("Costs", _costs(benchmark)),
    ]
    block = element("pre", element("code", "\n".join(commands(benchmark))), tabindex=0)
    text = "The same versions and the same device give the same numbers; finished runs are not run again."
    parts = [element("h2", "To reproduce", id="reproduce"), element("p", text, class_="muted"), block]
    return element("section", *parts, element("div", *shown, class_="columns"))


def commands(benchmark: Benchmark) -> list[str]:
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
    return [" \\\n  ".join(words), f"diffusion-gym report {out}"]


def every_record(benchmark: Benchmark) -> list[Record]:
    """The records of all runs, failed ones too."""
    return [*benchmark.results.records.values(), *benchmark.results.failures]


def _suite_option(benchmark: Benchmark) -> str:
    """The suite's name where the package has the same, else the file in the folder."""
    kept = next(benchmark.folder.glob("*.toml"))
    if kept.stem in suites() and suite_file(kept.stem).read_bytes() == kept.read_bytes():
        return kept.stem
    return str(kept)


def _budget(benchmark: Benchmark) -> int:
    asked = [record.get("settings", {}).get("total_reward_queries") for record in every_record(benchmark)]
    return max((budget for budget in asked if budget), default=benchmark.results.suite.budget)


def _values(found: Iterable[Mapping[str, Any]]) -> list[tuple[object, object]]:
    """Each name with its value, or with all of them where runs differ."""
    values: dict[str, dict[str, None]] = {}
    for entry in found:
        for name, value in entry.items():
            values.setdefault(name, {})[str(value)] = None
    return [(name, ", ".join(different)) for name, different in values.items()]


def _machine(record: Record) -> Mapping[str, Any]:
    device = record.get("settings", {}).get("env_options", {}).get("device")
    return {**record.get("hardware", {}), **({"device": device} if device else {})}


def _costs(benchmark: Benchmark) -> list[tuple[object, object]]:
    """For each agent, the mean minutes of training and of the whole run, and the peak memory."""
    entries: list[tuple[object, object]] = []
    for agent in benchmark.agents:
        records = [record for (name, _, _), record in benchmark.results.records.items() if name == agent]
        training = sum(record["points"][-1]["seconds"] for record in records) / len(records) / 60
        parts = [f"{training:.1f} minutes of training"]
        if memory := [record["peak_memory_mb"] for record in records if "peak_memory_mb" in record]:
            parts.append(f"{max(memory) / 1000:.1f} GB")
        entries.append((agent, join([", ".join(parts)])))
    return entries
