"""Look into a live model and change what passes, until a block of code ends.

Nothing else sets hooks or replaces a module's ``forward``: what is set here comes off whatever
happens inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def hidden(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The stream among what a block is given."""
    if args:
        return args[0]
    if "hidden_states" not in kwargs:
        raise ValueError(f"a block reads {sorted(kwargs)} and no hidden_states: it is not known")
    return kwargs["hidden_states"]


def with_hidden(args: tuple, kwargs: dict[str, Any], states: Tensor) -> tuple[tuple, dict]:
    """The same arguments with other states."""
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states}


def tensor(output: Any) -> Tensor:
    """The states among what a module returns, a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def with_tensor(output: Any, states: Tensor) -> Any:
    """The same output with other states."""
    if isinstance(output, Tensor):
        return states
    if hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: states})
    return type(output)((states, *output[1:]))


@contextmanager
def hooked(
    before: Sequence[tuple[nn.Module, Callable]] = (),
    after: Sequence[tuple[nn.Module, Callable]] = (),
) -> Iterator[None]:
    """Functions that run before and after modules, taken off at the end whatever happens.

    Parameters
    ----------
    before : sequence of (module, function)
        Called with the states that the module reads; what it returns, unless None, is read
        in their place.
    after : sequence of (module, function)
        Called with the states that the module returns; what it returns, unless None, takes
        their place.

    Examples
    --------
    >>> layer, seen = nn.Linear(2, 2, bias=False), []
    >>> with hooked(before=[(layer, lambda h: 2 * h)], after=[(layer, seen.append)]):
    ...     doubled = layer(torch.ones(1, 2))
    >>> torch.equal(doubled, 2 * layer(torch.ones(1, 2))), len(seen)
    (True, 1)
    """
    handles = []

    def reading(function: Callable) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            states = function(hidden(args, kwargs))
            return None if states is None else with_hidden(args, kwargs, states)

        return hook

    def returning(function: Callable) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            states = function(tensor(output))
            return None if states is None else with_tensor(output, states)

        return hook

    try:
        for module, function in before:
            hook = reading(function)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for module, function in after:
            handles.append(module.register_forward_hook(returning(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(modules: Iterable[nn.Module], look: Callable[..., None]) -> Iterator[None]:
    """Look at all that modules are given and return, until the block ends.

    ``look`` is called with the module, its positional and its named arguments, and its output,
    and changes none of them.

    Examples
    --------
    >>> layer, seen = nn.Linear(2, 3), []
    >>> with watched([layer], lambda module, args, kwargs, output: seen.append(output.shape)):
    ...     _ = layer(torch.ones(1, 2))
    >>> seen
    [torch.Size([1, 3])]
    """

    def only(*given: Any) -> None:
        look(*given)

    with rewritten(modules, only):
        yield


@contextmanager
def rewritten(modules: Iterable[nn.Module], function: Callable[..., Any]) -> Iterator[None]:
    """As :func:`watched`, and what the function returns, unless None, is the module's output.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> with rewritten([layer], lambda module, args, kwargs, output: args[0]):
    ...     layer(torch.ones(1, 2))  # returns what it reads
    tensor([[1., 1.]])
    """
    handles = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        return function(module, args, kwargs, output)

    try:
        for module in modules:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def announced(module: nn.Module, look: Callable[[tuple, Mapping], None]) -> Iterator[None]:
    """Look at what a module is given before it runs, and object by raising an error.

    Examples
    --------
    >>> layer, seen = nn.Linear(2, 3), []
    >>> with announced(layer, lambda args, kwargs: seen.append(len(args))):
    ...     _ = layer(torch.ones(1, 2))
    >>> seen
    [1]
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        look(args, kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


#: What modules compute now instead of their own ``forward``, the latest last, under the
#: ``forward`` that they had, so that contexts may end in any order.
_REPLACED: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


@contextmanager
def computing(*pairs: tuple[nn.Module, Callable]) -> Iterator[None]:
    """Each module calls a function in place of its ``forward``, until the block ends.

    Contexts may end in any order: of those that are left, the latest holds.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> with computing((layer, lambda x: x)):
    ...     layer(torch.ones(1, 2))
    tensor([[1., 1.]])
    >>> "forward" in vars(layer)
    False
    """
    entered: list[tuple[nn.Module, list]] = []
    try:
        for module, function in pairs:
            stack = _REPLACED.setdefault(module, [vars(module).get("forward")])
            entry = [function]
            stack.append(entry)
            entered.append((module, entry))
            module.forward = function
        yield
    finally:
        for module, entry in reversed(entered):
            stack = _REPLACED[module]
            stack[:] = [other for other in stack if other is not entry]
            if len(stack) > 1:
                module.forward = stack[-1][0]
                continue
            del _REPLACED[module]
            if stack[0] is None:
                vars(module).pop("forward", None)
            else:
                module.forward = stack[0]


@contextmanager
def computing_as(*pairs: tuple[nn.Module, nn.Module]) -> Iterator[None]:
    """Each first module computes what the second would, until the block ends.

    Parameters
    ----------
    *pairs : (module, module)
        Two that exchange their places are two pairs, ``(a, b), (b, a)``.

    Examples
    --------
    >>> one, other, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.ones(1, 2)
    >>> with computing_as((one, other)):
    ...     torch.equal(one(x), other(x))
    True
    >>> torch.equal(one(x), other(x)), "forward" in vars(one)
    (False, False)
    """
    theirs = [other.forward for _, other in pairs]
    with computing(*[(module, f) for (module, _), f in zip(pairs, theirs, strict=True)]):
        yield


#: Lists of modules whose order is changed now: as they were, and the changes, the latest last.
_REORDERED: weakref.WeakKeyDictionary[nn.ModuleList, tuple] = weakref.WeakKeyDictionary()


@contextmanager
def reordered(container: nn.ModuleList, places: Sequence[int]) -> Iterator[None]:
    """A list's modules stand in another order, until the block ends.

    Whatever is hooked to a module moves with it. Contexts may end in any order: the changes
    that are left are made again on the list as it was.

    Parameters
    ----------
    container : torch.nn.ModuleList
    places : sequence of int
        For each place, from which place its module comes.

    Examples
    --------
    >>> blocks = nn.ModuleList([nn.Identity(), nn.ReLU(), nn.Tanh()])
    >>> with reordered(blocks, [0, 2, 1]):
    ...     [type(block).__name__ for block in blocks]
    ['Identity', 'Tanh', 'ReLU']
    >>> [type(block).__name__ for block in blocks]
    ['Identity', 'ReLU', 'Tanh']
    """
    if sorted(places) != list(range(len(container))):
        raise ValueError(f"places are 0 to {len(container) - 1} in some order, not {list(places)}")
    before, changes = _REORDERED.setdefault(container, (list(container), []))
    change = [list(places)]

    def arrange() -> None:
        order = before
        for (places,) in changes:
            order = [order[place] for place in places]
        for place, module in enumerate(order):
            container[place] = module

    changes.append(change)
    try:
        arrange()
        yield
    finally:
        changes[:] = [other for other in changes if other is not change]
        arrange()
        if not changes:
            del _REORDERED[container]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients, and each module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
