"""What a researcher asks first of a run: did it learn, did it generalise, what did it cost, what did it exploit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from diffusion_gym.agents.report.numbers import change, number, percent
from diffusion_gym.storage import number_or_nan

_PROBES: Final = {"Incompressibility": "size of a picture as a JPEG in kB, which tells of detail"}


@dataclass(frozen=True)
class Value:
    """A measure before and after.

    Attributes:
        name: what is measured.
        before: of the pretrained model, in words; empty where there is but one value.
        after: of the trained one.
        details: lines of small print.
    """

    name: str
    before: str
    after: str
    details: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a word, and the numbers behind it.

    Attributes:
        question: what is asked.
        word: the answer; empty where the numbers are all there is.
        good: whether that is what one hopes for; None for neither.
        values: the numbers.
    """

    question: str
    word: str
    good: bool | None
    values: Sequence[Value]


def answers(evaluation: Mapping[str, Any] | None, queries: int, seconds: float) -> list[Answer]:
    """The answers that a run's files have, in the order of the questions.

    Args:
        evaluation: the content of `eval.json`; None where there is none.
        queries: pictures scored in training.
        seconds: that the training took.
    """
    found = []
    for question, name, part in (
        ("Did it learn?", "training prompts", evaluation),
        ("Did it generalise?", "held-out prompts", (evaluation or {}).get("held_out")),
    ):
        if part is not None:
            values = _measured(part, name)
            found.append(Answer(question, *_verdict(part), values))
    found.append(Answer("What did it cost?", "", None, _costs(evaluation or {}, queries, seconds)))
    if (evaluation or {}).get("probe"):
        found.append(_exploited(evaluation or {}))
    return found


def _measured(part: Mapping[str, Any], prompts: str) -> list[Value]:
    """Strict success where there is one, and the reward where that is another number."""
    measures: list[tuple[str, str, str, Callable[..., str]]] = [("Reward", "reward", "reward_mean", number)]
    if "success" in part:
        same = all(part[f"{model}success"] == part[f"{model}reward_mean"] for model in ("", "base_"))
        measures = [("Strict success", "success", "success", percent), *([] if same else measures)]
    return [_value(part, f"{title}, {prompts}", key, mean, text) for title, key, mean, text in measures]


def _value(part: Mapping[str, Any], name: str, key: str, mean: str, text: Callable[..., str]) -> Value:
    before, after = part[f"base_{mean}"], part[mean]
    ends = [*part[f"base_{key}_ci95"], *part[f"{key}_ci95"]]
    told = f"Change {text(change(before, after), '+')}"
    if known := _interval(part.get(f"{key}_change_ci95"), text):
        told += f" (95 % interval {known})"
    intervals = "95 % intervals: {} to {} before, {} to {} after".format(*map(text, ends))
    return Value(name, text(before), text(after), (f"{told}, {part['samples']:,} samples of each model", intervals))


def _interval(ends: Sequence[float | None] | None, text: Callable[..., str]) -> str:
    return "" if ends is None or None in ends else f"{text(ends[0], '+')} to {text(ends[1], '+')}"


def _verdict(part: Mapping[str, Any]) -> tuple[str, bool | None]:
    """Yes or no by the interval of the change; of an evaluation without one, by whether the two others are apart."""
    key = "success" if "success" in part else "reward"
    low, high = (number_or_nan(end) for end in part.get(f"{key}_change_ci95", (None, None)))
    if f"{key}_change_ci95" not in part:
        (base_low, base_high), (tuned_low, tuned_high) = part[f"base_{key}_ci95"], part[f"{key}_ci95"]
        low = number_or_nan(tuned_low) - number_or_nan(base_high)
        high = number_or_nan(tuned_high) - number_or_nan(base_low)
    if low > 0:
        return "yes", True
    return ("no, it became worse", False) if high < 0 else ("not shown", None)


def _costs(evaluation: Mapping[str, Any], queries: int, seconds: float) -> list[Value]:
    details = []
    if seconds > 0:
        rate = f"{queries / seconds:,.1f} images/s"
        details.append(f"{seconds / 60:,.1f} minutes of training, {rate}: sampling, scoring and updates together")
    values = [Value("Reward queries", "", f"{queries:,}", details)]
    held_out = evaluation.get("held_out") or {}
    if "kl_to_base" in evaluation:
        others = f"; held-out prompts {number(held_out['kl_to_base'])}" if held_out else ""
        text = f"closed form, summed over the noisy steps{others}"
        values.append(Value("KL to the pretrained model", "", f"{number(evaluation['kl_to_base'])} nats", (text,)))
    if "vendi" in evaluation:
        text = "Vendi score, within a prompt where prompts repeat; a fall is mode collapse"
        before, after = (number(evaluation[name]) for name in ("base_vendi", "vendi"))
        values.append(Value("Diversity: how many pictures differ", before, after, (text,)))
    return values


def _exploited(evaluation: Mapping[str, Any]) -> Answer:
    """By a reward that was not trained on: nothing to be seen, or a fall of it."""
    probe = evaluation["probe"]
    low, high = (number_or_nan(end) for end in probe["change_ci95"])
    word, good = ("nothing seen", True) if low > 0 or not high < 0 else ("it lost what a probe measures", False)
    told = f"Change {number(change(probe['base_mean'], probe['mean']), '+')}"
    if known := _interval(probe["change_ci95"], number):
        told += f" (95 % interval {known})"
    shown = len(probe["pictures"])
    below = f"The {shown} pictures whose reward rose most while it fell are below" if shown else ""
    about = _PROBES.get(probe["name"], "a reward")
    details = [told, f"{about}; not trained on", *([below] if below else [])]
    value = Value(probe["name"], number(probe["base_mean"]), number(probe["mean"]), details)
    return Answer("What did it exploit?", word, good, [value])
