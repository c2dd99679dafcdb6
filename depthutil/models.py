"""Load causal language models, and find where their blocks write to the residual stream.

:func:`load` takes a name on the Hugging Face hub, a folder, or one of the small models that
come with the book (:func:`available`). :func:`anatomy` says where a model's blocks,
sublayers, norms and head are; ``depthutil.trajectory`` records through it. :func:`batches`
turns texts into what both read. Needs the ``models`` extra.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from depthutil import _corpus, archive

#: For each ``model_type``, where in the backbone the blocks are, which two modules of a block
#: write to the stream, and where the final norm is.
FAMILIES = {
    "gpt2": ("h", "attn", "mlp", "ln_f"),
    "gpt_neox": ("layers", "attention", "mlp", "final_layer_norm"),
    "opt": ("decoder.layers", "self_attn", "fc2", "decoder.final_layer_norm"),
    "phi": ("layers", "self_attn", "mlp", "final_layernorm"),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3"),
        ("layers", "self_attn", "mlp", "norm"),
    ),
    # These normalise a sublayer's output once more before they add it to the stream.
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "olmo2"),
        ("layers", "post_attention_layernorm", "post_feedforward_layernorm", "norm"),
    ),
}

_PARTS = 0.4  # of a GPU's memory that weights may take in float32


class Loaded(NamedTuple):
    """A language model in evaluation mode and its tokenizer; unpacks like a pair."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Anatomy:
    """Where a model's blocks read and write.

    Attributes
    ----------
    family : str
        The ``model_type`` of the configuration.
    backbone : torch.nn.Module
        The model without its head.
    blocks : tuple of torch.nn.Module
        In the order in which they run.
    attention, mlp : tuple of torch.nn.Module, or None
        For each block, the module whose output is added to the stream; None in
        an architecture whose sublayers :data:`FAMILIES` does not name.
    norm : torch.nn.Module
        The norm after the last block.
    embedding, head : torch.nn.Module or None
        Token embedding and map to logits; no head in a bare backbone.
    parallel : bool
        Whether attention and MLP read the same stream, and not one after the other.
    softcap : float or None
        Logits are ``softcap · tanh(logits / softcap)``, where given (Gemma 2).
    """

    family: str
    backbone: nn.Module
    blocks: tuple[nn.Module, ...]
    attention: tuple[nn.Module, ...] | None
    mlp: tuple[nn.Module, ...] | None
    norm: nn.Module
    embedding: nn.Module | None
    head: nn.Module | None
    parallel: bool
    softcap: float | None

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def logits(self, states: Tensor) -> Tensor:
        """What the final norm and the head make of states ``(…, width)``, in float32 or better."""
        if self.head is None:
            raise ValueError(
                f"this {self.family} model has no head: load the causal language model, not the "
                "bare backbone"
            )
        states, weight = self.norm(states), self.head.weight
        # Weights that a device_map keeps on disk are on no device until they are used.
        logits = self.head(states if weight.is_meta else states.to(weight.device))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def anatomy(model: nn.Module) -> Anatomy:
    """Find a causal language model's blocks, sublayers, norms, embedding and head.

    Known by name are the families of :data:`FAMILIES`. Of any other decoder, the blocks are
    its only list of as many equal modules as it has layers; its sublayers stay unknown.

    Parameters
    ----------
    model : torch.nn.Module
        A Hugging Face causal language model, or its backbone.

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
    >>> parts.depth, type(parts.norm).__name__, parts.parallel
    (3, 'LayerNorm', False)
    """
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
    backbone = model.base_model
    if family in FAMILIES:
        blocks_at, attention_at, mlp_at, norm_at = FAMILIES[family]
        blocks = tuple(backbone.get_submodule(blocks_at))
        norm = backbone.get_submodule(norm_at)
        attention = tuple(block.get_submodule(attention_at) for block in blocks)
        mlp = tuple(block.get_submodule(mlp_at) for block in blocks)
    else:
        blocks, norm = _generic(backbone, config, _kind(model), family)
        attention = mlp = None
    head = None if model is backbone else model.get_output_embeddings()
    return Anatomy(
        family=family,
        backbone=backbone,
        blocks=blocks,
        attention=attention,
        mlp=mlp,
        norm=norm,
        embedding=model.get_input_embeddings(),
        head=head,
        parallel=family == "phi"
        or (family == "gpt_neox" and bool(getattr(config, "use_parallel_residual", True))),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _kind(model: Any) -> str:
    return type(model).__name__


def _generic(backbone: nn.Module, config: Any, kind: str, family: str):
    """Blocks and final norm of an architecture that is not in the table."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    found = [
        (name, tuple(module))
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len({type(block) for block in module}) == 1
    ]
    # Lists inside a block (experts) are no candidates.
    found = [f for f in found if not any(f[0].startswith(g[0] + ".") for g in found)]
    if len(found) == 1:
        name, blocks = found[0]
        parent = backbone.get_submodule(name.rpartition(".")[0])
        norms = [m for m in parent.children() if is_norm(m)]
        if norms:
            return blocks, norms[-1]
    raise ValueError(
        f"no list of blocks with a norm after it was found in {kind} ({family}): the families "
        f"that are known are {', '.join(FAMILIES)}"
    )


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
        If the hub has no such model, or arguments contradict each other.
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
            model = transformers.AutoModelForCausalLM.from_pretrained(
                where, config=config, device_map=device_map, **{_dtype_word(): dtype}, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        except OSError as error:
            if folder is not None or not options["local_files_only"]:
                raise
            raise FileNotFoundError(_offline(where)) from error
    return Loaded((model if device_map is not None else model.to(device)).eval(), tokenizer)


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
    if count < 1:
        raise ValueError(f"count is at least 1, not {count!r}")
    if source is None:
        source = HELD_OUT if str(model) in available() else "HuggingFaceFW/fineweb"
    if source == HELD_OUT:
        return _held_out(count, length)
    return _streamed(source, count)


def _held_out(count: int, length: int) -> list[str]:
    documents = len(_corpus.held_out())
    pieces = _corpus.held_out(length=length, per_document=-(-count // documents))
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

    Examples
    --------
    >>> def letters(text):
    ...     return {"input_ids": [ord(letter) for letter in text]}
    >>> batches(letters, ["to be", "or", "?"], size=2)[0]["attention_mask"]
    tensor([[1, 1, 1, 1, 1],
            [1, 1, 0, 0, 0]])
    """
    if isinstance(texts, str):
        raise TypeError("texts is a list of texts: write [text] for one")
    if length < 2 or size < 1:
        raise ValueError(f"length is at least 2 and size at least 1, not {length} and {size}")
    rows = [list(tokenizer(text)["input_ids"])[:length] for text in texts]
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
