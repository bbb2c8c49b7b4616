"""Plugins from real package metadata: found without an import, clashes, broken ones, unknown names."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from safecli.costs.faiss import FaissCost
from safecli.errors import MissingError, UsageError
from safecli.judges.outcome import OutcomeJudge
from safecli.registry import COSTS, JUDGES, load_plugin, plugins


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(site: Path, package: str, entries: dict[str, str], code: str, group: str = COSTS, asks: str = "") -> None:
    """A package with plugins, as pip leaves it; `asks` is the lines of its metadata that say what it requires."""
    info = site / f"{package}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n{asks}")
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (site / f"{package.replace('-', '_')}.py").write_text(code)


GOOD = "from pydantic import BaseModel\nclass Cost:\n    class Options(BaseModel):\n        k: int = 3\n"


def test_our_own_backends_and_judge_work() -> None:
    assert {plugin.name for plugin in plugins(COSTS)} >= {"token", "sentence", "faiss"}
    assert all(plugin.state() == "ok" for plugin in plugins() if plugin.package == "safecli")
    assert load_plugin(COSTS, "faiss") is FaissCost
    assert load_plugin(JUDGES, "outcome") is OutcomeJudge


def test_a_package_brings_a_plugin_that_is_imported_only_when_used(site: Path) -> None:
    install(site, "far-cost", {"far": "far_cost:Cost"}, GOOD)
    (found,) = [plugin for plugin in plugins(COSTS) if plugin.name == "far"]
    assert (found.package, found.version) == ("far-cost", "1.2")
    assert "far_cost" not in sys.modules
    assert load_plugin(COSTS, "far").Options().k == 3
    assert found.state() == "ok"
    assert "far" not in {plugin.name for plugin in plugins(JUDGES)}


def test_a_clash_names_both_packages(site: Path) -> None:
    install(site, "one-cost", {"same": "one_cost:Cost"}, GOOD)
    install(site, "two-cost", {"same": "two_cost:Cost"}, GOOD)
    with pytest.raises(UsageError, match=r"cost 'same' .*(one-cost 1.2 and two-cost|two-cost 1.2 and one-cost) 1.2"):
        load_plugin(COSTS, "same")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
        ("raise RuntimeError('my fault')\n", "my fault"),
        ("import sys\nsys.exit('bye')\n", "bye"),
        ("class Cost: pass\n", "no Options class"),
        ("", "has no attribute 'Cost'"),
    ],
)
def test_a_broken_plugin_shows_its_error_and_harms_no_other(site: Path, code: str, reason: str) -> None:
    module = f"bad_{len(code)}"
    install(site, module, {"bad": f"{module}:Cost"}, code)
    states = {plugin.name: plugin.state() for plugin in plugins(COSTS)}
    assert states["bad"].startswith("broken: ")
    assert reason in states["bad"]
    assert states["token"] == "ok"
    with pytest.raises(MissingError, match=f"plugin 'bad' of {module.replace('_', '[-_]')} 1.2 is broken"):
        load_plugin(COSTS, "bad")
    assert load_plugin(COSTS, "faiss") is FaissCost


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        (COSTS, "fais", "no cost is called 'fais', did you mean 'faiss'"),
        (JUDGES, "outcomes", "no judge is called 'outcomes', did you mean 'outcome'"),
        (COSTS, "xyz", "valid: faiss, .*mix, sentence, token"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(kind: str, name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load_plugin(kind, name)


def test_the_environment_narrows_what_is_loaded(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "far-cost", {"far": "far_cost:Cost", "away": "far_cost:Cost"}, GOOD)
    monkeypatch.setenv("SAFECLI_PLUGINS", "token, far-cost")
    states = {plugin.name: plugin.state() for plugin in plugins(COSTS)}
    assert states["token"] == states["far"] == states["away"] == "ok"
    assert states["faiss"] == "disabled"
    assert load_plugin(COSTS, "far").Options().k == 3
    with pytest.raises(UsageError, match="cost 'faiss' is left out by SAFECLI_PLUGINS=token, far-cost"):
        load_plugin(COSTS, "faiss")


def test_a_clash_ends_where_the_environment_names_one_package(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "red-cost", {"twin": "red_cost:Cost"}, GOOD)
    install(site, "blue-cost", {"twin": "blue_cost:Cost"}, GOOD.replace("= 3", "= 4"))
    monkeypatch.setenv("SAFECLI_PLUGINS", "blue-cost")
    assert load_plugin(COSTS, "twin").Options().k == 4


def test_a_new_plugin_is_a_package_that_passes_its_own_tests(
    tmp_path: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_cli("plugins", "new", "cost", "my_letters", "--in", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    folder = Path(json.loads(result.stdout)["folder"])
    assert folder == tmp_path / "safecli-cost-my-letters"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["safecli.costs"] == {"my_letters": "safecli_cost_my_letters:MyLettersCost"}
    own = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert own.returncode == 0, own.stdout
    assert "28 passed" in own.stdout


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("judge", "mine"), 2, "'cost' is what can be written"),
        (("cost", "My-Cost"), 2, "small letters"),
        (("cost", "there"), 3, "is there already"),
    ],
)
def test_a_plugin_that_can_not_be_written_says_why(
    tmp_path: Path, run_cli: Callable[..., Result], words: tuple[str, str], code: int, told: str
) -> None:
    (tmp_path / "safecli-cost-there").mkdir()
    result = run_cli("plugins", "new", *words, "--in", tmp_path)
    assert result.exit_code == code
    assert told in result.stderr
