"""Run a model over a corpus and record what every layer writes."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from depthutil import _checks, _runs, archive
from depthutil.stream import Stream, fingerprint
from depthutil.trajectory.decoding import Decoder, next_rows
from depthutil.trajectory.passing import Buffers, Writes, gram_matrices, not_finite, trace_of
from depthutil.trajectory.result import Trajectory, result_of
from depthutil.trajectory.sums import Sums, read, settings_of


def record(
    model: nn.Module,
    batches: Iterable[Any],
    writes: str = "block",
    *,
    per_token: bool = False,
    mask: str | Callable[[Tensor, Tensor], Tensor] = "next",
    null: bool = False,
    sample: int = 512,
    decode: str | None = None,
    top: int = 0,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_seconds: float = 60,
    progress: bool | Callable[[int, int | None, float | None], None] = False,
) -> Trajectory:
    """Run a language model over a corpus and keep the statistics of its writes.

    On the first batch, the recorded writes are compared with the states that the blocks return.
    Memory does not grow with the corpus unless values are wanted per token. The head is not run.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model, see :func:`depthutil.stream.anatomy`. Run in evaluation mode.
    batches : iterable
        Token ids ``(documents, positions)``, or mappings with ``input_ids`` and, where
        documents are filled up, ``attention_mask``; :func:`depthutil.models.batches` makes
        them. Each row is a document.
    writes : str
        ``"block"``, or ``"sublayer"`` to tell attention from MLP, which gives everything
        that ``"block"`` does and more.
    per_token : bool
        Keep norms, angles and update angles of every token, 4 bytes a number.
    mask : str or callable
        Positions that count: ``"next"``, where the token and the next are real (arXiv
        2602.05970, appendix A), so never the last; ``"inner"``, the same without the first of each
        document; ``"all"`` real ones; or a function of ids and attention mask that returns
        booleans of their shape.
    null : bool
        Also compare the updates of each token with the next layer's at another token.
    sample : int
        Of how many documents to keep one token's Gram matrix, see :meth:`Trajectory.grams`.
    decode : str, optional
        Decode every layer early in the same pass: ``"last"`` through the last block, or ``"lens"``
        directly, for :meth:`Trajectory.decoded`. It costs a block and the head for each layer.
    top : int
        As for :func:`decode_early`.
    device : str or torch.device, optional
        Where products are taken, by default where the last block is.
    checkpoint : path, optional
        File to save to and, where it exists, to continue from, to the same bits.
    checkpoint_seconds : float
        Time between checkpoints.
    progress : bool or callable
        Print progress and time left to standard error about every ten seconds, or call
        with ``(batches done, all batches, seconds left)``; the last two are None if
        ``batches`` has no length.

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError
        If the model's writes do not add up to its states, if a batch has the wrong shape or no
        position counts, or if the checkpoint belongs to another recording.
    FloatingPointError
        If a state is not finite; the message names batch, row and position.

    Examples
    --------
    >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    >>> _ = torch.manual_seed(0)
    >>> model = GPTNeoXForCausalLM(GPTNeoXConfig(
    ...     vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    ...     intermediate_size=32, max_position_embeddings=32))
    >>> corpus = [torch.randint(50, (3, 20)) for _ in range(2)]
    >>> recorded = record(model, corpus, writes="sublayer")
    >>> recorded.documents, recorded.tokens  # the last position of each does not count
    (6, 114)
    >>> recorded.angles().columns.tolist(), len(recorded.angles())
    (['layer', 'mean', 'stderr', 'std', 'max'], 4)
    """
    live = Stream(model)
    _checks.word(writes, ("block", "sublayer"), "writes")
    decoder = None
    if decode is not None:
        _checks.word(decode, ("last", "lens"), "decode")
        decoder = Decoder(live, decode == "last", _checks.count(top, "top", low=0))
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    device = product_device(live) if device is None else torch.device(device)
    total = len(batches) if isinstance(batches, Sized) else None
    sums: Sums | None = None
    digest = reached = identity = ""
    buffers, width, done = Buffers(), live.parts.width, 0
    report = _runs.Progress(progress, total, of="batch")
    number, saved = -1, time.perf_counter()
    with live.open():
        for number, batch in enumerate(batches):
            inputs, keep = live.inputs(batch, mask, number)
            if sums is None:
                _measure(live, inputs, writes, decoder is not None)
                settings = settings_of(
                    live.parts.depth,
                    writes == "sublayer",
                    live.parts.parallel,
                    normed=True,
                    null=null,
                    sample=sample,
                    per_token=per_token,
                    decode=decode,
                    top=top,
                )
                sums = Sums(settings)
                if path is not None:
                    identity = fingerprint(model, settings)
                    if path.exists():
                        done, reached = _resume(path, identity, sums)
                        report = _runs.Progress(progress, total, done, of="batch")
            if path is not None:
                digest = fingerprint(digest, inputs, keep)
            if number < done:
                if number == done - 1 and digest != reached:
                    raise ValueError(f"{path} is the checkpoint of a recording of other text")
                continue
            width = _one_batch(live, inputs, keep, sums, device, number, buffers, decoder)
            report(number + 1, f"{sums.tokens:,} tokens")
            if path is not None and time.perf_counter() - saved >= checkpoint_seconds:
                _save(path, identity, digest, sums)
                saved = time.perf_counter()
    if number + 1 < done:
        raise ValueError(f"{path} has seen {done} batches, and now there are fewer")
    if sums is None or sums.tokens == 0:
        raise ValueError("no position counts: batches are empty, or the mask leaves nothing")
    if path is not None and sums.batches > done:
        _save(path, identity, digest, sums)
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return result_of(sums, name, width)


def _measure(live: Stream, inputs: dict[str, Tensor], writes: str, head: bool = False) -> None:
    """Find out on a batch what the parts are, and whether such writes can be recorded of them."""
    live.measure(inputs, head=head)
    parts = live.parts
    if writes == "sublayer" and not (parts.sublayers and parts.parallel is not None):
        raise ValueError(
            f"attention and MLP of {live.name} cannot be told apart: no two modules of each block "
            "were found whose outputs are what it adds, one after the other or both at once; "
            "record writes='block'"
        )
    if parts.writes is None and live.dtype is not None and torch.finfo(live.dtype).bits == 16:
        warnings.warn(
            f"what blocks of {live.name} add was found only as a difference of states, which in "
            f"{live.dtype} has few digits where the stream is large: load the model with "
            "dtype='float32' for exact small writes",
            stacklevel=3,
        )


def _one_batch(
    live: Stream,
    inputs: dict[str, Tensor],
    keep: Tensor,
    sums: Sums,
    device: torch.device,
    number: int,
    buffers: Buffers,
    decoder: Decoder | None = None,
) -> int:
    """Run the model on one batch and add its tokens; returns the stream's width."""
    rows = keep.reshape(-1).nonzero().squeeze(1)
    ids = inputs["input_ids"]
    document, position = rows // ids.shape[1], rows % ids.shape[1]
    if decoder is None:
        trace = trace_of(live, inputs, buffers)
    else:
        with decoder.watching():
            trace = trace_of(live, inputs, buffers, decoder.hooks())
    width = trace.start.shape[-1]
    stack = Writes(live.parts, trace, sums.settings["sublayers"], device)
    groups = gram_matrices(stack, rows, width, sums.settings["null"])
    groups = _finite(groups, document, position, number, device)
    some = (tensor.to(device) for tensor in (document, position, ids.reshape(-1)[rows]))
    sums.add(groups, *some)
    if decoder is not None and sums.decoded is not None:
        rows = next_rows(inputs, keep)
        sums.decoded.add(decoder.decode(inputs, rows), rows, ids.shape, number)
    return width


