"""The whole job in one run folder: collect, cost, train, rounds of sampling and training on, eval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safecli.config import CollectOptions, EvalOptions, RunPlan, TrainOptions, build, stage_values
from safecli.stages import Reporter
from safecli.stages.collect import collect
from safecli.stages.evaluate import Evaluated, evaluate
from safecli.stages.train import train


def run(content: Mapping[str, Any], report: Reporter | None = None) -> Evaluated:
    """Run all stages; each is skipped when it is done already, and resumed where it was interrupted.

    `content` is a configuration as `config.read_toml` reads it. A round samples the tuned model on the same toxic
    prompts; answers that comply join the unsafe ones, fluent ones that don't become own safe answers, and training
    goes on from the adapter with both.
    """
    report = report or Reporter()
    plan, collecting, training, evaluating = _options(content)
    first = collect(collecting, report).path
    unsafe: list[Path] = [*training.unsafe, first]
    safe: list[Path] = [*training.own_safe, first] if training.recipe == "safecli" else training.own_safe
    general = training.general or [first]
    adapter = _train(training, unsafe, safe, general, training.init_adapter, report)
    for number in range(1, plan.rounds + 1):
        report.say(f"round {number} of {plan.rounds}")
        update = {
            "adapter": adapter,
            "general": "none",
            "samples": plan.round_samples,
            "temperature": plan.round_temperature,
            "seed": plan.seed + number,
        }
        sampled = collect(collecting.model_copy(update=update), report).path
        unsafe, safe = [*unsafe, sampled], [*safe, sampled]
        adapter = _train(training, unsafe, safe, general, adapter, report)
    return evaluate(evaluating.model_copy(update={"adapter": evaluating.adapter or [adapter]}), report)


def preview(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `run` would do: the options of every stage."""
    names = ("run", "collect", "train", "eval")
    return {name: part.model_dump(mode="json") for name, part in zip(names, _options(content), strict=True)}


def _options(content: Mapping[str, Any]) -> tuple[RunPlan, CollectOptions, TrainOptions, EvalOptions]:
    return (
        build(RunPlan, {key: value for key, value in content.items() if key in RunPlan.model_fields}),
        build(CollectOptions, stage_values(content, "collect", CollectOptions)),
        build(TrainOptions, stage_values(content, "train", TrainOptions)),
        build(EvalOptions, stage_values(content, "eval", EvalOptions)),
    )


def _train(
    options: TrainOptions,
    unsafe: list[Path],
    safe: list[Path],
    general: list[Path],
    start: Path | None,
    report: Reporter,
) -> Path:
    update = {"unsafe": unsafe, "own_safe": safe, "general": general, "init_adapter": start}
    return train(options.model_copy(update=update), report).adapter
