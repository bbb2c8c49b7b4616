"""How long `safecli --help` takes, against the `--help` of a bare Typer app with two commands."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

BARE = """
import typer
app = typer.Typer()
@app.command()
def one(name: str = "x") -> None: "One."
@app.command()
def two(name: str = "x") -> None: "Two."
app()
"""
RUNS = 9


def startup() -> dict[str, float]:
    """Median seconds of both over interleaved runs, and their ratio."""
    commands = {"bare_typer": ["-c", BARE, "--help"], "safecli": ["-m", "safecli", "--help"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(RUNS):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {**medians, "ratio": medians["safecli"] / medians["bare_typer"]}
