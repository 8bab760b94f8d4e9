"""How Sphinx makes the site of these pages and of the docstrings: `make docs`.

The pages stay plain Markdown, readable where they lie. What a site needs beside them is made here
at build time: the lists of index.md become its table of contents, and every room gets a page of its
API.
"""

import ast
import importlib
import inspect
import pathlib
import re
import types

from sphinx.application import Sphinx

ROOT = pathlib.Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api"  # written here, in no commit

# A page for each room, with what it exports.
ROOMS = {
    "collectives": ("txcore.collectives", "txcore.zero", "txcore.compression"),
    "mesh and plan": ("txcore.mesh", "txcore.plan"),
    "gradients": ("txcore.parallel", "txcore.parallel.gradients"),
    "layers, sequences, stages": ("txcore.tensor", "txcore.context", "txcore.pipeline"),
    "optim": ("txcore.optim",),
    "train": ("txcore.train", "txcore.train.loggers"),
    "launch": ("txcore.launch", "txcore.launch.watch"),
    "kernels": ("txcore.kernels",),
    "profiling": ("txcore.profiling", "txcore.profiling.lock", "txcore.profiling.trace.record"),
    "testing": ("txcore.testing", "txcore.bench", "txcore.doctor"),
}

_NAMED = {
    'class="caption" role="heading"': 'class="caption" role="heading" aria-level="2"',
    '<aside class="sidebar-drawer"': '<aside aria-label="Pages" class="sidebar-drawer"',
    '<aside class="toc-drawer': '<aside aria-label="This page" class="toc-drawer',
    "<pre>": '<pre tabindex="0">',
}

project = "txcore"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "docs/api/*.rst",
    "examples/*/README.md",
    "benchmarks/peers/README.md",
]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "data",
    "logs",
    "tests",
    "txcore",
    "kernels",
    "profiling",
]
myst_heading_anchors = 4
highlight_language = "none"
html_theme = "furo"
html_title = "txcore"
html_copy_source = False
smartquotes = False  # what is quoted is code
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
napoleon_use_param = False
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    """Tell Sphinx what to do beside reading the pages."""
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", prepare_page)
    app.connect("build-finished", name_parts)
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)  # before napoleon


def write_api_pages(_: Sphinx) -> None:
    """Write a page for each room, which names what autodoc is to describe."""
    API.mkdir(exist_ok=True)
    for old in API.glob("*.rst"):
        old.unlink()
    for title, modules in ROOMS.items():
        lines = [title, "=" * len(title), ""]
        for name in modules:
            module = find_module(name)
            lines += [_first_paragraph(module), ""]
            for export in list_exports(module):
                lines += _directive(name, getattr(module, export), export)
        name = re.sub(r"\W+", "-", title)
        (API / f"{name}.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")


def find_module(name: str) -> types.ModuleType:
    """Return a module by the name that users have for it: tx.zero is txcore.parallel.zero."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        return getattr(find_module(parent), last)


def list_exports(module: types.ModuleType) -> list[str]:
    """Return the public names of a module in its order: those that it defines, or exports by name.

    They are read from its source, since some are imported when they are asked for.
    """
    tree = ast.parse(inspect.getsource(module))
    own = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in tree.body if isinstance(node, own)]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in imports for alias in node.names if alias.asname == alias.name]
    names += getattr(module, "__all__", [])
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def _first_paragraph(module: types.ModuleType) -> str:
    return (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " ")


def _directive(module: str, described: object, name: str) -> list[str]:
    """Return the lines that describe an export, under the shortest name that users have for it."""
    if not (inspect.isfunction(described) or inspect.isclass(described)):
        return []
    is_top = getattr(importlib.import_module("txcore"), name, None) is described
    path = f"txcore.{name}" if is_top else f"{module}.{name}"
    kind = "autoclass" if inspect.isclass(described) else "autofunction"
    return [f".. {kind}:: {path}", ""]


def prepare_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Make the lists of index.md a table of contents, and take links to folders away.

    A site has no page for a folder of the repository; a file of it is handed out as it is.
    """
    if page == root_doc:
        source[0] = add_toctrees(source[0])
    folder = (ROOT / page).parent
    source[0] = re.sub(
        r"\[([^\]]+)\]\(([^)\s#:]+)\)",
        lambda link: link[1] if (folder / link[2]).is_dir() else link[0],
        source[0],
    )


def add_toctrees(text: str) -> str:
    """Return index.md with a hidden table of contents of each heading, and of the rooms."""
    parts = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        caption, _, body = section.partition("\n")
        pages = re.findall(r"^- \[[^\]]+\]\(([^)#]+)\.md\)", body, re.MULTILINE)
        parts.append((caption, pages))
    parts.append(("API", sorted(f"api/{path.stem}" for path in API.glob("*.rst"))))
    trees = [
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"
        for caption, pages in parts
        if pages
    ]
    return text + "\n" + "\n".join(trees)


def name_parts(app: Sphinx, error: Exception | None) -> None:
    """Add what screen readers and keyboards need, and the theme leaves out."""
    for file in pathlib.Path(app.outdir).glob("**/*.html"):
        text = file.read_text(encoding="utf-8")
        for there, instead in _NAMED.items():
            text = text.replace(there, instead)
        file.write_text(text, encoding="utf-8")


def escape_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Take from a docstring's text what means something in reStructuredText and nothing here."""
    text = "\n".join(lines)
    parts = re.split(r"(^ *(?:>>>|\.\.\.).*$|`+[^`]+`+)", text, flags=re.MULTILINE)
    parts[::2] = [re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [f"`{part}`" if re.match("`[^`]", part) else part for part in parts[1::2]]
    lines[:] = re.sub(r"``(?=s\b)", r"``\\ ", "".join(parts)).split("\n")
