"""VQ-Diffusion in JAX: text to image by discrete diffusion over VQGAN codes."""

from typing import Any


def __getattr__(name: str) -> Any:
    """``VQDiffusion`` and ``__version__``. Only who asks for the model waits for JAX."""
    if name == "VQDiffusion":
        from vqd_jax.pipeline import VQDiffusion

        return VQDiffusion
    if name == "__version__":
        from importlib import metadata

        return metadata.version("vqd_jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
