"""The data of a page, and a picture of them."""

from __future__ import annotations

from elbozoo.models.contract.sequences import SequenceEntry
from elbozoo.notebook.cells import Code, Run, Text
from elbozoo.tutorials.subject import Subject


def data(s: Subject) -> list[Text | Code]:
    """Return the code that loads the rows and draws them."""
    source, says = _picture(s)
    if any("$" in name for name in s.source.rows.columns):
        source = f'plt.rcParams["text.parse_math"] = False  # a dollar in a name is no formula\n{source.lstrip()}'
    return [
        Text(f"## Data\n\n{s.source.text}"),
        Code(f"{s.source.code}\nprint(data.description)"),
        Code(source, alt=lambda run: f"{_size(run)}: {says}", caption=lambda run: f"{_size(run)}: {says}."),
    ]


def _size(run: Run) -> str:
    rows, columns = run["data"].rows, run["data"].width
    return f"The {rows} rows of {columns} column{'' if columns == 1 else 's'}"


def _picture(s: Subject) -> tuple[str, str]:
    """Return the code of the picture that suits the rows, and what it shows."""
    x = s.source.rows.x
    if isinstance(s.entry, SequenceEntry):
        return _SERIES, "each column against the step"
    if ((x == 0) | (x == 1)).all():
        return _BINARY, "a row from top to bottom, ones black"
    if x.shape[1] == 1:
        return _HISTOGRAM, "how often each value is there"
    if s.source.rows.labels is None:
        return _SCATTER.format(colour=""), "the second column against the first"
    return _SCATTER.format(colour="c=data.labels, "), "the second column against the first, classes in colour"


_SCATTER = """
figure, axes = plt.subplots(figsize=(5, 4))
axes.scatter(data.x[:, 0], data.x[:, 1], {colour}s=12)
axes.set(xlabel=data.columns[0], ylabel=data.columns[1])
figure.tight_layout()
"""
_HISTOGRAM = """
figure, axes = plt.subplots(figsize=(5, 3))
axes.hist(data.x[:, 0], bins=30)
axes.set(xlabel=data.columns[0], ylabel="rows")
figure.tight_layout()
"""
_SERIES = """
figure, axes = plt.subplots(figsize=(5.6, 3))
axes.plot(data.x, marker=".", linewidth=0.8, label=data.columns)
axes.set(xlabel="step", ylabel="value")
axes.legend(ncols=3)
figure.tight_layout()
"""
_BINARY = """
figure, axes = plt.subplots(figsize=(5.6, 2.2))
axes.imshow(data.x.T.numpy(), aspect="auto", cmap="Greys", interpolation="nearest")
axes.set(xlabel="row", ylabel="column")
figure.tight_layout()
"""
