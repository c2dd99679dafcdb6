"""Load causal language models, and find where their blocks write to the residual stream.

:func:`load` takes a name on the Hugging Face hub, a folder, or one of the small models that
come with the book (:func:`available`). :func:`anatomy` says where a model's blocks,
sublayers, norms and head are; ``depthutil.trajectory`` records through it. :func:`batches`
turns texts into what both read. Needs the ``models`` extra.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from depthutil import _checks, archive, corpus

#: For each ``model_type`` that is known by name, where in the backbone its blocks and its
#: final norm are, and in a block, attention and MLP, and the two modules whose outputs are added to
#: the stream. Of all others, ``stream.measured`` finds what writes.
FAMILIES = {
    "gpt2": ("h", "attn", "mlp", "attn", "mlp", "ln_f"),
    "gpt_neox": ("layers", "attention", "mlp", "attention", "mlp", "final_layer_norm"),
    # Two bare linear maps among the rest of the block make up its MLP, which is no module.
    "opt": ("layers", "self_attn", None, "self_attn", "fc2", "final_layer_norm"),
    "phi": ("layers", "self_attn", "mlp", "self_attn", "mlp", "final_layernorm"),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3"),
        ("layers", "self_attn", "mlp", "self_attn", "mlp", "norm"),
    ),
    # These normalise a sublayer's output once more before they add it to the stream.
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "olmo2"),
        (
            "layers",
            "self_attn",
            "mlp",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
            "norm",
        ),
    ),
}

_PARTS = 0.4  # of a GPU's memory that weights may take in float32


class Loaded(NamedTuple):
    """A language model in evaluation mode and its tokenizer; unpacks like a pair."""

    model: Any
    tokenizer: Any


class Write(NamedTuple):
    """A module whose output is added to the stream.

    Attributes
    ----------
    module : torch.nn.Module
    scale : float
        What its output is multiplied with before (Granite's ``residual_multiplier``).
    """

    module: nn.Module
    scale: float = 1.0


@dataclass(frozen=True)
class Anatomy:
    """Where a model's blocks read and write.

    :func:`anatomy` fills it in by names. What names do not say is None until
    :func:`depthutil.stream.measured` has found it on a batch.

    Attributes
    ----------
    family : str
        The ``model_type`` of the configuration.
    backbone : torch.nn.Module
        The model without its head.
    container : torch.nn.ModuleList
        What holds the blocks, to swap, drop or repeat them.
    blocks : tuple of torch.nn.Module
        In the order in which they run.
    attention, mlp : tuple of torch.nn.Module, or None
        For each block, the modules that compute; None where it is not known, or no one module
        does (OPT's MLP). In a hybrid, ``attention`` is whatever mixes positions.
    writes : tuple of tuple of Write, or None
        For each block, the modules whose outputs are added to the stream: attention's and
        the MLP's, or only one where a block has one.
    norm : torch.nn.Module or None
        The norm after the last block.
    embedding, head : torch.nn.Module or None
        Token embedding and map to logits; no head in a bare backbone.
    parallel : bool or None
        Whether attention and MLP read the same stream, and not one after the other.
    scale : float
        Logits are ``scale`` times what the head returns (Cohere, Granite).
    softcap : float or None
        Logits are then ``softcap · tanh(logits / softcap)``, where given (Gemma 2).
    """

    family: str
    backbone: nn.Module
    container: nn.Module
    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...] | None
    mlp: tuple[nn.Module, ...] | None
    writes: tuple[tuple[Write, ...], ...] | None
    norm: nn.Module | None
    embedding: nn.Module | None
    head: nn.Module | None
    parallel: bool | None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Size of the stream, as the configuration or else the embedding says."""
        size = getattr(_text_config(self.backbone.config), "hidden_size", None)
        return int(self.embedding.weight.shape[1] if size is None else size)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, as the configuration or else the embedding says."""
        size = getattr(_text_config(self.backbone.config), "vocab_size", None)
        return int(self.embedding.weight.shape[0] if size is None else size)

    @property
    def tokens(self) -> int:
        """How many token ids the embedding has room for."""
        weight = getattr(self.embedding, "weight", None)
        return self.vocabulary if weight is None else int(weight.shape[0])

    @property
    def positions(self) -> int | None:
        """How many positions the model was made for; None where there is no limit."""
        config = _text_config(self.backbone.config)
        room = getattr(config, "max_position_embeddings", None)
        # Rotary frequencies that follow the length of the text have no limit.
        rope = getattr(config, "rope_scaling", None) or {}
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic":
            return None
        return room if isinstance(room, int) and room > 0 else None

    @property
    def sublayers(self) -> bool:
        """Whether it is known of every block where attention and MLP write."""
        return self.writes is not None and all(len(writes) == 2 for writes in self.writes)

    @property
    def attention_write(self) -> tuple[nn.Module, ...] | None:
        """For each block, the module whose output is what attention adds to the stream."""
        return tuple(w[0].module for w in self.writes) if self.sublayers else None

    @property
    def mlp_write(self) -> tuple[nn.Module, ...] | None:
        """For each block, the module whose output is what the MLP adds to the stream."""
        return tuple(w[1].module for w in self.writes) if self.sublayers else None

    def logits(self, states: Tensor) -> Tensor:
        """What the final norm and the head make of states ``(…, width)``, in float32 or better."""
        if self.head is None:
            raise ValueError(
                f"this {self.family} model has no head: load the causal language model, not the "
                "bare backbone"
            )
        states = states if self.norm is None else self.norm(states)
        weight = next(self.head.parameters())
        # Weights that a device_map keeps on disk are on no device until they are used.
        logits = self.head(states if weight.is_meta else states.to(weight.device))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if self.scale == 1 else self.scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def anatomy(model: nn.Module) -> Anatomy:
    """Find a causal language model's blocks, sublayers, norms, embedding and head, by names.

    Of the families of :data:`FAMILIES` everything is known. Of any other decoder, the blocks are
    its only list of as many modules as it has layers; what its sublayers are is measured when
    it is recorded.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model, or its backbone. Of a model that also sees or
        hears, its text decoder is taken; of one with adapters, the model inside.

    Returns
    -------
    Anatomy

    Raises
    ------
    ValueError
        If blocks do not add to the stream (an encoder, the post-norm ``opt-350m``) or cannot
        be found; the message names the architecture.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> parts = anatomy(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2)))
    >>> parts.depth, parts.width, type(parts.norm).__name__, parts.parallel
    (3, 4, 'LayerNorm', False)
    """
    model = _unwrapped(model)
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or family is None:
        raise TypeError(f"model is a Hugging Face causal language model, not a {_kind(model)}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{_kind(model)} ({family}) has an encoder: only decoders have one stream")
    if family == "opt" and not config.do_layer_norm_before:
        raise ValueError(
            f"{_kind(model)} with do_layer_norm_before=False (opt-350m) normalises the stream "
            "itself after every write, so that its states are no sums of writes: take another size"
        )
    backbone = _decoder(model)
    family = getattr(getattr(backbone, "config", None), "model_type", family)
    attention = mlp = writes = parallel = None
    if family in FAMILIES:
        blocks_at, attention_at, mlp_at, *writes_at, norm_at = FAMILIES[family]
        container = backbone.get_submodule(blocks_at)
        norm = backbone.get_submodule(norm_at)
        attention, mlp = (
            None if at is None else tuple(block.get_submodule(at) for block in container)
            for at in (attention_at, mlp_at)
        )
        writes = tuple(
            tuple(Write(block.get_submodule(at)) for at in writes_at) for block in container
        )
        parallel = family == "phi" or (
            family == "gpt_neox" and bool(getattr(config, "use_parallel_residual", True))
        )
    else:
        container, norm = _generic(backbone, _kind(model), family)
    return Anatomy(
        family=family,
        backbone=backbone,
        container=container,
        blocks=tuple(container),
        attention=attention,
        mlp=mlp,
        writes=writes,
        norm=norm,
        embedding=model.get_input_embeddings(),
        head=_head(model, backbone),
        parallel=parallel,
        softcap=getattr(_text_config(config), "final_logit_softcapping", None),
    )


def _kind(model: Any) -> str:
    return type(model).__name__


def _text_config(config: Any) -> Any:
    """Of a model that also sees or hears, the configuration of what reads text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _unwrapped(model: Any) -> Any:
    """The model inside a wrapper of adapters (PEFT), which act on it in its place."""
    if not hasattr(model, "get_base_model"):
        return model
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        raise ValueError(
            f"{_kind(model)} puts learned positions before the tokens (prompt tuning), so that "
            "states are not those of the tokens: record model.get_base_model() without them"
        )
    return model.get_base_model()


