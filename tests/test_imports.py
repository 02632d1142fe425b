"""Imports go down only, PyTorch stays in interop, and only the top reads configs."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "vcm_jax"

# The rooms of the package from the bottom up. A module may import modules of its own room and of
# rooms in the rows above its own row in this table, inside functions too. A folder stands for its
# modules, except for those that are listed by themselves.
FLOORS = [
    {"atomic", "console", "settings", "usage"},
    {"ema", "hashes", "objectives", "metrics", "media.names"},
    {"records.example", "records.sequence"},
    {"claim", "cli", "sampling", "codec", "media", "devices"},
    {"models", "records"},
    {"runs"},
    {"interop"},
    {"features", "pretrained"},
    {"weights"},
    {"generation", "data"},
    {"evaluation", "training", "interop.export_torch", "interop.import_torch"},
    {"main", "generate", "evaluate", "compare", "search_times", "reconstruct", "web"},
    {"codec.corpus"},
    {"codec.train"},
    {"impacts"},
]
ROOMS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Modules that may import these packages, whose names are prefixes.
OWNERS = {
    "torch": ("interop.",),
    "transformers": ("interop.",),
    "ml_collections": (
        "main",
        *(f"training.{n}" for n in ("dry_run", "loop", "program", "setup", "stages")),
    ),
    "tensorflow": (),
}

# These define PyTorch modules: nobody imports them when a module is loaded.
TORCH_MODULES = {"interop.torch_model", "interop.synchformer", "interop.clip"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem != "__init__"
}


def room(name: str) -> str:
    """The room of a module: the longest prefix of its name that is listed."""
    parts = name.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    found = next((prefix for prefix in prefixes if prefix in ROOMS), None)
    assert found, f"{name} has no floor: add it to FLOORS"
    return found


def imports(path: Path):
    """(imported module, whether it is imported when the module is loaded)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not used here"
            for alias in node.names:
                inner = PACKAGE.parent / f"{node.module}.{alias.name}".replace(".", "/")
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                name = f"{node.module}.{alias.name}" if is_module else node.module
                yield name, id(node) in top
        elif isinstance(node, ast.Call) and node.args:
            function, argument = node.func, node.args[0]
            called = getattr(function, "attr", getattr(function, "id", ""))
            if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield argument.value, False


def ours(path: Path) -> set[str]:
    """Modules of the package that a module imports, at the top or inside functions."""
    found = (name.partition("vcm_jax.")[2] for name, _ in imports(path))
    return set(filter(None, found))


def violations():
    """Lines of what is imported from the same row or from above."""
    for name, path in MODULES.items():
        for imported in sorted(ours(path)):
            here, there = room(name), room(imported)
            if here != there and ROOMS[there] >= ROOMS[here]:
                yield f"{name} imports {imported}"


def test_imports_go_down():
    assert not list(violations())


def test_every_room_of_the_table_exists():
    for name in ROOMS:
        path = PACKAGE / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), name


def test_there_are_no_circles():
    """Modules can be put in an order in which each comes after all that it imports."""
    waiting = {name: ours(path) - {name} for name, path in MODULES.items()}
    while ready := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting


def test_packages_with_owners_are_imported_by_their_owners_only():
    for name, path in MODULES.items():
        for imported, _ in imports(path):
            owners = OWNERS.get(imported.split(".")[0])
            assert owners is None or name.startswith(owners), f"{name} imports {imported}"


def test_pytorch_is_imported_lazily():
    for name, path in MODULES.items():
        for imported, at_top in imports(path):
            if at_top and imported.split(".")[0] in ("torch", "transformers"):
                assert name in TORCH_MODULES, f"{name} imports {imported} when it is loaded"
            if at_top:
                assert imported.removeprefix("vcm_jax.") not in TORCH_MODULES, name


def test_the_torch_model_needs_pytorch_alone():
    names = {imported.split(".")[0] for imported, _ in imports(MODULES["interop.torch_model"])}
    assert names == {"math", "torch"}


def test_no_test_module_imports_another():
    """What several of them use is in tests/helpers, which pyproject.toml puts on the path."""
    modules = {path.stem for path in TESTS.rglob("test_*.py")} | {"tests", "conftest"}
    for path in TESTS.rglob("*.py"):
        for imported, _ in imports(path):
            assert imported.split(".")[0] not in modules, f"{path} imports {imported}"


@pytest.mark.parametrize(
    "code, found",
    [
        ("import vcm_jax.training.loop", ("vcm_jax.training.loop", True)),
        ("from vcm_jax import main", ("vcm_jax.main", True)),
        ("from vcm_jax.models import MMDiT", ("vcm_jax.models", True)),
        ("def f():\n    from vcm_jax.training import loop", ("vcm_jax.training.loop", False)),
        ("if x:\n    import vcm_jax.main as m", ("vcm_jax.main", False)),
        ("import_module('vcm_jax.main')", ("vcm_jax.main", False)),
        ("importlib.import_module('torch')", ("torch", False)),
    ],
)
def test_every_kind_of_import_is_seen(tmp_path, code, found):
    (tmp_path / "module.py").write_text(code)
    assert list(imports(tmp_path / "module.py")) == [found]


def test_an_import_that_goes_up_is_a_violation(tmp_path, monkeypatch):
    for name, code in (
        ("codec.extra", "def f():\n    import vcm_jax.training.loop"),
        ("media.extra", "import vcm_jax.records.schema"),
    ):
        path = tmp_path / f"{name}.py"
        path.write_text(code)
        monkeypatch.setitem(MODULES, name, path)
    assert list(violations()) == [
        "codec.extra imports training.loop",
        "media.extra imports records.schema",
    ]
