"""Sphinx's settings: ``make docs`` builds the site from the repository's root, so that README's links work in both."""

from __future__ import annotations

from resnet_fused import __version__

project = "resnet_fused"
author = "the resnet_fused authors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/*.md",
    "examples/README.md",
    "benchmarks/RESULTS.md",
]
exclude_patterns = ["build", "runs", ".venv", "**/.*"]
html_extra_path = ["index.html"]  # sends visitors of the site's root to README
html_theme = "furo"
html_title = f"resnet_fused {release}"

myst_heading_anchors = 3  # as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Names of types that a reader finds in PyTorch's documentation; links to it would need the network.
nitpicky = False