def _decoder(model: Any) -> nn.Module:
    """The part that reads text, without the head."""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):  # it has none, or names a part that it lacks
        decoder = None
    if isinstance(decoder, nn.Module) and decoder is not model and hasattr(decoder, "config"):
        return decoder
    if model.base_model is not model:
        return model.base_model
    # Some classes name their base model wrongly: it is the only model inside.
    inside = [m for m in model.children() if hasattr(m, "config") and hasattr(m, "base_model")]
    return inside[0] if len(inside) == 1 else model


def _head(model: Any, backbone: nn.Module) -> nn.Module | None:
    """The map to logits: by the model's own word, else its only map to the vocabulary."""
    if model is backbone:
        return None
    head = model.get_output_embeddings()
    if head is None:
        inside = set(backbone.modules())
        size = getattr(_text_config(model.config), "vocab_size", None)
        maps = [
            module
            for module in model.modules()
            if module not in inside and getattr(module, "out_features", None) == size
        ]
        head = maps[0] if len(maps) == 1 else None
    return head


def _generic(backbone: nn.Module, kind: str, family: str) -> tuple[nn.Module, nn.Module | None]:
    """Blocks and final norm of an architecture that is not in the table."""
    depth = getattr(_text_config(backbone.config), "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and depth
    ]
    # Lists inside a block (experts) are no candidates.
    found = [f for f in found if not any(f[0].startswith(g[0] + ".") for g in found)]
    if len(found) != 1:
        what = "no list" if not found else f"{len(found)} lists ({', '.join(n for n, _ in found)})"
        raise ValueError(
            f"{what} of {depth} blocks found in {kind} ({family}), where one is needed: if a "
            "causal language model is inside (model.language_model), pass that"
        )
    name, container = found[0]
    siblings = list(backbone.get_submodule(name.rpartition(".")[0]).children())
    norms = [module for module in siblings if is_norm(module)]
    after = [module for module in siblings[siblings.index(container) :] if is_norm(module)]
    return container, (after or norms[::-1] or [None])[0]


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by the name of its class."""
    return "norm" in type(module).__name__.lower()


# Loading --------------------------------------------------------------------------------


def available() -> list[str]:
    """Names of the models that come with the book and need no network.

    Examples
    --------
    >>> all(isinstance(name, str) for name in available())
    True
    """
    try:
        folder = archive.find("models")
    except FileNotFoundError:
        return []
    return sorted(config.parent.name for config in folder.glob("*/config.json"))


def load(
    name_or_path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    revision: str | None = None,
) -> Loaded:
    """Load a causal language model and its tokenizer, from here or from the hub.

    Parameters
    ----------
    name_or_path : str or path
        A name from :func:`available`, a folder, or a name on the Hugging Face hub such as
        ``"EleutherAI/pythia-410m"``. Offline, the hub's local cache is used.
    device : str or torch.device, optional
        By default the GPU, where there is one.
    dtype : str or torch.dtype, optional
        Precision of the weights. By default float32 on a CPU, and on a GPU whose memory holds
        that 2.5 times over; beyond, bfloat16 where the GPU has it, float16 elsewhere. Products
        of recorded writes are taken in double precision in any case, but what a 16-bit model
        writes has 3 (bfloat16: 2) digits to begin with.
    device_map : str or dict, optional
        As in ``transformers``: ``"auto"`` spreads a model over all devices. Needs
        ``accelerate``. The precision then defaults to 16 bits.
    revision : str, optional
        Branch, tag or commit on the hub.

    Returns
    -------
    Loaded
        ``model, tokenizer``.

    Raises
    ------
    FileNotFoundError
        If the model is not on this machine and the hub cannot be reached; the message
        names the models that need no network.
    ValueError
        If the hub has no such model, files are damaged or lack weights (which would be random),
        the model brings code of its own, or arguments contradict each other.
    ImportError
        If ``transformers`` (or, for ``device_map``, ``accelerate``) is not installed.

    Examples
    --------
    >>> model, tokenizer = load("EleutherAI/pythia-410m")  # doctest: +SKIP
    """
    transformers = _transformers()
    if device_map is not None and device is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r}: give one of the two")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            f"device_map={device_map!r} needs accelerate: pip install accelerate, or give device="
        )
    dtype = _as_dtype(dtype)
    folder = _folder(name_or_path)
    where = str(name_or_path) if folder is None else str(folder)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    options["local_files_only"] = folder is not None or not _hub_has(where, revision)
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(where, **options)
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            dtype = dtype or _default_dtype(config, device, spread=device_map is not None)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                device_map=device_map,
                output_loading_info=True,
                **{_dtype_word(): dtype},
                **options,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        except MemoryError:
            raise
        except Exception as error:
            if folder is None and options["local_files_only"] and isinstance(error, OSError):
                raise FileNotFoundError(_offline(where)) from error
            raise _why_not(where, folder, error) from error
    _check_weights(where, info)
    return Loaded((model if device_map is not None else model.to(device)).eval(), tokenizer)


def _check_weights(where: str, info: dict[str, Any]) -> None:
    """Refuse a model some of whose weights were not in its files, and so are random."""
    missing, more = (sorted(info.get(key) or ()) for key in ("missing_keys", "unexpected_keys"))
    if not missing:
        return
    wrapped = next((m for m in more if any(m.endswith("." + name) for name in missing)), None)
    way = (
        f"its names begin with something that is not the model's ({wrapped}): rename them, or save "
        "the model from inside its wrapper"
        if wrapped is not None
        else "fetch it again, or load the class that it was saved as"
    )
    raise ValueError(
        f"{where} lacks {len(missing):,} weights of the model, such as {missing[0]}, which would "
        f"be random numbers: {way}"
    )


def _why_not(where: str, folder: Path | None, error: Exception) -> Exception:
    """What went wrong, in a sentence that names the model and the way out."""
    said = " ".join(str(error).split())
    if "trust_remote_code" in said or "custom code" in said:
        return ValueError(
            f"{where} brings code of its own, which depthutil does not run: read it, load the "
            "model with transformers' from_pretrained(..., trust_remote_code=True), and pass the "
            "model to trajectory.record"
        )
    if folder is not None:
        for path in _damaged(folder):
            return ValueError(f"{path} is damaged or not whole: fetch it again ({said[:120]})")
        if (folder / "adapter_config.json").is_file() and not any(folder.glob("*.safetensors")):
            return ValueError(f"{folder} holds adapters only: load their base model, and add them")
    return ValueError(f"{where} could not be loaded: {type(error).__name__}: {said[:300]}")


def _damaged(folder: Path) -> Iterator[Path]:
    """Files of a model that cannot be read to their end."""
    for path in sorted(folder.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(path, "pt") as file:
                    list(file.keys())
            elif path.suffix == ".bin":
                torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except Exception:
            yield path


def _transformers() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # In a notebook without ipywidgets tqdm says that its bars will be plain ones.
            warnings.filterwarnings("ignore", message="IProgress not found")
            import transformers
    except ImportError as error:
        raise ImportError(
            "language models need transformers: pip install 'depthutil[models]'"
        ) from error
    return transformers


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is such as 'float32' or torch.bfloat16, not {dtype!r}")
    return dtype


def _folder(name_or_path: str | os.PathLike) -> Path | None:
    """The folder that is meant, or None for a name on the hub."""
    path = Path(name_or_path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
    elif str(name_or_path) in available():
        return archive.find(f"models/{name_or_path}")
    elif isinstance(name_or_path, str) and len(path.parts) <= 2 and not path.is_absolute():
        return None
    raise FileNotFoundError(f"{path} holds no model: there is no {path / 'config.json'}")


def _hub_has(name: str, revision: str | None, kind: str = "model") -> bool:
    """Whether the hub can be reached; asked once, because transformers would ask for minutes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=5)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a folder nor a name on the hub") from error
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403, 404):
            raise ValueError(
                f"the hub has no {kind} {name!r} (revision {revision or 'main'}), or asks you to "
                "log in and accept its terms first: huggingface-cli login"
            ) from error
        return False
    except Exception:  # no network shows as one of many exceptions of the HTTP library
        return False
    return True


