"""How costs are built: one builder for many askers, killed builds, plugins of others, files, and large vocabularies."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from test_registry import install as install_package
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from safecli.artifacts import locked
from safecli.bench.cost import cost as bench_cost
from safecli.bench.cost import made_vocabulary
from safecli.config import CostOptions, ModelOptions
from safecli.costs import DenseCost, SparseCost, Vocabulary
from safecli.costs.build import build_into, load_cost, read_cost, vocabulary_fingerprint
from safecli.costs.faiss import FaissCost
from safecli.costs.file import FileCost
from safecli.costs.token import TokenCost
from safecli.errors import InputError, MissingError, RunError
from safecli.models import LanguageModel
from safecli.registry import COSTS, load_plugin, plugins
from safecli.stages import Reporter
from safecli.stages.cost import plane
from safecli.testing import COST_CHECKS, cost_conformance, vocabulary

wordllama = pytest.importorskip("wordllama")

SLOW = """
import os, time
from pathlib import Path
from pydantic import BaseModel, ConfigDict, Field
from torch import tensor

class Cost:
    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        wait: float = Field(0.0, description="Seconds for each part.")

    def __init__(self, options): self.options = options

    def build(self, vocabulary, say):
        log = Path(os.environ["SLOW_LOG"])
        def read(texts):
            with log.open("a") as stream:
                stream.write(" ".join(texts) + "\\n")
            time.sleep(self.options.wait)
            return tensor([[float(len(text)), float(ord(text[0]))] for text in texts])
        return vocabulary.embedded(read, say, at_once=8)
