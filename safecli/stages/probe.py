"""The probe for collapse: a few dev prompts answered during training, and the KL to the base on harmless ones."""

from __future__ import annotations

import torch

from safecli.config import TrainOptions
from safecli.judges.fluency import degenerate_reasons
from safecli.losses.fused import divergences
from safecli.models import LanguageModel, Request, generate, last_hidden
from safecli.records import SETS, shipped
from safecli.stages.batches import Rows

PROMPTS = {"toxic": 8, "lookalike": 8, "harmless": 8}
TOKENS = 32


class Probe:
    """Remembers what the base model does on dev prompts, and says when a tuned one has collapsed."""

    def __init__(self, model: LanguageModel, options: TrainOptions) -> None:
        self.options = options
        prompts = [prompt for kind in SETS for prompt in shipped(kind, "dev")[: PROMPTS[kind]]]
        self.prompts = prompts
        self.ids = [model.prompt_ids(prompt.prompt) for prompt in prompts]
        self.base_broken = 0.0
        if options.probe_every:
            self._remember(model)

    def _remember(self, model: LanguageModel) -> None:
        answers = self._answers(model)
        self.base_broken = self._broken(answers)
        rows = Rows()
        for prompt_ids, answer, prompt in zip(self.ids, answers, self.prompts, strict=True):
            if prompt.kind == "harmless":  # with the end token, so that an empty answer is a position too
                rows.add(prompt_ids, [*model.answer_ids(answer), model.end_id])
        ids, mask, at = rows.tensors(model.tokenizer.pad_token_id)
        self.batch = [tensor.to(model.device) for tensor in (ids, mask)]
        self.scored = torch.cat(at).to(model.device)
        self.reference = self._hidden(model)

    @torch.no_grad()
    def _hidden(self, model: LanguageModel) -> torch.Tensor:
        return last_hidden(model.model, *self.batch)[self.scored]

    def _answers(self, model: LanguageModel) -> list[str]:
        return [answer.text for answer in generate(model, [Request(ids) for ids in self.ids], TOKENS)]

    def _broken(self, answers: list[str]) -> float:
        broken = [
            bool(degenerate_reasons(prompt.prompt, answer))
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        return sum(broken) / len(broken)

    def collapse(self, model: LanguageModel) -> str:
        """What has collapsed, or '' for a healthy model."""
        was_training = model.model.training
        model.model.eval()
        kl = float(divergences(self._hidden(model), model.head, self.reference)["kl"].mean())
        broken = self._broken(self._answers(model))
        model.model.train(was_training)
        if not kl <= self.options.max_kl:
            return f"KL to base on harmless dev answers is {kl:.2f}, over {self.options.max_kl:g}"
        if broken > self.base_broken + self.options.max_degenerate:
            return f"{broken:.0%} of the dev answers are broken, {self.base_broken:.0%} of the base's"
        return ""
