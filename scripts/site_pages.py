"""MkDocs hooks: the README as first page, links out of docs/ as text, and llms.txt with the pages as Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")  # files of the repository that are no pages
TEXTS: dict[str, str] = {}  # Markdown of the pages


def on_files(files: Files, config: Any, **_: Any) -> Files:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.sub(r"\]\((?!docs/|https?://|#)", "](../", text).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=links))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    TEXTS[page.file.src_uri] = OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
    return TEXTS[page.file.src_uri]


def on_post_build(config: Any, **_: Any) -> None:
    pages = [(title, path) for entry in config.nav for title, path in entry.items()]
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Docs", ""]
    lines += [f"- [{title}]({path})" for title, path in pages]
    for name, text in (TEXTS | {"llms.txt": "\n".join(lines) + "\n"}).items():
        (Path(config.site_dir) / name).write_text(text, encoding="utf-8")
