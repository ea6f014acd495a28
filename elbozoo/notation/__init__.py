"""The notation of an entry: each symbol with its name in the code, its shape and what it means, read off the entry."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor, nn

from elbozoo.models.contract.entry import Entry, Program
from elbozoo.models.contract.registry import get_entry
from elbozoo.models.contract.sequences import SequenceEntry, StackedEntry
from elbozoo.models.contract.sites import DATA_PLATE
from elbozoo.notation.sizes import Sizes, sizes_of
from elbozoo.notation.structure import (
    COMPONENTS_PLATE,
    DETERMINISTIC,
    FLAT,
    GIVEN,
    LATENT,
    OBSERVED,
    PARTLY,
    Node,
    Structure,
    structure_of,
)
from elbozoo.notation.symbols import from_unicode, symbol_of
from elbozoo.pages import markdown_table

HEADER = ["symbol", "name in the code", "shape", "meaning"]
ROWS = 4  # of an entry that is asked without data
MOST_SHAPES = 4
_SYMBOL = r"[A-Za-zΑ-Ωα-ω]\u0303?(?:[⁻⁰-⁹¹²³]+|[₀-₉]+|_\w+)*"
_BETWEEN = r", and | and |, \.\.\., |, "
_SYMBOLS = re.compile(rf"(?P<symbols>{_SYMBOL}(?:(?:{_BETWEEN}){_SYMBOL})*)[.,:;]\s*(?P<meaning>.*)")
_STATED = re.compile(
    r"(?P<before>(?:.*\b(?:prior|shape|rate|number|deviation|mean|concentration) )?)"
    rf"(?P<symbol>{_SYMBOL})(?P<after>(?: of|,| with) .*)"
)


class Attribute(NamedTuple):
    """An attribute as a class's docstring describes it; ``symbols`` as they stand there, empty where it gives none."""

    name: str
    kind: str
    symbols: str
    meaning: str


class Row(NamedTuple):
    """A row of the table, as Markdown."""

    symbol: str
    name: str
    shape: str
    meaning: str


def notation_table(entry: str | Entry | type[Entry]) -> str:
    """Return the notation of ``entry`` as a Markdown table: symbol, name in the code, shape, meaning.

    First the observed site, the latent ones and what the program conditions on, as its trace has them; then the
    parameters, in the words of the entry's docstring; then the sizes in the shapes.

    Parameters
    ----------
    entry : str, Entry or type
        Name of an entry, its class, or an entry. A user's program is a ``Program``, whose table says what the trace
        says: shapes hold numbers then, because a program does not tell where they come from.

    Raises
    ------
    InvalidInput
        For an unknown name, or a program without an observed site ``"x"``.
    """
    return markdown_table(HEADER, notation_rows(entry))


def notation_rows(entry: str | Entry | type[Entry]) -> list[Row]:
    """Return the rows of :func:`notation_table`."""
    return _rows(entry_of(entry))


def _rows(entry: Entry) -> list[Row]:
    x, _ = entry.simulate(ROWS, seed=0)
    structure = structure_of(entry, x, {})
    sizes = _as_documented(entry, sizes_of(entry))
    rows = [*_site_rows(entry, structure, sizes), *_parameter_rows(entry, sizes)]
    symbols = {row.symbol for row in rows}
    rows += [row for row in _option_rows(entry) if row.symbol not in symbols]
    return [*rows, *_size_rows(sizes, rows)]


def entry_of(entry: str | Entry | type[Entry]) -> Entry:
    """Return an entry as it is, and a name or a class as the entry that its examples are drawn from.

    Raises
    ------
    InvalidInput
        For an unknown name.
    """
    if isinstance(entry, str):
        return get_entry(entry).example()
    return entry.example() if isinstance(entry, type) else entry  # type: ignore[return-value]  # Pyro's metaclass is Any


def parameter_symbols(entry: Entry) -> dict[str, str]:
    """Return the symbols in TeX of what ``entry`` learns, by the name of the attribute that holds it."""
    learned = {name for name, _ in entry.named_parameters()}
    found = {}
    for attribute in attributes_of(entry):
        if any(_is_in(parameter, attribute.name) for parameter in learned):
            found[attribute.name] = symbol_of_attribute(entry, attribute)
    return found


