"""Watch what a reward does not ask for: how light the backgrounds get while a run learns something else.

python examples/background_probe.py runs/demo-1

Any reward can be such a probe: scored on the same pictures, never trained on. On the command line that is
`diffusion-gym eval RUN --probe background_probe:lightness`, in this folder, or `train --probes` for every evaluation.
"""

import argparse
import sys
from pathlib import Path

from diffusion_gym.agents.training import runs
from diffusion_gym.agents.training.evaluation import EVALUATION_SEED


def lightness(images, prompts, metadata):
    """Median grey of the pictures' edges, where objects seldom are: images (N, 3, H, W) in [0, 1] to (N,)."""
    grey = images.mean(1)
    edges = (grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1])
    return sum(edge.median(1).values for edge in edges) / len(edges)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()

    sys.path.insert(0, str(Path(__file__).parent))  # as the probe is found by its module's name
    result = runs.evaluate_run(options.run, options.samples, EVALUATION_SEED, probe="background_probe:lightness")
    probe = result["probe"]
    low, high = probe["change_ci95"]
    print(
        f"lightness of the background {probe['base_mean']:.3f} -> {probe['mean']:.3f} (change {low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()
