"""Low-rank fits of weights on data, from their equations, by NumPy in float64."""

import numpy as np


def output_space(weight, inputs, rank):
    """``V Vᵀ W`` with the leading eigenvectors of ``E[y yᵀ]``, ``y = W x``."""
    outputs = inputs @ weight.T
    basis = _leading(outputs.T @ outputs / len(inputs), rank)
    return basis @ (basis.T @ weight)


def mimicked_features(weight, bias, inputs, rank):
    """Two layers with biases that give the outputs behind their principal components.

    ``W₁ = Vᵀ W``, ``b₁ = Vᵀ b``, ``W₂ = V``, ``b₂ = (I − V Vᵀ) ȳ``; as one weight and bias.
    """
    outputs = inputs @ weight.T + bias
    mean = outputs.mean(axis=0)
    centred = outputs - mean
    basis = _leading(centred.T @ centred / len(inputs), rank)
    first, inner = basis.T @ weight, basis.T @ bias
    outer = mean - basis @ (basis.T @ mean)
    return basis @ first, basis @ inner + outer


def eigenspace_correction(residual, inputs, rank):
    """SVD of ``D Q Λ^½``, and back by ``Λ^(−½) Qᵀ``, with ``E[x xᵀ] = Q Λ Qᵀ``."""
    values, vectors = np.linalg.eigh(inputs.T @ inputs / len(inputs))
    u, s, vt = np.linalg.svd(residual @ vectors * np.sqrt(values), full_matrices=False)
    back = (vt[:rank] / np.sqrt(values)) @ vectors.T
    return (u[:, :rank] * s[:rank]) @ back, np.sum(s[rank:] ** 2)


def utilized(weight, inputs, of_outputs, of_inputs):
    """``P_T W P_S`` with the leading eigenvectors of outputs and of inputs."""
    outputs = inputs @ weight.T
    left = _leading(outputs.T @ outputs, of_outputs)
    right = _leading(inputs.T @ inputs, of_inputs)
    return left @ left.T @ weight @ right @ right.T


def two_sided_error(error, inputs, gradients):
    """The mean of ``(gᵀ E x)²`` over all pairs of a gradient and an input."""
    return np.mean((gradients @ error @ inputs.T) ** 2)


def _leading(moment, rank):
    return np.linalg.eigh(moment)[1][:, ::-1][:, :rank]
