"""Builds the documentation: Sphinx with MyST and furo; warnings are errors (`make docs`)."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import statefeed

project = "statefeed"
author = copyright = "The statefeed authors"
release = version = statefeed.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "statefeed"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"  # what browsers draw themselves: the pages need no script and no network
pygments_style = "tango"
pygments_dark_style = "monokai"

autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "pytorch_lightning", "transformers"]  # bases of the callbacks
autodoc_typehints = "signature"
autodoc_type_aliases = {"FeedbackLike": "FeedbackLike"}
python_maximum_signature_line_length = 88
napoleon_use_ivar = True  # attributes are listed in the class, not each as an entry of its own
viewcode_follow_imported_members = True

# Sections of our docstrings that napoleon does not know. Their text begins on the line of their name, so they become
# fields beside "Parameters" and "Raises".
_OWN_SECTION = re.compile(r"(Gradient|Cost): (?=\S)")


def _own_sections(_app, what, _name, _object, _options, lines):
    inside = False
    # napoleon takes what stands before a colon in the first line of a property for its type.
    result = [""] if what == "property" else []
    for line in lines:
        if match := _OWN_SECTION.match(line):
            result.append(f":{match[1]}: {line[match.end() :]}")
            inside = True
        elif inside and line and not line[0].isspace():
            inside = False
            result += [line] if not result[-1] else ["", line]
        else:
            result.append(line)
    lines[:] = result


def _formula(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def _named_aliases(_app, _what, _name, _object, _options, signature, returned):
    """Write an alias in a union by its name; Sphinx writes the class that stands for it."""
    return signature and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature), returned


def setup(app):
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    app.connect("autodoc-process-docstring", _own_sections, priority=100)  # before napoleon, which runs at 500
    app.connect("autodoc-process-signature", _named_aliases)
