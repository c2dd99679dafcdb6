"""Load causal language models, and give them texts.

:func:`load` takes a name on the Hugging Face hub, a folder, or one of the small models that
come with the book (:func:`available`). :func:`texts` finds texts to read, and :func:`batches`
turns them into what ``depthutil.trajectory`` and ``depthutil.stream`` take; there is also
:func:`depthutil.stream.anatomy`, which says where a model's blocks are. Needs the ``models``
extra.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from depthutil import _checks, archive, corpus
from depthutil.gguf_file import PACKAGED, converted

# Their former place, for notebooks that import them from here.
from depthutil.stream import FAMILIES as FAMILIES
from depthutil.stream import Anatomy as Anatomy
from depthutil.stream import Write as Write
from depthutil.stream import anatomy as anatomy
from depthutil.stream import is_norm as is_norm

_PARTS = 0.4  # of a GPU's memory that weights may take in float32


class Loaded(NamedTuple):
    """A language model in evaluation mode and its tokenizer; unpacks like a pair."""

    model: Any
    tokenizer: Any


# Loading --------------------------------------------------------------------------------


def available() -> list[str]:
    """Names of the models that are here and need no network.

    They are the depth ladder's, and those of ``gguf_file.PACKAGED`` whose wheel is installed.

    Examples
    --------
    >>> all(isinstance(name, str) for name in available())
    True
    """
    packaged = [name for name, model in PACKAGED.items() if model.path is not None]
    return sorted([*_trained_here(), *packaged])


def _trained_here() -> list[str]:
    """The models of this project."""
    try:
        folder = archive.find("models")
    except FileNotFoundError:
        return []
    return [config.parent.name for config in folder.glob("*/config.json")]


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
        A name from :func:`available`, a folder, a GGUF file, or a name on the Hugging Face hub
        such as ``"EleutherAI/pythia-410m"``. Offline, the hub's local cache is used. A GGUF file
        is converted at its first use and kept: :func:`depthutil.gguf_file.converted`.
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
        names the models that need no network. Or if its wheel is not installed; the message
        says how to.
    ValueError
        If the hub has no such model, files are damaged or lack weights (which would be random),
        the model brings code of its own, or arguments contradict each other.
    ImportError
        If ``transformers`` (or, for ``device_map``, ``accelerate``, and for a GGUF file both
        that and ``gguf``) is not installed.

    Examples
    --------
    >>> model, tokenizer = load("EleutherAI/pythia-410m")  # doctest: +SKIP
    """
    transformers = library()
    if device_map is not None and device is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r}: give one of the two")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            f"device_map={device_map!r} needs accelerate: pip install accelerate, or give device="
        )
    dtype = _as_dtype(dtype)
    with _quiet(transformers):
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
    if str(name_or_path) in available():
        model.config.name_or_path = str(name_or_path)  # and not the folder that it is kept in
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


def library() -> ModuleType:
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
    elif str(name_or_path) in PACKAGED:
        packaged = PACKAGED[str(name_or_path)]
        return converted(packaged.located(), packaged.name)
    elif path.suffix == ".gguf":
        if path.is_file():
            return converted(path)
        raise FileNotFoundError(f"there is no file {path}")
    elif str(name_or_path) in _trained_here():
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
    more = [model.install for name, model in PACKAGED.items() if name not in names]
    return (
        f"{name!r} is not on this machine, and the Hugging Face hub cannot be reached: "
        f"available offline are {here}" + "".join(f"; {line} brings another" for line in more)
    )


def _dtype_word() -> str:
    """The name of the argument that says the precision, which changed in transformers 4.56."""
    major, minor = (int(part) for part in library().__version__.split(".")[:2])
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
        model = library().AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
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

