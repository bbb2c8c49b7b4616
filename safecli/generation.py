"""Answers from a language model: rows that are refilled as answers end, and fewer of them where memory runs out."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.cache_utils import DynamicCache, DynamicLayer

from safecli.errors import RunError
from safecli.models import LanguageModel, free_memory, is_out_of_memory

REFILL = 4
"""New prompts are read when this part of the rows is free: one prompt at a time would read them slowly."""
ROOM = 128
"""So many tokens can be written before what is known of the rows is copied to where there is room for more."""


@dataclass(frozen=True)
class Request:
    """One answer to generate: a prompt's token ids, the seed of its own random numbers, and how it has to begin."""

    ids: list[int]
    seed: int = 0
    opening: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A generated answer; `finished` says that the model ended it, not the token limit."""

    text: str
    tokens: int
    finished: bool


class _Picker:
    """How the next token of every row is chosen: the likeliest, or one drawn at a temperature.

    Drawing is by Gumbel-max with a generator for each row, so that an answer depends on its seed and not on its batch.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        penalty = getattr(model.generation_config, "repetition_penalty", None) or 1.0
        self.penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None
        self.temperature = temperature

    def scores(self, ids: torch.Tensor, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Scores [B, V] whose largest is the token to take, after the tokens `ids` [B, L]."""
        scores = logits.float()
        if self.penalty:
            scores = self.penalty(ids, scores)
        if self.temperature > 0:
            noise = torch.empty(scores.shape)
            for row, generator in zip(noise, generators, strict=True):
                row.exponential_(generator=generator)
            scores = scores / self.temperature - noise.log_().to(scores.device)
        return scores


class _Room(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, H, L, D] of a layer as a window of larger blocks, so that what is known is rarely copied.

    A token is written behind the others; a row moves into the place of one that ended; new rows come after the last.
    Nothing but `update`, `keep` and `join` may change it.
    """

    blocks: list[torch.Tensor]
    rows = start = end = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write down what the layer made of new tokens, and give it all back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.blocks, self.rows = [key_states[:, :, :0], value_states[:, :, :0]], len(key_states)
        more = key_states.shape[2]
        if self.end + more > self.blocks[0].shape[2]:
            self._move(self.rows, self.end - self.start, more)
        after = self.end + more
        for block, states in zip(self.blocks, (key_states, value_states), strict=True):
            block[: self.rows, :, self.end : after] = states
        self._show(self.rows, self.start, after)
        return self.keys, self.values

    def keep(self, order: Sequence[int], first: int) -> None:
        """Row i is what row order[i] >= i was, and there are no others; the first columns go."""
        for block in self.blocks:
            for row, was in enumerate(order):
                if row != was:
                    block[row, :, self.start : self.end] = block[was, :, self.start : self.end]
        self._show(len(order), self.start + first, self.end)

    def join(self, other: _Room) -> None:
        """Take up the rows of another, the shorter of both behind zeros (a mask would not hide infinity or NaN)."""
        rows, length, theirs = self.rows + other.rows, self.end - self.start, other.end - other.start
        if rows > len(self.blocks[0]) or theirs > self.end:
            self._move(rows, max(length, theirs))
        start = self.end - max(length, theirs)
        for block, states in zip(self.blocks, (other.keys, other.values), strict=True):
            block[: self.rows, :, start : self.start] = 0
            block[self.rows : rows, :, start : self.end - theirs] = 0
            block[self.rows : rows, :, self.end - theirs : self.end] = states
        self._show(rows, start, self.end)

    def _move(self, rows: int, length: int, more: int = 0) -> None:
        """New blocks for so many rows, with the window at the end of the first `length` columns and room for `more`."""
        own, blocks = self.end - self.start, []
        for old in self.blocks:
            new = old.new_zeros(rows, old.shape[1], length + more + ROOM, old.shape[3])
            new[: self.rows, :, length - own : length] = old[: self.rows, :, self.start : self.end]
            blocks.append(new)
        self.blocks = blocks
        self._show(self.rows, length - own, length)

    def _show(self, rows: int, start: int, end: int) -> None:
        self.rows, self.start, self.end = rows, start, end
        self.keys, self.values = (block[:rows, :, start:end] for block in self.blocks)


def _empty_cache(model: Any) -> DynamicCache:
    """What a model that `_can_refill` remembers before it has read anything."""
    cache = DynamicCache(config=_inner(model).config)
    cache.layers = [_Room() for _ in cache.layers]
    return cache


@dataclass
class _Rows:
    """Answers under way: which request each row answers, all its tokens [B, L] with their mask, and what was computed.

    Rows are padded on the left. The last token of each has been picked, but not read yet.
    """

    request: list[int]
    generators: list[torch.Generator]
    said: list[list[int]]
    ids: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the columns that only they had; the last ones take the places of those that go."""
        order = _places(rows)
        index = torch.tensor(order, device=self.ids.device)
        self.request = [self.request[row] for row in order]
        self.generators = [self.generators[row] for row in order]
        self.said = [self.said[row] for row in order]
        self.mask = self.mask[index]
        first = int(self.mask.any(0).to(torch.uint8).argmax())
        self.ids, self.mask = self.ids[index, first:], self.mask[:, first:]
        for layer in self.cache.layers:
            layer.keep(order, first)

    def join(self, other: _Rows) -> None:
        """Take up the rows of another."""
        self.request += other.request
        self.generators += other.generators
        self.said += other.said
        self.ids, self.mask = (_stacked(*pair) for pair in ((self.ids, other.ids), (self.mask, other.mask)))
        for own, new in zip(self.cache.layers, other.cache.layers, strict=True):
            own.join(new)


def _places(rows: Sequence[int]) -> list[int]:
    """Which of the ascending `rows` moves to each of the first places: those that are there already stay."""
    there, last = set(rows), [row for row in rows if row >= len(rows)]
    return [place if place in there else last.pop() for place in range(len(rows))]


def _stacked(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Two batches [B, L] as one, the shorter padded with zeros at its beginning."""
    length = max(a.shape[1], b.shape[1])
    return torch.cat([functional.pad(part, [length - part.shape[1], 0]) for part in (a, b)])


class _Engine:
    """Answers requests in rows that take up the next request when an answer ends."""

    def __init__(self, language_model: LanguageModel, requests: Sequence[Request], longest: int, temperature: float):
        self.model, self.tokenizer = language_model.model, language_model.tokenizer
        self.requests, self.longest = requests, longest
        self.stops = {language_model.end_id, int(self.tokenizer.eos_token_id)}
        self.cache_argument = "cache" if "cache" in _parameters(self.model) else "past_key_values"
        self.pick = _Picker(self.model, temperature)
        self.said: dict[int, list[int]] = {}

    def run(self, slots: int) -> list[list[int]]:
        """The tokens of every answer, up to and with the one that ends it."""
        waiting = deque(range(len(self.requests)))
        rows: _Rows | None = None
        while waiting or rows:
            free = slots - (len(rows.request) if rows else 0)
            if waiting and (rows is None or free * REFILL >= slots):
                numbers = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                if rows:
                    rows.join(self._read(numbers))
                else:
                    rows = self._read(numbers)
            else:
                assert rows
                self._step(rows)
            rows = self._finish(rows)
        return [self.said[number] for number in range(len(self.requests))]

    def padded(self, requests: Sequence[Request]) -> Any:
        """What the model reads of requests: prompts and openings, padded on the left."""
        ids = [[*request.ids, *request.opening] for request in requests]
        return self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)

    def _read(self, numbers: list[int]) -> _Rows:
        """Read prompts and pick the first token of each answer."""
        batch = self.padded([self.requests[number] for number in numbers])
        mask, cache = batch["attention_mask"], _empty_cache(self.model)
        output = self.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: cache},
        )
        generators = [torch.Generator().manual_seed(self.requests[number].seed) for number in numbers]
        rows = _Rows(numbers, generators, [[] for _ in numbers], batch["input_ids"], mask, cache)
        self._take(rows, output.logits)
        return rows

    def _step(self, rows: _Rows) -> None:
        """Read the last token of every row and pick the next."""
        output = self.model(
            input_ids=rows.ids[:, -1:],
            attention_mask=rows.mask,
            position_ids=rows.mask.sum(1, keepdim=True) - 1,
            use_cache=True,
            **{self.cache_argument: rows.cache},
        )
        self._take(rows, output.logits)

    def _take(self, rows: _Rows, logits: torch.Tensor) -> None:
        picked = self.pick.scores(rows.ids, logits[:, -1], rows.generators).argmax(-1)
        for said, token in zip(rows.said, picked.tolist(), strict=True):
            said.append(token)
        rows.ids = torch.cat([rows.ids, picked[:, None]], 1)
        rows.mask = functional.pad(rows.mask, [0, 1], value=1)

    def _finish(self, rows: _Rows) -> _Rows | None:
        """Put away answers that ended; None when no other is under way."""
        going = []
        for row, (number, said) in enumerate(zip(rows.request, rows.said, strict=True)):
            if said[-1] in self.stops or len(said) == self.longest:
                self.said[number] = said
            else:
                going.append(row)
        if len(going) < len(rows.request) and going:
            rows.keep(going)
        return rows if going else None


