"""Sphinx: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import inspect
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx


HERE = Path(__file__).parent
AT_THE_TOP = {"CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
OTHERS = {"diffrax", "eqx", "jax", "jnp", "optax"}  # their Schedule is not ours
sys.path.insert(0, str(HERE))

import _generate  # noqa: E402
import _signatures  # noqa: E402

import lrjax  # noqa: E402


project = "lrjax"
author = "The lrjax authors"
release = lrjax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_*"]
nitpicky = True

html_theme = "furo"
html_title = f"lrjax {release}"
html_static_path = ["_static"]
html_css_files = ["lrjax.css"]
html_show_sphinx = False
html_show_copyright = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the test suite runs the notebooks; their stored output is shown

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Reference"]
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"


def write_pages(app: Sphinx, config) -> None:
    """Write the generated pages, touching none that is as it should be."""
    pages = _generate.pages()
    for stale in {*HERE.glob("rooms/*"), *HERE.glob("notebooks/*")}:
        if f"{stale.parent.name}/{stale.name}" not in pages:
            stale.unlink()
    for name, text in pages.items():
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def skip_fields(app, what, name, member, skip, options) -> bool | None:
    """Leave out fields: the Attributes section of the class tells what they are."""
    method = inspect.isroutine(member) or isinstance(member, property)
    return None if method and inspect.getdoc(member) else True


def resolve(app: Sphinx, env, node, contnode):
    """Find what a docstring names in short: ``Basis``, ``solve``, ``lrjax.recipes.fira``.

    Types in signatures that are not ours, ``Float[Array, "m n"]`` say, stay plain text.
    """
    if node.get("refdomain") != "py":
        return None
    target, here = node["reftarget"], node.get("refdoc", "")
    paths = _generate.public_paths()
    parts = target.split(".")
    depths = () if parts[0] in OTHERS else range(1, len(parts) + 1)
    for depth in depths[:2]:  # a name, or a method of a class
        name, rest = parts[-depth], parts[len(parts) - depth + 1 :]
        named = [path for path, (_, public) in paths.items() if public == name]
        nearest = [path for path in named if here == f"rooms/{paths[path][0]}"]
        for path in nearest or named[: len(named) == 1]:
            full = ".".join([path, *rest])
            found = env.domains.python_domain.resolve_xref(
                env, here, app.builder, "obj", full, node, contnode
            )
            if found is not None:
                return found
    in_signature = not isinstance(contnode, nodes.literal)
    return contnode if in_signature else None


def link_names(app: Sphinx, doctree) -> None:
    """Link what the hand-written pages call by name: `solve`, `recovery.spectrum`."""
    here = app.env.docname
    if here.startswith(("rooms/", "notebooks/")):
        return
    paths = {path.removeprefix("lrjax."): path for path in _generate.public_paths()}
    for literal in list(doctree.findall(nodes.literal)):
        path = paths.get(literal.astext().removeprefix("lrjax."))
        if path and not isinstance(literal.parent, pending_xref | nodes.reference):
            link = pending_xref("", literal.deepcopy(), refdomain="py", reftype="obj")
            link.attributes |= {"reftarget": path, "refdoc": here, "refexplicit": True}
            literal.replace_self(link)


def link_top(app: Sphinx, doctree) -> None:
    """Link what the README calls by its place in the repository, outside of this folder."""
    for link in doctree.findall(pending_xref):
        page = AT_THE_TOP.get(link["reftarget"])
        if page:
            link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", page, None


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("config-inited", write_pages)
    app.connect("autodoc-process-signature", _signatures.as_written)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-read", link_names)
    app.connect("doctree-read", link_top)
    app.connect("missing-reference", resolve)
