"""Imports go down only; torch stays in interop; configs are read at the top alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "vcm_jax"

# From the bottom up; a module may import from its own floor and those below.
FLOORS = [
    {"atomic", "logs", "times", "guidance", "ema", "data.sequence", "objectives", "codec",
     "metrics", "models"},
    {"sampling", "sharding", "data"},
    {"features", "page"},
    {"data.corpora", "data.builder", "data.validate", "data.validate_page"},
    {"train_state"},
    {"train_step", "checkpoint", "distributed", "preemption", "resume", "runs", "writer",
     "interop"},
    {"validation", "teacher"},
    {"monitor"},
    {"plan", "run_setup"},
    {"train"},
    {"main", "generate", "evaluate_caches"},
    {"evaluate_sounds", "generate_records", "search_times"},
    {"report", "evaluate", "compare"},
]  # fmt: skip


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


# These define torch modules; nobody imports them at the top.
TORCH_MODULES = {"interop.torch_model", "interop.synchformer", "interop.clip"}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}


def test_imports_go_down():
    for name, path in MODULES.items():
        if name == "__init__":
            continue
        ours = name.removesuffix(".__init__")
        for imported, at_top in imports(path):
            package, _, rest = imported.partition(".")
            if package == "vcm_jax" and rest and at_top:
                assert floor(rest) <= floor(ours), f"{ours} imports {rest}"


def test_objectives_never_see_a_model():
    for name, path in MODULES.items():
        if name.startswith("objectives"):
            assert not any(".models" in imported for imported, _ in imports(path)), name


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
            assert name in ("main", "train", "run_setup"), name


def test_modules_that_need_torch_are_imported_lazily():
    for name, path in MODULES.items():
        for imported, at_top in imports(path):
            assert not at_top or imported.removeprefix("vcm_jax.") not in TORCH_MODULES, name


def test_the_torch_model_needs_torch_alone():
    names = {imported.split(".")[0] for imported, _ in imports(MODULES["interop.torch_model"])}
    assert names == {"math", "torch"}
