"""What compare_agents.py writes into docs/agents.md: the table, the findings, the command."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from learning_charts import draw_learning_curves, draw_reward_against_kl
from learning_numbers import (
    Estimate,
    Groups,
    Measure,
    Record,
    contrast,
    kl,
    label,
    number,
    over_pairs,
    over_seeds,
    read_groups,
    training_reward,
)

from diffusion_gym.agents.report.marked import markdown_table, write_marked


def write_page(records: Path, page: Path, images: Path) -> None:
    """Draw the charts, and write what stands between the page's `learning` markers anew.

    Raises:
        ValueError: the records cannot be compared, or the page has no such markers.
    """
    groups = read_groups(records)
    images.mkdir(parents=True, exist_ok=True)
    draw_learning_curves(groups, images / "learning-curves.png")
    draw_reward_against_kl(groups, images / "reward-vs-kl.png")
    block = results(groups, os.path.relpath(images, page.parent).replace(os.sep, "/"))
    write_marked(page, {"learning": block})


def results(groups: Groups, images: str) -> str:
    """The Markdown of the results.

    Args:
        groups: records by agent.
        images: folder of the charts, seen from the page.
    """
    measure, first = Measure.of(groups), next(iter(groups.values()))[0]
    seeds = sorted({record["seed"] for own in groups.values() for record in own})
    threads = sorted({record["threads"] for own in groups.values() for record in own})
    cpu = " or ".join(
        "all CPU threads" if not n else "one CPU thread" if n == 1 else f"{n} CPU threads" for n in threads
    )
    env, preset, total = first["env"], first["preset"], first["total_reward_queries"]
    samples = first["evaluation_samples"]
    command = (
        f"python docs/compare_agents.py run --env {env} --preset {preset} --agents {','.join(groups)} "
        f"--seeds {','.join(map(str, seeds))} --total-reward-queries {total} --samples {samples}"
    )
    return "\n\n".join(
        [
            f"![{measure.name.capitalize()} in training against reward queries]({images}/learning-curves.png)",
            table(groups),
            f"`{env}`, preset `{preset}`, {total:,} reward queries a run, {cpu}. Intervals are 95 %, Student's over "
            f"seeds. *Before*, *after*, *held-out* and *KL*: {samples} fresh samples a run, both models from the same "
            "noise. *Significant*: the interval of *change, over seeds* excludes 0. *Change, over pairs*: a pair is "
            "one prompt of one run. *Training reward*: mean of the iterations in the tenth of the budget before that "
            "many queries.",
            "\n".join(f"- {sentence}" for sentence in findings(groups)),
            f"![Final reward against KL to the pretrained model]({images}/reward-vs-kl.png)",
            f"Trained by the first command, written by the second from `docs/results/learning/`:\n\n    {command}\n"
            "    python docs/compare_agents.py page",
        ]
    )


def table(groups: Groups) -> str:
    """A row for each agent."""
    measure, total = Measure.of(groups), next(iter(groups.values()))[0]["total_reward_queries"]
    held_out = all("held_out" in record["evaluation"] for own in groups.values() for record in own)
    head = ["agent", "seeds", f"{measure.name} before → after", "change, over seeds", "significant"]
    head += ["change, over pairs", *(["change, held-out prompts"] if held_out else [])]
    head += [f"training reward at {queries:,.0f} queries" for queries in (total / 2, total)]
    head += ["KL to base, nats", "minutes"]
    return markdown_table(head, (_row(agent, own, measure, held_out) for agent, own in groups.items()))


def _row(agent: str, own: Sequence[Record], measure: Measure, held_out: bool) -> list[str]:
    change, total = over_seeds([measure.change(record) for record in own]), own[0]["total_reward_queries"]
    after = over_seeds([measure.after(record) for record in own]).text(low=measure.low, high=measure.high)
    return [
        label(agent),
        str(len(own)),
        f"{number(over_seeds([measure.before(record) for record in own]).mean)} → {after}",
        change.text("+"),
        "one seed" if len(own) == 1 else "yes" if change.significant else "no",
        over_pairs(own, measure.name).text("+"),
        *([over_seeds([measure.held_out_change(record) for record in own]).text("+")] if held_out else []),
        *(over_seeds([training_reward(record, queries) for record in own]).text() for queries in (total / 2, total)),
        over_seeds([kl(record) for record in own]).text(low=0.0),
        f"{sum(record['seconds'] for record in own) / len(own) / 60:.1f}",
    ]


def findings(groups: Groups) -> list[str]:
    """What the table says, in sentences that follow from its numbers."""
    measure = Measure.of(groups)
    penalised = [agent for agent in ("ddpo_iskl", "dpok") if agent in groups and "ddpo_is" in groups]
    return [
        order(groups, measure),
        improvements(groups, measure),
        paper_order(groups, measure),
        *(divergence(groups, measure, agent) for agent in penalised),
    ]


def order(groups: Groups, measure: Measure) -> str:
    """The agents, best first."""
    means = {agent: over_seeds([measure.after(record) for record in own]).mean for agent, own in groups.items()}
    listed = (f"{label(agent)} {number(means[agent])}" for agent in sorted(means, key=lambda agent: -means[agent]))
    return f"Order by mean {measure.name} after training: {', '.join(listed)}."


def improvements(groups: Groups, measure: Measure) -> str:
    """Which agents raise the measure significantly."""
    kinds = ("significantly higher", "significantly lower", "not significantly different", "open, with one seed,")
    agents: dict[str, list[str]] = {kind: [] for kind in kinds}
    for agent, own in groups.items():
        change = over_seeds([measure.change(record) for record in own])
        sure = 2 if not change.significant else 0 if change.mean > 0 else 1
        agents[kinds[3 if math.isnan(change.low) else sure]].append(label(agent))
    parts = [f"{kind} for {', '.join(names)}" for kind, names in agents.items() if names]
    return f"Against the pretrained model, the {measure.name} is {'; '.join(parts)}."


def paper_order(groups: Groups, measure: Measure) -> str:
    """Whether the DDPO paper's order shows: DDPO_IS at least as good as DDPO_SF, and that better than RWR."""
    if missing := [label(agent) for agent in ("ddpo_is", "ddpo_sf", "rwr") if agent not in groups]:
        return f"Whether the paper's order DDPO_IS ≥ DDPO_SF > RWR shows is open: no results of {', '.join(missing)}."
    upper = contrast(groups, "ddpo_is", "ddpo_sf", measure.after)
    lower = contrast(groups, "ddpo_sf", "rwr", measure.after)
    shows = "shows" if upper.mean >= 0 and lower.mean > 0 else "does not show"
    return (
        f"The paper's order at equal reward queries, DDPO_IS ≥ DDPO_SF > RWR, {shows} in the means: "
        f"DDPO_IS − DDPO_SF = {_verdict(upper)}; DDPO_SF − RWR = {_verdict(lower)}."
    )


def divergence(groups: Groups, measure: Measure, agent: str) -> str:
    """How an agent with a KL term compares with DDPO_IS."""
    farther, better = contrast(groups, agent, "ddpo_is", kl), contrast(groups, agent, "ddpo_is", measure.after)
    ends = [number(over_seeds([kl(record) for record in groups[name]]).mean) for name in (agent, "ddpo_is")]
    return (
        f"{label(agent)} ends {'nearer to' if farther.mean < 0 else 'no nearer to'} the pretrained model than DDPO_IS: "
        f"KL {ends[0]} against {ends[1]} nats, difference {_verdict(farther)}; "
        f"difference in {measure.name} {_verdict(better)}."
    )


def _verdict(difference: Estimate) -> str:
    if math.isnan(difference.low):
        return f"{difference.text('+')}, one seed"
    return f"{difference.text('+')}, {'significant' if difference.significant else 'not significant'}"
