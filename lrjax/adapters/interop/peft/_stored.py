"""Whole weights and biases as torch stores them, for what is trained beside adapters."""

import jax.numpy as jnp
import numpy as np

from .._names import Module


def as_stored(module: Module, matrix: np.ndarray) -> np.ndarray:
    """The weight of a module in the axes of torch."""
    site = module.site
    if site.kind == "vector":
        return matrix[:, 0]
    if module.experts:
        return np.asarray(site.put(jnp.asarray(matrix), None))
    if module.is_embedding and not module.is_transposed:
        return matrix.T
    if module.kernel:
        return matrix.reshape(len(matrix), *module.kernel)
    return matrix


def as_matrix(module: Module, stored: np.ndarray) -> np.ndarray:
    """The matrix of a weight in the axes of torch; its shape is not checked."""
    site = module.site
    if site.kind == "vector":
        return stored.reshape(-1, 1)
    if module.experts:
        same = stored.shape == site.layer.shape
        return np.asarray(site.of(stored).matrix()) if same else stored
    if module.is_embedding and not module.is_transposed:
        return stored.T
    return stored.reshape(len(stored), -1) if stored.ndim > 1 else stored


def base_bias(module: Module, modules: dict[str, Module]) -> np.ndarray | None:
    """The bias that the model has there, ``(out,)``."""
    site = module.site
    if site.bias is not None:
        return np.asarray(site.bias[module.index]).reshape(-1)
    beside = modules.get(f"{module.name}.bias")
    if beside is None or beside.site.kind != "vector":
        return None
    return np.asarray(beside.site.layer)
