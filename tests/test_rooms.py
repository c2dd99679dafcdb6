"""The plan of the package: who may know of whom, and what former names still work."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "depthutil"
# A room imports from floors below its own, and a wing's files from one another.
FLOORS = (
    {"_checks", "_arguments"},
    {
        "gram",
        "moments",
        "powerlaw",
        "corpus",
        "archive",
        "figures",
        "checks",
        "nulls",
        "_runs",
        "directions",
        "findings",
    },
    {"stream", "scaling", "signatures", "explorer", "gguf_file"},
    {"models", "regimes", "trajectory", "toy", "surgery", "primitives"},
    {"ladder", "interventions", "hops"},
    {"evidence"},
)
# Rooms that moved, kept so that notebooks of before go on working.
FORMER = {"toy_model": "toy", "kernels": "toy"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, str]]:
    """The rooms that a file imports, and the names it takes from them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "depthutil":
            where = node.module.split(".")[1:]
            for alias in node.names:
                full = [*where, alias.name]
                found.append((full[0], ".".join(full[1:])))
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            found += [(n[1], ".".join(n[2:])) for n in names if n[0] == "depthutil" and n[1:]]
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in FILES}
    placed = set.union(*FLOORS)
    assert rooms - set(FORMER) == placed
    assert sum(map(len, FLOORS)) == len(placed)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_room_imports_upwards(path):
    room = room_of(path)
    if room in FORMER:
        assert {there for there, _ in imports(path)} == {FORMER[room]}
        return
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for there, _ in imports(path):
        if there not in (room, "__version__"):
            assert floor[there] < floor[room], f"{room} imports {there}"


def private(name: str) -> bool:
    return any(re.match(r"_(?!_)", part) for part in name.split("."))


SOURCES = [
    *FILES,
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_name_is_used_across_files(path):
    """``_runs`` and its like are rooms of the package; what they call private stays inside."""
    tree = ast.parse(path.read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "depthutil":
            for alias in node.names:
                top = node.module == "depthutil"  # where a name is a room
                assert top or not private(alias.name), f"{alias.name} of {node.module}"
                modules.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules and node.value.id.islower():
                assert not private(node.attr), f"{node.value.id}.{node.attr}"


def test_chapters_use_public_names_only():
    for path in sorted((ROOT / "chapters").rglob("*.md")):
        for line in path.read_text().splitlines():
            match = re.match(r"\s*(?:from|import) depthutil(.*)", line)
            assert not match or not re.search(r"[\s.]_\w", match[1]), f"{path.name}: {line}"


# What could be imported from where before rooms were rearranged.
NAMES = {
    "toy": "GRID POWER_LAW Network SweepError ToyConfig ToyResult exponent gpu_pool merge shards "
    "slug sweep train train_plainly",
    "toy_model": "GRID Layer Network ToyConfig inputs losses rms student_weights targets "
    "teacher_weights train_plainly",
    "kernels": "PRECISIONS FusedStack Memory Stack choose",
    "ladder": "BOS VOCABULARY Corpus Document LadderConfig LadderModel Shard assemble best_rate "
    "corpus curves documents held_out members shards slug train write_tokenizer",
    "trajectory": "STATISTICS Trajectory decode_early record writes_of",
    "models": "FAMILIES HELD_OUT SUBSETS Anatomy Loaded Write anatomy available batches is_norm "
    "load texts",
    "stream": "PROBE computing_as device_of evaluating fingerprint forward hidden hooked "
    "inputs_of measured tensor watched with_hidden with_tensor",
    "interventions": "skip swap repeat patch erase noise scale skip_effects local_effects lens "
    "erasure_effects integrated_gradients causal_trace depth_score linear_maps removal",
    "scaling": "ALPHA_MAX LAWS PUBLISHED Profile ScalingFit adam_path compare drop_highest fit "
    "fit_many load_chinchilla optimal_shape predict terms",
    "signatures": "diagnose gram signature",
    "regimes": "PowerLaw compositional diagnose ensemble fit_exponent learn_folds measure "
    "procedural signature tent",
}


@pytest.mark.parametrize("room", NAMES)
def test_former_names_are_where_they_were(room):
    module = importlib.import_module(f"depthutil.{room}")
    assert [name for name in NAMES[room].split() if not hasattr(module, name)] == []


def test_files_of_a_wing_shadow_none_of_its_functions():
    """``toy.train`` is a function whatever was imported before."""
    for wing in ("stream", "scaling", "trajectory", "toy", "ladder", "interventions"):
        module = importlib.import_module(f"depthutil.{wing}")
        files = {path.stem for path in (PACKAGE / wing).glob("*.py")}
        assert not files & set(module.__all__), wing


def test_no_file_is_longer_than_one_reads():
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in FILES}
    assert max(lengths.values()) <= 620, max(lengths, key=lengths.get)


def test_types_travel_with_the_package():
    assert (PACKAGE / "py.typed").exists()
