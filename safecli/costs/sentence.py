"""Cost from a sentence-transformers model that reads each token as text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from safecli.costs import Vocabulary
from safecli.errors import MissingError
from safecli.models import MINILM_INSTALL, minilm


class SentenceCost:
    """Cosine distance of sentence embeddings of the tokens' texts; equal texts are embedded once."""

    class Options(BaseModel):
        """Options of the backend."""

        model_config = ConfigDict(extra="forbid")
        encoder: str | None = Field(None, description="Folder or hub id of the sentence model; default: MiniLM.")
        template: str = Field("{token}", description="Text around a token, such as 'the word: {token}'.")
        batch_size: int = Field(256, ge=1, description="Texts embedded at once.")

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor:
        """Sentence embeddings [V, k] of the stripped token texts."""
        from sentence_transformers import SentenceTransformer

        source = self.options.encoder or minilm()
        try:
            encoder = SentenceTransformer(source, device=str(vocabulary.device))
        except Exception as error:
            raise MissingError(f"the sentence model {source} can't be loaded: {MINILM_INSTALL}") from error
        texts = [text.strip().casefold() for text in vocabulary.texts]
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        parts = []
        for start in range(0, len(unique), 4096):
            batch = [self.options.template.replace("{token}", text) for text in unique[start : start + 4096]]
            parts.append(
                encoder.encode(
                    batch, batch_size=self.options.batch_size, convert_to_tensor=True, show_progress_bar=False
                ).cpu()
            )
            say(f"sentence cost: {min(start + 4096, len(unique)):,} of {len(unique):,} texts embedded")
        position = {text: index for index, text in enumerate(unique)}
        return torch.cat(parts)[torch.tensor([position[text] for text in texts])]
