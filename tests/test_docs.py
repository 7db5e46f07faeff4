"""The documentation leads to what exists: links, anchors, the pages of the site, and the modules and files it names."""

import ast
import pkgutil
import re

import pytest
import yaml

from tests import runs

DOCS = runs.ROOT / "docs"
ROOT_PAGES = [runs.ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES = [*ROOT_PAGES, *sorted(DOCS.rglob("*.md"))]
# How the site calls the pages that lie outside docs/, see docs/site_hooks.py.
OUTSIDE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
ROOMS = ("contrastive_jax", "data", "configs", "tests", "benchmarks", "docs")


def name_of(page):
  return str(page.relative_to(runs.ROOT))


def prose(page):
  """The page without its blocks of code."""
  return re.sub(r"^ *(```|~~~).*?^ *\1 *$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links_of(text):
  """Target and anchor of each link and picture, in place or as a reference at the end, that is no web address."""
  text = re.sub(r"`[^`\n]*`", "``", text)
  found = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
  return [link.partition("#")[::2] for link in found if not re.match(r"[a-z]+:", link)]


def anchors_of(page):
  """The anchors that forges and the site make of headings; of equal headings none, since the two number them apart."""
  made = []
  for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), flags=re.MULTILINE):
    shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    made.append(re.sub(r"[^\w\- ]", "", shown).strip().lower().replace(" ", "-"))
  return {anchor for anchor in made if made.count(anchor) == 1}


def broken_links(page):
  broken = []
  for target, anchor in links_of(prose(page)):
    file = (page.parent / target).resolve() if target else page
    if not file.exists() or (anchor and not (file.suffix == ".md" and anchor in anchors_of(file))):
      broken.append(f"{target}#{anchor}" if anchor else target)
  return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
  assert not broken_links(page)


def test_a_broken_link_or_anchor_is_found(tmp_path):
  (tmp_path / "other.md").write_text("# A heading: of `code`\n## Twice\n## Twice\n")
  page = tmp_path / "page.md"
  page.write_text(
    "[a](other.md#a-heading-of-code) [b](https://x.org/#y) ![c](gone.png) [d](other.md#gone) [e](other.md#twice)\n"
    "[f](#here) `[g](code.md)` [h][i]\n# Here\n```\n[j](fence.md)\n```\n[i]: lost.md\n"
  )
  assert broken_links(page) == ["gone.png", "other.md#gone", "other.md#twice", "lost.md"]


class Loader(yaml.SafeLoader):
  """Reads mkdocs.yml without the Python objects that some of its options name."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def nav_pages(entry):
  if isinstance(entry, str):
    return [entry]
  return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in nav_pages(inner)]


def test_the_site_shows_every_page_once():
  site = yaml.load((runs.ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
  pages = nav_pages(site["nav"])
  there = {*OUTSIDE, *(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))}
  assert sorted(pages) == sorted(there)
  assert all((runs.ROOT / name).is_file() for name in (*OUTSIDE.values(), *site["hooks"]))


REFERENCES = [
  (page.relative_to(DOCS), name)
  for page in sorted(DOCS.rglob("*.md"))
  for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
]


@pytest.mark.parametrize(("page", "name"), REFERENCES, ids=[name for _, name in REFERENCES])
def test_the_reference_names_what_can_be_imported_and_is_documented(page, name):
  assert pkgutil.resolve_name(name).__doc__


def test_the_reference_has_every_public_loss_and_term():
  from contrastive_jax import losses, objectives

  listed = {name for _, name in REFERENCES}
  functions = {f"contrastive_jax.losses.{name}" for name in losses.__all__ if name.islower()}
  terms = {f"{term.__module__}.{term.__qualname__}" for term in objectives.TERMS.values()}
  assert len(terms) > 5 and not (functions | terms) - listed


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_and_modules_in_code_marks_exist(page):
  missing = []
  for words in re.findall(r"`([^`\n]+)`", prose(page)):
    for file in re.findall(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/[\w/.-]*\w", words):
      if "." in file.rpartition("/")[2] and not (runs.ROOT / file).exists():
        missing.append(file)
    for module in re.findall(r"(?<![\w/.])contrastive_jax(?:\.\w+)+(?![\w/])", words):
      try:
        pkgutil.resolve_name(module)
      except (ImportError, AttributeError):
        missing.append(module)
  assert not missing


def test_rooms_import_what_the_architecture_says():
  table = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## The rooms")[2].partition("\n## ")[0]
  rows = re.findall(r"^\| `contrastive_jax/(\w+)` \|[^|]*\|([^|]*)\|$", table, flags=re.MULTILINE)
  library = runs.ROOT / "contrastive_jax"
  rooms = {path.parent.name for path in library.glob("*/__init__.py")}
  assert {room for room, _ in rows} == rooms
  for room, listed in rows:
    used = set()
    for path in (library / room).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
          used.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
          used.update(alias.name for alias in node.names)
    names = {tuple(f"{name}.".split(".")[:2]) for name in used}
    assert not {top for top, *_ in names} & {"data", "configs", "tests", "benchmarks"}, room
    allowed = set(re.findall(r"`(\w+)`", listed))
    assert {inner for top, inner in names if top == "contrastive_jax"} & (rooms - {room}) <= allowed, room
    assert allowed <= {above for above, _ in rows[: [name for name, _ in rows].index(room)]}, "rooms import in a circle"


def test_the_linter_has_one_version():
  files = ["requirements-test.txt", "requirements-docs.txt", ".pre-commit-config.yaml"]
  pins = {name: set(re.findall(r"ruff==([\d.]+)", (runs.ROOT / name).read_text(encoding="utf-8"))) for name in files}
  assert len(set.union(*pins.values())) == 1 and all(pins.values()), pins


def test_the_hooks_of_commits_are_those_of_make_lint():
  hooks = yaml.safe_load((runs.ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
  lint = (runs.ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
  commands = [hook["entry"] for hook in hooks]
  assert all(f"{command.replace(' --fix', '')} " in lint for command in commands) and len(commands) == 2


def test_the_workflow_runs_what_must_pass():
  workflow = yaml.safe_load((runs.ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
  commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
  assert ".ci/run" in commands and "make docs" in commands