HELD_OUT, PROSE = "held-out", "prose"
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
        cut to pieces (:func:`depthutil.corpus.held_out`). ``"prose"``: English that every
        Python carries, whole documents (:func:`depthutil.corpus.prose`). A folder of text
        files. Or a data set with a column ``text`` on the Hugging Face hub, which is streamed.
        By default ``"held-out"`` for the models of this project, ``"prose"`` for those of
        ``gguf_file.PACKAGED``, and for others the web pages of ``"HuggingFaceFW/fineweb"``, as
        in arXiv 2602.05970, appendix A.
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
        source = HELD_OUT if str(model) in _trained_here() else "HuggingFaceFW/fineweb"
        source = PROSE if str(model) in PACKAGED else source
    if source == HELD_OUT:
        return _held_out(count, length)
    found = corpus.prose() if source == PROSE else corpus.files(source)
    if found:
        return [document.text for document in found[:count]]
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
            f"source={PROSE!r} or {HELD_OUT!r}"
        ) from error
    local = Path(source).is_dir()
    if local and not any(Path(source).iterdir()):
        raise ValueError(f"the folder {source} is empty: put text files there")
    if not local and not _hub_has(source, None, kind="dataset"):
        raise ConnectionError(
            f"the Hugging Face hub cannot be reached, so that {source!r} cannot be streamed: "
            f"source={PROSE!r} and source={HELD_OUT!r} need no network"
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
            f"texts is a list of texts, not a {type(texts).__name__} of {', '.join(names)}: pass "
            "the column that holds them, such as table['text'] (tokens need no batches)"
        )
    length, size = _checks.count(length, "length", low=2), _checks.count(size, "size")
    rows = []
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"text {number} is a {type(text).__name__} and no text: {str(text)[:40]!r}"
            )
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


@torch.no_grad()
def losses(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> np.ndarray:
    """Cross-entropy of the next token, a mean for each document.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    batches : iterable of dict
        As :func:`batches` makes them.

    Returns
    -------
    numpy.ndarray
        Nats per token, ``(documents,)``.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=2))
    >>> ids = torch.ones(2, 5, dtype=torch.long)
    >>> losses(model, [{"input_ids": ids, "attention_mask": ids}]).shape
    (2,)
    """
    found = []
    for batch in batches:
        batch = {name: values.to(model.device) for name, values in batch.items()}
        hidden = batch["attention_mask"][:, 1:] == 0
        goal = batch["input_ids"][:, 1:].masked_fill(hidden, -100)
        logits = model(**batch, use_cache=False).logits[:, :-1].float().transpose(1, 2)
        each = torch.nn.functional.cross_entropy(logits, goal, reduction="none")
        found.append(each.sum(1) / (goal >= 0).sum(1))
    return torch.cat(found).double().cpu().numpy()


@torch.no_grad()
def pair_losses(model: Any, other: Any, batches: Iterable[Mapping[str, Tensor]]) -> pd.DataFrame:
    """What two models lose, and what they would gain by answering together.

    With the mean of their logits, a pair loses less than its members do in the mean by
    ``G = −log Σᵢ √(pᵢ qᵢ)``, whatever comes next (Heskes, Neural Computation 10, 1998). Of two
    trainings of one kind ``2 G`` is about the variance of their loss: what the average of very
    many would gain.

    Parameters
    ----------
    model, other : transformers.PreTrainedModel
        Of one vocabulary.
    batches : iterable of dict
        As :func:`batches` makes them.

    Returns
    -------
    pandas.DataFrame
        A row for each document: ``loss`` (the mean of both) and ``gain``, in nats per token, and
        ``tokens``, how many were predicted.

    Raises
    ------
    ValueError
        If their vocabularies differ in size.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=2)).eval()
    >>> ids = torch.ones(2, 5, dtype=torch.long)
    >>> pair = pair_losses(model, model, [{"input_ids": ids, "attention_mask": ids}])
    >>> bool((pair["gain"].abs() < 1e-6).all()), pair["tokens"].tolist()
    (True, [4, 4])
    """
    found = []
    for batch in batches:
        logs = []
        for one in (model, other):
            given = {name: values.to(one.device) for name, values in batch.items()}
            logits = one(**given, use_cache=False).logits[:, :-1]
            logs.append(logits.double().log_softmax(-1).cpu())
        first, second = logs
        if first.shape != second.shape:
            raise ValueError(
                f"two vocabularies, of {first.shape[-1]} and {second.shape[-1]} tokens, have no "
                "pair: take models of one tokenizer"
            )
        both, inside = (first + second) / 2, batch["attention_mask"][:, 1:].cpu() > 0
        tokens = inside.sum(1)
        goal = batch["input_ids"][:, 1:, None].cpu()
        each = {"loss": -both.gather(-1, goal)[..., 0], "gain": -both.logsumexp(-1)}
        sums = {name: (values * inside).sum(1) / tokens for name, values in each.items()}
        found.append(pd.DataFrame({n: v.numpy() for n, v in {**sums, "tokens": tokens}.items()}))
    return pd.concat(found, ignore_index=True)