def attributes_of(entry: Entry) -> list[Attribute]:
    """Return what the docstring of the entry's class says about its tensors, modules taken apart where they say more.

    A user's program says nothing: what it learns has the names that it has in the code.
    """
    if isinstance(entry, Program):
        return list(_undocumented(entry.program, "program."))
    return list(_documented(entry, ""))


def symbol_of_attribute(entry: Entry, attribute: Attribute) -> str:
    """Return the symbols of ``attribute`` in TeX; its name where its docstring gives none, or those of other layers."""
    if not attribute.symbols or _is_another_network(attrgetter(attribute.name)(entry), attribute.symbols):
        return symbol_of(attribute.name.rpartition(".")[2], words=False)
    parts = re.split(f"({_BETWEEN})", attribute.symbols)
    joints = {", ..., ": r", \dots, "}
    return "".join(joints.get(part, ", ") if place % 2 else from_unicode(part) for place, part in enumerate(parts))


def _is_another_network(value: object, symbols: str) -> bool:
    is_network = isinstance(value, nn.Module) and not isinstance(value, nn.ModuleList)
    return is_network and len(list(value.parameters())) != len(re.split(_BETWEEN, symbols))  # type: ignore[attr-defined]


# ---- docstrings ------------------------------------------------------------------------------------------------------


def _documented(module: nn.Module, prefix: str) -> Iterator[Attribute]:
    for attribute in _attributes_section(type(module)):
        value = getattr(module, attribute.name, None)
        inside = list(_documented(value, f"{prefix}{attribute.name}.")) if isinstance(value, nn.Module) else []
        if inside:
            yield from inside
        elif isinstance(value, Tensor | nn.Module):
            yield attribute._replace(name=prefix + attribute.name)


def _attributes_section(cls: type) -> Iterator[Attribute]:
    docs = [inspect.cleandoc(base.__doc__ or "") for base in cls.__mro__ if base.__module__.startswith("elbozoo")]
    section = next((found[1] for doc in docs if (found := re.search(r"^Attributes\n-+\n((?:.+\n?)*)", doc, re.M))), "")
    for names, kind, text in re.findall(r"^(\S.*?) : (.*)\n((?: {4}.*(?:\n|$))+)", section, flags=re.MULTILINE):
        yield from _attributes(names.split(", "), kind, " ".join(text.split()))


def _attributes(names: list[str], kind: str, text: str) -> Iterator[Attribute]:
    """Take the symbols at the beginning of the text apart, one for each name where there are as many."""
    found = _SYMBOLS.fullmatch(text)
    symbols, meaning = (found["symbols"], found["meaning"]) if found else ("", text)
    each = re.split(_BETWEEN, symbols)
    for position, name in enumerate(names):
        yield Attribute(name, kind, each[position] if len(each) == len(names) else symbols, meaning)


def _undocumented(program: object, prefix: str) -> Iterator[Attribute]:
    if isinstance(program, nn.Module):
        for name in program._parameters:
            yield Attribute(prefix + name.removesuffix("_unconstrained"), "", "", "parameter")
        for name, module in program.named_children():
            yield Attribute(prefix + name, "", "", f"parameters of a `{type(module).__name__}`")


def _is_in(parameter: str, attribute: str) -> bool:
    return parameter.removesuffix("_unconstrained") == attribute or parameter.startswith(f"{attribute}.")


# ---- rows ------------------------------------------------------------------------------------------------------------


def _site_rows(entry: Entry, structure: Structure, sizes: Sizes) -> Iterator[Row]:
    order = [OBSERVED, PARTLY, LATENT, DETERMINISTIC, GIVEN]
    for node in sorted(structure.nodes.values(), key=lambda node: order.index(node.kind)):
        name = f'`constant_data(x)["{node.name}"]`' if node.kind == GIVEN else f'site `"{node.name}"`'
        shape = sizes.of_site(node.name)
        yield Row(f"${node.symbol}$", name, shape, _meaning_of(entry, node, structure, sizes))


