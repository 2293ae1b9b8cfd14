"""The wheel is `laqjax` alone and needs five packages; the source distribution is the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import laqjax
from tests.support import MODULES, ROOT

NAME = f"laqjax-{laqjax.__version__}"
NEEDED = {"jax", "jaxlib", "jaxtyping", "numpy", "optax"}
METADATA = ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"
(README_BLOCK, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: git says what belongs to it")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and not name.startswith(".")]


def build(what: str, source: Path, out: Path) -> Path:
    """By the backend itself: nothing is fetched."""
    subprocess.run([sys.executable, "-W", "error", "-c", BUILD, what, str(out)], cwd=source, check=True)
    (made,) = out.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files: what lies about beside them is in no package."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as it would lie in site-packages."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_is_the_library_alone(installed: Path) -> None:
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert "laqjax/py.typed" in found
    library = {name for name in tracked() if name.startswith("laqjax/")}
    assert found == library | {f"{NAME}.dist-info/{name}" for name in METADATA}
    (own,) = distributions(path=[str(installed)])
    assert {Requirement(line).name for line in own.requires or () if "extra ==" not in line} == NEEDED


def test_the_source_distribution_is_the_checkout(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", checkout, tmp_path)) as archive:
        found = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert not set(tracked()) - found
    assert not [name for name in found if "__pycache__" in name]
    again = build("wheel", tmp_path / NAME, tmp_path)
    contents = [{one.filename: one.CRC for one in zipfile.ZipFile(path).infolist()} for path in (wheel, again)]
    assert contents[0] == contents[1]


def test_the_library_needs_nothing_else(installed: Path) -> None:
    """All that is installed here but would not come with the wheel is made to be absent."""
    coming, more = {"laqjax"}, NEEDED
    while more:
        coming |= more
        more = {canonicalize_name(name) for one in more for name in needs(one)} - coming
    absent = [
        name for name, owners in packages_distributions().items() if not coming & set(map(canonicalize_name, owners))
    ]
    assert {"beartype", "hypothesis", "pytest"} <= set(absent)
    first = f"import sys; sys.modules.update(dict.fromkeys({[*absent, 'experiments']!r}))\n"
    public = [name for name in MODULES if not name.startswith("laqjax.federation")]  # with the extra `[flower]`
    check = f"\nassert laqjax.__file__.startswith({str(installed)!r})\nimport importlib\nlist(map(importlib.import_module, {public}))"
    run(sys.executable, first + README_BLOCK + check, installed, PYTHONPATH=str(installed))


@pytest.mark.long
def test_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    reached = subprocess.run([*pip, "download", "--retries", "0", "--no-deps", "--dest", str(tmp_path), "jaxtyping"])
    if reached.returncode:
        pytest.skip("no package index answers")
    subprocess.run([*pip, "install", str(wheel)], check=True)
    subprocess.run([*pip, "check"], check=True)
    run(python, README_BLOCK, tmp_path)


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {laqjax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def needs(name: str) -> list[str]:
    """What pip installs with a distribution, one step on."""
    try:
        lines = map(Requirement, requires(name) or ())
    except PackageNotFoundError:  # of another platform
        return []
    return [line.name for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})]


def run(python: str, program: str, folder: Path, **env: str) -> None:
    """Elsewhere than in the checkout, warnings being errors."""
    mine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-W", "error", "-c", program], cwd=folder, env=mine | env, check=True)
