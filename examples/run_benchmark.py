"""A benchmark of your own: a suite, an agent and a variant of it, several seeds; the summary and the report.

python examples/run_benchmark.py --jobs 2

The same command goes on where it was stopped. docs/benchmark.md explains suites, measures and statistics.
"""

import argparse
from pathlib import Path

from diffusion_gym.agents.benchmark.command import BenchOptions, run_bench
from diffusion_gym.agents.benchmark.results import Results
from diffusion_gym.agents.report.benchmark.page import write_benchmark_report

SUITE = """
description = "Location on the embedded model"
preset = "shapes-short"  # where hyperparameters begin
budget = 640             # reward queries of a training
evaluations = 2          # measurements, besides that of the pretrained model
samples = 32             # pictures of each

[overrides]
samples_per_iteration = 32
rollout_batch = 32
batch_size = 16
num_inference_steps = 5

[agents.ddpo_is_batch]   # a variant: rewards normalised by the batch, not by the prompt
agent = "ddpo_is"
normalization = "batch"

[tasks.location]         # as many as you like
env = "DiffusionDenoise-Shapes-Location-v0"
env_options = { prompts = ["shapes-demo"], strict = true }
ceiling = 1.0            # the reward that scores 1; the pretrained model's scores 0
probe = "Incompressibility"
"""


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    # More: sb3/ppo, tianshou/ppo, and custom_agent:RLOO with `PYTHONPATH=examples` before the command.
    parser.add_argument("--agents", default="ddpo_is,ddpo_is_batch")
    parser.add_argument("--seeds", type=int, default=2, help="five or more for an answer")
    parser.add_argument("--budget", type=int, help="reward queries of a training, in place of the suite's")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--out", type=Path, default=Path("runs/my-benchmark"))
    options = parser.parse_args()

    suite = options.out.with_suffix(".toml")
    suite.parent.mkdir(parents=True, exist_ok=True)
    suite.write_text(SUITE)
    given = {"agents": options.agents, "seeds": options.seeds, "budget": options.budget, "jobs": options.jobs}
    failed = run_bench(BenchOptions(str(suite), options.out, **given))  # a process for each training

    results = Results.read(options.out)
    for task in results.suite.tasks:
        for agent in results.agents:
            before, after = (results.column(agent, task, "reward", point).mean() for point in (0, -1))
            print(f"{task}, {agent}: mean reward {before:.3f} before, {after:.3f} after")
    print(f"report: {write_benchmark_report(options.out)}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
