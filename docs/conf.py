"""Sphinx: the pages of ``docs/`` with the results of the benchmarks, as a site.

    sphinx-build -b html -W --keep-going -c docs . _site
    sphinx-build -b linkcheck -c docs . _site/links

The source is the root of the repository, so that links between pages, to measured results and to files of the repository are
the same in the site and where the pages are read as they lie.
"""

from importlib import metadata

project = "nnunet_norm"
author = "The nnunet_norm developers"
release = metadata.version("nnunet_norm")

extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "benchmarks/results/*.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
# The root is walked: what is hidden, built or somebody's data is not looked into.
exclude_patterns = [".*", "_site", "build", "dist", "*.egg-info", "nnunet_norm", "tests", "nnunet_norm_demo"]

smartquotes = False  # "--" begins a flag here
myst_heading_anchors = 4
myst_links_external_new_tab = False

html_theme = "furo"
html_title = "nnunet_norm"
html_copy_source = False
html_additional_pages = {"index": "to_first_page.html"}
templates_path = ["templates"]
