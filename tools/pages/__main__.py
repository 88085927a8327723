"""Writes the marked parts of the README and the pages anew, from the records in docs/results/ and the registries."""

from pathlib import Path

from diffusion_gym.agents.report.marked import write_marked
from tools.pages import benchmark, demo, environments, findings, sample_efficiency

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    for module in (demo, benchmark, environments, findings, sample_efficiency):
        made = module.parts()
        for page, names in module.PAGES.items():
            write_marked(ROOT / page, {name: made[name] for name in names})
