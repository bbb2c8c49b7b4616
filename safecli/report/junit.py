"""Gates as a JUnit file, which CI services show as tests."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from safecli.artifacts import atomic
from safecli.report.untrusted import visible


def write_junit(results: Mapping[str, Any], path: Path) -> None:
    """Write one test case for each gate and model of an evaluation's results; a gate that failed is a failure."""
    gates = results["gates"]
    failures = sum(gate["failed"] for gate in gates)
    suite = ElementTree.Element("testsuite", name="safecli", tests=str(len(gates)), failures=str(failures))
    for gate in gates:
        model, expression = visible(gate["model"]), visible(gate["expression"])
        case = ElementTree.SubElement(suite, "testcase", classname=f"safecli.{model}", name=expression)
        if gate["failed"]:
            told = f"{expression}: it is {gate['value']:.4g}"
            ElementTree.SubElement(case, "failure", message=told).text = f"{model}: {told}"
    written = io.BytesIO()
    ElementTree.ElementTree(suite).write(written, encoding="utf-8", xml_declaration=True)
    with atomic(path) as beside:
        beside.write_bytes(written.getvalue())
