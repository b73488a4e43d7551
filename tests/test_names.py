"""One meaning each: the words that public names and arguments are made of."""

import inspect
import re
import types

import pytest

import lrjax


# What is not said, what is said in its place, and where the word stands for something
# else or is part of an interface that other people's code calls.
ARGUMENTS = {
    "reg": ("nuclear_weight, sparse_weight or ridge", ()),
    "lam": ("nuclear_weight, sparse_weight or ridge", ()),
    "l2": ("ridge", ()),
    "weight": (
        "nuclear_weight (of a nuclear norm) or sparse_weight (of a sparse part)",
        (
            "transforms.add_nuclear_norm",  # fixed
            "transforms.add_anchor",  # of the pull to any point
            "transforms.amplify_slow",  # of the amplified part
            "subspaces.Residual",  # of what a lift adds
            "subspaces.SignResidual",
            "flows.end_to_end_velocity",  # a weight matrix
            "lowrank.edit_weight",
            "compression.folded_factors",
            "nn.LowRankLinear.from_node",  # the weight of a layer
            "nn.LowRankConv.from_node",
            "nn.LowRankEmbedding.from_node",
            "nn.SparsePlusLowRankLinear.from_node",
            "nn.TuckerConv.from_node",
            "nn.replace_weight",
            "compression.weighted_factors",
        ),
    ),
    "others": ("fallback", ()),
    "growth": ("max_growth, or what grows: penalty_growth", ()),
    "max_iter": ("max_steps", ()),
    "maxiter": ("max_steps", ()),
    "num_steps": ("steps, or max_steps for an upper limit", ()),
    "iterations": ("steps, or max_steps for an upper limit", ()),
    "beta1": ("b1", ()),
    "beta2": ("b2", ()),
    "betas": ("b1 and b2", ()),
    "decay": (
        "momentum, or b1 and b2 in the Adam family",
        (
            "recovery.alternating_projections",  # of a threshold
            "recovery.geometric_layers",  # of a threshold
            "recipes.soap",  # of the statistics that are no momentum
            "subspaces.EmaGram",
            "transforms.amplify_slow",
            "transforms.rotate_updates",
        ),
    ),
    "alpha": (
        "std, scale or what it is",
        (
            *(f"adapters.{kind}" for kind in ("LoRA", "DoRA", "LoRAXS", "TiedLoRA")),
            *(
                f"adapters.{kind}"
                for kind in ("AdaLoRA", "SoRA", "DyLoRA", "NLS", "IncreLoRA")
            ),
            *(f"adapters.{kind}" for kind in ("CapaBoost", "GraLoRA", "LoHa", "LoKr")),
            *(f"adapters.{kind}" for kind in ("NoRA", "LoLDU", "PMSS", "EigenLoRAx")),
            *(f"adapters.{kind}" for kind in ("LoTR", "PoLAR", "StelLA", "BoRA", "NOLA")),
            "adapters.RandLoRA",
            "flows.half_learning_times",
        ),
    ),
    "rng": ("key", ()),
    "seed": ("key", ()),
}
# ``rows`` are rows of a matrix, or their indices.
ROWS = {
    "linalg.RowSample",
    "recovery.representer_points",
    "recovery.Entries",
    "recovery.MatrixEntries",
    "recovery.fit_completion",
    "recovery.CompletionFit.predict",
    "recovery.CompletionFit.transform",
    "recovery.RobustPCAFit.transform",
    "recovery.RobustPCAFit.update",
    "recovery.SubspaceTracker.track",
    "recovery.SubspaceTracker.update",
    "recovery.matrix_completion.from_data",
    "subspaces.MatrixSpec",
}
NAMES = {
    "Moment": "FlowState",
    "Carry": "MomentTransport",
    "Change": "BasisChange",
    "Turn": "ScheduleContext",
    "Plan": "MatrixLeaf",
    "Leaf": "MatrixLeaf",
    "Loop": "SubspaceConfig",
    "Rows": "Projector",
    "Roles": "MomentFields",
    "register_roles": "register_moments",
    "Codes": "BlockQuantized",
    "scale_by_level": "scale_by_target_level",
    "scale_by_low_rank_curvature": "scale_by_psgd",
    "learned_descent": "learned_robust_pca",
}
# Constructors of problems take the key first.
KEY_FIRST = {
    f"recovery.{name}"
    for name in (
        "matrix_completion",
        "matrix_sensing",
        "phase_retrieval",
        "robust_pca",
        "spiked_model",
    )
}
FIELDS = {
    "iterations": "steps",
    "n_iter": "steps",
    "taken": "steps",
    "is_converged": "converged",
}


