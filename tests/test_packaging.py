"""The wheel: it holds the tree's packages and nothing else, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {package: ROOT / folder for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}

IMPORT_EVERYTHING = """
import importlib, pathlib, pkgutil, align
names = [module.name for module in pkgutil.walk_packages(align.__path__, "align.") if module.name != "align.__main__"]
for name in names:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(pathlib.Path(align.__file__).parent), module.__file__
print(pathlib.Path(align.__file__).parent)
print(*names)
"""


def source_files() -> Iterator[tuple[str, Path]]:
    """(path in the wheel, path in the checkout) of each file of the folders that install."""
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}", path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy, so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS.values():
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    return target


def run_installed(site: Path, cwd: Path, *arguments: str) -> str:
    """Python in an empty folder; ``-S`` keeps the editable install of the checkout out of reach."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), sysconfig.get_path("purelib")])}
    command = [sys.executable, "-S", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_folders_and_nothing_else(wheel: Path) -> None:
    """Every module, recipe, data file and template of the tree is in it; site-packages gets only `align`."""
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.startswith("align_lm-")}
    assert names - metadata == {name for name, _ in source_files()}
    assert {"align/py.typed", "align/recipes/quickstart.yaml"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_declared_packages_are_the_folders_with_an_init() -> None:
    found = {
        name.removesuffix("/__init__.py").replace("/", ".")
        for name, path in source_files()
        if path.name == "__init__.py"
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_installed_modules_all_import_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    home, names = run_installed(site, tmp_path, "-c", IMPORT_EVERYTHING).splitlines()[-2:]
    assert Path(home) == site / "align"
    assert {"align.losses.pairwise", "align.evals", "align.rewards", "align.decoding", "align.recipes"} <= set(
        names.split()
    )
    assert not list(tmp_path.iterdir())


def test_installed_command_answers_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    assert "train" in run_installed(site, tmp_path, "-m", "align", "--help")
    assert "quickstart" in run_installed(site, tmp_path, "-m", "align", "recipes", "ls")


def test_constraints_pin_every_dependency_within_its_range() -> None:
    """A dependency that constraints.txt does not name would be whatever is newest on the day of `make`."""
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["build-system"]["requires"],
        *(r for extra in extras for r in extra),
    ]
    for requirement in map(Requirement, declared):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not pinned"
        assert pin in requirement.specifier, f"{requirement.name}=={pin} is outside {requirement}"