def _meaning_of(entry: Entry, node: Node, structure: Structure, sizes: Sizes) -> str:
    given = ", ".join(f"${structure.nodes[name].symbol}$" for name in structure.parents(node.name))
    if node.kind == GIVEN:
        return "given and not explained"
    if node.kind == DETERMINISTIC:
        return f"computed from {given}"
    values = sizes.of_values(node.name) if node.kind in (LATENT, PARTLY) else None
    law = f"`{node.distribution}`" if node.distribution != FLAT else "a flat prior"
    words = [f"{_role(entry, node)}: {law}", f" given {given}" if given else "", f", {values} values" if values else ""]
    return "".join(words)


def _role(entry: Entry, node: Node) -> str:
    if node.kind == OBSERVED:
        return "observed"
    if node.kind == PARTLY:
        return "latent where it is not observed"
    if node.plate is None:
        return "latent, one for all data"
    if node.plate == COMPONENTS_PLATE:
        return "latent, one for each component"
    if isinstance(entry, SequenceEntry):
        return "latent, a path for each sequence"
    is_of_stack = isinstance(entry, StackedEntry) and node.plate == DATA_PLATE
    return f"latent, one for each {'group' if is_of_stack else 'row'}"


def _parameter_rows(entry: Entry, sizes: Sizes) -> Iterator[Row]:
    for attribute in attributes_of(entry):
        shapes = sizes.of_attribute(attribute.name)
        if not shapes:
            continue
        few = len(shapes) <= MOST_SHAPES
        shape = ", ".join(shapes) if few else f"{len(shapes)} tensors"
        name = attribute.name.removeprefix("program.") if isinstance(entry, Program) else attribute.name
        yield Row(f"${symbol_of_attribute(entry, attribute)}$", f"`{name}`", shape, _as_markdown(attribute.meaning))


def _as_markdown(meaning: str) -> str:
    """Return a sentence of a docstring as a table has it: no capital, no full stop, code between single backticks."""
    text = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", meaning).replace("``", "`").removesuffix(".")
    return re.sub(r"^[A-Z](?=[a-z ])", lambda first: first[0].lower(), text)


def _option_rows(entry: Entry) -> Iterator[Row]:
    """Yield the numbers that the options state and whose descriptions name a symbol, such as those of priors."""
    for option in type(entry).Options.describe():
        description = option["description"].partition(";")[0]
        found = _STATED.match(description)
        if found and option["type"].startswith("float"):
            meaning = " ".join(f"{found['before']}{found['after'].removeprefix(', ')}".split())
            yield Row(f"${from_unicode(found['symbol'])}$", f"option `{option['option']}`", "()", meaning)


def _size_rows(sizes: Sizes, rows: list[Row]) -> Iterator[Row]:
    """Yield the sizes that the other rows speak of, those that one option sets together."""
    used = set(re.findall(r"[A-Z]\w*", " ".join(f"{row.symbol} {row.shape} {row.meaning}" for row in rows)))
    named = [(meaning, letter) for letter, meaning in sizes.meanings.items() if letter in used]
    for (name, meaning), together in itertools.groupby(named, key=lambda pair: pair[0]):
        symbols = [f"${from_unicode(_with_index(letter))}$" for _, letter in together]
        yield Row(", ".join(symbols), name, "integer" if len(symbols) == 1 else "integers", meaning)


def _as_documented(entry: Entry, sizes: Sizes) -> Sizes:
    """Call the number of columns as the docstring's shapes call it, such as V of words, where that is not D."""
    for attribute in attributes_of(entry):
        documented = re.search(r"\(([^()]*)\)", attribute.kind)
        shapes = sizes.of_attribute(attribute.name)
        if documented and len(shapes) == 1:
            pairs = zip(documented[1].split(", "), shapes[0].strip("()").split(", "), strict=False)
            own = next((stated for stated, letter in pairs if letter == "D" and stated not in ("D", "1")), None)
            if own:
                return sizes.renamed("D", own)
    return sizes


def _with_index(letter: str) -> str:
    """Return a size such as ``Ku`` as ``K_u``."""
    return letter if "_" in letter else "_".join(letter)
