"""The model card of an adapter."""

from __future__ import annotations

from typing import Any

from safecli import __version__
from safecli.config import TrainOptions
from safecli.models import DEMO_HUB

TEMPLATE = """---
base_model: {model}
library_name: peft
tags: [lora, safety, ta-sft]
---
# A LoRA adapter that moves {model} away from its own unsafe answers

Trained by safecli {version} with TA-SFT (arXiv 2412.06843), recipe `{recipe}`, {step} steps, {minutes} minutes.

- Trained on {unsafe} unsafe answers of the model itself, {general} general answers and {safe} of its own safe ones.
- Cost `{cost}`, target `{target}`, tokens `{tokens}`, reference `{reference}`, strength {strength:g}, seed {seed}.
- Scaled by {scale:g}, so that helpful answers on dev prompts hold as far as `--guard` asks (1: nothing to mend).
- Collapse while training: {collapsed}.

Last metrics of training:

| metric | value |
|---|---|
{metrics}

What it changed is measured by `safecli eval --adapter` (`results.json`, `report.html` of the run folder). It lowers
the rate of unsafe answers; it does not make a model safe.
"""


def model_card(options: TrainOptions, result: dict[str, Any]) -> str:
    """Markdown: what the adapter was trained on, how, and the metrics at its last step."""
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in result["metrics"].items())
    return TEMPLATE.format(
        version=__version__,
        metrics=metrics,
        model=DEMO_HUB if options.model == "demo" else options.model,
        **options.model_dump(include={"recipe", "cost", "target", "tokens", "reference", "strength", "seed"}),
        **result["examples"],
        step=result["step"],
        scale=result["scale"],
        minutes=result["minutes"],
        collapsed=result["collapsed"] or "none",
    )
