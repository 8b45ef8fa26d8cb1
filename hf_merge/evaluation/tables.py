"""Plain tables, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence


Cell = str | float | int | None


def show(value: Cell, digits: int = 3) -> str:
    """A cell as text: numbers with a fixed number of decimals, nothing as a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def text_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 3) -> str:
    """Aligned columns, the first one to the left.

    Args:
        header (`Sequence[str]`): The titles.
        rows (`Sequence`): One cell for each title.
        digits (`int`): Decimals of floating-point numbers.
    """
    cells = [list(header), *([show(cell, digits) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = row
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], digits: int = 3) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [
        list(header),
        ["---", *["---:"] * (len(header) - 1)],
        *([show(cell, digits) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_bytes(count: float | None) -> str:
    """Bytes in a readable unit."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