def _offline(name: str) -> str:
    names = available()
    here = ", ".join(names) if names else "no models yet (make ladder trains them)"
    return (
        f"{name!r} is not on this machine, and the Hugging Face hub cannot be reached: "
        f"available offline are {here}"
    )


def _dtype_word() -> str:
    """The name of the argument that says the precision, which changed in transformers 4.56."""
    major, minor = (int(part) for part in _transformers().__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _default_dtype(config: Any, device: torch.device, spread: bool) -> torch.dtype:
    """float32 where that fits, else the better 16 bits of the GPU."""
    if device.type != "cuda":
        return torch.float32
    if not spread:
        memory = torch.cuda.get_device_properties(device).total_memory
        if 4 * _parameters(config) <= _PARTS * memory:
            return torch.float32
    # A T4 only imitates bfloat16, slowly; hardware has it from compute capability 8.
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def _parameters(config: Any) -> int:
    """How many parameters a model of this configuration has; none is allocated."""
    with torch.device("meta"):
        model = _transformers().AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _quiet(transformers: ModuleType):
    """No progress bars of loading, whose place is not in a chapter."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# Text -----------------------------------------------------------------------------------

HELD_OUT = "held-out"
#: The part of a data set that is streamed, where the whole is too large to be listed.
SUBSETS = {"HuggingFaceFW/fineweb": "sample-10BT"}


def texts(
    model: str | os.PathLike, count: int = 128, *, source: str | None = None, length: int = 128
) -> list[str]:
    """Texts to record a model on.

    Parameters
    ----------
    model : str or path
        As :func:`load` takes it. It decides where texts are from if ``source`` does not.
    count : int
        How many; fewer where there are no more.
    source : str, optional
        ``"held-out"``: text that the book's models have not seen, from Python's own library,
        cut to pieces (``ladder.held_out``). Or a folder of text files, or a data set with a
        column ``text`` on the Hugging Face hub, which is streamed. By default
        ``"held-out"`` for the models of :func:`available`, and for others the web pages of
        ``"HuggingFaceFW/fineweb"``, as in arXiv 2602.05970, appendix A.
    length : int
        Longest piece of held-out text, in tokens of the book's models. Pieces are taken evenly
        from all documents; those of one document are not quite independent. Other
        sources give whole documents, which :func:`batches` cuts.

    Returns
    -------
    list of str

    Raises
    ------
    ConnectionError
        If the hub cannot be reached.
    ImportError
        If a data set is asked for and ``datasets`` is not installed.
    ValueError
        If the data set does not exist or has no column ``text``, or a number is too small.

    Examples
    --------
    >>> [len(text) for text in texts("ladder-w64-d16-s0", 2, source="held-out", length=64)]
    [63, 63]
    """
    count, length = _checks.count(count, "count"), _checks.count(length, "length")
    if source is None:
        source = HELD_OUT if str(model) in available() else "HuggingFaceFW/fineweb"
    if source == HELD_OUT:
        return _held_out(count, length)
    return _streamed(source, count)


def _held_out(count: int, length: int) -> list[str]:
    documents = len(corpus.held_out())
    pieces = corpus.held_out(length=length, per_document=-(-count // documents))
    step = max(len(pieces) / count, 1)
    return [pieces[int(i * step)] for i in range(min(count, len(pieces)))]


def _streamed(source: str, count: int) -> list[str]:
    """The first documents of a data set, without what comes after them."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"texts of {source!r} are streamed with datasets: pip install datasets, or take "
            f"source={HELD_OUT!r}"
        ) from error
    local = Path(source).is_dir()
    if local and not any(Path(source).iterdir()):
        raise ValueError(f"the folder {source} is empty: put text files there")
    if not local and not _hub_has(source, None, kind="dataset"):
        raise ConnectionError(
            f"the Hugging Face hub cannot be reached, so that {source!r} cannot be streamed: "
            f"source={HELD_OUT!r} needs no network"
        )
    options = {"sample_by": "document"} if local else {"name": SUBSETS.get(source)}
    stream = datasets.load_dataset(source, split="train", streaming=True, **options)
    result = []
    for row in stream.take(count):
        if "text" not in row:
            raise ValueError(f"{source!r} has no column 'text', but {sorted(row)}")
        result.append(row["text"])
    return result


