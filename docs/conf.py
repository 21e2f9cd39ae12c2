"""How Sphinx makes the site: `make docs`. Guides are Markdown, the reference is made from the docstrings."""

import re

from docutils import nodes
from sphinx.addnodes import pending_xref

import torch_subspace
import torch_subspace.grassmann
import torch_subspace.metrics
import torch_subspace.peft

project = "torch-subspace"
author = copyright = "torch-subspace developers"
release = version = torch_subspace.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "torch-subspace"
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # what torch says of forward() is of no use
autodoc_typehints = "none"  # the docstrings say it, with shapes
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]

# `name` in a docstring is a link where the name is public, else code.
PUBLIC = {
    **{name: f"torch_subspace.{name}" for name in [*torch_subspace.__all__, "ManifoldClustering"]},
    **{f"grassmann.{name}": f"torch_subspace.grassmann.{name}" for name in torch_subspace.grassmann.__all__},
    **{name: f"torch_subspace.metrics.{name}" for name in torch_subspace.metrics.__all__},
    **{f"torch_subspace.peft.{name}": f"torch_subspace.peft.{name}" for name in torch_subspace.peft.__all__},
}
default_role = "name"
nitpicky = True
# Names of other libraries, whose inventories lie on the network.
nitpick_ignore_regex = [(r"py:.*", r"(?!torch_subspace\b).*")]


def name_role(role, rawtext, text, lineno, inliner, options=None, content=None):
    """A public name, also with `torch_subspace.` or `ts.` before it."""
    short = re.sub(r"^(ts|torch_subspace)\.(?=(grassmann\.)?\w+$)", "", text)
    code = nodes.literal(text, text)
    if short not in PUBLIC:
        return [code], []
    where = {"refdomain": "py", "reftype": "obj", "reftarget": PUBLIC[short], "refwarn": True, "refexplicit": True}
    return [pending_xref("", code, refdoc=inliner.document.settings.env.docname, **where)], []


def setup(app):
    app.add_role("name", name_role)