"""


def tiny() -> LanguageModel:
    """A model of a few numbers over the words of `safecli.testing`."""
    torch.manual_seed(0)
    known = vocabulary()
    config = LlamaConfig(
        vocab_size=known.size, hidden_size=24, num_hidden_layers=1, intermediate_size=8, num_attention_heads=2
    )
    return LanguageModel(LlamaForCausalLM(config), known.tokenizer, ModelOptions(model="tiny"))


def install(site: Path, name: str, code: str, *asks: str) -> None:
    """A package with one cost backend."""
    needs = "".join(f"Requires-Dist: {one}\n" for one in asks)
    install_package(site, f"{name}-cost", {name: f"{name}_cost:Cost"}, code, asks=needs)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, on the path here and in processes that are started."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SAFECLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SLOW_LOG", str(tmp_path / "log"))
    return folder


def build_slow(_: int) -> str:
    return str(load_cost(CostOptions(cost="slow:wait=0.05"), tiny())[1])


def test_eight_processes_that_ask_at_once_build_once(site: Path, tmp_path: Path) -> None:
    install(site, "slow", SLOW)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_builds"])
    with context.Pool(8) as pool:
        folders = pool.map(build_slow, range(8), chunksize=1)
    assert len(set(folders)) == 1
    texts = (tmp_path / "log").read_text().split()
    assert sorted(texts) == sorted({text.strip() for text in vocabulary().texts} - {""})


def test_a_killed_build_leaves_no_lock_and_goes_on_where_it_was(site: Path, tmp_path: Path) -> None:
    install(site, "slow", SLOW)
    log = tmp_path / "log"
    script = "import test_builds as t; t.load_cost(t.CostOptions(cost='slow:wait=0.5'), t.tiny())"
    builder = subprocess.Popen([sys.executable, "-c", script])
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert builder.poll() is None
        time.sleep(0.05)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    (unfinished,) = (tmp_path / "cache" / "costs").iterdir()
    with locked(unfinished / ".lock"):
        kept = len(list((unfinished / "unfinished").glob("*.safetensors")))
    before = log.read_text().splitlines()
    assert kept >= 1
    cost, folder = load_cost(CostOptions(cost="slow:wait=0.5"), tiny())
    after = log.read_text().splitlines()[len(before) :]
    assert folder == unfinished
    assert not (folder / "unfinished").exists()
    assert not {*before[:kept]} & {*after}
    whole, _ = load_cost(CostOptions(cost="slow"), tiny())
    assert torch.equal(cost.rows(torch.arange(5)), whole.rows(torch.arange(5)))


def test_what_a_plugin_raises_is_reported_as_its_own(site: Path) -> None:
    install(site, "bad", SLOW.replace("return vocabulary.embedded", "return 1 / 0 + vocabulary.embedded"))
    with pytest.raises(RunError, match=r"cost 'bad' of bad-cost 1\.2 failed with ZeroDivisionError: .*--debug"):
        load_cost(CostOptions(cost="bad"), tiny())


def test_a_plugins_own_message_stays_as_it_is(site: Path) -> None:
    code = "from safecli.errors import MissingError\n" + SLOW
    install(
        site, "mute", code.replace("return vocabulary", "raise MissingError('start the server'); return vocabulary")
    )
    with pytest.raises(MissingError, match=r"^start the server$"):
        load_cost(CostOptions(cost="mute"), tiny())


def test_a_plugin_for_another_version_is_refused_by_name(site: Path) -> None:
    install(site, "later", SLOW, "safecli<8,>=7", "numpy")
    install(site, "fit", SLOW, "safecli<1,>=0.1", 'safecli>=9; extra == "dev"')
    told = r"plugin 'later' of later-cost 1\.2 is made for safecli<8,>=7, and this is safecli .*--upgrade later-cost"
    with pytest.raises(MissingError, match=told):
        load_plugin(COSTS, "later")
    states = {plugin.name: plugin.state() for plugin in plugins(COSTS)}
    assert states["later"].startswith("broken: plugin 'later'")
    assert states["fit"] == "ok"
    assert "later_cost" not in sys.modules


class WordLlamaCost:
    """The vectors of another project's package, which ships its weights: averages of a language model's embeddings."""

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        size: int = Field(256, description="Numbers to keep: 64, 128 or 256.")

    def __init__(self, options: Options) -> None:
        self.options = options

    def build(self, vocabulary: Vocabulary, say: Callable[[str], None]) -> Tensor:
        inside = Path(wordllama.__file__).parent  # it looks for its tokenizer in the wrong folder by itself
        keep = self.options.size if self.options.size < 256 else None
        model = wordllama.WordLlama.load(cache_dir=inside, disable_download=True, trunc_dim=keep)
        return vocabulary.embedded(model.embed, say)


test_a_package_that_knows_nothing_of_us = cost_conformance(WordLlamaCost)
test_its_options = cost_conformance(WordLlamaCost, size=64)


def test_it_knows_meaning(demo: LanguageModel) -> None:
    known = vocabulary()
    features = torch.nn.functional.normalize(WordLlamaCost(WordLlamaCost.Options()).build(known, print), dim=1)
    king, queen, bread = (features[known.texts.index(word)] for word in ("king", "queen", "bread"))
    assert king @ queen > king @ bread + 0.2


def test_each_text_is_read_once_and_blanks_are_nothing() -> None:
    read: list[str] = []

    def lengths(texts: list[str]) -> np.ndarray:
        read.extend(texts)
        return np.array([[len(text), 1.0] for text in texts])

    known = vocabulary()
    made = known.embedded(lengths, lambda _: None, at_once=5)
    assert sorted(read) == sorted({text.strip() for text in known.texts} - {""})
    assert made.shape == (known.size, 2)
    assert not made[known.meaningless].any()
    assert made[known.texts.index(" king"), 0] == 4


def test_a_file_counts_by_what_it_holds(site: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "features.npy", tiny()
    folders = []
    for seed in (0, 1, 0):
        np.save(path, np.random.default_rng(seed).normal(size=(vocabulary().size, 3)).astype(np.float32))
        folders.append(load_cost(CostOptions(cost="file", cost_opt=[f"path={path}"]), model)[1])
    assert folders[0] == folders[2] != folders[1]


@pytest.mark.parametrize(
    ("name", "ending"), [("token", "npz"), ("faiss:k=3,search=hnsw,links=4,effort=8", "safetensors")]
)
def test_a_cost_goes_out_and_comes_in_the_same(
    run_cli: Callable[..., Result], cache: Path, tmp_path: Path, name: str, ending: str
) -> None:
    file = tmp_path / f"cost.{ending}"
    small = ("--model", "demo", "--json")
    assert run_cli("cost", "export", file, "--cost", name, *small).exit_code == 0
    result = run_cli("cost", "import", file, *small)
    assert result.exit_code == 0, result.stderr
    built = json.loads(run_cli("cost", "build", "--cost", name, *small).stdout)
    first, second = (
        load_file(Path(found["path"]) / "cost.safetensors") for found in (built, json.loads(result.stdout))
    )
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, atol=1e-6, rtol=0)


def sparse() -> dict[str, Tensor]:
    built = FaissCost(FaissCost.Options(k=2)).build(vocabulary(), lambda _: None).symmetric()
    ceiling = torch.tensor(built.ceiling)
    return {"starts": built.starts, "neighbours": built.neighbours, "costs": built.costs, "ceiling": ceiling}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda t: t | {"extra": torch.zeros(1)},
            "extra, neighbours, starts: a cost is features;",
        ),
        (lambda t: t | {"costs": t["costs"] * torch.nan}, "costs holds NaN"),
        (lambda t: t | {"starts": t["starts"][:-1]}, "starts are of"),
        (lambda t: t | {"costs": t["costs"][:-1]}, "don't belong together"),
        (lambda t: t | {"neighbours": t["neighbours"] + 1}, "a neighbour is no token"),
        (lambda t: t | {"costs": t["costs"] - 0.1}, "not between 0 and the ceiling"),
        (lambda t: t | {"costs": t["costs"] * torch.linspace(0.1, 1, len(t["costs"]))}, "not symmetric"),
        (lambda t: t | {"costs": (t["costs"] + 1e-3).clamp(max=float(t["ceiling"]))}, "not at 0 from itself"),
        (lambda t: {"features": torch.ones(3, 4)}, "features are of 3 tokens"),
    ],
)
def test_a_file_that_is_no_cost_says_why(
    tmp_path: Path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], told: str
) -> None:
    path = tmp_path / "cost.safetensors"
    save_file(spoil(sparse()), path)
    with pytest.raises(InputError, match=told):
        FileCost(FileCost.Options(path=path)).build(vocabulary(), lambda _: None)


def test_a_file_for_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cost.safetensors"
    save_file(sparse(), path, metadata={"vocabulary": "0123456789abcdef"})
    with pytest.raises(InputError, match=r"another vocabulary \(0123456789abcdef\) than this model's"):
        FileCost(FileCost.Options(path=path)).build(vocabulary(), lambda _: None)


@pytest.mark.parametrize(
    "name", ["none.safetensors", "none.npz", "none.npy", "text.safetensors", "text.npz", "pickle.npy"]
)
def test_a_file_that_can_not_be_read_says_so(tmp_path: Path, name: str) -> None:
    if name.startswith("text"):
        (tmp_path / name).write_text("not tensors")
    if name.startswith("pickle"):
        np.save(tmp_path / name, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="can't be read as a cost"):
        FileCost(FileCost.Options(path=tmp_path / name)).build(vocabulary(), lambda _: None)


def test_files_conform(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", vocabulary().embeddings.numpy())
    save_file(sparse(), tmp_path / "sparse.safetensors")
    for name in ("features.npy", "sparse.safetensors"):
        for check in COST_CHECKS:
            check(FileCost, {"path": tmp_path / name})


def test_neighbours_from_a_file_are_made_symmetric(tmp_path: Path) -> None:
    found = FaissCost(FaissCost.Options(k=2)).build(vocabulary(), lambda _: None)
    np.savez(tmp_path / "n.npz", indices=found.indices, costs=found.costs, ceiling=found.ceiling)
    read = FileCost(FileCost.Options(path=tmp_path / "n.npz")).build(vocabulary(), lambda _: None)
    ids = torch.arange(vocabulary().size)
    assert torch.equal(read.symmetric().rows(ids), found.symmetric().rows(ids))


def test_the_plane_is_that_of_the_largest_spread() -> None:
    wide = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9, 1, 1, 4, 1.0]) + 5
    first, second = plane(wide).T
    assert abs(np.corrcoef(first, wide[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(second, wide[:, 4])[0, 1]) > 0.99


def test_the_benchmark_has_a_row_for_each_floor(demo: LanguageModel) -> None:
    rows = bench_cost(1200, 8, "cpu", 1, Reporter())
    assert [(row["cost"], row["V"], row["k"]) for row in rows] == [("sentence", 1200, 8), ("faiss", 1200, 8)]
    assert all(row["floor_ratio"] > 0 for row in rows)
    assert all(row["extra_bytes"] >= 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "search"), [(32_000, "exact"), (128_256, "hnsw"), (256_000, "hnsw")])
def test_vocabularies_of_every_size(tmp_path: Path, vocab: int, search: str) -> None:
    large = made_vocabulary(vocab, 16, torch.device("cpu"))
    near: Any = FaissCost(FaissCost.Options(k=8, search=search, links=8, effort=24))
    for name, backend in (("token", TokenCost(TokenCost.Options(transform="whitened"))), ("faiss", near)):
        folder = tmp_path / name
        build_into(folder, backend, large, {"vocabulary": vocabulary_fingerprint(large)}, lambda _: None)
        cost = read_cost(folder, large)
        assert cost.vocab == vocab
        rows = cost.rows(torch.tensor([17, vocab - 1]))
        assert rows.shape == (2, vocab)
        assert rows[0, 17] == rows[1, vocab - 1] == 0
        if isinstance(cost, SparseCost):
            assert 8 * vocab <= len(cost.costs) <= 20 * vocab
        else:
            assert isinstance(cost, DenseCost)
