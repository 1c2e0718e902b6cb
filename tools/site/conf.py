"""Sphinx's configuration. `make docs` builds with it, and a warning fails the build: see docs/decisions/site.md."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import aiqueue  # noqa: E402 (the root of the project must be on the path first)

project = "aiqueue"
version = release = aiqueue.__version__
copyright = "the authors of aiqueue"  # noqa: A001 (the name that Sphinx reads)

# The sources are the project's own directory, so that a link has the same target here and on GitHub.
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/**/README.md", "tests/guide/guide.md"]
exclude_patterns = ["build", "dist", ".venv", "node_modules", "**/node_modules"]

extensions = ["myst_parser", "tools.site.pages", "tools.site.llms"]
myst_heading_anchors = 6  # GitHub makes an anchor of each heading
suppress_warnings = ["myst.header"]  # a page may begin with any level of heading

smartquotes = False  # what is quoted may be copied

html_theme = "furo"
html_title = f"aiqueue {release}"
html_show_sphinx = False
html_copy_source = False  # `llms` copies the sources to where links find them
html_use_index = False
highlight_language = "text"
