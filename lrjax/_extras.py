import importlib
from types import ModuleType


def load(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: the module, as ``import`` names it.
        extra: the extra of this package that installs it.
        purpose: what needs it, as the start of a sentence.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.split('.')[0]}, which is not installed: pip install "
            f"'lrjax[{extra}]'."
        ) from error
