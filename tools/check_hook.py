"""Runs in a chapter's kernel: can its checks fail?

After a cell with assertions has passed, it is run again and again with one of the things it
reads spoilt: signs flipped, entries shuffled, scaled, made equal or missing. What becomes of
every assertion is written to a file; ``tests/test_checks.py`` asks that each ran, and that
something made it fail. Names, random states, figures and output of the
chapter are as before.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import random
import sys
import time
import types
import warnings
from pathlib import Path

CELL, CHAPTER = 1.5, 12.0  # seconds of processor time for running cells again and again


# Spoiling -------------------------------------------------------------------------------


def _numbers(change):
    """A change of one array or number, for all kinds of things that hold some."""
    import numpy as np
    import pandas as pd

    torch = sys.modules.get("torch")  # which some chapters never load

    def spoil(thing, level=0):
        if isinstance(thing, bool | np.bool_):
            return bool(spoil(np.array([thing]))[0])
        if isinstance(thing, int | float | np.number) and not isinstance(thing, complex):
            return change(np.array([float(thing)]))[0].item()
        if isinstance(thing, np.ndarray):
            if thing.dtype == bool:
                if change.__name__ in ("less", "down", "missing"):
                    return np.zeros_like(thing)
                return np.ones_like(thing) if change.__name__ in ("more", "up") else ~thing
            if thing.dtype.kind in "OUS" and thing.size:
                flat = thing.ravel()
                if all(isinstance(entry, str) for entry in flat):
                    flat = _words(flat, change.__name__)
                else:
                    flat = np.array([spoil(v, level + 1) for v in flat], dtype=object)
                return flat.reshape(thing.shape)
            if thing.dtype.kind not in "iuf" or thing.size == 0:
                return thing
            return change(thing.astype(float).ravel()).reshape(thing.shape)
        if torch is not None and isinstance(thing, torch.Tensor):
            if thing.dtype == torch.bool:
                return torch.as_tensor(spoil(thing.cpu().numpy()))
            changed = spoil(thing.detach().cpu().double().numpy())
            return torch.as_tensor(changed).to(thing.dtype if thing.is_floating_point() else None)
        if isinstance(thing, pd.Series):
            values = spoil(thing.to_numpy())
            return pd.Series(values, index=thing.index, name=thing.name)
        if isinstance(thing, pd.DataFrame):
            # Whole numbers beside others are mostly keys, by which rows are chosen.
            numbers = [i for i in range(thing.shape[1]) if thing.dtypes.iloc[i].kind in "fb"]
            numbers = numbers or range(thing.shape[1])
            columns = [
                spoil(thing.iloc[:, i]) if i in numbers else thing.iloc[:, i]
                for i in range(thing.shape[1])
            ]
            return pd.concat(columns, axis=1).set_axis(thing.columns, axis=1)
        if level > 3 or isinstance(thing, type | types.ModuleType | str | bytes):
            return thing
        if isinstance(thing, dict):
            keys = list(thing)
            if change.__name__ == "shuffle" and len(keys) > 1:
                return dict(zip(keys, [thing[key] for key in [*keys[1:], keys[0]]], strict=True))
            return type(thing)({k: spoil(v, level + 1) for k, v in thing.items()})
        if isinstance(thing, tuple) and hasattr(thing, "_fields"):
            return type(thing)(*(spoil(v, level + 1) for v in thing))
        if isinstance(thing, list | tuple):
            if change.__name__ == "shuffle" and len(thing) > 1:
                return type(thing)([*thing[1:], thing[0]])
            return type(thing)(spoil(v, level + 1) for v in thing)
        if callable(thing) or type(thing).__module__.split(".")[0] in ("depthutil", "__main__"):
            return Spoilt(thing, spoil)
        return thing

    return spoil


def _words(words, how):
    """Words that are exchanged, made equal, or taken away."""
    import numpy as np

    if how in ("shuffle", "reverse"):
        return np.roll(words, 1)
    return np.full_like(words, words[0] if how == "equal" else "", dtype=object)


def _one_column(i, change):
    """The change of one column of a table only."""
    inner = _numbers(change)

    def spoil(thing):
        import pandas as pd

        columns = [
            inner(thing.iloc[:, j]) if j == i else thing.iloc[:, j] for j in range(thing.shape[1])
        ]
        return pd.concat(columns, axis=1).set_axis(thing.columns, axis=1)

    return spoil


class Spoilt:
    """An object whose numbers, and what its methods return, are spoilt."""

    def __init__(self, thing, spoil):
        self._thing, self._spoil = thing, spoil

    def __getattr__(self, name):
        value = getattr(self._thing, name)
        if isinstance(value, types.MethodType | types.FunctionType | types.BuiltinMethodType):
            return lambda *args, **options: self._spoil(value(*args, **options))
        return self._spoil(value)

    def __call__(self, *args, **options):
        return self._spoil(self._thing(*args, **options))

    def __str__(self):
        return str(self._thing)

    def __iter__(self):
        return iter(self._thing)


def changes():
    import numpy as np

    def flip(x):
        return -x

    def shuffle(x):
        return np.roll(x, max(1, len(x) // 3))

    def more(x):
        return 4 * x

    def less(x):
        return x / 4

    def reverse(x):
        return x[::-1].copy()

    def equal(x):
        return np.full_like(x, np.nanmean(x) if len(x) else 0)

    def up(x):
        return x + 1

    def far(x):
        return x + 1000

    def down(x):
        return x - 1

    def missing(x):
        return np.full_like(x, np.nan)

    return [flip, shuffle, more, less, reverse, equal, up, down, far, missing]


# Asking ---------------------------------------------------------------------------------


class _Asking(ast.NodeTransformer):
    """Turns ``assert test`` into a call that notes what became of it."""

    def __init__(self):
        self.lines: list[int] = []
        self.names: dict[int, set[str]] = {}
        self.words: dict[int, list[str]] = {}

    def visit_Assert(self, node):
        self.lines.append(node.lineno)
        own = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
        self.names[node.lineno] = own
        every = (n.value for n in ast.walk(node.test) if isinstance(n, ast.Constant))
        self.words[node.lineno] = [value for value in every if isinstance(value, str)]
        test = ast.Lambda(
            args=ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[]),
            body=node.test,
        )
        call = ast.Call(ast.Name("__ask__", ast.Load()), [ast.Constant(node.lineno), test], [])
        return ast.copy_location(ast.Expr(call), node)


def _read(tree, namespace):
    """Names that some code reads, also in the chapter's own functions that it calls."""
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for name in list(names):
        function = namespace.get(name)
        if isinstance(function, types.FunctionType) and function.__module__ == "__main__":
            names |= set(function.__code__.co_names)
    ours = [
        name
        for name in sorted(names)
        if name in namespace and not isinstance(namespace[name], types.ModuleType | type)
    ]
    # Data first, functions last.
    return sorted(ours, key=lambda name: isinstance(namespace[name], types.FunctionType))


