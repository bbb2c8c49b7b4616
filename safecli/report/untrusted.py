"""Text that a model or a stranger wrote, made safe to show."""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: terminal escapes start here
    "\u00ad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\ufffe\uffff"  # bidi controls, other characters without a glyph
    "\ud800-\udfff\U000e0000-\U000e0fff]"  # lone surrogates, which UTF-8 can't hold, and tags
)


def visible(text: str) -> str:
    """Show each control, bidi and other glyphless character by its number: ⟨U+202E⟩.

    Tabs, newlines and the joiners that emoji and some scripts need stay. Markup isn't escaped here.
    """
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def markdown_cell(text: str) -> str:
    """One line of `text` that Markdown shows as it is, inside a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(visible(text).split()))
