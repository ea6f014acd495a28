"""Mathematical symbols of the names in code: one spelling in TeX, from which those of pictures are made."""

from __future__ import annotations

import itertools
import re
from html import escape

_SMALL = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon varphi chi psi "
    "omega"
)
_LARGE = "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
GREEK = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", f"{_SMALL} {_LARGE}".split(), strict=True))
BASE, SCRIPT, HALF = 14, 10, 11  # points: size of a symbol, of its scripts, and half the height of its line
LETTERS = {name: letter for letter, name in GREEK.items()} | {"phi": "φ", "dots": "…"}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

# What sites and conditions are called in the code, where that is a word; the symbols are those of docs/notation.md.
WORDS = {
    "rate": r"\lambda",
    "probs": r"\pi",
    "mean": r"\mu",
    "means": r"\mu",
    "precision": r"\tau",
    "precisions": r"\Lambda",
    "coefficients": r"\beta",
    "weights": r"\pi",
    "design": r"\Phi",
    "condition": "c",
    "standard_error": r"\sigma",
    "total": "T",
    "label": "y",
}


def symbol_of(name: str, *, words: bool = True) -> str:
    r"""Return the symbol of the site or parameter ``name`` in TeX.

    A Greek letter that is spelled out becomes that letter, with what follows an underscore as its index, and a digit
    behind a letter the number of a layer: ``z1`` is $z^{(1)}$. With ``words`` the zoo's own names have the symbols of
    its notation. Any other name stays a name.

    Examples
    --------
    >>> symbol_of("theta"), symbol_of("tau_0"), symbol_of("z1"), symbol_of("rate"), symbol_of("my_site")
    ('\\theta', '\\tau_{0}', 'z^{(1)}', '\\lambda', '\\mathrm{my\\_site}')
    """
    if words and name in WORDS:
        return WORDS[name]
    letter, _, index = name.partition("_")
    if letter in LETTERS or (len(letter) == 1 and letter.isalpha()):
        base = from_unicode(letter) if len(letter) == 1 else rf"\{letter}"
        return indexed(base, index if len(index) == 1 or index.isdigit() else _upright(index)) if index else base
    layer = re.fullmatch(r"([a-z])(\d+)", name)
    if layer:
        return rf"{layer[1]}^{{({layer[2]})}}"
    return _upright(name)


def from_unicode(text: str) -> str:
    r"""Return a symbol as docstrings write it, such as ``W₀⁻¹``, ``σ`` or ``K_1``, in TeX.

    Examples
    --------
    >>> from_unicode("W₀⁻¹"), from_unicode("σ"), from_unicode("x̃")
    ('W_{0}^{-1}', '\\sigma', '\\tilde{x}')
    """
    text = re.sub(r"(.)\u0303", r"\\tilde{\1}", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: f"^{{{found[0].translate(_RAISED)}}}", text)
    text = re.sub(r"[₀-₉]+", lambda found: f"_{{{found[0].translate(_LOWERED)}}}", text)
    text = re.sub(r"_(\w+)", r"_{\1}", text)
    # A letter behind the command would belong to its name.
    return re.sub(f"[{''.join(GREEK)}](?=([A-Za-z])?)", lambda g: rf"\{GREEK[g[0]]}" + (" " if g[1] else ""), text)


def indexed(symbol: str, index: str) -> str:
    r"""Return ``symbol`` with ``index`` as its subscript, behind one that it has.

    Examples
    --------
    >>> indexed("x", "n"), indexed("x", "1:T"), indexed(r"\mu_{k}", "d"), indexed("z^{(1)}", "n")
    ('x_{n}', 'x_{1:T}', '\\mu_{k,d}', 'z^{(1)}_{n}')
    """
    if symbol.endswith("}") and "_{" in symbol:
        return f"{symbol[:-1]},{index}}}"
    return f"{symbol}_{{{index}}}"


def as_cells(symbol: str) -> str:
    r"""Return ``symbol`` as a table of Graphviz's HTML: italics, and a cell of its own for each sub- and superscript.

    ``<SUB>`` becomes ``baseline-shift`` in SVG, for which Graphviz leaves no room, by which Chromium lowers as far as
    the font's height says, and which Firefox does not know.
    """
    groups = [
        list(group) for _, group in itertools.groupby(_TOKENS.finditer(symbol), lambda token: bool(token["script"]))
    ]
    cells = []
    for group, behind in itertools.zip_longest(groups, groups[1:]):
        if group[0]["script"]:
            cells.append(_scripts({token["script"]: _TOKENS.sub(_html_of, token["inside"]) for token in group}))
            continue
        # Graphviz stretches the table over the node; scripts stay at what they belong to.
        side = ' ALIGN="RIGHT"' if behind else ""
        text = "".join(map(_html_of, group))
        cells.append(f'<TD{side}><FONT POINT-SIZE="{BASE}">{text}</FONT></TD>')
    return f"{_TABLE}<TR>{''.join(cells)}</TR></TABLE>"


_TABLE = '<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0">'


def _scripts(scripts: dict[str, str]) -> str:
    """Return a superscript above a subscript, each in half the height of the line, as one cell."""
    halves = "".join(
        f'<TR><TD HEIGHT="{HALF}" ALIGN="LEFT"><FONT POINT-SIZE="{SCRIPT}">{scripts.get(which, " ")}</FONT></TD></TR>'
        for which in "^_"
    )
    return f'<TD ALIGN="LEFT">{_TABLE}{halves}</TABLE></TD>'


_TOKENS = re.compile(
    r"\\mathrm\{(?P<upright>(?:[^{}\\]|\\_)*)\}|\\tilde\{(?P<tilde>\w)\}"
    r"|(?P<script>[_^])\{(?P<inside>(?:[^{}]|\{[^{}]*\})*)\}"
    r"|\\(?P<greek>[A-Za-z]+) ?|(?P<letter>[^\W\d_])|(?P<other>.)",
    re.DOTALL,
)


def _html_of(token: re.Match[str]) -> str:
    if token["upright"] is not None:
        return escape(token["upright"].replace(r"\_", "_"))
    if token["script"]:  # of a script
        return _TOKENS.sub(_html_of, token["inside"])
    letter = f"{token['tilde']}\u0303" if token["tilde"] else LETTERS.get(token["greek"] or "", token["letter"])
    return f"<I>{letter}</I>" if letter else escape((token["other"] or token["greek"]).strip("{}"))


def _upright(name: str) -> str:
    escaped = name.replace("_", r"\_")
    return rf"\mathrm{{{escaped}}}"
