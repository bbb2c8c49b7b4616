"""Prompts and answers in, JSONL out: every reader of the data that users bring, and the record that we write.

A response is one JSON object per line. `use` says what it is for: `unsafe` (to leave), `safe` (the model's own
fluent answer that does not comply), `general` (its own answer to a harmless prompt), or `left_out` with the
reason in `why`. To train on answers from elsewhere, `prompt` and `answer` are enough.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from safecli.artifacts import atomic, fingerprint, os_errors
from safecli.config import Kind
from safecli.errors import InputError, MissingError

Use = Literal["unsafe", "safe", "general", "left_out"]
SETS: tuple[Kind, ...] = get_args(Kind)

PROMPT_COLUMNS = ("prompt", "instruction", "question", "text")
ANSWER_COLUMNS = ("answer", "response", "output", "completion")
MAX_LINE = 1 << 20


class Prompt(BaseModel):
    """A prompt to answer, the set that it belongs to, and where it was read.

    `asks` is the prompt itself where `prompt` has a wrapper around it.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    kind: Kind
    prompt: str
    where: str = ""
    set: str = ""
    asks: str = ""
    category: str = ""


class Response(BaseModel):
    """An answer with its judgement: one line of `responses.jsonl` and of `answers.jsonl`."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    id: str = ""
    kind: Kind = "toxic"
    set: str = ""
    category: str = ""
    prompt: str
    asks: str = ""
    answer: str
    sample: int = 0
    finished: bool = True
    outcome: str = ""
    score: float = 0.0
    reasons: list[str] = []
    use: Use | None = None
    why: str = ""


def shipped(kind: Kind, split: str) -> list[Prompt]:
    """The prompts of one split (train, dev, test) that the package ships."""
    text = files("safecli").joinpath("data", f"{kind}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [
        Prompt(id=row["id"], kind=kind, set=kind, prompt=row["prompt"], where=f"{kind}.jsonl:{number}")
        for number, row in enumerate(rows, 1)
        if row["split"] == split
    ]


def read_prompts(
    source: str | Sequence[str],
    kind: Kind,
    column: str | None = None,
    *,
    name: str = "",
    category: str | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
) -> list[Prompt]:
    """Read the set `name` of prompts from JSONL, JSON, CSV, plain text (one per line), or a `datasets` id, or several.

    JSON is `{"instructions": [...]}`, a list of strings, or a list of objects; an `input` is put under its
    instruction. `only` maps a column to the values that a row may have there, `category` names one to tell rows apart.
    Errors: `InputError` with file and line, `MissingError` where there is no such dataset.
    """
    name = name or kind
    prompts: list[Prompt] = []
    for one in [source] if isinstance(source, str) else source:
        before = len(prompts)
        for where, row in _rows(one):
            if only and any(str(_cell(row, where, key)) not in values for key, values in only.items()):
                continue
            text = row if isinstance(row, str) else _prompt_of(row, where, column)
            of = str(_cell(row, where, category)) if category else ""
            key = f"{name}-{len(prompts) + 1:04}"
            prompts.append(Prompt(id=key, kind=kind, set=name, category=of, prompt=text, where=where))
        if len(prompts) == before:
            unmet = f", or no row has {dict(only)}" if only else ""
            raise InputError(f"{one} holds no prompts: it is empty{unmet}")
    return prompts


def _cell(row: Any, where: str, column: str) -> Any:
    if not isinstance(row, dict) or column not in row:
        columns = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
        raise InputError(f"{where}: no column '{column}' (columns: {columns})")
    return row[column]


def _prompt_of(row: Any, where: str, column: str | None = None, mend: str = "use --prompt-column NAME") -> str:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with a prompt, got {type(row).__name__}")
    name = column or next((name for name in PROMPT_COLUMNS if name in row), None)
    if name is None or name not in row:
        columns = ", ".join(map(str, row)) or "none"
        raise InputError(f"{where}: no column '{name or 'prompt'}' (columns: {columns}): {mend}")
    text = row[name][0] if isinstance(row[name], list) and len(row[name]) == 1 else row[name]
    if not isinstance(text, str):
        raise InputError(f"{where}: '{name}' must be text, got {type(text).__name__}")
    extra = row.get("input") if name == "instruction" else None
    return f"{text}\n\n{extra}" if extra else text


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix or source.startswith((".", "/", "~")):
            raise InputError(f"there is no file {source}")
        yield from _dataset_rows(source)
        return
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv_rows(path, text)
    elif suffix == ".json":
        yield from _json_rows(path, text)
    elif suffix in (".jsonl", ".ndjson"):
        yield from read_jsonl(path, text)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path.name}:{number}", _checked(line, f"{path.name}:{number}")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            if None in row:
                raise InputError(f"{where}: more cells than the header has names: quote cells that hold a comma")
            yield where, _checked(row, where)
    except csv.Error as error:
        raise InputError(f"{path.name}:{reader.line_num + 1}: not valid CSV: {error}") from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: JSON that can't be read: {error}") from error
    rows = content.get("instructions") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(f'{path}: expected {{"instructions": [...]}} or a list of texts or objects')
    for number, row in enumerate(rows, 1):
        yield f"{path.name}: record {number}", _checked(row, f"{path.name}: record {number}")


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, *config, split = source.split(":") if ":" in source else (source, "train")
    try:
        table = datasets.load_dataset(name, *config, split=split)
    except Exception as error:
        raise MissingError(
            f"'{source}' is neither a file nor a dataset that can be loaded ({type(error).__name__}): "
            "give a path, or a datasets id such as owner/name:split or owner/name:config:split"
        ) from error
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(table, 1))


def read_text(path: Path) -> str:
    """Read UTF-8 text without its BOM and with plain line ends; `InputError` names the byte that is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8: convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    return text.replace("\r\n", "\n")


