"""From records to batches: token ids with masks, unsafe targets, and the reference's aligned positions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from safecli.config import CAREFUL, TrainOptions
from safecli.errors import InputError, UsageError
from safecli.losses import Head, Target
from safecli.models import LanguageModel
from safecli.records import Response, read_responses

WINDOW = 4
DECAY = 0.5
REPEATS = 3


@dataclass(frozen=True)
class Example:
    """A prompt with an answer as token ids; position i of `answer` is predicted at `len(prompt) + i - 1`.

    `reference` is the prompt as the reference model sees it, with the careful sentence in front or the same.
    """

    prompt: list[int]
    answer: list[int]
    reference: list[int]


def examples(responses: Sequence[Response], model: LanguageModel, options: TrainOptions) -> list[Example]:
    """Token ids of every response, cut to `max_tokens`; an answer that the model ended carries its end token."""
    careful = CAREFUL if options.reference == "careful" else None
    made = []
    for response in responses:
        prompt = model.prompt_ids(response.prompt)
        ending = [model.end_id] if response.finished else []
        answer = (model.answer_ids(response.answer) + ending)[: options.max_tokens - len(prompt)]
        if answer and len(prompt) < options.max_tokens:
            made.append(Example(prompt, answer, model.prompt_ids(response.prompt, careful)))
    return made


def output_head(model: LanguageModel) -> Head:
    """The model's output head, with the scale (Cohere, Granite) or soft cap (Gemma) that its architecture has."""
    layer, config = model.model.get_output_embeddings(), model.model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, cap)


def few_repeats(responses: Sequence[Response]) -> list[Response]:
    """At most three answers that begin with the same eight words: a stock sentence teaches only itself."""
    seen: Counter[str] = Counter()
    kept = []
    for response in responses:
        opening = " ".join(response.answer.casefold().split()[:8])
        seen[opening] += 1
        if seen[opening] <= REPEATS:
            kept.append(response)
    return kept


def first_tokens(tokens: str) -> int | None:
    """K of `first:K`, None for `all`; `UsageError` for anything else."""
    if tokens == "all":
        return None
    match = re.fullmatch(r"first:([1-9]\d*)", tokens)
    if match is None:
        raise UsageError(f"--tokens {tokens}: write first:K (such as first:16) or all")
    return int(match[1])


def unsafe_targets(
    answer: list[int], count: int, target: Literal["onehot", "window", "bag"], content: set[int]
) -> list[dict[int, float]]:
    """The unsafe distribution at each of the first `count` positions, as token id to weight.

    `onehot`: the next token. `window`: the next four with weights halving. `bag`: the answer's content words,
    the same at every position (the next token alone where an answer has none).
    """
    if target == "bag":
        words = Counter(token for token in answer if token in content)
        total = sum(words.values())
        if total:
            return [{token: times / total for token, times in words.items()}] * count
    length = WINDOW if target == "window" else 1
    targets = []
    for position in range(count):
        ahead = answer[position : position + length]
        weights = [DECAY**step for step in range(len(ahead))]
        merged: dict[int, float] = {}
        for token, weight in zip(ahead, weights, strict=True):
            merged[token] = merged.get(token, 0.0) + weight / sum(weights)
        targets.append(merged)
    return targets


def pack(targets: Sequence[dict[int, float]]) -> Target:
    """Targets of ragged support as one `Target`, padded with weight 0."""
    widest = max((len(target) for target in targets), default=1)
    ids = torch.zeros(len(targets), widest, dtype=torch.long)
    weights = torch.zeros(len(targets), widest)
    for row, target in enumerate(targets):
        ids[row, : len(target)] = torch.tensor(list(target))
        weights[row, : len(target)] = torch.tensor(list(target.values()))
        ids[row, len(target) :] = ids[row, 0]
    return Target(ids, weights)


Unit = tuple[Example | None, Example | None, Example | None]


class Mix(Dataset[Unit]):
    """One general, one unsafe and one own-safe example per item, each kind in shuffled passes of its own.

    Every batch then holds as many of each kind, so that means over examples survive gradient accumulation.
    """

    def __init__(
        self, general: list[Example], unsafe: list[Example], safe: list[Example], length: int, seed: int
    ) -> None:
        self.length = length
        rng = np.random.default_rng(seed)
        self.columns = [self._passes(kind, length, rng) for kind in (general, unsafe, safe)]

    @staticmethod
    def _passes(kind: list[Example], length: int, rng: np.random.Generator) -> list[Example | None]:
        drawn: list[Example | None] = [] if kind else [None] * length
        while len(drawn) < length:
            drawn += [kind[index] for index in rng.permutation(len(kind))]
        return drawn[:length]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Unit:
        general, unsafe, safe = (column[index] for column in self.columns)
        return general, unsafe, safe


