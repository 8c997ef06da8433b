"""What `pip install` takes along."""

from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parent.parent


def test_every_folder_of_the_package_is_found():
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "kdmos").rglob("*.py")}
    packages = find_packages(ROOT, include=["kdmos", "kdmos.*"])
    assert {".".join(folder.parts) for folder in folders} == set(packages)