@contextlib.contextmanager
def _left_alone(namespace):
    """Names, random states, figures and output are afterwards as they were."""
    import matplotlib.pyplot as plt
    import numpy as np

    torch = sys.modules.get("torch")
    bound = dict(namespace)
    of_ours = [
        (value, value.bit_generator.state)
        for value in bound.values()
        if isinstance(value, np.random.Generator)
    ]
    kind = () if torch is None else torch.Generator
    of_torch = [(v, v.get_state()) for v in bound.values() if isinstance(v, kind)]
    everywhere = random.getstate(), np.random.get_state()  # noqa: NPY002
    of_all_torch = None if torch is None else torch.get_rng_state()
    figures = set(plt.get_fignums())
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
    finally:
        namespace.clear()
        namespace.update(bound)
        for value, state in of_ours:
            value.bit_generator.state = state
        for value, state in of_torch:
            value.set_state(state)
        random.setstate(everywhere[0])
        np.random.set_state(everywhere[1])  # noqa: NPY002
        if torch is not None:
            torch.set_rng_state(of_all_torch)
        for number in set(plt.get_fignums()) - figures:
            plt.close(number)


def ask(source, namespace, seconds=CELL):
    """What becomes of each assertion of a cell that has passed.

    Returns a list of ``{"line", "ran", "held", "by"}``, the last None or what was spoilt and how.
    """
    asking = _Asking()
    tree = asking.visit(ast.parse(source))
    ast.fix_missing_locations(tree)
    parts = [
        compile(ast.Module([statement], []), "<check>", "exec")
        for statement in tree.body
        if not isinstance(statement, ast.Import | ast.ImportFrom)
    ]
    noted: dict[int, set] = {}
    result = {line: {"line": line, "ran": False, "held": True, "by": None} for line in asking.lines}

    def holds(test):
        try:
            return bool(test())
        except Exception:
            return None

    def note(line, test):
        noted.setdefault(line, set()).add(holds(test))

    def try_all(line, test):
        """Where an assertion stands, spoil one after the other of the things that it reads."""
        one = result[line]
        for name in sorted(asking.names[line] & namespace.keys()):
            kept = namespace[name]
            for how, spoil in _ways(kept, asking.words[line]):
                if one["by"] is not None:
                    return
                with contextlib.suppress(Exception):
                    namespace[name] = spoil(kept)
                    if holds(test) is False:
                        one["by"] = f"{name}, {how}"
                namespace[name] = kept

    def once(asked, name=None, spoil=None):
        noted.clear()
        with _left_alone(namespace):
            namespace["__ask__"] = asked
            if name is not None:
                namespace[name] = spoil(namespace[name])
            for part in parts:
                with contextlib.suppress(Exception):
                    exec(part, namespace)

    begin = time.process_time()
    once(note)
    took = time.process_time() - begin
    for line, held in noted.items():
        result[line] |= {"ran": True, "held": held == {True}}
    names = _read(ast.parse(source), namespace)
    # First what the cell was given, by the whole cell, as far as time allows; then what is left,
    # where each assertion stands, however slow the machine: what is found must not depend on it.
    every = [(name, *way) for name in names for way in _ways(namespace[name], [])]
    for name, how, spoil in every:
        left = any(one["by"] is None for one in result.values())
        if not left or time.process_time() - begin + took > seconds:
            break
        with contextlib.suppress(Exception):
            once(note, name, spoil)
            for line, held in noted.items():
                if False in held and result[line]["by"] is None:
                    result[line]["by"] = f"{name}, {how}"
    once(try_all)
    return list(result.values())