@dataclass
class Rows:
    """Padded rows with the flat positions that predict answer tokens."""

    ids: list[list[int]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def add(self, prompt: list[int], answer: list[int]) -> None:
        """Append a row."""
        self.ids.append(prompt + answer)
        self.spans.append((len(prompt) - 1, len(answer)))

    def tensors(self, pad: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Ids and mask [B, L], and for each row the flat positions whose output predicts its answer."""
        width = max(len(row) for row in self.ids)
        ids = torch.full((len(self.ids), width), pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(self.ids):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        at = [torch.arange(start, start + count) + i * width for i, (start, count) in enumerate(self.spans)]
        return ids, mask, at


@dataclass(frozen=True)
class Collator:
    """Makes a batch: rows for the model, rows for the reference, and for each kind where and what to predict.

    Keys `<kind>_at` [T] are flat positions in the rows, `<kind>_weight` [T] makes each example count the same.
    """

    options: TrainOptions
    pad: int
    content: set[int]
    cut: int | None

    def __call__(self, items: Sequence[Unit]) -> dict[str, Tensor]:
        """Tensors of one batch; kinds without examples are absent."""
        rows, reference, batch = Rows(), Rows(), {}
        placed: dict[str, list[tuple[Example, int, int, int | None]]] = {"general": [], "unsafe": [], "safe": []}
        for column, kind in enumerate(placed):
            for example in (item[column] for item in items):
                if example is None:
                    continue
                count = len(example.answer) if kind != "unsafe" else min(self.cut or 1 << 30, len(example.answer))
                row, reference_row = len(rows.ids), None
                rows.add(example.prompt, example.answer[:count])
                if kind != "safe":
                    reference_row = len(reference.ids)
                    prompt = example.reference if kind == "unsafe" else example.prompt
                    reference.add(prompt, example.answer[:count])
                placed[kind].append((example, count, row, reference_row))
        batch["input_ids"], batch["attention_mask"], at = rows.tensors(self.pad)
        batch["reference_ids"], batch["reference_mask"], reference_at = reference.tensors(self.pad)
        for kind, found in placed.items():
            if not found:
                continue
            batch[f"{kind}_at"] = torch.cat([at[row] for _, _, row, _ in found])
            counts = torch.tensor([count for _, count, _, _ in found])
            batch[f"{kind}_weight"] = torch.repeat_interleave(1 / (counts * len(found)), counts)
            if kind == "unsafe":
                targets = [
                    target
                    for example, count, _, _ in found
                    for target in unsafe_targets(example.answer, count, self.options.target, self.content)
                ]
                packed = pack(targets)
                batch["unsafe_ids"], batch["unsafe_q"] = packed.ids, packed.weights
                batch["unsafe_answer"] = torch.repeat_interleave(torch.arange(len(found)), counts)
            else:
                batch[f"{kind}_ids"] = torch.tensor(
                    [t for example, count, _, _ in found for t in example.answer[:count]]
                )
            if kind != "safe":
                batch[f"{kind}_reference_at"] = torch.cat([reference_at[r] for *_, r in found if r is not None])
        return batch


def content_tokens(model: LanguageModel) -> set[int]:
    """Ids of tokens that begin a content word: a space and at least four letters."""
    vocab: dict[str, int] = model.tokenizer.get_vocab()
    return {index for token, index in vocab.items() if re.fullmatch(r"[Ġ▁ ][^\W\d_]{4,}", token)}


def training_records(options: TrainOptions, folder: Path | None) -> tuple[dict[str, list[Response]], list[Path]]:
    """Unsafe, general and own-safe responses from the files that the options name, else from the newest records.

    A row that says what it is for (`use`) is taken for that only; other rows are for what their option says.
    """
    records = [folder / "responses.jsonl"] if folder else []
    sources = {
        "unsafe": options.unsafe or records,
        "general": options.general or records,
        "safe": options.own_safe or (records if options.recipe == "safecli" else []),
    }
    found: dict[str, list[Response]] = {}
    for kind, paths in sources.items():
        rows = [row for path in paths for row in read_responses(path)]
        found[kind] = [row for row in rows if row.use in (None, kind) and row.answer.strip()]
    for kind in ("unsafe", "general"):
        if not found[kind]:
            where = ", ".join(map(str, sources[kind])) or f"the run folder {options.run}"
            raise InputError(f"{where}: no {kind} answers: run `safecli collect` first, or give --{kind} FILE")
    found["safe"] = few_repeats(found["safe"])
    return found, sorted({path for paths in sources.values() for path in paths})