def rooms():
    """The public rooms by name; sweep is a function in a room of its own."""
    return {
        name: room
        for name, room in vars(lrjax).items()
        if isinstance(room, types.ModuleType) and hasattr(room, "__path__")
        if not name.startswith("_")
    }


def public():
    """Every public function, class and public method of every room, by its name."""
    found = {"sweep": lrjax.sweep}
    for room, module in rooms().items():
        for name, value in vars(module).items():
            if name.startswith("_") or isinstance(value, types.ModuleType):
                continue
            if not callable(value):
                continue
            found[f"{room}.{name}"] = value
            if inspect.isclass(value):
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if inspect.isfunction(function) and not method.startswith("_"):
                        found[f"{room}.{name}.{method}"] = function
    return found


def parameters(value):
    """The parameters of a call, that of a class without ``self``."""
    call, own = value, 0
    if inspect.isclass(value) and not is_record(value):
        # Problems are functions that are called as classes: they have no __init__.
        makers = [f for f in (value.__init__, value.__new__) if inspect.isfunction(f)]
        call, own = (makers[0], 1) if makers else (value, 0)
    try:
        return list(inspect.signature(call).parameters.values())[own:]
    except (TypeError, ValueError):  # built-in types
        return []


def is_record(value):
    return inspect.isclass(value) and issubclass(value, tuple)


PUBLIC = public()


def test_every_room_is_looked_at():
    ones = ("adapters", "flows", "linalg", "lowrank", "metrics", "recipes", "recovery")
    assert {*ones, "subspaces", "transforms"} <= set(rooms())
    assert len(PUBLIC) > 200


@pytest.mark.parametrize("word", ARGUMENTS)
def test_arguments_are_called_what_the_field_calls_them(word):
    instead, exceptions = ARGUMENTS[word]
    said = {
        name
        for name, value in PUBLIC.items()
        if word in [p.name for p in parameters(value)]
    }
    assert said <= set(exceptions), f"say {instead} in place of {word}"


def test_rows_are_rows():
    said = {
        name
        for name, value in PUBLIC.items()
        if "rows" in [p.name for p in parameters(value)]
    }
    assert said <= ROWS, "say what it is in place of rows"


@pytest.mark.parametrize("word", NAMES)
def test_nothing_goes_by_an_old_name(word):
    found = [name for name in PUBLIC if name.split(".")[-1] == word]
    assert not found, f"call it {NAMES[word]}"


def test_initializations_are_called_init():
    assert not [name for name in PUBLIC if re.search(r"_start$", name)]


def test_keys_are_keywords():
    """But for problems, which are made from a key."""
    for name, value in PUBLIC.items():
        if is_record(value) or name.count(".") > 1:  # methods follow their protocol
            continue
        for place, parameter in enumerate(parameters(value)):
            if parameter.name != "key":
                continue
            if name in KEY_FIRST:
                assert place == 0, name
            else:
                assert parameter.kind is parameter.KEYWORD_ONLY, f"{name}(*, key)"


def test_an_upper_limit_of_steps_is_max_steps():
    """``solve`` alone, whose signature is fixed, calls it steps."""
    for name, value in PUBLIC.items():
        documented = re.search(r"^\s*steps: (.*)$", inspect.getdoc(value) or "", re.M)
        if "steps" in [p.name for p in parameters(value)] and documented:
            limit = re.search("at most|up to", documented[1]) is not None
            assert limit == (name == "recovery.solve"), name


def test_results_have_steps_and_converged():
    for name, value in PUBLIC.items():
        if inspect.isclass(value):
            fields = set(getattr(value, "__annotations__", {}))
            assert not fields & set(FIELDS), f"{name}: {FIELDS}"
    for name in ("Solution", "Separation", "RobustPCAFit", "CompletionFit"):
        result = getattr(lrjax.recovery, name)
        assert "steps" in result.__annotations__, name
        assert hasattr(result, "converged") or "converged" in result.__annotations__, name
