"""Packaging of vcm_jax; the requirements live in requirements.txt alone."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
REQUIREMENTS = [
    line.strip()
    for line in (HERE / "requirements.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]
COMMANDS = runpy.run_path(str(HERE / "vcm_jax/console.py"))["COMMANDS"]

setup(
    name="vcm_jax",
    version="0.1.0",
    description="Few-step video-to-audio models in JAX: velocity consistency and its siblings",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    # The configs are named by path in a checkout, and also by name once they are installed.
    packages=[*find_packages(include=["vcm_jax", "vcm_jax.*"]), "vcm_jax.configs"],
    package_dir={"vcm_jax.configs": "configs"},
    entry_points={"console_scripts": [f"{name} = vcm_jax.console:start" for name in COMMANDS]},
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require={
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "torch": ["torch>=2.6,<2.14", "ftfy>=6"],
        "web": ["gradio>=6.31,<7"],
        "browser": ["playwright>=1.55", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.14",
            "pillow>=11",
            "portpicker",
        ],
    },
)
