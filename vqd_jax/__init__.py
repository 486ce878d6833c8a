"""VQ-Diffusion in JAX: text to image by discrete diffusion over VQGAN codes."""
