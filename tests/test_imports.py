"""Imports go down only; torch stays in interop; configs are read at the top alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vcm_jax"

# From the bottom up: a module may import from its own row and from the rows before it, inside of
# functions too. A folder stands for its modules, except for those that are listed by themselves.
FLOORS = [
    {
        "atomic",
        "cli",
        "ema",
        "objectives",
        "metrics",
        "records.example",
        "records.sequence",
        "settings",
    },
    {"sampling", "codec", "media", "models", "records", "runs", "devices"},
    {"interop"},
    {"features"},
    {"generation", "training", "data"},
    {"interop.export_torch", "interop.import_torch", "evaluation"},
    {"main", "generate", "evaluate", "compare", "search_times", "reconstruct"},
    {"impacts"},
]

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.stem != "__init__"
}


def floor(name: str) -> int:
    """The floor of a module, by the longest prefix that is listed."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for level, names in enumerate(FLOORS):
            if ".".join(parts[:length]) in names:
                return level
    raise AssertionError(f"{name} has no floor: add it to FLOORS")


def imports(path: Path):
    """(imported module, whether it is imported when the module is loaded)."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                name = f"{node.module}.{alias.name}" if is_module else node.module
                yield name, id(node) in top


def ours(path: Path) -> set[str]:
    """Modules of the package that a module imports, anywhere."""
    found = (name.partition("vcm_jax.")[2] for name, _ in imports(path))
    return set(filter(None, found))


def test_imports_go_down():
    for name, path in MODULES.items():
        for imported in ours(path):
            assert floor(imported) <= floor(name), f"{name} imports {imported}"


def test_no_circles():
    """Modules can be put in an order in which each comes after all that it imports."""
    waiting = {name: ours(path) - {name} for name, path in MODULES.items()}
    while ready := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting


def test_objectives_never_see_a_model():
    for name, path in MODULES.items():
        if name.startswith("objectives"):
            assert not any(imported.startswith("models") for imported in ours(path)), name


# These define torch modules; nobody imports them at the top.
TORCH_MODULES = {"interop.torch_model", "interop.synchformer", "interop.clip"}


def test_torch_stays_in_interop_and_tensorflow_away():
    for name, path in MODULES.items():
        for imported, at_top in imports(path):
            package = imported.split(".")[0]
            assert package != "tensorflow", name
            if package in ("torch", "transformers"):
                assert name.startswith("interop.") and (not at_top or name in TORCH_MODULES), name


def test_no_library_module_reads_a_config():
    for name, path in MODULES.items():
        if any(imported.startswith("ml_collections") for imported, _ in imports(path)):
            assert name in ("main", "training.loop", "training.setup"), name


def test_modules_that_need_torch_are_imported_lazily():
    for name, path in MODULES.items():
        for imported, at_top in imports(path):
            assert not at_top or imported.removeprefix("vcm_jax.") not in TORCH_MODULES, name


def test_the_torch_model_needs_torch_alone():
    names = {imported.split(".")[0] for imported, _ in imports(MODULES["interop.torch_model"])}
    assert names == {"math", "torch"}
