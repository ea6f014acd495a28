"""Pages to look things up in: data sets, the command line, the JSON document and its schema."""

from __future__ import annotations

import json
from typing import Any

import typer
from pydantic import BaseModel

import elbozoo as ez
from elbozoo.cli import app
from elbozoo.pages import code_block, markdown_table
from elbozoo.schema import PARTS, json_schema
from sitegen.markdown import frame_table, page

SCHEMA_FILE = "elbozoo-comparison.schema.json"
# Clocks differ from build to build, and a page that says so would be another page each time.
SECONDS = 0.01


def datasets() -> str:
    """Return the page of the data sets that come with the zoo."""
    return page(
        "# Data sets",
        "Beside these names, data may be `simulate:MODEL`, which draws from an entry, the path of a CSV or Parquet "
        "file with a header or of a NPY or NPZ file, or in Python a DataFrame, an array or a tensor.",
        frame_table(ez.list_datasets(), ["name", "rows", "columns", "kind", "description", "source"]),
    )


def commands() -> str:
    """Return a section for each command, from the command line's own declarations."""
    group: Any = typer.main.get_command(app)
    blocks = []
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        shown = [p for p in command.params if not getattr(p, "hidden", False)]
        usage = " ".join(["elbozoo", name, *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
        rows = [[f"`{_spelling(p)}`", p.help or "", "yes" if p.required else ""] for p in shown]
        summary = (command.help or "").partition("\n")[0]
        table = markdown_table(["argument or option", "meaning", "required"], rows)
        blocks += [f"## {name}", summary, code_block(usage, "text"), table]
    return page(*blocks)


def _spelling(parameter: Any) -> str:
    value = str(parameter.metavar or parameter.name.upper())
    if parameter.param_type_name == "argument":
        return value
    return ", ".join(parameter.opts) + ("" if parameter.is_flag else f" {value}")


def schema_text() -> str:
    """Return the JSON Schema as a file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def json_page() -> str:
    """Return the page about the JSON document: each part's fields, an example, the schema to download."""
    comparison = ez.compare("ppca", "iris", methods=["closed-form"], seeds=1, progress=False)
    comparison.table["seconds"] = SECONDS
    example = json.dumps(comparison.document(), indent=2)
    return page(
        "# The JSON document",
        "`elbozoo fit --json` and `elbozoo compare --json` print one document and nothing else, and `--out DIR` "
        "leaves it in `comparison.json` with the options beside it. Figures are totals over the rows of the data, in "
        "nats; `null` where one does not apply.",
        f"As a [JSON Schema](https://json-schema.org), draft 2020-12: {{download}}`{SCHEMA_FILE} <{SCHEMA_FILE}>`.",
        "```python\nimport json\n\nimport jsonschema\n\n"
        f'with open("{SCHEMA_FILE}") as schema, open("compare.json") as document:\n'
        "    jsonschema.validate(json.load(document), json.load(schema))\n```",
        *(block for part in PARTS for block in _part(part)),
        "## An example",
        "What `elbozoo compare ppca --data iris --methods closed-form --seeds 1 --json` prints (its time is another on "
        "each machine):",
        code_block(example, "json"),
    )


def _part(part: type[BaseModel]) -> list[str]:
    defined = part.model_json_schema()
    required = set(defined.get("required", []))
    rows = [
        [f"`{name}`", _type(field), "yes" if name in required else "", field.get("description", "")]
        for name, field in defined["properties"].items()
    ]
    table = markdown_table(["field", "type", "always there", "meaning"], rows)
    return [f"## `{part.__name__}`", (part.__doc__ or "").strip(), table]


def _type(field: dict[str, Any]) -> str:
    """Return the type of a field in words, with null where it may be."""
    if "anyOf" in field:
        return " or ".join(_type(each) for each in field["anyOf"])
    if "$ref" in field:
        return f"[{field['$ref'].rpartition('/')[2]}](#{field['$ref'].rpartition('/')[2].lower()})"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"array of {_type(field['items'])}"
    return str(field.get("type", "any"))
