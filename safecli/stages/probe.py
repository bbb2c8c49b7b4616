"""The probe for collapse: a few dev prompts answered during training, and the KL to the base on harmless ones."""

from __future__ import annotations

import torch

from safecli.config import TrainOptions
from safecli.judges.fluency import degenerate_reasons
from safecli.losses.fused import divergences
from safecli.models import LanguageModel, Request, generate
from safecli.records import SETS, shipped

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
        self.batch: dict[str, torch.Tensor] = {}
        if options.probe_every:
            self._remember(model)

    def _remember(self, model: LanguageModel) -> None:
        answers = self._answers(model)
        self.base_broken = self._broken(answers)
        kept = [
            (ids, model.answer_ids(answer))
            for ids, answer, prompt in zip(self.ids, answers, self.prompts, strict=True)
            if prompt.kind == "harmless" and answer
        ]
        width = max(len(ids) + len(answer) for ids, answer in kept)
        rows = torch.full((len(kept), width), model.tokenizer.pad_token_id)
        mask, scored = torch.zeros_like(rows), torch.zeros(len(kept), width, dtype=torch.bool)
        for index, (ids, answer) in enumerate(kept):
            length = len(ids) + len(answer)
            rows[index, :length] = torch.tensor(ids + answer)
            mask[index, :length] = 1
            scored[index, len(ids) - 1 : length - 1] = True
        self.batch = {"input_ids": rows.to(model.device), "attention_mask": mask.to(model.device)}
        self.scored = scored.flatten().to(model.device)
        self.reference = self._hidden(model)

    @torch.no_grad()
    def _hidden(self, model: LanguageModel) -> torch.Tensor:
        output = model.model(**self.batch, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        return output.hidden_states[-1].flatten(0, 1)[self.scored]  # type: ignore[no-any-return]

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
