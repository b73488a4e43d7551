from collections.abc import Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from .._arguments import check_key
from .._sites import (
    Call,
    InputStatistic,
    Site,
    Where,
    check_used_once,
    find_sites,
    flat_leaves,
    fold_in_path,
    over_batch,
    pick,
    sums_of_inputs,
)
from ..linalg import nonzero, orthonormalize, outer, times, working_dtype
from ..subspaces import append_directions
from ._input_spectrum import count_by_energy, count_by_smallest, left_over


class InputBases(eqx.Module):
    """For each layer the directions of its inputs that later steps leave alone.

    ``U ← U − U M Mᵀ`` for the update U of a weight ``(out, in)``, with orthonormal columns
    ``M (in, k)``: an input in their span gives what it gave, ``U x = 0``. Where the inputs
    of a task lie in the spans of all layers the whole model keeps its answers to them. A
    bias belongs to the weight, as that of an input that is always one: of a layer with a
    bias M has ``in + 1`` rows, for ``[x; 1]`` and ``[W, b]``.

    The layers are those of an unmodified model: linear ones and convolutions, by their
    patches, also stacked for ``lax.scan``; but no head or embedding, by default. What is
    no layer of these, as the scale of a norm, is not protected.

    At the end of a task it grows by what the task has fed to the layers, of which sums
    alone are kept, the second moments ``C = Σ x xᵀ``:

    - *Gradient projection memory (GPM)*: ``energy``, the fewest directions, behind those
      that are there, with which all but ``1 − energy`` of ``Σ ‖x‖²`` is protected.
    - *Adam-NSCL*: ``smallest``, all directions but those of the eigenvalues ``λ ≤ smallest
      · λ_min`` of the C of all tasks together. An empty memory grows by the sum of all
      statistics, ``{path: old[path] + new[path] for path in new}``, which weighs tasks by
      their samples. The published code multiplies the steps by ``1/√(n − k)``, too.
    - *Federated orthogonal training (FOT)*: a sketch of ``rank`` in place of C. Statistics
      of several clients are added up, ``lax.psum`` or ``+``, and are those of all their
      data; no inputs are sent.

    Use it as ``optax.chain(optax.adamw(1e-3), lrjax.project_out(memory))``, behind
    everything that rescales entries; see :func:`lrjax.project_out`. Weights in bfloat16
    round each step, and by that much it leaves the complement: keep float32 ones.

    Attributes:
        bases: ``M (*b, in or in + 1, k)`` of each layer by its path; zero columns are free.
        kept: the share of the energy ``Σ ‖x‖²`` of the last inputs that is protected,
            ``1 − Σ ‖(I − M Mᵀ) [x; 1]‖² / Σ ‖x‖²``, negative where even that of the bias is
            missing; of each matrix of a stack. Not a number, and nothing grown, where the
            inputs had an infinite number, or none, among them.
        cut: whether there was less room than the rule asked for, in M or in the sketch.
        probes: what the sketches are taken along, ``(*b, in, rank)``; none without.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, lrjax, optax
        >>> model = eqx.nn.MLP(8, 3, 16, 1, key=jax.random.key(0))
        >>> plane = jax.random.normal(jax.random.key(1), (2, 8))
        >>> task = jax.random.normal(jax.random.key(2), (5, 20, 2)) @ plane
        >>> memory = lrjax.continual.InputBases.start(model)
        >>> memory = memory.grow(memory.statistics(model, task), energy=0.999)
        >>> memory.used["layers.0"].item(), bool(memory.kept["layers.1"] >= 0.999)
        (3, True)
        >>> tx = optax.chain(optax.adam(1e-2), lrjax.project_out(memory))
        >>> params = eqx.filter(model, eqx.is_inexact_array)
        >>> step, _ = tx.update(params, tx.init(params))
        >>> new = eqx.apply_updates(model, step)
        >>> x = task[0]
        >>> hidden = lambda model: jax.vmap(model.layers[0])(x)
        >>> bool(jnp.max(jnp.abs(hidden(new) - hidden(model))) < 1e-5)
        True

    Reference:
        G. Saha, I. Garg, K. Roy, "Gradient projection memory for continual learning"
        (2021), arXiv 2103.09762; S. Wang, X. Li, J. Sun, Z. Xu, "Training networks in null
        space of feature covariance for continual learning" (2021), arXiv 2103.07113; Y. F.
        Bakman et al., "Federated orthogonal training: mitigating global catastrophic
        forgetting in continual federated learning" (2023), arXiv 2309.01289, whose random
        combinations ``X N`` of the inputs are here those with ``N = Xᵀ Ω``: as wide, and
        they know the energy of each direction. Special case: without a bias GPM by the
        singular values of ``X``.
    """

    bases: dict[str, Float[Array, "..."]]
    kept: dict[str, Float[Array, "..."]]
    cut: dict[str, Bool[Array, "..."]]
    probes: dict[str, Float[Array, "..."]]

    @staticmethod
    def start(
        model: PyTree,
        columns: int | None = None,
        *,
        where: Where = None,
        rank: int | None = None,
        key: PRNGKeyArray | None = None,
    ) -> "InputBases":
        """An empty memory, which leaves every update as it is.

        Args:
            model: the module, or the half of it that is trained.
            columns: k, for how many directions of a layer there is room; by default for
                all of them, so that nothing is ever cut.
            where: which layers, as in :func:`lrjax.adapt`; by default all ``eqx.nn.Linear``
                and ``Conv`` but heads, embeddings and routers.
            rank: the width of the sketches, some times the directions that a task adds;
                by default the second moments are summed whole. They also hold the inputs
                along M, so that ``columns`` has to be small for a sketch to be one.
            key: for the sketches.

        Raises:
            ValueError: without room, for a layer whose inputs are not seen, or a rank
                without a key.
        """
        check_key("InputBases", key)
        if columns is not None and columns < 1:
            raise ValueError(f"InputBases needs room for a direction, got {columns}.")
        if rank is not None and (rank < 1 or key is None):
            raise ValueError(
                f"InputBases draws sketches of a rank, 1 or more, from a key: got {rank} "
                f"and {'no key' if key is None else 'a key'}."
            )
        sites = pick(find_sites(model), where, ("linear", "conv"))
        bases, probes = {}, {}
        for path, site in sites.items():
            if site.kind not in ("linear", "conv"):
                raise ValueError(
                    f"{path or 'the root'} is of the kind {site.kind!r}, and InputBases "
                    "protects the inputs of linear layers and convolutions: leave it out "
                    "with where=."
                )
            site.check()
            n, dtype = _rows(site), working_dtype(site.dtype)
            k = n if columns is None else min(columns, n)
            bases[path] = jnp.zeros((*site.stack, n, k), dtype)
            if rank is not None and key is not None and k + rank < n:
                shape = (*site.stack, site.shape[1], rank)
                drawn = jr.normal(fold_in_path(key, path), shape, dtype)
                probes[path] = orthonormalize(drawn)
        kept = {path: jnp.ones(m.shape[:-2], m.dtype) for path, m in bases.items()}
        cut = {path: jnp.zeros(m.shape[:-2], bool) for path, m in bases.items()}
        return InputBases(bases, kept, cut, probes)

    @property
    def used(self) -> dict[str, Int[Array, "..."]]:
        """How many directions of each layer there are."""
        return {
            path: jnp.sum(jnp.any(m != 0, axis=-2), axis=-1)
            for path, m in self.bases.items()
        }

    def statistics(
        self, model: PyTree, batches: Iterable[Any], *, call: Call = over_batch
    ) -> dict[str, InputStatistic]:
        """What the layers are fed on some batches, as sums: :meth:`grow` takes them.

        Some hundred samples of a task are enough. Sums of other batches, and of other
        clients with the same memory, are added with ``+`` or ``lax.psum``.

        Args:
            model: the module, whole, as it is after the task.
            batches: anything to go through once.
            call: ``(model, batch) -> outputs``, by default ``jax.vmap(model)(batch)``.

        Raises:
            ValueError: if there are no batches, or one of the layers is not reached.
        """
        sites = find_sites(model)
        if missing := sorted(self.bases.keys() - sites.keys()):
            raise ValueError(
                f"InputBases was started with a model that has layers at {missing}: this "
                "one has none there."
            )
        check_used_once(model, set(self.bases))
        along = {
            path: jnp.concatenate(
                [self.bases[path][..., : probe.shape[-2], :], probe], axis=-1
            )
            for path, probe in self.probes.items()
        }
        sums = sums_of_inputs(
            "InputBases.statistics", call, model, batches, self.bases, probes=along
        )
        # Without what they were taken along, which must not be added up.
        plain = lambda one: eqx.tree_at(
            lambda one: one.probe, one, None, is_leaf=lambda x: x is None
        )
        sums = {path: plain(one) for path, one in sums.items()}
        counts = {path: one.count for path, one in sums.items()}
        unseen = [
            path
            for path, count in counts.items()
            if not isinstance(count, Tracer) and not np.all(count > 0)
        ]
        if unseen:
            raise ValueError(
                f"No inputs were seen at {unseen}: the layer is not called in call(model, "
                "batch), has a __call__ of its own, or its output does not reach that of "
                "call in a differentiable way. Leave it out with where=."
            )
        return sums

    def grow(
        self,
        statistics: Mapping[str, InputStatistic],
        *,
        energy: ArrayLike | Mapping[str, ArrayLike] | None = None,
        smallest: ArrayLike | None = None,
    ) -> "InputBases":
        """The memory with the directions of further inputs, by one of two rules.

        Args:
            statistics: of a task, from :meth:`statistics`.
            energy: the share of ``Σ ‖x‖²`` to protect, in [0, 1], one number or one for
                each path. Second moments are sums in float32: what holds less than 1e-6 of
                the energy is not seen.
            smallest: how many times the smallest eigenvalue is still left free, 1 or more.
                Where an input is always zero that eigenvalue is zero, and nothing else is
                free: then ``energy`` is the better rule.

        Raises:
            ValueError: for none or both of the rules, or statistics of other layers.
        """
        if (energy is None) == (smallest is None):
            raise ValueError(
                "InputBases grows by one rule: energy= or smallest=, "
                f"got {'none' if energy is None else 'both'}."
            )
        if statistics.keys() != self.bases.keys():
            raise ValueError(
                f"InputBases of the layers {sorted(self.bases)} got the statistics of "
                f"{sorted(statistics)}."
            )
        if smallest is not None and self.probes:
            raise ValueError(
                "The smallest eigenvalues are not in a sketch: InputBases with a rank "
                "grows by energy=."
            )
        if isinstance(energy, Mapping) and energy.keys() != self.bases.keys():
            raise ValueError(
                f"energy= has the paths {sorted(energy)}, the layers are "
                f"{sorted(self.bases)}."
            )
        found = {}
        for path, basis in self.bases.items():
            value = energy[path] if isinstance(energy, Mapping) else energy
            one = statistics[path]
            probe = self.probes.get(path)

            def grown(basis, one, probe, value=value):
                return _grown(basis, one, probe, value, smallest)

            for _ in basis.shape[:-2]:
                grown = jax.vmap(grown)
            found[path] = grown(basis, one, probe)
        bases, kept, cut = (
            {path: values[i] for path, values in found.items()} for i in range(3)
        )
        return InputBases(bases, kept, cut, self.probes)

    def project_out(self, updates: PyTree) -> PyTree:
        """``[U, u] (I − M Mᵀ)`` of the layers; all else stays as it is.

        Args:
            updates: a tree like the model, with ``None`` for what is not trained.

        Raises:
            ValueError: if a layer is missing, or only its weight or its bias is there.
        """
        leaves, treedef = flat_leaves(updates)
        sites = find_sites(updates)
        new = {
            path: _projected(path, sites.get(path), basis)
            for path, basis in self.bases.items()
        }
        return treedef.unflatten([new.get(path, leaf) for path, leaf in leaves])


