"""The layout of the package: which room imports which, file names, a wheel that works, a README that runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import venv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from condconv_surgery.recipe.toml_text import parse_toml

ROOT = Path(__file__).parent.parent
ROOMS = [
    "errors",
    "recipe",
    "runtime",
    "ops",
    "layers",
    "surgery",
    "models",
    "data",
    "training",
    "reporting",
    "deploy",
    "studies",
    "sharing",
    "integrations",
    "cli",
]
PYTHON = ("condconv_surgery", "cli", "tests", "benchmarks", "examples")
FORBIDDEN = {
    ("training", "surgery"),
    ("reporting", "surgery"),
    ("training", "reporting"),
    ("reporting", "training"),
    ("deploy", "training"),
    ("deploy", "reporting"),
    ("integrations", "studies"),
}


def modules_of_the_package() -> dict[str, Path]:
    """Every module of the package and its file, by its dotted name."""
    files = {}
    for package, folder in (("condconv_surgery", ROOT / "condconv_surgery"), ("condconv_surgery.cli", ROOT / "cli")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return files


def imported_modules(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules that ``name`` imports, also inside functions and in ``TYPE_CHECKING`` blocks.

    The parent packages, which Python imports first, do not count: an ``__init__`` may import its own modules.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names}
    return found & modules.keys() - {name}


def modules_in_circles(imports: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves through others."""

    def reached(start: str) -> set[str]:
        seen, waiting = set[str](), [start]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    return sorted(name for name in imports if name in reached(name))


def test_a_room_imports_only_rooms_above_it() -> None:
    modules = modules_of_the_package()
    wrong = []
    for name, path in modules.items():
        room = room_of(name)
        for other in {room_of(module) for module in imported_modules(name, path, modules)} & set(ROOMS):
            if room in ROOMS and (ROOMS.index(other) > ROOMS.index(room) or (room, other) in FORBIDDEN):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def room_of(module: str) -> str:
    """``models`` of ``condconv_surgery.models.load``."""
    return module.partition(".")[2].partition(".")[0]


def test_no_import_circle() -> None:
    modules = modules_of_the_package()
    assert "condconv_surgery.cli.main" in modules
    imports = {name: imported_modules(name, path, modules) for name, path in modules.items()}
    found = imports["condconv_surgery.cli.output.conversion_output"]
    assert found > {"condconv_surgery.cli.output.console", "condconv_surgery.reporting"}
    assert modules_in_circles(imports) == []
    assert modules_in_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_measuring_does_not_import_rendering() -> None:
    modules = modules_of_the_package()
    for name, path in modules.items():
        if name.startswith("condconv_surgery.reporting.measure"):
            assert not any(".render" in other for other in imported_modules(name, path, modules)), name


def test_every_package_is_in_the_wheel() -> None:
    settings = parse_toml((ROOT / "pyproject.toml").read_text(encoding="utf-8"), "pyproject.toml")["tool"]["setuptools"]
    packages = {name for name, path in modules_of_the_package().items() if path.name == "__init__.py"}
    assert set(settings["packages"]) == packages
    folders = {path.parent for path in modules_of_the_package().values()}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_a_file_name_is_used_once() -> None:
    """Except where two backends have a file for the same thing."""
    files = [path for folder in PYTHON for path in (ROOT / folder).rglob("*.py") if "backends" not in path.parts]
    names = Counter(path.name for path in files if path.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_backends_are_chosen_inside_ops_alone() -> None:
    """No other module imports one; ``native`` is the public switch of one."""
    modules = modules_of_the_package()
    for name, path in modules.items():
        if name != "condconv_surgery.native" and not name.startswith("condconv_surgery.ops"):
            backends = {other for other in imported_modules(name, path, modules) if ".ops.backends" in other}
            assert not backends, f"{name} imports {backends}"


def test_no_folder_has_more_than_16_files() -> None:
    files = [path for folder in PYTHON for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    counts = Counter(path.parent.relative_to(ROOT) for path in files)
    assert {str(folder): count for folder, count in counts.items() if count > 16} == {}


def literals(path: Path) -> Iterator[str]:
    """The texts of a file, except the flags that the rules of the recipe declare."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = {
        id(keyword.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "flag"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in declared:
            yield node.value


def test_the_library_speaks_of_arguments_not_of_flags() -> None:
    """The command line translates arguments into its flags. Commands that a text gives whole may have flags."""
    wrong = {}
    for path in (ROOT / "condconv_surgery").rglob("*.py"):
        for text in literals(path):
            without_commands = re.sub(r"(pip install|torchrun|condconv finetune --recipe)[^,;]*", "", text)
            if flags := re.findall(r"(?<![\w-])--[a-z][\w-]*", without_commands):
                wrong[f"{path.relative_to(ROOT)}: {text[:60]}"] = flags
    assert wrong == {}


def test_errors_and_recipe_need_no_torch() -> None:
    code = "import sys, condconv_surgery, condconv_surgery.recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


DISTRIBUTIONS = {
    "PIL": "pillow",
    "pillow_heif": "pillow-heif",
    "litert_torch": "litert-torch",
    "ai_edge_litert": "ai-edge-litert",
    "onnx_ir": "onnx-ir",
}
"""Of a module that is imported under another name."""

STANDARD = sys.stdlib_module_names | {"tomllib"}  # since Python 3.11; on 3.10 it is tomli

WITH_TORCH = {"triton", "typing_extensions"}
"""Installed by torch."""


def test_every_third_party_import_is_declared() -> None:
    project = parse_toml((ROOT / "pyproject.toml").read_text(encoding="utf-8"), "pyproject.toml")["project"]
    extras = [name for extra, names in project["optional-dependencies"].items() if extra != "dev" for name in names]
    declared = {re.split(r"[^\w.-]", name)[0].lower() for name in [*project["dependencies"], *extras]}
    undeclared = {}
    for path in [*(ROOT / "condconv_surgery").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names} - STANDARD - WITH_TORCH - {"condconv_surgery"}:
                if DISTRIBUTIONS.get(name, name) not in declared:
                    undeclared[name] = path.name
    assert not undeclared


@pytest.mark.slow
def test_a_built_wheel_works_from_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True, system_site_packages=False)
    python = tmp_path / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    assert not (site / "cli").exists()
    assert (site / "condconv_surgery" / "cli" / "main.py").exists()
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    for command in ([str(tmp_path / "env" / "bin" / "condconv")], [str(python), "-m", "condconv_surgery"]):
        done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert all(name in done.stdout for name in ("convert", "finetune", "report"))


def test_no_top_level_cli_is_installed() -> None:
    code = "import importlib.util; print(importlib.util.find_spec('cli'))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "resnet18.condconv.safetensors").exists()