def _inner(model: Any) -> Any:
    """The model itself where an adapter is around it."""
    return getattr(model, "get_base_model", lambda: model)()


def _parameters(model: Any) -> Collection[str]:
    return inspect.signature(_inner(model).forward).parameters.keys()


def _can_refill(model: Any) -> bool:
    """Whether what the model remembers is one pair of keys and values per layer for every token, and no window."""
    cache = DynamicCache(config=_inner(model).config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    return plain and {"position_ids", "logits_to_keep"} <= set(_parameters(model))


class _RowSampler(LogitsProcessor):  # type: ignore[misc]
    """The picker's drawing for models that `transformers` has to generate with."""

    def __init__(self, pick: _Picker, requests: Sequence[Request]) -> None:
        self.pick = pick
        self.generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.pick.scores(input_ids, scores, self.generators)


def _whole_batches(engine: _Engine, slots: int) -> list[list[int]]:
    """What the engine does, batch by batch with `model.generate`."""
    said: list[list[int]] = []
    for start in range(0, len(engine.requests), slots):
        requests = engine.requests[start : start + slots]
        batch = engine.padded(requests)
        output = engine.model.generate(
            **batch,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            max_new_tokens=engine.longest,
            eos_token_id=sorted(engine.stops),
            pad_token_id=engine.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([_RowSampler(engine.pick, requests)]),
        )
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            end = next((at for at, token in enumerate(row) if token in engine.stops), len(row))
            said.append(row[: end + 1])
    return said


@torch.inference_mode()
def generate(
    language_model: LanguageModel,
    requests: Sequence[Request],
    max_new_tokens: int,
    temperature: float = 0.0,
    slots: int | None = None,
) -> list[Answer]:
    """Answer requests, greedily or at a temperature, `slots` of them at once: all of them where not given."""
    engine = _Engine(language_model, requests, max_new_tokens, temperature)
    slots = min(slots or len(requests), len(requests))
    found = engine.run(slots) if _can_refill(language_model.model) else _whole_batches(engine, slots)
    answers = []
    for request, said in zip(requests, found, strict=True):
        finished = said[-1] in engine.stops
        own = said[:-1] if finished else said
        text = engine.tokenizer.decode([*request.opening, *own], skip_special_tokens=True)
        answers.append(Answer(text.replace("\0", "\ufffd").strip(), len(own), finished))
    return answers


def fitting_batch(language_model: LanguageModel, tokens: int, cap: int = 48) -> int:
    """How many sequences of `tokens` tokens fit in a quarter of the free memory: their KV cache and logits."""
    config = language_model.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = language_model.head.element_size()
    cache = 2 * 2 * config.num_hidden_layers * heads * head_dim * item * (tokens + ROOM)
    fitting = free_memory(language_model.device) // 4 // int(cache + 12 * config.vocab_size)
    return max(1, min(cap, fitting))


def halving(
    language_model: LanguageModel,
    requests: Sequence[Request],
    max_new_tokens: int,
    temperature: float,
    say: Callable[[str], None],
    slots: int | None = None,
) -> list[Answer]:
    """`generate`, with half as many answers at once for as long as it runs out of memory; `say` is told."""
    slots = min(slots or len(requests), len(requests))
    while True:
        try:
            return generate(language_model, requests, max_new_tokens, temperature, slots)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if slots == 1:
                raise RunError("out of memory with a batch of one: use a smaller model or --max-new-tokens") from error
        if language_model.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"out of memory with {slots} prompts at once: going on with {slots - slots // 2}")
        slots -= slots // 2
