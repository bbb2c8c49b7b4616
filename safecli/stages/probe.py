"""What training watches on dev prompts: the probe for collapse, and the guard on answers that must stay helpful."""

from __future__ import annotations

import torch

from safecli.config import Kind, TrainOptions
from safecli.generation import Request, halving
from safecli.judges import Judge, Pair
from safecli.judges.fluency import degenerate_reasons
from safecli.losses import linear_kl
from safecli.models import LanguageModel, last_hidden, scale_adapter
from safecli.records import SETS, Prompt, shipped
from safecli.stages import Reporter
from safecli.stages.batches import Rows, output_head

PROMPTS = {"toxic": 8, "lookalike": 8, "harmless": 8}
TOKENS = 32
GUARDED: tuple[Kind, ...] = ("lookalike", "harmless")
MAY_FALL = 0.05
GUARD_TOKENS = 48
STEP, LEAST = 0.8, 0.3


class Probe:
    """Remembers what the base model does on dev prompts, and says when a tuned one has collapsed."""

    def __init__(self, model: LanguageModel, options: TrainOptions, report: Reporter) -> None:
        self.options, self.report = options, report
        self.prompts = [prompt for kind in SETS for prompt in shipped(kind, "dev")[: PROMPTS[kind]]]
        self.base_broken = 0.0
        if options.probe_every:
            self._remember(model)

    def _remember(self, model: LanguageModel) -> None:
        answers = _answers(model, self.prompts, TOKENS, self.report)
        self.base_broken = self._broken(answers)
        rows = Rows()
        for prompt, answer in zip(self.prompts, answers, strict=True):
            if prompt.kind == "harmless":  # with the end token, so that an empty answer is a position too
                rows.add(model.prompt_ids(prompt.prompt), [*model.answer_ids(answer), model.end_id])
        ids, mask, at = rows.tensors(model.tokenizer.pad_token_id)
        self.batch = [tensor.to(model.device) for tensor in (ids, mask)]
        self.scored = torch.cat(at).to(model.device)
        self.reference = self._hidden(model)

    @torch.no_grad()
    def _hidden(self, model: LanguageModel) -> torch.Tensor:
        return last_hidden(model.model, *self.batch)[self.scored]

    def _broken(self, answers: list[str]) -> float:
        broken = [
            bool(degenerate_reasons(prompt.prompt, answer))
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        return sum(broken) / len(broken)

    def kl(self, model: LanguageModel) -> float:
        """Mean KL to base over the tokens of its answers to harmless dev prompts, nats."""
        return float(linear_kl(self._hidden(model), output_head(model), self.reference, reverse=True))

    def collapse(self, model: LanguageModel) -> str:
        """What has collapsed, or '' for a healthy model."""
        was_training = model.model.training
        model.model.eval()
        kl = self.kl(model)
        broken = self._broken(_answers(model, self.prompts, TOKENS, self.report))
        model.model.train(was_training)
        if not kl <= self.options.max_kl:
            return f"KL to base on harmless dev answers is {kl:.2f}, over {self.options.max_kl:g}"
        if broken > self.base_broken + self.options.max_degenerate:
            return f"{broken:.0%} of the dev answers are broken, {self.base_broken:.0%} of the base's"
        return ""


class Guard:
    """Scales an adapter down until dev prompts that deserve an answer are answered about as often as by the base.

    A backtracking line search from the adapter towards the base: what a LoRA adapter adds is linear in its scale.
    Helpful answers may fall by 5 points on look-alikes and on harmless prompts.
    """

    def __init__(self, model: LanguageModel, report: Reporter) -> None:
        self.prompts = [prompt for kind in GUARDED for prompt in shipped(kind, "dev")]
        self.report = report
        self.base = _answers(model, self.prompts, GUARD_TOKENS, report)

    def hold(self, model: LanguageModel, judge: Judge) -> float:
        """Scale the adapter in place, by 0.8 again and again; the scale at which the guard holds, at the least 0.3."""
        model.model.eval()
        before, scale = self._helpful(self.base, judge), 1.0
        while True:
            now = self._helpful(_answers(model, self.prompts, GUARD_TOKENS, self.report), judge)
            changes = ", ".join(f"{kind} {before[kind]:.0%} to {now[kind]:.0%}" for kind in GUARDED)
            self.report.say(f"helpful on dev prompts, adapter at {scale:.2f}: {changes}")
            if all(before[kind] - now[kind] <= MAY_FALL + 1e-9 for kind in GUARDED):
                return scale
            if scale * STEP < LEAST:
                self.report.warn(
                    f"even at {scale:.2f} of its strength the adapter costs more helpful answers than allowed"
                )
                return scale
            scale_adapter(model.model, STEP)
            scale *= STEP

    def _helpful(self, answers: list[str], judge: Judge) -> dict[Kind, float]:
        pairs = [Pair(prompt.prompt, answer, prompt.kind) for prompt, answer in zip(self.prompts, answers, strict=True)]
        helpful: dict[Kind, list[bool]] = {kind: [] for kind in GUARDED}
        for pair, verdict in zip(pairs, judge.judge(pairs), strict=True):
            helpful[pair.kind].append(verdict.outcome == "helpful")
        return {kind: sum(found) / len(found) for kind, found in helpful.items()}


def _answers(model: LanguageModel, prompts: list[Prompt], tokens: int, report: Reporter) -> list[str]:
    requests = [Request(model.prompt_ids(prompt.prompt)) for prompt in prompts]
    return [answer.text for answer in halving(model, requests, tokens, 0.0, report.warn)]
