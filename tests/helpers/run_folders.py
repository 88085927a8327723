"""What the tests read from run folders, and how they compare runs."""

import json

CLOCKS = {"seconds", "rollout_seconds", "images_per_second"}

# Everything that an agent may carry from one iteration to the next is switched on; an agent takes what it has.
CARRYING_OPTIONS = {
    "learning_rate": 1e-3,
    "learning_rate_schedule": "warmup_cosine",
    "first_learning_rate": 1e-4,
    "ema_decay": 0.8,
    "timestep_fraction": 0.67,
    "normalization": "prompt",
    "statistics_buffer": 6,
    "statistics_min_count": 2,
    "updates": 2,
    "clip_range": 0.2,
    "value_batch_size": 12,
    "value_updates": 1,
    "percentile": 0.5,
}


def metrics_lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def metrics_rows(folder):
    """The records of a run's metrics, without what the clock gave."""
    records = [json.loads(line) for line in metrics_lines(folder)]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]


def file_names(folder):
    return sorted(entry.name for entry in folder.iterdir())
