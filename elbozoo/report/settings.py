"""What was compared and how it is made again: model, data, options, versions, the command."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elbozoo.data import FILE_SUFFIXES, SIMULATE, SIMULATED_ROWS, list_datasets
from elbozoo.inference.comparison import Comparison
from elbozoo.inference.fit import Fit
from elbozoo.models.contract.entry import Corrupts, Program
from elbozoo.preparation import OWN
from elbozoo.report.words import counted, methods_of, seeds_of
from elbozoo.words import NOT_A_BOUND

LOADING = ("root", "split", "key", "stream")  # arguments of load_data; the others are those of compare, too


def about_model(comparison: Comparison) -> list[str]:
    """Return what the model is, as paragraphs."""
    entry = comparison.fits[0].entry
    if isinstance(entry, Program):
        return ["A program of your own, with no capability beyond its forward pass."]
    parts = [f"{comparison.model}: {entry.summary()}."]
    page = inspect.cleandoc(getattr(inspect.getmodule(type(entry)), "__doc__", None) or "")
    prose = [" ".join(paragraph.split()) for paragraph in page.split("\n\n")[1:2]]
    return parts + [paragraph for paragraph in prose if "$" not in paragraph]  # no formulas: nothing here sets them


def settings(comparison: Comparison) -> dict[str, str]:
    """Return data, options, methods and seeds by what they are."""
    data = comparison.data
    found = {"data": f"{data['name']}: {counted(data['rows'], 'row')}, {counted(data['columns'], 'column')}"}
    named = list_datasets()
    if data["name"] in named.index:
        facts = named.loc[data["name"]]
        found |= {"description": facts["description"], "source": facts["source"]}
    arguments = data.get("arguments", {})
    if arguments:
        found["what was done to the data"] = _options_text(arguments)
    if comparison.heldout is not None:
        found["held out"] = f"{counted(comparison.heldout['rows'], 'row')} to {comparison.heldout['part']} with"
    found["methods"] = ", ".join(methods_of(comparison))
    found["seeds"] = ", ".join(map(str, seeds_of(comparison)))
    found["options given"] = _options_text(comparison.options) or "none: all are at their defaults"
    found["options of the model"] = _options_text(comparison.fits[0].entry.options.model_dump()) or "it has none"
    found["options of the guides"] = _options_text(comparison.fits[0].guide_options.model_dump())
    found["objectives"] = ", ".join(dict.fromkeys(f"{fit.method}: {_objective(fit)}" for fit in comparison.fits))
    return found


def _objective(fit: Fit) -> str:
    objective = f"{fit.objective} on corrupted rows" if isinstance(fit.entry, Corrupts) else fit.objective
    return objective if fit.guide.is_bound else f"{objective} ({NOT_A_BOUND}, as q has no density)"


def _options_text(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in options.items())


def _value(value: Any) -> str:
    return (
        {None: "none", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _asked(comparison: Comparison) -> list[str]:
    """Methods as they were asked for: all ways to q share a model that was learned before."""
    asked = comparison.data.get("methods")
    return [str(asked)] if asked else methods_of(comparison)


def reproduction(comparison: Comparison) -> tuple[list[str], str]:
    """Return what to know, and the command that makes this comparison again; Python where there is no command."""
    words = ["On the same machine with the same versions every figure but the seconds comes out the same."]
    source, about_source = _data_source(comparison.data, _rows_in_all(comparison))
    is_program = isinstance(comparison.fits[0].entry, Program)
    if is_program:
        words.append("The model is a program of your own, so Python runs it and the command line cannot.")
    words += about_source
    seeds = seeds_of(comparison)
    is_counted = seeds == list(range(len(seeds)))
    loading, preparing = _arguments(comparison.data)
    own = [name for name, value in preparing.items() if value == OWN]
    words += [f"Its {name} rows came from memory: pass the same rows as {name}." for name in own]
    in_one_call = "seed" not in comparison.data.get("arguments", {})
    if not is_program and is_counted and not own and in_one_call and source == repr(comparison.data["name"]):
        return words, _command(comparison)
    if loading:
        source = f"ez.load_data({source}, {_keywords(loading)})"
    arguments = [
        "program" if is_program else repr(comparison.model),
        source,
        f"methods={_asked(comparison)!r}",
        f"seeds={len(seeds) if is_counted else seeds!r}",
        *([_keywords(preparing)] if preparing else []),
        *(f"{option}={value!r}" for option, value in comparison.options.items()),
    ]
    return words, f"import elbozoo as ez\n\nez.compare({', '.join(arguments)}).report('report.html')"


def _arguments(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what loads the data beside their name, and what was done to them after that."""
    given = data.get("arguments", {})
    at_loading = (*LOADING, "binarise", "seed") if "seed" in given else LOADING
    loading = {name: value for name, value in given.items() if name in at_loading}
    return loading, {name: value for name, value in given.items() if name not in loading}


def _keywords(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={name if value == OWN else repr(value)}" for name, value in arguments.items())


def _rows_in_all(comparison: Comparison) -> int:
    """Number of rows before shares of them were held out."""
    rows, about = int(comparison.data["rows"]), comparison.heldout or {}
    shares = {part for part, value in comparison.data.get("arguments", {}).items() if isinstance(value, float)}
    if "validation" in shares:
        rows += about["validation_rows"]
    return rows + (about["rows"] if "test" in shares else 0)


def _data_source(data: dict[str, Any], rows: int) -> tuple[str, list[str]]:
    """Return the data as Python that loads them, and what to know about that."""
    name, named = str(data["name"]), list_datasets()
    if name.startswith(SIMULATE):
        seed = "The data were simulated with seed 0, unless another was given."
        return (repr(name) if rows == SIMULATED_ROWS else f"ez.load_data({name!r}, rows={rows})"), [seed]
    if name in named.index:
        if rows != named.loc[name, "rows"] and "split" not in data.get("arguments", {}):
            return "x", [f"Of the rows of {name}, {rows} were picked: pass the same rows as x."]
        picked = data["columns"] != named.loc[name, "columns"]
        words = f"Of the columns of {name}, {data['columns']} were picked: name them with --columns or columns=[...]."
        return repr(name), [words] if picked else []
    if Path(name).suffix.lower() in FILE_SUFFIXES or "stream" in data.get("arguments", {}):
        what = "file" if Path(name).suffix else "folder"
        return repr(name), [f"The data came from a {what}: give its path, and the same columns if some were picked."]
    return "x", ["The data came from memory, a folder or Dask, not from a name or a file: pass the same rows as x."]


def _command(comparison: Comparison) -> str:
    methods, seeds = ",".join(_asked(comparison)), str(len(seeds_of(comparison)))
    command = ["elbozoo", "compare", comparison.model, "--data", str(comparison.data["name"])]
    for name, value in comparison.data.get("arguments", {}).items():
        flag = name.replace("_", "-")
        command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    command += ["--methods", methods, "--seeds", seeds]
    for option, value in comparison.options.items():
        command += ["--set", f"{option}={_value(value)}"]
    return shlex.join(command)


def versions(fits: Sequence[Fit]) -> dict[str, str]:
    """Return the versions under which the fits ran."""
    names = dict.fromkeys(name for fit in fits for name in fit.provenance)
    return {n: ", ".join(dict.fromkeys(fit.provenance[n] for fit in fits if n in fit.provenance)) for n in names}
