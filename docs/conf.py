"""How Sphinx makes the site: `make docs`. Guides are Markdown, the reference is made from the docstrings."""

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref

import torch_subspace
import torch_subspace.peft

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from names import HOMES  # noqa: E402

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
PUBLIC = {f"{home}.{name}" for home, names in HOMES.items() for name in names}
default_role = "name"
nitpicky = True
# Names of other libraries, whose inventories lie on the network.
nitpick_ignore_regex = [(r"py:.*", r"(?!torch_subspace\b).*")]


def name_role(role, rawtext, text, lineno, inliner, options=None, content=None):
    """A public name of where the docstring is, or of the package; also with `torch_subspace.` or `ts.` before it."""
    env, short = inliner.document.settings.env, re.sub(r"^(ts|torch_subspace)\.", "", text)
    code = nodes.literal(text, text)
    for home in (env.ref_context.get("py:module"), "torch_subspace"):
        if f"{home}.{short}" in PUBLIC:
            where = {"refdomain": "py", "reftype": "obj", "reftarget": f"{home}.{short}", "refwarn": True}
            return [pending_xref("", code, refdoc=env.docname, refexplicit=True, **where)], []
    return [code], []


def setup(app):
    app.add_role("name", name_role)
