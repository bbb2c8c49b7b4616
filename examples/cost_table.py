"""Make the table of docs/costs.md: `python examples/cost_table.py RUN [PAIRS]`. Half an hour on two cores.

Each cost is built, held against people's word pairs, and trains one adapter from the same records without a guard. As
some push harder than others, every adapter is scaled to the KL to base that the first one has, and read there. The
prompts are the shipped dev ones and those that the judge learned from (examples/judge), neither train nor test.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safecli
from safecli.bench.memory import peak_rss, restart_peak
from safecli.config import ModelOptions
from safecli.costs.build import build_into, load_backend, vocabulary_of
from safecli.models import attach_adapter, load_model, scale_adapter
from safecli.records import SETS, shipped
from safecli.stages.cost import cost_quality
from safecli.stages.probe import Probe

COSTS = (
    "token",
    "token:transform=whitened",
    "sentence",
    "faiss",
    "mix:token=0.5,sentence=0.5",
)
COUNTS = {"toxic": 140, "lookalike": 50, "harmless": 50}
LABELS = Path(__file__).parent / "judge" / "labels.jsonl"
HEADINGS = (
    "cost",
    "build, s",
    "peak, MiB",
    "anisotropy",
    "hubness",
    "word pairs",
    "scaled by",
    "KL to base",
    "toxic: unsafe",
    "degenerate",
    "look-alikes: helpful",
    "harmless: helpful",
)


class Said(safecli.Reporter):
    """Prints what happens to stderr."""

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=sys.stderr, flush=True)


def prompts(folder: Path) -> dict[str, str]:
    """A file of prompts of each kind, in `folder`."""
    labelled = [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]
    files = {}
    for kind in SETS:
        known = {prompt.prompt for split in ("train", "dev", "test") for prompt in shipped(kind, split)}
        more = sorted({row["prompt"] for row in labelled if row["kind"] == kind} - known)
        random.Random(0).shuffle(more)
        chosen = [*(prompt.prompt for prompt in shipped(kind, "dev")), *more][: COUNTS[kind]]
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in chosen), encoding="utf-8")
        files[kind] = str(path)
    return files


def built(cost: str, pairs: Path | None) -> dict[str, Any]:
    """What building a cost takes, and what it knows."""
    options = safecli.CostOptions(model="demo", cost=cost)
    vocabulary = vocabulary_of(load_model(options))
    backend_class, chosen = load_backend(options)
    before, started = restart_peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        build_into(Path(folder), backend_class(chosen), vocabulary, {}, lambda _: None)
    seconds, held = time.perf_counter() - started, peak_rss() - before
    found, quality = safecli.build_cost(options), cost_quality(options, pairs)
    return {
        "build, s": f"{seconds:.0f}",
        "peak, MiB": f"{held / 2**20:.0f}",
        "anisotropy": "–" if found.anisotropy is None else f"{found.anisotropy:.2f}",
        "hubness": "–" if found.hubness is None else f"{found.hubness:.1f}",
        "word pairs": f"{quality.spearman:.2f}",
    }


def at_kl(adapters: list[Path], folder: Path) -> tuple[list[Path], list[dict[str, str]]]:
    """The adapters scaled until each has the KL to base of the first, and by how much."""
    options = safecli.TrainOptions(model="demo")
    base = load_model(ModelOptions(model="demo"))
    probe = Probe(base, options, Said())
    wanted, scaled, rows = 0.0, [], []
    for adapter in adapters:
        model = load_model(ModelOptions(model="demo"))
        model.model = attach_adapter(model.model, adapter)
        scale, kl = 1.0, probe.kl(model)
        wanted = wanted or kl
        for _ in range(8):
            if abs(kl / wanted - 1) < 0.02:
                break
            step = (wanted / kl) ** 0.5  # near the base the KL grows with the square of the scale
            scale_adapter(model.model, step)
            scale, kl = scale * step, probe.kl(model)
        path = folder / f"cost-{len(scaled)}"
        model.model.save_pretrained(path)
        scaled.append(path)
        rows.append({"scaled by": f"{scale:.2f}", "KL to base": f"{kl:.3f}"})
    return scaled, rows


def main(run: Path, pairs: Path | None) -> None:
    """Print the table."""
    report = Said()
    run.mkdir(parents=True, exist_ok=True)
    safecli.collect(safecli.CollectOptions(model="demo", run=run), report)
    rows, adapters = [], []
    for cost in COSTS:
        report.say(f"== {cost}")
        rows.append({"cost": f"`{cost}`", **built(cost, pairs)})
        options = safecli.TrainOptions(model="demo", run=run, cost=cost, guard=False, batch_size=2, accumulate=2)
        adapters.append(safecli.train(options, report).adapter)
    scaled, matched = at_kl(adapters, run)
    found = safecli.evaluate(safecli.EvalOptions(model="demo", run=run, adapter=scaled, **prompts(run)), report)
    models = found.results["models"]
    rows.insert(0, dict.fromkeys(HEADINGS, "–") | {"cost": "the base model"})
    for row, model, place in zip(rows, models.values(), [{}, *matched], strict=True):
        shown = (("toxic", "unsafe"), ("toxic", "degenerate"), ("lookalike", "helpful"), ("harmless", "helpful"))
        counts = [f"{model[kind][outcome]['count']} of {model[kind][outcome]['n']}" for kind, outcome in shown]
        row |= place | dict(zip(HEADINGS[-4:], counts, strict=True))
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    for row in rows:
        print("| " + " | ".join(row[name] for name in HEADINGS) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
