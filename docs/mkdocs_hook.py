"""A hook of mkdocs: the pages of the site are the Markdown files of the whole checkout.

mkdocs reads one folder, docs/. Here it gets every Markdown file under its path from the root of the
checkout, and the files that they link to, so that a relative link is the same in both.
"""

import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent

LINKED = ("*.md", "*.svg", "*.png", "*.ipynb", "LICENSE", "setup.py", "constraints.txt")
"""Pages, pictures, and what pages link to."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the theme, and those of the checkout that git knows or does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *LINKED]
    names = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    theme = [file for file in files if not Path(file.abs_src_path).is_relative_to(ROOT / "docs")]
    ours = [
        File(name, str(ROOT), config.site_dir, config.use_directory_urls)
        for name in sorted(set(names))
        if (ROOT / name).is_file()
    ]
    return Files([*theme, *ours])
