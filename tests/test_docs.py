"""The pages name files, links, commands, flags and settings that exist."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vcm_jax.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w.-]*)")
CONFIG = re.compile(r"--config=(configs/\w+\.py)(?::([^\s`\"'\])]+))?")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub derives them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}: no such heading"


@pages
def test_named_files_exist(page):
    names = r"`((?:benchmarks|configs|docs|launch|tests|vcm_jax)/[\w./-]*)`"
    for name in re.findall(names, page.read_text()):
        if "NAME" in name:  # a placeholder
            continue
        assert (ROOT / name).exists(), f"{page.name} names {name}, which does not exist"


@pages
def test_named_functions_exist(page):
    """`objectives/times.py: sample_times` names a file of the package and what it defines."""
    for name, member in re.findall(r"`([\w/]+\.py): (\w+)[\w.]*`", page.read_text()):
        files = [path for path in ROOT.glob("vcm_jax/**/*.py") if str(path).endswith(f"/{name}")]
        found = any(re.search(rf"(def|class) {member}\b", path.read_text()) for path in files)
        assert found, f"{page.name} names {member} in {name}, which is not there"


def commands(page: Path, blocks: bool = False) -> list[tuple[str, str]]:
    """(what is run, its arguments) of every Python command and script that a page shows.

    `blocks` are those in blocks of code alone, not those in sentences.
    """
    text = page.read_text().replace("\\\n", " ")
    if blocks:
        text = "\n".join(re.findall(r"```.*?```", text, flags=re.S))
    runs = r"(?:python -m (vcm_jax[\w.]*)|(?:python|bash|sbatch) ((?:benchmarks|launch)/\w+\.\w+))"
    found = re.findall(runs + r"([^`\n|;#]*)", text)
    return [(module or script, arguments) for module, script, arguments in found]


def source_of(name: str) -> Path | None:
    """The file of a dotted module of this repository, or of a path; None when there is none."""
    if "/" in name:
        path = ROOT / name
        return path if path.is_file() else None
    path = ROOT / name.replace(".", "/")
    files = path.with_suffix(".py"), path / "__main__.py", path / "__init__.py"
    return next((file for file in files if file.is_file()), None)


def is_definition(node) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr.startswith("DEFINE_") or node.func.attr == "add_argument")
    )


@functools.cache
def defined_flags(path: Path) -> set[str]:
    """Names that one file may define as flags: all strings in statements that define some."""
    found = set()
    for statement in ast.parse(path.read_text()).body:
        nodes = list(ast.walk(statement))
        if any(map(is_definition, nodes)):
            texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
            found |= {text.removeprefix("--") for text in texts if isinstance(text, str)}
    return found


@functools.cache
def flags_of(name: str) -> set[str]:
    """Flags of a command: its own, and those of the modules that it imports directly."""
    path = source_of(name)
    found = defined_flags(path) | {"help", "helpfull"}
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vcm_jax"):
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for file in filter(None, map(source_of, modules)):
            found |= defined_flags(file)
    return found


@pages
def test_commands_and_their_flags_exist(page):
    for name, arguments in commands(page):
        path = source_of(name)
        assert path, f"{page.name} shows {name}, which does not exist"
        known = set()
        if path.suffix == ".py":
            known = flags_of(name)
        else:  # a script: flags of its own, and those that it hands on to the command that it runs
            known = set(FLAG.findall(path.read_text())) | flags_of("vcm_jax.main")
            known |= defined_flags(ROOT / "tests/conftest.py")
        for flag in FLAG.findall(arguments):
            if not flag.startswith("config."):
                assert flag in known, f"{page.name}: {name} has no flag --{flag}"


def required_flags(path: Path) -> set[str]:
    """Flags that a command cannot go without, of those that its own file defines."""
    if path.suffix != ".py":
        return set()
    definitions = filter(is_definition, ast.walk(ast.parse(path.read_text())))
    return {
        definition.args[0].value.removeprefix("--")
        for definition in definitions
        if any(k.arg == "required" and k.value.value for k in definition.keywords)
    }


@pages
def test_commands_have_the_flags_that_they_need(page):
    """Commands in sentences may be sketches, but not those of measurements."""
    measured = [found for found in commands(page) if found[0].startswith("benchmarks")]
    for name, arguments in measured + commands(page, blocks=True):
        missing = required_flags(source_of(name)) - set(FLAG.findall(arguments))
        assert not missing or "..." in arguments, f"{page.name}: {name}{arguments} lacks {missing}"


@pages
def test_flags_in_the_text_exist(page):
    """Flags that the text names without their command are flags of some command or script."""
    sources = [*ROOT.glob("vcm_jax/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    known = {"help", "pyargs"} | defined_flags(ROOT / "tests/conftest.py")
    known = known.union(*map(defined_flags, sources))
    known = known.union(*(FLAG.findall(path.read_text()) for path in ROOT.glob("launch/*")))
    for flag in re.findall(r"`--([A-Za-z][\w-]*)(?=[=`\s])", page.read_text()):
        assert flag in known, f"{page.name} names --{flag}: no command has such a flag"


@functools.cache
def config(path: str, argument: str | None):
    """The config of a file of configs/."""
    spec = importlib.util.spec_from_file_location("config", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([argument] if argument else []))


def has(settings, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(settings, ConfigDict) or name not in settings:
            return False
        settings = settings[name]
    return True


@pages
def test_configs_and_their_settings_exist(page):
    """Every --config=FILE:ARGUMENT loads, and every --config.key is a setting of some objective.

    Words in capitals are placeholders.
    """
    text = page.read_text().replace("\\\n", " ")
    for path, argument in CONFIG.findall(text):
        if not argument.isupper():
            config(path, argument)
    default = [config("configs/s16k.py", name) for name in OBJECTIVES]
    for key in set(re.findall(r"--config\.([\w.]+\w)", text)):
        assert key.split(".")[-1].isupper() or any(has(settings, key) for settings in default), (
            f"{page.name}: no setting {key}"
        )
