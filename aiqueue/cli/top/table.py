"""A table of `top`: sorts, filters and lays out rows of any class, of which it formats only those that are visible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import output

MARK = "> "  # before the selected row; no colour is needed to see it
PLAIN = "  "
GAP = 1


@dataclass(frozen=True)
class TopField:
    """A column.

    - `text`: a row's cell. `value`: what it is sorted by; None sorts last. `style`: the colour of the cell.
    - `low`: the direction in which it is sorted first: the lowest value on top.
    - `width`: at least so many cells. `grows`: it is cut where there is less room than its cells need; below `floor`
      cells only after columns that can be dropped.
    - `draw`: makes the cell of a width, from `width` to `width_max`, whatever is left; then `text` does not count.
    - `drop`: columns with the highest number are left out first where the line is too narrow; 0: never.
    """

    title: str
    text: Callable[[Any], str]
    value: Callable[[Any], Any] | None = None
    style: Callable[[Any], str] = lambda _: ""
    right: bool = True
    low: bool = False
    width: int = 0
    grows: bool = False
    floor: int = 8
    draw: Callable[[Any, int], str] | None = None
    width_max: int = 0
    drop: int = 0


@dataclass(frozen=True)
class Table:
    """The rows of a place in the order of its list, each with its fields. `key`: names a row over readings.

    `search`: the text that a filter looks in. `empty`: what is said where there are no rows. `note`: what the last
    cells of a row say instead of the fields after the first one; "": it has its fields.
    """

    fields: Sequence[TopField]
    rows: Sequence[Any]
    key: Callable[[Any], str]
    search: Callable[[Any], str]
    empty: str
    note: Callable[[Any], str] = field(default=lambda _: "")

    def arrange(self, sort: str, reverse: bool, wanted: str) -> list[Any]:
        """Return the rows that contain `wanted`, sorted by the column `sort`; "": in their own order."""
        sought = wanted.casefold()
        rows = [each for each in self.rows if sought in self.search(each).casefold()] if sought else list(self.rows)
        by = next((each for each in self.fields if each.title == sort and each.value is not None), None)
        if by is None:
            return rows[::-1] if reverse else rows
        assert by.value is not None
        known: list[tuple[Any, Any]] = []
        unknown: list[tuple[Any, Any]] = []
        for row in rows:
            value = by.value(row)
            (unknown if value is None else known).append((value, row))
        known.sort(key=lambda each: each[0], reverse=by.low == reverse)
        return [row for _, row in (*known, *unknown)]

    def sorts(self) -> list[str]:
        """The columns that it can be sorted by, after its own order."""
        return ["", *(each.title for each in self.fields if each.value is not None)]

    def render(self, rows: Sequence[Any], width: int, sort: str = "", reverse: bool = False) -> tuple[str, list[str]]:
        """Return the header and a line for each of the rows, of at most this width, without the mark before it."""
        from rich.cells import cell_len  # noqa: PLC0415

        fields = list(self.fields)
        cells = [[_clean(each.text(row)) for each in fields] for row in rows]
        notes = [self.note(row) for row in rows]
        lengths = [
            max(
                [each.width, cell_len(each.title) + (2 if each.title == sort and sort else 0)]
                + [cell_len(line[at]) for line, note in zip(cells, notes, strict=True) if at == 0 or not note]
            )
            for at, each in enumerate(fields)
        ]
        shown = _fit(fields, lengths, width)
        for at, size in shown:
            if (draw := fields[at].draw) is not None:
                for line, row in zip(cells, rows, strict=True):
                    line[at] = draw(row, size)
        titles = [_title(fields[at], sort, reverse) for at, _ in shown]
        header = _join([(fields[at], size) for at, size in shown], titles, ["dim"] * len(shown))
        lines = []
        for row, line, note in zip(rows, cells, notes, strict=True):
            if note:
                first = output.truncate(line[0], shown[0][1], middle=True)
                text = f"{first}{' ' * max(1, shown[0][1] - cell_len(first) + GAP)}{note}"
                lines.append(output.apply_style(output.truncate(text, width), "red"))
                continue
            styles = [fields[at].style(row) for at, _ in shown]
            lines.append(_join([(fields[at], size) for at, size in shown], [line[at] for at, _ in shown], styles))
        return header, lines


def _clean(text: str) -> str:
    return " ".join(output.escape_controls(text).split()) if text else ""


def _title(field: TopField, sort: str, reverse: bool) -> str:
    """Return the title, with the direction if the table is sorted by it."""
    if not sort or field.title != sort:
        return field.title
    return f"{field.title} {'^' if field.low != reverse else 'v'}"


def _fit(fields: Sequence[TopField], lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Return which columns fit into a width, and how wide each is."""
    chosen = list(range(len(fields)))

    def least() -> int:
        floors = [min(lengths[at], fields[at].floor) if fields[at].grows else lengths[at] for at in chosen]
        return sum(floors) + GAP * (len(chosen) - 1)

    while least() > width:
        droppable = [at for at in chosen if fields[at].drop]
        if not droppable:
            break
        chosen.remove(max(droppable, key=lambda at: fields[at].drop))
    sizes = {at: lengths[at] for at in chosen}
    growing = [at for at in chosen if fields[at].grows]
    over = sum(sizes.values()) + GAP * (len(chosen) - 1) - width
    while over > 0:
        cut = [at for at in growing if sizes[at] > fields[at].floor] or [at for at in growing if sizes[at] > 4]
        if not cut:
            break
        widest = max(cut, key=lambda at: sizes[at])
        sizes[widest] -= 1
        over -= 1
    for at in chosen:
        if fields[at].draw is not None and over < 0:
            more = min(-over, fields[at].width_max - sizes[at])
            sizes[at], over = sizes[at] + more, over + more
    return [(at, sizes[at]) for at in chosen]


def _join(shown: Sequence[tuple[TopField, int]], texts: Sequence[str], styles: Sequence[str]) -> str:
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415

    parts = []
    for number, ((each, size), text, style) in enumerate(zip(shown, texts, styles, strict=True)):
        last = number == len(shown) - 1
        cell = output.truncate(text, size, middle=not last)
        if each.right:
            cell = " " * (size - cell_len(cell)) + cell
        elif not last:
            cell = set_cell_size(cell, size)
        parts.append(output.apply_style(cell, style) if cell.strip() else cell)
    return (" " * GAP).join(parts).rstrip()
