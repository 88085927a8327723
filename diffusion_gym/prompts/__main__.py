"""`python -m diffusion_gym.prompts` prints the table of prompt sets that docs/prompts.md holds."""

from __future__ import annotations

from diffusion_gym.prompts import PROMPTS, PromptSet


def prompt_table() -> str:
    """The registered prompt sets as a Markdown table."""
    rows = ["| set | prompts | example | held-out splits | source |", "|---|---|---|---|---|"]
    rows += [_row(PROMPTS[name]()) for name in PROMPTS]
    return "\n".join(rows) + "\n"


def _row(prompts: PromptSet) -> str:
    splits = {**prompts.splits} or ({"held-out": prompts.held_out} if prompts.held_out else {})
    held_out = ", ".join(f"{split} ({len(part):,})" for split, part in splits.items()) or "none"
    example = prompts.prompts[0] or "(the empty prompt)"
    return f"| `{prompts.name}` | {len(prompts.prompts):,} | {example} | {held_out} | {prompts.source} |"


if __name__ == "__main__":
    print(prompt_table(), end="")
