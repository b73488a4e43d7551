"""A matrix product whose weight gradient stays one 2-D product under nested ``vmap``.

Equinox layers take one vector and are vmapped over batch and positions. The gradient of
the weight then contracts two axes at once, for which XLA on CPU first copies the large
upstream gradient into another layout. Primitives of their own in the derivative see the
batch axes come and flatten them; on other platforms, where nothing is gained and a
reshape could merge sharded axes, they lower to the plain contraction.

The product itself is ``lax.dot_general``, so that checkpoint policies and whatever else
looks for matrix products finds them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def _is_placed(x: Array) -> bool:
    """Whether JAX tracks by type where ``x`` lives: Explicit meshes and ``shard_map``."""
    aval = jax.typeof(x)
    return not aval.sharding.mesh.empty or bool(getattr(aval, "vma", ()))


def dense(x: Float[Array, "... n"], weight: Float[Array, "m n"]) -> Float[Array, "... m"]:
    """``x @ weight.T`` for an input with any leading axes and a weight that is trained."""
    x, weight = _promoted(x, weight)
    if _is_placed(x) or _is_placed(weight):
        return _contract(x, weight)
    return _product(x, weight)


def frozen_dense(
    x: Float[Array, "... n"], weight: Float[Array, "m n"]
) -> Float[Array, "... m"]:
    """The same for a weight that gets no gradient: ``lax.dot_general`` and no more.

    Not by ``stop_gradient``: what that gives is no argument of a scanned function any
    more, so that ``scan`` would keep a copy of every weight for the gradient.
    """
    return _frozen_product(*_promoted(x, weight))


def _promoted(x, weight):
    dtype = jnp.result_type(x, weight)
    return x.astype(dtype), weight.astype(dtype)


@jax.custom_jvp
def _product(x, weight):
    return _contract(x, weight)


def _product_jvp(primals, tangents):
    (x, weight), (dx, dweight) = primals, tangents
    # Plain products, not calls of a function: a checkpoint policy does not look into those.
    y = _contract(x, weight)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_contract(dx, weight))
    if not isinstance(dweight, SymbolicZero):
        terms.append(_dense_p.bind(x, dweight))
    return y, sum(terms[1:], terms[0])


_product.defjvp(_product_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _frozen_product(x, weight):
    return _contract(x, weight)


def _frozen_product_jvp(primals, tangents):
    (x, weight), (dx, _) = primals, tangents
    y = _contract(x, weight)
    still = isinstance(dx, SymbolicZero)
    return y, jnp.zeros_like(y) if still else _contract(dx, weight)


_frozen_product.defjvp(_frozen_product_jvp, symbolic_zeros=True)


def _contract(x, weight):
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _flat(x, weight):
    return _contract(_rows(x), weight).reshape(*x.shape[:-1], weight.shape[0])


def _contract_lead(cotangent, x):
    """``Σ cotangent xᵀ`` over all leading axes, ``(m, n)``."""
    lead = tuple(range(x.ndim - 1))
    return lax.dot_general(cotangent, x, ((lead, lead), ((), ())))


def _thin_first(cotangent, x):
    """The same on CPU, where the product with the thin matrix first is 3-7 × faster.

    The barrier keeps XLA from folding the transposition back into the product. Batched
    products stay without one: XLA on CPU aborts on their layouts.
    """
    contract = lambda a, b: lax.dot_general(a, b, (((0,), (0,)), ((), ())))
    cotangent, x = _rows(cotangent), _rows(x)
    if cotangent.shape[1] <= x.shape[1]:
        return lax.optimization_barrier(contract(cotangent, x))
    return lax.optimization_barrier(contract(x, cotangent)).T


def _batch(args, axes):
    (x, weight), (x_axis, weight_axis) = args, axes
    if weight_axis is None:
        return _dense_p.bind(jnp.moveaxis(x, x_axis, 0), weight), 0
    return jax.vmap(_flat, (x_axis, weight_axis))(x, weight), 0


def _batch_gradient(args, axes):
    return jax.vmap(_contract_lead, axes)(*args), 0


def _bilinear(name, shape, lowerings, batch, transposes):
    """A primitive linear in either of two arguments, lowered differently on CPU."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(primitive.bind))
    primitive.def_abstract_eval(lambda a, b: ShapedArray(shape(a, b), a.dtype))
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = batch
    for platform, function in lowerings.items():
        rule = mlir.lower_fun(function, multiple_results=False)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


_dense_p = _bilinear(
    "lrjax_dense",
    lambda x, weight: (*x.shape[:-1], weight.shape[0]),
    {None: _contract, "cpu": _flat},
    _batch,
    (
        lambda cotangent, x, weight: dense(cotangent, weight.T),
        lambda cotangent, x, weight: _gradient_p.bind(cotangent, x),
    ),
)
_gradient_p = _bilinear(
    "lrjax_dense_gradient",
    lambda cotangent, x: (cotangent.shape[-1], x.shape[-1]),
    {None: _contract_lead, "cpu": _thin_first},
    _batch_gradient,
    (
        lambda outer, cotangent, x: dense(x, outer),
        lambda outer, cotangent, x: dense(cotangent, outer.T),
    ),
)
