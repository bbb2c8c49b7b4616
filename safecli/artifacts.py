"""A run folder: whole files or none, one writer at a time, and stages that know when they are done.

A stage lives in `RUN/<stage>-<identity>`, where the identity is a hash of everything that decides its result.
Asked again with the same identity it is resumed, or skipped when its `manifest.json` says that it is done.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from safecli.errors import InputError, RunError, UsageError

FORMAT = 1
"""Version of the layout of every artefact; a newer one is refused."""


def fingerprint(*parts: Any) -> str:
    """Hash JSON-like values to 16 hex digits; the order of keys changes nothing."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """Hash a file's bytes to 16 hex digits; once per process for as long as its size and time stay the same."""
    stat = path.stat()
    return _content_hash(path, stat.st_mtime_ns, stat.st_size)


@lru_cache
def _content_hash(path: Path, _modified_ns: int, _size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def by_content(values: Mapping[str, Any]) -> dict[str, str]:
    """What the values of options stand for: a file for what it holds, whatever its name."""
    return {
        key: file_fingerprint(value) if isinstance(value, Path) and value.is_file() else str(value)
        for key, value in values.items()
    }


@contextmanager
def os_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn a full disk or a read-only folder into a `RunError` that says so."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        reasons = {
            errno.ENOSPC: "the disk is full: free some space and run the same command again",
            errno.EDQUOT: "your disk quota is used up: free some space and run the same command again",
            errno.EROFS: "it lies on a read-only file system: choose another folder",
            errno.EACCES: "permission denied: choose a folder that you may write to",
        }
        reason = reasons.get(number, os.strerror(number) if number else str(error))
        raise RunError(f"can't {doing} {path}: {reason}. What was finished before is kept.") from error


def _errno(error: Exception) -> int | None:
    """The system's number of an error, 0 if it has none, None for an error of another kind.

    safetensors puts the number in its text; torch says only that its stream broke, as it does on a full disk.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number:
        return int(number[1])
    return errno.ENOSPC if re.search("inline_container|iostream error", str(error)) else None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes its place, fsynced, only if the block succeeds."""
    with os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            with beside.open("rb") as stream:
                os.fsync(stream.fileno())
            beside.chmod(0o644)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; `InputError` if it is missing or malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` to fill; it takes the place of `path` only if the block succeeds."""
    with os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield beside
            beside.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            beside.replace(path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def first_process() -> bool:
    """Whether this process writes: the only one of its run, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on `path`; released by the system even when the process is killed.

    Another holder is waited for, or is a `RunError` that names its process.
    """
    with os_errors(path, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream: IO[str] = path.open("a+", encoding="utf-8")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            stream.seek(0)
            raise RunError(
                f"another safecli (process {stream.read().strip() or 'unknown'}) is working in {path.parent}: "
                "wait for it, stop it, or give this run a folder of its own with --run"
            ) from error
        stream.seek(0)
        stream.truncate()
        with suppress(OSError):
            stream.write(str(os.getpid()))
            stream.flush()
        yield


@dataclass(frozen=True)
class Stage:
    """One stage's folder inside a run folder."""

    run: Path
    name: str
    identity: dict[str, Any]

    @property
    def path(self) -> Path:
        """The folder, named by the hash of the identity."""
        return self.run / f"{self.name}-{fingerprint(self.identity)[:8]}"

    @property
    def manifest_path(self) -> Path:
        """The file that exists only once the stage is done."""
        return self.path / "manifest.json"

    @property
    def done(self) -> bool:
        """Whether the stage has run to its end."""
        return self.manifest_path.exists()

    def finish(self, result: dict[str, Any]) -> None:
        """Mark the stage as done, with what decided its result and what came out."""
        write_json(self.manifest_path, manifest(self.name, self.identity, result))


def manifest(kind: str, identity: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The metadata that every artefact carries: format, version, identity (options, seed, fingerprints)."""
    from safecli import __version__

    return {"format": FORMAT, "safecli": __version__, "kind": kind, "identity": identity, "result": result}


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """Read a manifest, refusing one of another kind or of a newer format."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise InputError(f"{path} is not the manifest of a {kind} artefact of safecli")
    if content.get("format", 0) > FORMAT:
        raise InputError(f"{path} has format {content['format']}, this safecli reads {FORMAT}: upgrade safecli")
    return content


@contextmanager
def open_stage(stage: Stage, parallel: bool = False) -> Iterator[Path]:
    """Lock the run folder and give the stage's own folder, created if need be.

    A stage that is done already becomes the newest of its name: what was asked for last is what the next stage takes.
    Of the processes that a launcher starts for one `parallel` stage, the first holds the lock for all; any other
    stage in several processes is a `UsageError`.
    """
    if not parallel and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(f"only train takes several processes: call {stage.name} without a launcher")
    with locked(stage.run / ".lock") if first_process() else nullcontext():
        with os_errors(stage.path, "create"):
            stage.path.mkdir(parents=True, exist_ok=True)
            if stage.done and first_process():
                stage.manifest_path.touch()
        yield stage.path


def newest(run: Path, stage: str, accept: Callable[[dict[str, Any]], bool] = lambda _: True) -> Path | None:
    """The folder of the newest finished stage of that name in `run` whose manifest is accepted."""
    found = sorted(run.glob(f"{stage}-*/manifest.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path.parent for path in found if accept(read_manifest(path, stage))), None)
