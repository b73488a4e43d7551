"""The version is that of the package; a checkout without an installation imports."""

import importlib.metadata
from pathlib import Path

import lrjax


def test_version_is_that_of_the_metadata():
    assert lrjax.__version__ == importlib.metadata.version("lrjax")


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    scope = {"__name__": "lrjax", "__package__": "lrjax"}
    exec(Path(lrjax.__file__).read_text(), scope)
    assert scope["__version__"] == "0+unknown"