def read_jsonl(path: Path, text: str | None = None) -> Iterator[tuple[str, Any]]:
    """The values of a JSONL file with `file:line`; blank lines are passed over, a bad line is an `InputError`."""
    for number, line in enumerate((read_text(path) if text is None else text).split("\n"), 1):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        if len(line) > MAX_LINE:
            raise InputError(f"{where}: the line has {len(line):,} characters, more than {MAX_LINE:,}: split the file")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: JSON that can't be read: {error}") from error
        yield where, _checked(row, where)


def _checked(row: Any, where: str) -> Any:
    """Refuse text that can't be kept: NUL, and surrogates without their other half."""
    for text in (row,) if isinstance(row, str) else row.values() if isinstance(row, dict) else ():
        if isinstance(text, str) and ("\0" in text or not _encodable(text)):
            fault = "a NUL character" if "\0" in text else "a lone surrogate"
            raise InputError(f"{where}: the text holds {fault}: remove it")
    return row


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def usable(prompts: Sequence[Prompt], tokens: Sequence[int], longest: int) -> tuple[list[Prompt], list[str]]:
    """Split off prompts that are empty, longer than `longest` tokens, or duplicates; the latter by where and why."""
    kept: list[Prompt] = []
    faults = []
    seen: dict[tuple[str, str], str] = {}
    for prompt, length in zip(prompts, tokens, strict=True):
        key = (prompt.set or prompt.kind, prompt.prompt.strip())
        if not key[1]:
            faults.append(f"{prompt.where}: empty")
        elif length > longest:
            faults.append(f"{prompt.where}: too long ({length} tokens, the limit is {longest})")
        elif key in seen:
            faults.append(f"{prompt.where}: duplicate of {seen[key]}")
        else:
            seen[key] = prompt.where
            kept.append(prompt)
    return kept, faults


@dataclass(frozen=True)
class Row:
    """A prompt with an answer, where it was read, and everything else that its row holds."""

    where: str
    columns: dict[str, Any]
    prompt: str
    answer: str


def read_rows(path: Path, prompt_column: str | None = None, answer_column: str | None = None) -> list[Row]:
    """Read prompts with answers from JSONL, JSON or CSV; `InputError` with file and line."""
    if not path.exists():
        raise InputError(f"there is no file {path}")
    rows = []
    for where, row in _rows(str(path)):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with a prompt and an answer")
        name = answer_column or next((name for name in ANSWER_COLUMNS if name in row), None)
        if name is None or name not in row:
            raise InputError(f"{where}: no answer (one of the columns {name or ', '.join(ANSWER_COLUMNS)})")
        if not isinstance(row[name], str):
            raise InputError(f"{where}: {name}: Input should be a valid string")
        prompt = _prompt_of(row, where, prompt_column, f"call it one of {', '.join(PROMPT_COLUMNS)}")
        rows.append(Row(where, row, prompt, row[name]))
    if not rows:
        raise InputError(f"{path} holds no usable rows: it is empty")
    return rows


def read_responses(path: Path) -> list[Response]:
    """Read prompts with answers: our own records, or any JSONL, JSON or CSV with a prompt and an answer column."""
    responses = []
    for row in read_rows(path):
        try:
            responses.append(Response(**(row.columns | {"prompt": row.prompt, "answer": row.answer})))
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{row.where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return responses


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as CSV where the name ends so, else as JSONL; whole or not at all."""
    with atomic(path) as beside, beside.open("w", encoding="utf-8", newline="") as stream:
        if path.suffix.lower() == ".csv":
            writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def append(path: Path, rows: Iterable[BaseModel]) -> None:
    """Append rows as JSONL in one write, fsynced."""
    _append(path, "".join(row.model_dump_json() + "\n" for row in rows))


def append_values(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append plain rows as JSONL in one write, fsynced."""
    _append(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _append(path: Path, lines: str) -> None:
    with os_errors(path, "write"), path.open("ab") as stream:
        stream.write(lines.encode())
        stream.flush()
        os.fsync(stream.fileno())


def truncate_to_whole(path: Path, counts: Sequence[int]) -> int:
    """Cut a JSONL file back to whole batches of the sizes `counts`; returns how many batches it holds.

    What a killed writer left half done, a torn last line or part of a batch, goes.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == 0x0A]
    done = rows = 0
    for count in counts:
        if rows + count > len(ends):
            break
        rows, done = rows + count, done + 1
    whole = ends[rows - 1] if rows else 0
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)
    return done


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Identify a list of prompts by ids, kinds, categories and texts."""
    return fingerprint([(prompt.id, prompt.kind, prompt.category, prompt.prompt) for prompt in prompts])
