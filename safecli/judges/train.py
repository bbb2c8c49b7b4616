"""Train the outcome judge from labelled answers, or measure it: `python -m safecli.judges.train --help`."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from safecli.artifacts import atomic, file_fingerprint
from safecli.errors import InputError
from safecli.judges import HARMLESS_OUTCOMES, TOXIC_OUTCOMES, Pair
from safecli.judges.outcome import FORMAT, WEIGHTS, OutcomeJudge, Reader

OUTCOMES = {"toxic": TOXIC_OUTCOMES, "harmless": HARMLESS_OUTCOMES}


@dataclass(frozen=True)
class Recipe:
    """The numbers that training is made of."""

    rank: int = 16
    alpha: int = 32
    rate: float = 1e-3
    epochs: int = 5
    batch: int = 32
    smoothing: float = 0.05
    dropout: float = 0.1
    decay: float = 0.01
    swapped: float = 0.15
    prompt_weight: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class Labelled:
    """An answer with what its readers say that it did."""

    pair: Pair
    labels: tuple[str, ...]
    source: str = ""

    @property
    def head(self) -> str:
        """The head that learns from this row."""
        return "toxic" if self.pair.kind == "toxic" else "harmless"


def read(paths: Sequence[Path]) -> list[Labelled]:
    """Read JSONL rows of prompt, answer, label and, where known, kind, source and second_label."""
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            pair = Pair(row["prompt"], row["answer"], row.get("kind") or "toxic")
            labels = tuple(label for label in (row["label"], row.get("second_label")) if label)
            one = Labelled(pair, labels, row.get("source", ""))
            if unknown := set(labels) - set(OUTCOMES[one.head]):
                raise InputError(f"{path}:{number}: {sorted(unknown)} is no outcome of a {pair.kind} prompt")
            rows.append(one)
    return rows


def swapped(rows: Sequence[Labelled], share: float, seed: int) -> list[Labelled]:
    """Fluent answers under another prompt, which thereby deflect: what tells a reader to look at both."""
    rng = random.Random(seed)
    usable = [row for row in rows if row.labels[0] in ("complied", "helpful", "deflected")]
    made = []
    for row in rng.sample(usable, min(int(share * len(rows)), len(usable))):
        other = rng.choice(rows).pair
        if not _words(other.prompt) & _words(row.pair.prompt):
            made.append(Labelled(Pair(other.prompt, row.pair.answer, other.kind), ("deflected",)))
    return made


def _words(text: str) -> set[str]:
    return {word for word in text.lower().split() if len(word) > 4}


def targets(rows: Sequence[Labelled], head: str) -> Tensor:
    """Soft targets [B, outcomes]: the mean of the readers' labels."""
    names = OUTCOMES[head]
    return torch.tensor([[row.labels.count(name) / len(row.labels) for name in names] for row in rows])


def fit(rows: Sequence[Labelled], recipe: Recipe) -> Reader:
    """Train LoRA and heads on `rows`; the reader that comes back still has its LoRA apart."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    reader = Reader()
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=r"encoder\.layer.*dense|.*query|.*key|.*value"
    )
    reader.encoder = inject_adapter_in_model(config, reader.encoder)
    parameters = [value for value in reader.parameters() if value.requires_grad]
    rows = [*rows, *swapped(rows, recipe.swapped, recipe.seed)]
    weights = {head: _class_weights([row for row in rows if row.head == head], head) for head in OUTCOMES}
    steps = recipe.epochs * len(_batches(rows, recipe.batch, rng))
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=0.1)
    drop = torch.nn.Dropout(recipe.dropout)
    reader.train()
    for _ in range(recipe.epochs):
        for batch in _batches(rows, recipe.batch, rng):
            features = reader.pairs([row.pair.prompt for row in batch], [row.pair.answer for row in batch])
            asked = reader.prompts([row.pair.prompt for row in batch])
            losses = []
            for head in OUTCOMES:
                chosen = [i for i, row in enumerate(batch) if row.head == head]
                if not chosen:
                    continue
                logits = reader.heads[head](drop(features[chosen]))
                losses.append(
                    functional.cross_entropy(
                        logits,
                        targets([batch[i] for i in chosen], head),
                        weights[head],
                        label_smoothing=recipe.smoothing,
                    )
                    * len(chosen)
                    / len(batch)
                )
            risk = reader.heads["prompt"](drop(asked))[:, 0]
            truth = torch.tensor([float(row.head == "toxic") for row in batch])
            losses.append(recipe.prompt_weight * functional.binary_cross_entropy_with_logits(risk, truth))
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return reader.eval()


def _batches(rows: Sequence[Labelled], size: int, rng: random.Random) -> list[list[Labelled]]:
    """Shuffled batches of rows of like length."""
    ordered = sorted(rows, key=lambda row: len(row.pair.answer) + rng.randrange(60))
    batches = [list(ordered[start : start + size]) for start in range(0, len(ordered), size)]
    rng.shuffle(batches)
    return batches


def _class_weights(rows: Sequence[Labelled], head: str) -> Tensor:
    """Weights of the outcomes, by the root of how rare they are, of mean 1 over the rows."""
    counts = targets(rows, head).sum(0).clamp(min=1) if rows else torch.ones(len(OUTCOMES[head]))
    weights = counts.rsqrt()
    return weights * counts.sum() / (weights * counts).sum()


def logits(reader: Reader, rows: Sequence[Labelled]) -> list[Tensor]:
    """Each row's logits by the head of its kind."""
    found: dict[int, Tensor] = {}
    ordered = sorted(range(len(rows)), key=lambda i: len(rows[i].pair.answer))
    with torch.inference_mode():
        for start in range(0, len(ordered), 32):
            batch = ordered[start : start + 32]
            features = reader.pairs([rows[i].pair.prompt for i in batch], [rows[i].pair.answer for i in batch])
            found |= {i: reader.heads[rows[i].head](one) for i, one in zip(batch, features, strict=True)}
    return [found[i] for i in range(len(rows))]


def folds(rows: Sequence[Labelled], count: int, seed: int) -> list[list[int]]:
    """Row numbers of each fold; all answers to a prompt are in one fold."""
    prompts = sorted({row.pair.prompt for row in rows})
    random.Random(seed).shuffle(prompts)
    fold = {prompt: i % count for i, prompt in enumerate(prompts)}
    return [[i for i, row in enumerate(rows) if fold[row.pair.prompt] == k] for k in range(count)]
