"""Alignment of picture and prompt as a vision-language model sees it (DDPO paper, appendix D.3)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import torch

from diffusion_gym.hub import REWARD_SOURCES
from diffusion_gym.images import to_uint8
from diffusion_gym.rewards.base import REWARDS, RewardOutput
from diffusion_gym.rewards.bertscore import BERTScore, make_bertscore
from diffusion_gym.rewards.judging import COMPARE, Scoring, checked_question, pairs_within, parse_verdict, win_rates
from diffusion_gym.rewards.question_answer import Counting
from diffusion_gym.rewards.vlm import VLM, VLMError, check_vlm_options, make_vlm
from diffusion_gym.rewards.vlm.base import without_reasoning

LLAVA, DEBERTA = REWARD_SOURCES["PromptAlignment"]
QUESTION: Final = "what is happening in this image?"  # figure 5 of the paper


@REWARDS.register("PromptAlignment", needs=("prompt", "photo"), prompts="animal-activities")
class PromptAlignment:
    """Asks a vision-language model about a picture and its prompt.

    `mode="describe"` scores the BERTScore recall of the description, the prompt being the reference. `mode="count"`
    is for prompts "n animals": it asks how many there are and scores 1 if the answer is n, else 0. `mode="score"` asks
    for a number. `mode="compare"` asks which of two pictures of a prompt is better and scores how often each is, among
    those of its prompt in the batch (Pref-GRPO); this needs a server, and groups that share a prompt.

    Args:
        vlm: a hub id or directory for transformers, the base URL of an OpenAI-compatible server, or a `VLM`.
        mode: `describe`, `count`, `score` or `compare`.
        question: what is asked; with `count`, `{things}` stands for the prompt's noun, with `score` and `compare`
            `{prompt}` for the prompt.
        scale: the lowest and the highest number, with `score`.
        both_orders: with `compare`, ask about each pair twice, either picture first.
        reference: what the description is compared with, `{prompt}` standing for the prompt.
        bertscore: `native`, or `package` for the numbers of the bert-score package as it is installed.
        bertscore_model: hub id or directory of BERTScore's encoder.
        bertscore_layers: its layers to run; by default the tuned number.
        cache: folder in which the model's answers are kept; None for no cache.
        **vlm_options: keywords of `ChatVLM` (`vlm_model`, `api_key`, `concurrency`, `timeout`, `retries`, ...) or of
            `LocalVLM` (`device`, `dtype`, `batch_size`, ...), and `max_tokens` of both.

    Attributes:
        descriptions: the answers to the last batch, without what a model says in `<think>...</think>`; None where there
            was none.
        default_prompts: the prompt set of the mode: `animal-activities`, or `counting` with `count`.

    Raises:
        ValueError: an option that is out of range or does not go with the mode.
        TypeError: an option that this kind of model does not take.
        FileNotFoundError: a model's files are not here and cannot be fetched.
        VLMError: the server cannot be reached, or refuses the key or the model.
    """

    name = "PromptAlignment"

    def __init__(
        self,
        vlm: str | VLM = LLAVA,
        *,
        mode: Literal["describe", "count", "score", "compare"] = "describe",
        question: str | None = None,
        scale: tuple[float, float] = (0, 10),
        both_orders: bool = True,
        reference: str = "{prompt}",
        bertscore: Literal["native", "package"] = "native",
        bertscore_model: str = DEBERTA,
        bertscore_layers: int | None = None,
        cache: str | None = None,
        **vlm_options: Any,
    ) -> None:
        check_vlm_options(vlm, vlm_options, list(inspect.signature(PromptAlignment).parameters)[:-1])
        self._judge: _Judge
        if mode == "describe":
            judge = make_bertscore(bertscore, bertscore_model, bertscore_layers)
            self._judge = _Description(question or QUESTION, reference, judge)
        elif mode == "count":
            self._judge = Counting(question)
        elif mode == "score":
            self._judge = Scoring(question, scale)
        elif mode != "compare":
            raise ValueError(f"mode={mode!r} must be describe, count, score or compare")
        self.mode, self.both_orders = mode, both_orders
        self._comparing = checked_question(question, COMPARE) if mode == "compare" else COMPARE
        self.vlm = make_vlm(vlm, cache=cache, **vlm_options)
        self.background = self.vlm.remote
        self.default_prompts = "counting" if mode == "count" else "animal-activities"
        self.descriptions: list[str | None] = []

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1].

        Returns:
            With `describe` the recall, and `precision`, `recall` and `f1` in `info`; with `count` 1 or 0, and the
            number that was answered as `counted` in `info`, NaN where the answer holds not just one number; with
            `score` that number on 0 to 1, and as it is as `answered`; with `compare` what `compare` returns, the
            pictures of a prompt being a group. All float32 `(N,)`; NaN where the model gave no answer.

        Raises:
            VLMError: the model gave no answer at all.
            ValueError: with `count`, a prompt that is not "n things".
        """
        if self.mode == "compare":
            numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
            return self.compare(images, prompts, metadata, [numbers[prompt] for prompt in prompts])
        said = self.vlm.describe(to_uint8(images), self._judge.questions(prompts))
        self.descriptions = [without_reasoning(answer) for answer in said]
        if cut := sum(answer is None for answer in self.descriptions) - sum(answer is None for answer in said):
            warnings.warn(
                f"vlm={self.vlm.name!r} came to no answer after its <think> for {cut} of {len(said)} pictures, which "
                "score NaN; give it more max_tokens, or switch its reasoning off",
                stacklevel=2,
            )
        answered = [index for index, answer in enumerate(self.descriptions) if answer is not None]
        if not answered:
            raise VLMError(f"vlm={self.vlm.name!r} described none of {len(prompts)} pictures")
        answers = [str(self.descriptions[index]) for index in answered]
        judged = self._judge.judge(answers, [prompts[index] for index in answered], images.device)

        def spread(part: torch.Tensor) -> torch.Tensor:
            full = torch.full((len(prompts),), float("nan"))
            full[answered] = part
            return full

        return RewardOutput(spread(judged.scores), {name: spread(part) for name, part in judged.info.items()})

    def compare(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        groups: Sequence[int],
    ) -> RewardOutput:
        """Win rates within groups; see `Reward`.

        Returns:
            The share of its comparisons that a picture wins, a draw being half a win, and `comparisons` with a verdict
            in `info`; 0.5 where there are none.

        Raises:
            VLMError: the model gave no verdict at all, or cannot see two pictures.
        """
        pairs = pairs_within(groups, both_orders=self.both_orders)
        if not pairs:
            return RewardOutput(torch.full((len(prompts),), 0.5), {"comparisons": torch.zeros(len(prompts))})
        shown = to_uint8(images)[torch.tensor(pairs)]
        asked = [self._comparing.replace("{prompt}", prompts[pair.first]) for pair in pairs]
        self.descriptions = [without_reasoning(answer) for answer in self.vlm.describe(shown, asked)]
        verdicts = [None if answer is None else parse_verdict(answer) for answer in self.descriptions]
        missing = verdicts.count(None)
        if missing == len(pairs):
            raise VLMError(
                f"vlm={self.vlm.name!r} gave no verdict on {missing} pairs, such as {self.descriptions[0]!r}"
            )
        if missing:
            warnings.warn(
                f"vlm={self.vlm.name!r} gave no verdict on {missing} of {len(pairs)} pairs, which do not count",
                stacklevel=2,
            )
        rates, compared = win_rates(pairs, verdicts, len(prompts))
        return RewardOutput(rates, {"comparisons": compared})

    def cancel(self) -> None:
        """Give up the call that waits for the model in another thread."""
        self.vlm.cancel()


class _Judge(Protocol):
    """Makes a question of each prompt, and scores of the answers."""

    def questions(self, prompts: Sequence[str]) -> list[str]: ...

    def judge(self, answers: Sequence[str], prompts: Sequence[str], device: torch.device) -> RewardOutput: ...


class _Description:
    def __init__(self, question: str, reference: str, bertscore: BERTScore) -> None:
        if "{prompt}" not in reference:
            raise ValueError(f"reference={reference!r} must hold {{prompt}}, which stands for the prompt")
        self.question, self.reference, self.bertscore = question, reference, bertscore

    def questions(self, prompts: Sequence[str]) -> list[str]:
        return [self.question] * len(prompts)

    def judge(self, answers: Sequence[str], prompts: Sequence[str], device: torch.device) -> RewardOutput:
        references = [self.reference.replace("{prompt}", prompt) for prompt in prompts]
        scores = self.bertscore(answers, references, device)
        return RewardOutput(scores.recall, scores._asdict())
