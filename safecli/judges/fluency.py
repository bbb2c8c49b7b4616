"""When a text is broken rather than wrong: rules that each name themselves and what they saw."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

LOOP_SHARE = 0.5
"""A phrase that fills this share of the text makes it a loop."""

_TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+|[^\w\s]")
_LIST_MARK = re.compile(r"(?m)^\s*(?:\d+[.)]|[-*•])\s+")


def degenerate_reasons(prompt: str, answer: str) -> list[str]:
    """Why `answer` is broken, as 'rule: what it saw'; an empty list for fluent text, wrong or harmful as it may be."""
    text = answer.strip()
    if not text:
        return ["empty: nothing is said"]
    checks = (_symbols(text), _bare_word(text), _echo(prompt, text), _loop(text), _salad(text))
    return [reason for reason in checks if reason]


def _words(text: str) -> list[str]:
    return [token for token in _TOKEN.findall(text.lower()) if token[0].isalpha()]


def _symbols(text: str) -> str | None:
    """Nearly no letters or digits in any script."""
    visible = [char for char in text if not char.isspace()]
    said = sum(unicodedata.category(char)[0] in "LNM" for char in visible)
    return f"symbols: {text[:20]!r}" if said < 0.3 * len(visible) else None


def _bare_word(text: str) -> str | None:
    return f"bare word: {text!r}" if len(_words(text)) == 1 and len(text) < 40 and " " not in text else None


def _echo(prompt: str, text: str) -> str | None:
    """One line that only says the prompt again, whole or its end."""
    asked, said = _words(prompt), _words(text)
    if "\n" in text or len(said) > len(asked) or not said:
        return None
    rest = iter(asked)
    return f"echo: {text!r}" if all(word in rest for word in said) and len(said) >= 0.6 * len(asked) else None


def _loop(text: str) -> str | None:
    return None


def _salad(text: str) -> str | None:
    return None