def _finite(
    groups: Iterable[tuple[Tensor, Tensor | None]],
    document: Tensor,
    position: Tensor,
    number: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Groups as they come, unless one holds a state that is no number."""
    start = 0
    for gram, null in groups:
        # One sum tells: it is not finite if anything is not.
        if not math.isfinite(float(gram.sum())):
            bad = int((~torch.isfinite(gram).flatten(1).all(1)).nonzero()[0]) + start
            where = int(document[bad]), int(position[bad])
            raise FloatingPointError(not_finite(number, "states", *where))
        start += len(gram)
        yield gram, null


def product_device(live: Stream) -> torch.device:
    """Where products are taken: Apple's GPUs have no double precision."""
    return torch.device("cpu") if live.device.type == "mps" else live.device


def writes_of(model: nn.Module, batch: Any, writes: str = "block") -> Tensor:
    """The stream's start and every write to it, as vectors, for a few sentences.

    Memory grows with everything: for a corpus, use :func:`record`.

    Parameters
    ----------
    model, batch, writes
        As one batch of :func:`record`.

    Returns
    -------
    torch.Tensor
        ``(writes + 1, documents, positions, width)`` in double precision. Its cumulative sum
        over the first axis are the states.

    Raises
    ------
    ValueError
        As :func:`record`.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> writes_of(model, torch.tensor([[1, 2, 3]]), "sublayer").shape
    torch.Size([7, 1, 3, 4])
    """
    live = Stream(model)
    _checks.word(writes, ("block", "sublayer"), "writes")
    inputs, _ = live.inputs(batch)
    with live.open():
        _measure(live, inputs, writes)
        return _vectors(live, inputs, writes)


def _vectors(live: Stream, inputs: dict[str, Tensor], writes: str) -> Tensor:
    """As :func:`writes_of`, of a model that is measured and open."""
    trace = trace_of(live, inputs)
    stack = Writes(live.parts, trace, writes == "sublayer", product_device(live))
    empty = stack.empty(inputs["input_ids"].numel(), trace.start.shape[-1])
    out = stack.fill(empty, slice(None), after=False)
    return out[:, : stack.rows].transpose(0, 1).unflatten(1, inputs["input_ids"].shape)


class Sample(NamedTuple):
    """Writes at a few positions, as vectors.

    Attributes
    ----------
    writes : torch.Tensor
        ``(writes, tokens, width)``, single precision; without the stream's start.
    tokens, documents : torch.Tensor
        Of each token, its id and the number of its document, ``(tokens,)``.
    """

    writes: Tensor
    tokens: Tensor
    documents: Tensor


def sample_writes(
    model: nn.Module,
    batches: Iterable[Any],
    writes: str = "block",
    *,
    per_document: int = 16,
    seed: int = 0,
) -> Sample:
    """Write vectors at random positions of each document, for what Gram matrices do not hold.

    Parameters
    ----------
    model, batches, writes
        As for :func:`record`.
    per_document : int
        How many positions of each document; never its first token, nor its last.
    seed : int
        Of the positions.

    Returns
    -------
    Sample

    Raises
    ------
    ValueError
        As :func:`record`.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=3, n_head=2))
    >>> found = sample_writes(model, [torch.randint(8, (2, 9))], per_document=5)
    >>> found.writes.shape, found.documents.tolist()
    (torch.Size([3, 10, 4]), [0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    """
    each = _checks.count(per_document, "per_document")
    rng, live = torch.Generator().manual_seed(seed), Stream(model)
    _checks.word(writes, ("block", "sublayer"), "writes")
    vectors, ids, documents = [], [], list[Tensor]()
    with live.open():
        for number, batch in enumerate(batches):
            inputs, real = live.inputs(batch, "all", number)
            if number == 0:
                _measure(live, inputs, writes)
            written = _vectors(live, inputs, writes).cpu()[1:]
            for row, mask in enumerate(real):
                at = 1 + torch.randperm(max(int(mask.sum()) - 2, 0), generator=rng)[:each]
                vectors.append(written[:, row, at].float())
                ids.append(inputs["input_ids"][row, at])
                documents.append(torch.full_like(at, len(documents)))
    if not vectors:
        raise ValueError("there are no batches: give one at least")
    return Sample(torch.cat(vectors, 1), torch.cat(ids), torch.cat(documents))


def _save(path: Path, identity: str, digest: str, sums: Sums) -> None:
    with archive.replacing(path) as partial, partial.open("wb") as file:
        arrays: dict[str, Any] = {"identity": identity, "digest": digest, **sums.state()}
        np.savez(file, **arrays)


def _resume(path: Path, identity: str, sums: Sums) -> tuple[int, str]:
    arrays = read(path, ("identity", "digest"), "whole checkpoint of a recording: remove it")
    theirs, digest = str(arrays["identity"]), str(arrays["digest"])
    if theirs != identity:
        raise ValueError(
            f"{path} is the checkpoint of another recording (model or settings differ): "
            "remove it, or name another"
        )
    sums.restore(arrays)
    return sums.batches, digest
