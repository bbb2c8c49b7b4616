"""Cost from static word vectors in a file that the user gives, in word2vec's text format (fastText's `.vec` too)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from safecli.costs import Vocabulary
from safecli.errors import InputError


class VectorsCost:
    """Cosine distance of the vectors of the tokens' words; a token whose word has none is an average one."""

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        path: Path = Field(description="File of vectors: a line 'COUNT SIZE', then 'WORD NUMBER NUMBER …'.")

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor:
        """Vectors [V, k]: of the word as it is written, else in lower case; rows of 0 where there is none."""
        words = [text.strip() for text in vocabulary.texts]
        found = read_vectors(self.options.path, {*words, *map(str.casefold, words)} - {""})
        rows = [found.get(word, found.get(word.casefold())) for word in words]
        known = [row for row in rows if row is not None]
        if not known:
            raise InputError(f"{self.options.path}: none of its words is a token of this model")
        say(f"vectors cost: {len(known):,} of {len(rows):,} tokens have a vector")
        nothing = torch.zeros_like(known[0])
        return torch.stack([nothing if row is None else row for row in rows])


def read_vectors(path: Path, wanted: set[str]) -> dict[str, Tensor]:
    """The vectors of these words; `InputError` names the line that is malformed."""
    found: dict[str, Tensor] = {}
    size = None
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                word, *numbers = line.rstrip().split(" ")
                if number == 1 and len(numbers) == 1:
                    continue
                size = size or len(numbers)
                if len(numbers) != size:
                    raise InputError(
                        f"{path}, line {number}: {len(numbers)} numbers where the lines before have {size}"
                    )
                if word in wanted:
                    found[word] = torch.tensor([float(value) for value in numbers])
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}, line {number}: {error}") from error
    return found
