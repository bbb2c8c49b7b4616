"""The vocabulary in a plane, as one HTML file that needs no network: what `cost map` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from torch import Tensor

from safecli.report.page import write_page
from safecli.report.untrusted import visible

GRID = 4095
"""Places of the plane in each direction."""
LEVELS = 1000
"""What a cost of 1 is written as."""
CLIPPED = 0.0005
"""The part of the tokens at each edge that is drawn on it, lest a few far ones press the others together."""


def write_map(
    title: str,
    basis: str,
    texts: Sequence[str],
    ids: Sequence[int],
    places: Tensor,
    costs: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Write the page: tokens [n] at `places` [n, 2], components of `basis`, coloured by cost [n] to the chosen ones."""
    low, high = places.quantile(CLIPPED, dim=0), places.quantile(1 - CLIPPED, dim=0)
    scaled = ((places - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * GRID
    data = {
        "grid": GRID,
        "levels": LEVELS,
        "ids": list(ids),
        "texts": [visible(text) for text in texts],
        "x": scaled[:, 0].round().int().tolist(),
        "y": scaled[:, 1].round().int().tolist(),
        "costs": [[visible(text), (row * LEVELS).round().int().tolist()] for text, row in costs.items()],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    write_page(path, "map", title=title, basis=basis, count=len(texts), data=Markup(text))