def _rows(site: Site) -> int:
    """How long an input is, with the one for a bias."""
    return site.shape[1] + (site.bias is not None)


def _grown(
    basis: Array,
    one: InputStatistic,
    probe: Array | None,
    energy: ArrayLike | None,
    smallest: ArrayLike | None,
) -> tuple[Array, Array, Array]:
    """Of one matrix: the basis, the share that it protects, whether it was cut."""
    rest = left_over(basis, one, probe)
    if energy is not None:
        wanted, more = count_by_energy(rest, energy)
    else:
        assert smallest is not None
        wanted, more = count_by_smallest(rest, smallest)
    free = basis.shape[-1] - jnp.sum(jnp.any(basis != 0, axis=0))
    count = jnp.minimum(wanted, free)
    before = jnp.arange(len(rest.values)) < count
    missing = rest.total - jnp.sum(jnp.where(before, rest.values, 0))
    kept = jnp.where(rest.finite, 1 - missing / nonzero(rest.of_inputs), jnp.nan)
    return append_directions(basis, rest.vectors, count), kept, more | (wanted > free)


def _projected(path: str, site: Site | None, basis: Array) -> Any:
    """The update of a layer without what lies in its basis."""
    has = lambda x: eqx.is_array_like(x)
    weight = None if site is None else getattr(site.layer, "weight", site.layer)
    if site is None or not has(weight):
        raise ValueError(
            f"InputBases protects the inputs of {path or 'the root'} and found no update "
            "of its weight: leave it out of InputBases.start with where= if it is not "
            "trained."
        )
    n, bias = site.shape[1], site.bias
    if basis.shape[-2] != n + has(bias):
        raise ValueError(
            f"InputBases has a basis of {basis.shape[-2]} rows for {path or 'the root'}, "
            f"whose updates have {n} inputs and {'a' if has(bias) else 'no'} bias: start "
            "it with the half of the model that is trained, eqx.filter(model, spec)."
        )
    own, part = site.matrix(), basis[..., :n, :]
    wide = own.astype(jnp.promote_types(own.dtype, basis.dtype))
    along = times(wide, part)
    if bias is None or not has(bias):
        return site.put(wide - outer(along, part), None)
    last = basis[..., n:, :]
    column = bias.reshape(*own.shape[:-1], 1).astype(wide.dtype)
    along = along + times(column, last)
    left = (column - outer(along, last)).reshape(bias.shape)
    return site.put(wide - outer(along, part), left)
