"""The rules of the house: who may import whom, what a Hub file may import, one version everywhere."""

import ast
import re
import sys
from pathlib import Path

import pytest

import linpass

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "linpass"
FAMILIES = ("_linformer", "_closed_form")
HUB_FILES = sorted(path for family in FAMILIES for path in PACKAGE.glob(f"*{family}.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up: a file imports only what stands before it.
ORDER = (
    *("errors", "configuration", "attention", "triton", "launch", "operators", "kernels"),
    *("cache", "layers", "feature_maps", "modeling", "training", "singlepass"),
)
# The mathematics of linpass.singlepass: numbers in, numbers out, without transformers.
TORCH_ONLY = ("statistics", "solver", "descent", "features", "classification", "kernel_ridge")


def level(module: str) -> int | None:
    """Place in ORDER of a module such as "linpass.training.tokens" or "cache_linformer"."""
    name = module.removeprefix("linpass.").split(".")[0]
    for family in FAMILIES:
        name = name.removesuffix(family)
    return ORDER.index(name) if name in ORDER else None


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, number of leading dots, inside try) of each import in a file; `from linpass import x` as "linpass.x"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0, id(node) in guarded) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole_package = node.module in (None, "linpass", "linpass.training", "linpass.singlepass")
            names = (
                [f"{node.module or ''}.{a.name}".lstrip(".") for a in node.names] if whole_package else [node.module]
            )
            found += [(name, node.level, id(node) in guarded) for name in names]
    return found


def test_the_rules_below_see_the_files():
    names = {path.name for path in HUB_FILES}
    assert names >= {"configuration_linformer.py", "attention_linformer.py", "modeling_linformer.py"}
    assert names >= {"configuration_closed_form.py", "feature_maps_closed_form.py", "modeling_closed_form.py"}
    assert ("linpass.training.preparation", 0, False) in imports(PACKAGE / "training/train.py")
    assert level("linpass.training.tokens") == level("training") > level("modeling_linformer") > level("configuration")
    assert level("linpass.singlepass.solver") > level("training") > level("modeling_closed_form")
    assert level("modeling_closed_form") > level("feature_maps_closed_form") > level("configuration_closed_form")


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_load_flat_and_alone(path):
    for module, dots, guarded in imports(path):
        top = module.split(".")[0]
        if dots:
            assert dots == 1, f"{path.name} imports {module} from a folder above"
            assert "." not in module, f"{path.name}: write `from .name import x`"
            assert (PACKAGE / f"{module}.py") in HUB_FILES, (
                f"{path.name} imports {module}, which is not copied to the Hub"
            )
        else:
            allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
            assert top in allowed or (top == "triton" and guarded), f"{path.name} imports {module}"


@pytest.mark.parametrize("name", ["attention_linformer.py", "kernels_closed_form.py"])
def test_the_mathematics_of_hub_files_imports_torch_only(name):
    allowed = {"torch", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module, _dots, _guarded in imports(PACKAGE / name)} <= allowed


def singlepass_files_below(names: tuple[str, ...]) -> set[str]:
    """The named files of linpass.singlepass and those of it that they import, directly or not."""
    found, left = set(), set(names)
    while left:
        name = left.pop()
        found.add(name)
        for module, dots, _guarded in imports(PACKAGE / "singlepass" / f"{name}.py"):
            if dots or module.startswith("linpass.singlepass."):
                left |= {module.removeprefix("linpass.singlepass.").split(".")[0]} - found
    return found


def test_the_mathematics_of_singlepass_imports_torch_only():
    allowed = {"torch", "safetensors", *sys.stdlib_module_names}
    for name in singlepass_files_below(TORCH_ONLY):
        for module, dots, _guarded in imports(PACKAGE / "singlepass" / f"{name}.py"):
            ours = dots == 1 or module == "linpass.errors" or module.startswith("linpass.singlepass.")
            assert ours or module.split(".")[0] in allowed, f"singlepass/{name}.py imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = level(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for module, dots, _guarded in imports(path):
        top = module.split(".")[0]
        assert top not in ("tests", "benchmarks"), f"{path} imports {module}"
        if own is not None and (dots or top == "linpass"):
            other = level(module)
            assert other is None or other <= own, f"{path} imports {module}"


def test_reference_shares_no_code():
    assert not [module for module, _d, _g in imports(ROOT / "tests/reference.py") if module.startswith("linpass")]


def test_no_file_has_a_name_that_says_nothing():
    files = [path for folder in ("linpass", "tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in files if re.fullmatch(r"_?(utils?|helpers?|commons?|misc)", path.stem)]


def test_one_version_everywhere():
    version = linpass.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
    assert re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    pattern = re.search(r"re\.search\(r'(.+)', ", (ROOT / "setup.py").read_text())[1]
    assert re.search(pattern, (PACKAGE / "__init__.py").read_text(), re.M)[1] == version


def test_what_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_makefile_has_the_commands_of_the_readme():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`?make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named
    assert named <= targets
