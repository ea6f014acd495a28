"""A page as one HTML file that needs no network: pictures inside, formulas as MathML, light and dark."""

from __future__ import annotations

import base64
import contextlib
import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elbozoo.notebook.cells import Executed, Output
from elbozoo.notebook.markdown import without_style

LIGHT_CODE, DARK_CODE = "default", "github-dark"


def html_files(cells: list[Executed], page: Path) -> dict[Path, bytes]:
    """Return the file that is the page, with its content."""
    markdown = _markdown()
    body = "\n".join(block for cell in cells for block in _blocks(cell, markdown))
    title = next((cell.source.partition("\n")[0].lstrip("# ") for cell in cells if cell.outputs is None), page.stem)
    document = _PAGE.format(title=html.escape(title), style=_STYLE + _code_style(), body=body)
    return {page: document.encode()}


def _blocks(cell: Executed, markdown: Callable[[str], str]) -> Iterator[str]:
    if cell.outputs is None:
        yield markdown(cell.source)
        return
    yield _highlighted(cell.source, "python")
    for output in cell.outputs:
        yield _figure(output, cell, markdown) if output.picture else _printed(output)


def _figure(output: Output, cell: Executed, markdown: Callable[[str], str]) -> str:
    assert output.picture is not None
    kind, content = output.picture
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    caption = f"<figcaption>{markdown(cell.caption)}</figcaption>" if cell.caption else ""
    return f'<figure><img src="{source}" alt="{html.escape(cell.alt, quote=True)}">{caption}</figure>'


def _printed(output: Output) -> str:
    table = output.data.get("text/html")
    if isinstance(table, str):
        return f'<div class="wide">{without_style(table)}</div>'
    return f'<pre class="output">{html.escape(str(output.data["text/plain"]).rstrip())}</pre>'


def _markdown() -> Callable[[str], str]:
    """Return a renderer of Markdown with formulas, tables and coloured code."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.amsmath import amsmath_plugin
    from mdit_py_plugins.deflist import deflist_plugin
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    found = MarkdownIt("commonmark", {"highlight": lambda source, language, _: _highlighted(source, language)})
    found.enable("table")
    found.use(dollarmath_plugin, renderer=lambda source, options: formula(source, options["display_mode"]))
    found.use(amsmath_plugin, renderer=lambda source: formula(source, is_display=True))
    found.use(deflist_plugin)
    found.add_render_rule("table_open", lambda *_: '<div class="wide"><table>')
    found.add_render_rule("table_close", lambda *_: "</table></div>")
    found.add_render_rule("fence", _fence)
    rendered: Callable[[str], str] = found.render
    return rendered


def _fence(renderer: Any, tokens: Sequence[Any], position: int, options: Any, env: Any) -> str:
    token = tokens[position]
    return _highlighted(token.content, token.info.strip() or "text")


def formula(source: str, is_display: bool = False) -> str:
    """Return a formula of LaTeX as MathML, which browsers set without a script."""
    from latex2mathml.converter import convert

    try:
        made = _as_browsers_read_it(convert(source.strip(), display="block" if is_display else "inline"))
    except Exception:  # of a program's page, where a dollar may be one of money
        return f"<code>{html.escape(source)}</code>"
    return f'<div class="wide">{made}</div>' if is_display else made


def _as_browsers_read_it(mathml: str) -> str:
    """Spell alphabets in letters of their own, which MathML Core asks for, and words as words."""
    mathml = mathml.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    mathml = re.sub(r'<mi mathvariant="(script|double-struck)">([A-Z])</mi>', _letter, mathml)
    return re.sub(r'(?:<mi mathvariant="normal">[^<]</mi>){2,}', _word, mathml)


def _letter(found: re.Match[str]) -> str:
    style, letter = found.group(1).upper(), found.group(2)
    # Letters that were in use before the others have names without MATHEMATICAL.
    for name in (f"MATHEMATICAL {style} CAPITAL {letter}", f"{style} CAPITAL {letter}"):
        with contextlib.suppress(KeyError):
            return f"<mi>{unicodedata.lookup(name)}</mi>"
    return f"<mi>{letter}</mi>"


def _word(found: re.Match[str]) -> str:
    return f"<mi>{re.sub('<[^>]*>', '', found.group())}</mi>"


def _highlighted(source: str, language: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    made: str = highlight(source, lexer, HtmlFormatter(cssclass="code"))
    return made


def _code_style() -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style=LIGHT_CODE, cssclass="code").get_style_defs(".code")
    dark = HtmlFormatter(style=DARK_CODE, cssclass="code").get_style_defs(".code")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{_CODE_STYLE}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #5c5c5c; --line: #d9dde2; --shade: #f5f7f9;
  --accent: #0061a1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6ea; --paper: #14181d; --faint: #a3abb5; --line: #39414b; --shade: #1d232a; --accent: #6db7ee; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1.1rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 1.2rem 0 1rem; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 2.6rem 0 .8rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 1.8rem 0 .6rem; }
a { color: var(--accent); }
hr { border: 0; border-top: 1px solid var(--line); margin: 2.5rem 0 1rem; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em; }
:not(pre) > code { background: var(--shade); border-radius: 3px; padding: .1em .3em; }
pre { overflow-x: auto; padding: .8rem 1rem; line-height: 1.45; margin: 1rem 0; border-radius: 6px; font-size: .86rem;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre.output { background: none; border: 1px solid var(--line); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
table.dataframe td { text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--line); }
figure { margin: 1.6rem 0; }
/* Pictures are drawn on white, and keep it in the dark. */
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--faint); font-size: .93rem; line-height: 1.5; margin-top: .6rem; }
figcaption p { margin: 0; }
math { font-size: 1.06em; }
math[display="block"] { padding: .2rem 0; }
@media (max-width: 480px) { body { font-size: 16px; } h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; } }
"""
_CODE_STYLE = ".code pre { background: var(--shade); }\n.code, .code .err { background: none; border: 0; }\n"