def _ways(thing, words):
    """Ways to spoil a thing, with what they are called."""
    for change in changes():
        yield change.__name__, _numbers(change)
    if type(thing).__name__ == "DataFrame":
        for i in range(min(thing.shape[1], 12)):
            for change in changes():
                yield f"{change.__name__} of {thing.columns[i]}", _one_column(i, change)
    for word in words:
        yield f"{word!r} everywhere", _all_words(word)


def _all_words(word):
    """Every word is another, of which the assertion speaks."""

    def spoil(thing, level=0):
        if isinstance(thing, str):
            return word
        if hasattr(thing, "map") and hasattr(thing, "columns"):
            return thing.map(lambda entry: word if isinstance(entry, str) else entry)
        if hasattr(thing, "map") and hasattr(thing, "index"):
            return thing.astype(object).map(lambda e: word if isinstance(e, str) else e)
        if isinstance(thing, list | tuple) and level < 3 and not hasattr(thing, "_fields"):
            return type(thing)(spoil(entry, level + 1) for entry in thing)
        if isinstance(thing, dict) and level < 3:
            return {name: spoil(entry, level + 1) for name, entry in thing.items()}
        if isinstance(thing, Spoilt) or level >= 3 or callable(thing):
            return thing
        return Spoilt(thing, spoil) if hasattr(thing, "__dict__") else thing

    return spoil


def key(source):
    """What a cell is called in the file."""
    return hashlib.sha256(source.strip().encode()).hexdigest()[:16]


def install(shell, path):
    """Ask after every cell of a kernel that has passed and holds assertions."""
    path, cells, spent = Path(path), {}, [0.0]

    def after(result):
        source = result.info.raw_cell
        if not result.success or "assert " not in source:
            return
        started = time.process_time()
        try:
            asked = ask(source, shell.user_ns, min(CELL, CHAPTER - spent[0]))
        except SyntaxError:  # of IPython's own
            return
        except Exception as error:
            asked = [{"line": 0, "ran": False, "held": False, "by": None, "error": repr(error)}]
        spent[0] += time.process_time() - started
        cells[key(source)] = asked
        about = {"cells": cells, "seconds": round(spent[0], 2)}
        path.write_text(json.dumps(about, indent=1))

    path.write_text(json.dumps({"cells": {}, "seconds": 0.0}))
    shell.events.register("post_run_cell", after)
