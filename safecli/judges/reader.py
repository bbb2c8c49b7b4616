"""The reader of the judges that were trained here: a small language model with a LoRA, and linear heads on it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from safecli.errors import InputError
from safecli.judges import Pair
from safecli.judges.fluency import SHAPE, shape
from safecli.models import pick_device, reading_model

FORMAT = 4
FROZEN = 12
"""How many of the language model's layers read as they are; on the last of them the kind of a prompt is told."""
LAYERS = 18
"""How many are used at all, those above the frozen ones with a LoRA: the end of the model knows the next token only."""
LORA = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
MAX_PROMPT_TOKENS = 128
MAX_ANSWER_TOKENS = 256
BATCH = 32

# What is addressed to a machine, not said to a reader: chat-template tokens, console markup, a claimed label.
_MARKS = re.compile(
    r"<\|[^|<>]{1,40}\|>|</?s>|\[/?(?:INST|SYS|CLS|SEP|PAD|MASK|UNK)\]|\[/?[a-z#][a-z0-9_# ]{0,30}\]"
    r"|\b(?:label|verdict|outcome|judge?ment|score)\s*[:=]\s*\w+",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """`text` without the marks that could steer a reader which is itself a model."""
    return _MARKS.sub(" ", text).strip()


class ReaderOptions(BaseModel):
    """Options of every judge that reads so; each adds its weights and its threshold."""

    model_config = ConfigDict(extra="forbid")

    encoder: str | None = Field(None, description="SmolLM2-135M-Instruct: a folder or hub id, found by default")
    device: str = Field("auto", description="where it reads: auto, cpu, cuda, cuda:1, mps")


class Reader:
    """The first layers of SmolLM2-135M-Instruct, the upper ones with a LoRA: features of prompts and of answers."""

    def __init__(self, encoder: str | None = None, device: str = "auto") -> None:
        self.tokenizer, self.lower = reading_model(AutoModel, encoder)
        layers, config = self.lower.layers, copy.deepcopy(self.lower.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = LAYERS - FROZEN, 1, None
        self.upper = AutoModel.from_config(config)
        self.lower.layers, self.upper.layers = layers[:FROZEN], layers[FROZEN:LAYERS]
        self.lower.norm = self.upper.norm = nn.Identity()
        inject_adapter_in_model(LORA, self.upper)
        self.device = pick_device(device)
        self.lower.to(self.device).eval().requires_grad_(False)
        self.upper.to(self.device).eval()
        self.width: int = config.hidden_size

    def features(self, pairs: Sequence[Pair]) -> Tensor:
        """Features [N, 2d + SHAPE]: the mean over the answer and over the prompt, normed, and the answer's shape."""
        shapes = torch.tensor([shape(pair.prompt, plain(pair.answer)) for pair in pairs]).reshape(-1, SHAPE)
        found = torch.empty(len(pairs), 2 * self.width)
        for batch in by_length([len(pair.prompt) + len(pair.answer) for pair in pairs]):
            with torch.inference_mode():
                found[batch] = self.pooled(*self.read([pairs[i] for i in batch])).cpu()
        return torch.cat([found, shapes], dim=1)

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Features [N, d] of prompts read without any answer, by the frozen layers alone."""
        found = torch.empty(len(prompts), self.width)
        for batch in by_length([len(prompt) for prompt in prompts]):
            hidden, part = self.read([Pair(prompts[i], "") for i in batch])
            found[batch] = _mean(hidden, part == 1).cpu()
        return found

    @torch.no_grad()
    def read(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """What the frozen layers make of 'A person asked: … An assistant replied: …': hidden states [B, L, d], and the
        part [B, L] that every token belongs to: 1 the prompt, 2 the answer, -1 padding.

        The tokens before them (0) draw the attention that has nowhere to go.
        """
        opening, reply = self._ids(["user\n", "\n\nAn assistant replied:"])
        asked = self._ids([f"A person asked: {plain(pair.prompt)}" for pair in pairs])
        said = self._ids([f" {answer}" if (answer := plain(pair.answer)) else "" for pair in pairs])
        first = [self.tokenizer.bos_token_id, *opening]
        rows = [
            (first, one[:MAX_PROMPT_TOKENS] + reply, two[:MAX_ANSWER_TOKENS])
            for one, two in zip(asked, said, strict=True)
        ]
        tokens = pad_sequence([torch.tensor([*chain(*row)]) for row in rows], batch_first=True).to(self.device)
        parts = [torch.tensor([number for number, ids in enumerate(row) for _ in ids]) for row in rows]
        part = pad_sequence(parts, batch_first=True, padding_value=-1).to(self.device)
        output = self.lower(input_ids=tokens, attention_mask=(part >= 0).long(), use_cache=False)
        return output.last_hidden_state, part

    def pooled(self, hidden: Tensor, part: Tensor) -> Tensor:
        """What the layers with the LoRA make of it [B, 2d]: the mean over the answer and over the prompt, normed."""
        output = self.upper(inputs_embeds=hidden, attention_mask=(part >= 0).long(), use_cache=False)
        means = [_mean(output.last_hidden_state.float(), part == number) for number in (2, 1)]
        return torch.cat([functional.layer_norm(mean, mean.shape[-1:]) for mean in means], dim=1)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def trained_reader(weights: Path, encoder: str | None, device: str) -> tuple[Reader, dict[str, Tensor]]:
    """A reader with the LoRA of a weights file, and its heads: `NAME.weight` [outcomes, features] and `NAME.bias`."""
    try:
        with safe_open(weights, framework="pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["safecli"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise InputError(f"{weights} holds no weights of this judge: {error}") from error
    if about.get("format") != FORMAT:
        raise InputError(f"{weights} has format {about.get('format')}, this safecli reads {FORMAT}")
    reader = Reader(encoder, device)
    heads = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    if any(t.shape[-1] not in (reader.width, 2 * reader.width + SHAPE) for n, t in heads.items() if "weight" in n):
        raise InputError(f"{weights} was trained on a language model of another width")
    set_peft_model_state_dict(reader.upper, {name: tensor for name, tensor in tensors.items() if "lora" in name})
    for layer in reader.upper.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return reader, heads


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def chances(heads: dict[str, Tensor], head: str, features: Tensor) -> Tensor:
    """Probabilities [..., C] of what a head tells apart, from features [..., F]."""
    return (features @ heads[f"{head}.weight"].T + heads[f"{head}.bias"]).softmax(-1)


def by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of row numbers of like length, so that little is padding."""
    ordered = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]
