"""Packaging: the version, and `configs/` and `benchmarks/` carried inside the wheel beside the code that reads them."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (ROOT / "kdmos" / "__init__.py").read_text()).group(1)

setup(
    version=version,
    packages=[*find_packages(include=["kdmos", "kdmos.*"]), "kdmos.configs", "kdmos.benchmarks"],
    package_dir={"kdmos.configs": "configs", "kdmos.benchmarks": "benchmarks"},
    include_package_data=False,
    package_data={"kdmos": ["weights/*"], "kdmos.configs": ["*.yaml"]},
)