def batches(
    tokenizer: Any, texts: Iterable[str], *, length: int = 1024, size: int = 8
) -> list[dict[str, Tensor]]:
    """Texts as batches of tokens, one document a row, cut at ``length`` tokens.

    Rows are filled up at their end, which a causal model cannot see. Texts of fewer than two
    tokens are left out: nothing follows their first.

    Parameters
    ----------
    tokenizer : callable
        A Hugging Face tokenizer, or anything that returns ``input_ids`` for a text.
    texts : iterable of str
    length : int
        Tokens at which documents are cut (1,024 in arXiv 2602.05970, appendix A).
    size : int
        Documents a batch.

    Returns
    -------
    list of dict
        ``input_ids`` and ``attention_mask``, both ``(documents, longest document)``.

    Raises
    ------
    ValueError
        If no text has two tokens.
    TypeError
        If ``texts`` is a text, a table or tokens, or holds something else than texts.

    Examples
    --------
    >>> def letters(text):
    ...     return {"input_ids": [ord(letter) for letter in text]}
    >>> batches(letters, ["to be", "or", "?"], size=2)[0]["attention_mask"]
    tensor([[1, 1, 1, 1, 1],
            [1, 1, 0, 0, 0]])
    """
    if isinstance(texts, str | bytes):
        raise TypeError("texts is a list of texts: write [text] for one")
    if isinstance(texts, Mapping) or hasattr(texts, "columns") or hasattr(texts, "input_ids"):
        names = [repr(name) for name in (texts if isinstance(texts, Iterable) else ())]
        raise TypeError(
            f"texts is a list of texts, not a {_kind(texts)} of {', '.join(names)}: pass the "
            "column that holds them, such as table['text'] (tokens need no batches)"
        )
    length, size = _checks.count(length, "length", low=2), _checks.count(size, "size")
    rows = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {number} is a {_kind(text)} and no text: {str(text)[:40]!r}")
        rows.append(list(tokenizer(text)["input_ids"])[:length])
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError("none of the texts has two tokens: there is nothing to predict")
    result = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = max(map(len, part))
        ids = torch.zeros((len(part), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        result.append({"input_ids": ids, "attention_mask": mask})
    return result
