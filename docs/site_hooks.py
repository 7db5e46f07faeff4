"""Pages of the site that are files of the repository: README.md, its neighbours, and what a page links to elsewhere.

A link is written once, relative to the file it stands in, as a forge resolves it. The site has README.md as its first
page and nothing above docs/, so that links are rewritten as the site is built, and a linked file of the repository gets
a page that shows it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# The target of a Markdown link or picture, up to its anchor; no address of the web.
TARGET = re.compile(r"(?<=\]\()[^)#\s:]+")


def on_files(files: Files, config: Any) -> Files:
  """Adds the pages that lie outside docs/ and those that show a linked file."""
  for path, uri in PAGES.items():
    files.append(File.generated(config, uri, content=relinked((ROOT / path).read_text(encoding="utf-8"), path, uri)))
  linked = {
    place
    for file in files.documentation_pages()
    if file.src_uri not in PAGES.values()
    for place in places(file.content_string, f"docs/{file.src_uri}")
  }
  linked |= {place for path in PAGES for place in places((ROOT / path).read_text(encoding="utf-8"), path)}
  for place in sorted(linked):
    if not place.startswith("docs/") and place not in PAGES:
      files.append(File.generated(config, shown_at(place), content=shown(place)))
  return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
  """Rewrites the links of a page of docs/; those of the others were rewritten when they were added."""
  uri = page.file.src_uri
  generated = page.file.generated_by is not None
  return markdown if generated else relinked(markdown, f"docs/{uri}", uri)


def places(markdown: str, path: str) -> set[str]:
  """The files and folders of the repository that the links of a file lead to.

  Args:
    markdown: content of the file.
    path: where the file lies in the repository.
  """
  found = {posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for target in TARGET.findall(markdown)}
  return {place for place in found if (ROOT / place).exists()}


def relinked(markdown: str, path: str, uri: str) -> str:
  """Returns a page whose links lead to pages of the site.

  Args:
    markdown: content of the page.
    path: where the page lies in the repository.
    uri: where the page lies on the site.
  """

  def moved(match: re.Match[str]) -> str:
    place = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[0]))
    if not (ROOT / place).exists():
      return match[0]  # A strict build refuses it by name.
    return posixpath.relpath(shown_at(place), posixpath.dirname(uri) or ".")

  return TARGET.sub(moved, markdown)


def shown_at(place: str) -> str:
  """The page of the site, or its picture, that stands for a file of the repository."""
  return PAGES.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else f"source/{place}.md")


def shown(place: str) -> str:
  """A page that shows a file, or names the files of a folder."""
  path = ROOT / place
  if path.is_dir():
    lines = "\n".join(f"- `{file.name}`" for file in sorted(path.iterdir()) if file.is_file())
    return f"# `{place}`\n\n{lines}\n"
  return f"# `{place}`\n\n~~~~~~ {path.suffix[1:] or 'text'}\n{path.read_text(encoding='utf-8')}\n~~~~~~\n"
