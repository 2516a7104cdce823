"""The same blocks of scores as lines for a terminal and as Markdown for a model card."""

from collections.abc import Sequence

from histoscale.eval.matrix import Overview
from histoscale.eval.published import PROTOCOLS, Published
from histoscale.eval.results import Score
from histoscale.eval.table import (
    Block,
    Footnotes,
    Line,
    TableConfig,
    blocks,
    general_notes,
    metric_words,
    number,
    published_columns,
    published_words,
)

_SUPERSCRIPT = str.maketrans("0123456789,", "⁰¹²³⁴⁵⁶⁷⁸⁹˒")
_MARKDOWN = {"&": "&amp;", "<": "&lt;", ">": "&gt;", **{c: "\\" + c for c in "\\`*_[]|~$"}}
_LABEL = 46  # longer names of encoders are cut in the terminal; Markdown and the summary have them whole


def terminal_table(
    scores: Sequence[Score], level: float, config: TableConfig, published: Sequence[Published] | None = None
) -> str:
    """Every score once, at most `config.width` characters a line. level: of the intervals. published: not the shipped rows."""
    found, notes = blocks(scores, config.published, published), Footnotes()
    lines: list[str] = []
    for place, block in enumerate(found):
        if place == 0 or found[place - 1].dataset != block.dataset:
            lines += ["", block.dataset, "═" * min(config.width, max(len(block.dataset), 12))]
        lines += ["", *_folded(block.title, config.width, "  ")]
        lines += _folded(block.size, config.width, "  ")
        if block.seen:
            lines += _folded(block.seen, config.width, "  ")
        lines += _grid(block, notes, config.width)
        later = [column for other in found[place + 1 :] if other.dataset == block.dataset for column in published_columns(other)]
        for metric, rows in published_columns(block):
            if (metric, rows) not in later:
                lines += _published_lines(metric, rows, config.width)
    numbered = [f"{str(n).translate(_SUPERSCRIPT)} {note}" for note, n in notes.numbers.items()]
    endings = [*numbered, *general_notes(found, level)]
    return "\n".join([*lines[1:], "", *(part for note in endings for part in _folded(note, config.width, ""))])


def _grid(block: Block, notes: Footnotes, width: int) -> list[str]:
    """Labels at the left, metrics as columns; as many bands of columns as the width asks for."""
    labels = [_label(line, block, _LABEL) + _raised(notes.of_line(line)) for line in block.lines]
    return _banded(labels, [_column(metric, block, notes) for metric in block.metrics], width)


def _banded(labels: Sequence[str], columns: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns (a head, then a cell a label) beside the labels, as many below one another as the width asks for."""
    left = max(map(len, labels))
    bands: list[list[Sequence[str]]] = [[]]
    for column in columns:
        if bands[-1] and left + sum(2 + max(map(len, c)) for c in [*bands[-1], column]) > width - 2:
            bands.append([])
        bands[-1].append(column)
    lines = []
    for band in bands:
        widths = [left, *(max(map(len, column)) for column in band)]
        rows = zip(["", *labels], *band, strict=True)
        lines += ["  " + "  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines


def _column(metric: str, block: Block, notes: Footnotes) -> list[str]:
    cells = []
    for line in block.lines:
        text = number(line.cells.get(metric))
        if text[:1] not in "+−–":
            text = " " + text  # a sign hangs to the left of the figures
        cells.append((text + _raised(notes.of_cell(line, metric))) if metric in line.cells else "")
    return [" " + metric_words(metric), *cells]


def _label(line: Line, block: Block, most: int) -> str:
    if line.minus:
        return f"  − {_cut(line.minus, most - 4)}"
    form = [line.embedding, "" if block.seen else " ".join(filter(None, (line.resolution, line.seen)))]
    runs = max(score.runs for score in line.cells.values())
    said = [*form, f"{runs} runs" if runs > 1 else "", "floor" if line.floor else ""]
    return f"{_cut(line.encoder, most - 20)}  " + ", ".join(filter(None, said))


def _published_lines(metric: str, rows: Sequence[Published], width: int) -> list[str]:
    """`name value (±sd), …`, after the words of the one protocol that made them all."""
    about = PROTOCOLS.get(rows[0].protocol, "")
    shared = [mark for mark in rows[0].marks if all(mark in row.marks for row in rows)]
    head = f"published {metric_words(metric)} · {'; '.join([published_words(rows[0]), *shared])}"
    cells = [_published_cell(row, [mark for mark in row.marks if mark not in shared]) for row in rows]
    lines = _folded(head, width, "  ") + _packed(cells, width, "    ")
    return lines + (_folded(f"({about})", width, "    ") if about else [])


def _published_cell(row: Published, marks: Sequence[str]) -> str:
    said = ", ".join([*(["floor"] if row.floor else []), *marks])
    spread = f" ±{row.sd:.3f}" if row.sd is not None else ""
    return f"{row.model} {row.value:.3f}{spread}" + (f" ({said})" if said else "")


def _raised(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers)).translate(_SUPERSCRIPT)


def _cut(text: str, most: int) -> str:
    """One line of at most so many characters; the middle of a path tells least."""
    text, half = " ".join(text.split()), most // 2
    return text if len(text) <= most else text[: most - half - 1] + "…" + text[-half:]


def _folded(text: str, width: int, indent: str) -> list[str]:
    return _packed(text.split(), width, indent, " ")


def _packed(parts: Sequence[str], width: int, indent: str, between: str = " · ") -> list[str]:
    lines, current = [], ""
    for part in parts:
        longer = f"{current}{between}{part}" if current else part
        if current and len(indent) + len(longer) > width:
            lines.append(indent + current)
            longer = part
        current = longer
    return [*lines, indent + current] if current else lines


def markdown_table(
    scores: Sequence[Score], level: float, config: TableConfig, published: Sequence[Published] | None = None
) -> str:
    """GitHub-flavoured Markdown, every score once: a table a data set, its published rows in a table below, notes at the end."""
    found, notes = blocks(scores, config.published, published), Footnotes()
    parts = []
    for dataset in dict.fromkeys(block.dataset for block in found):
        inside = [block for block in found if block.dataset == dataset]
        parts += [f"### {escaped(dataset)}", _markdown_scores(inside, notes)]
        sizes = dict.fromkeys(f"{block.protocol}, {block.probe}, {block.role}: {block.size}" for block in inside)
        parts.append("\n".join(f"- {escaped(size)}" for size in sizes))
        rows = [(metric, row) for block in inside for metric, column in published_columns(block) for row in column]
        if rows:
            parts += ["Published by others:", _markdown_published(list(dict.fromkeys(rows)))]
    numbered = [f"{n}. {escaped(note)}" for note, n in notes.numbers.items()]
    parts += ["\n".join(numbered)] if numbered else []
    parts.append("\n".join(f"- {escaped(note)}" for note in general_notes(found, level)))
    return "\n\n".join(parts) + "\n"


def _markdown_scores(found: Sequence[Block], notes: Footnotes) -> str:
    metrics = list(dict.fromkeys(metric for block in found for metric in block.metrics))
    head = ["protocol", "probe", "role", "encoder", "embedding", "sees", *map(metric_words, metrics)]
    rows = []
    for block in found:
        for line in block.lines:
            rows.append([
                block.protocol,
                block.probe,
                block.role + (" (selected on report)" if block.selected else ""),
                *_markdown_line(line, notes),
                *(_markdown_cell(line, metric, notes) for metric in metrics),
            ])  # fmt: skip
    return _piped(head, rows)


def _markdown_line(line: Line, notes: Footnotes) -> list[str]:
    name = f"− {line.minus}" if line.minus else line.encoder + (" (floor)" if line.floor else "")
    form = "" if line.minus else " ".join(filter(None, (line.resolution, line.seen)))
    return [_Raw(escaped(name) + _sup(notes.of_line(line))), "" if line.minus else line.embedding, form]


def _markdown_cell(line: Line, metric: str, notes: Footnotes) -> str:
    score = line.cells.get(metric)
    if score is None:
        return ""
    runs = f", {score.runs} runs" if score.runs > 1 and not score.minus else ""
    return _Raw(number(score) + runs + _sup(notes.of_cell(line, metric)))


class _Raw(str):
    """Markdown that is escaped already."""


def _sup(numbers: Sequence[int]) -> str:
    return f"<sup>{','.join(map(str, numbers))}</sup>" if numbers else ""


def _markdown_published(rows: Sequence[tuple[str, Published]]) -> str:
    head = ["model", "embedding", "protocol", "split", "metric", "value", "read with", "source"]
    return _piped(head, [
        [
            row.model + (" (floor)" if row.floor else ""), row.embedding or "not stated", row.protocol, row.split or "not stated",
            metric_words(metric), f"{row.value:.3f}" + (f" ±{row.sd:.3f}" if row.sd is not None else ""), ", ".join(row.marks),
            row.source,
        ]
        for metric, row in rows
    ])  # fmt: skip


def _piped(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell if _plain(cell) else escaped(cell) for cell in line) + " |" for line in lines)


def _plain(cell: str) -> bool:
    return isinstance(cell, _Raw) or cell == "---"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, inside a table too: no markup, no HTML, one line."""
    return "".join(_MARKDOWN.get(character, character) for character in " ".join(text.split()))


def terminal_overview(found: Overview, config: TableConfig) -> str:
    """Encoders against sets, one number a cell."""
    floors = [any(score is not None and score.floor for score in row) for row in found.cells]
    labels = []
    for (encoder, *form), floor in zip(found.rows, floors, strict=True):
        said = ", ".join(filter(None, [*form, "floor" if floor else ""]))
        labels.append("  ".join(filter(None, (_cut(encoder, _LABEL - 20), said))))
    columns = [
        [_cut(f"{dataset}, {metric_words(metric)}", _LABEL), *(number(row[place]) for row in found.cells)]
        for place, (dataset, _, metric) in enumerate(found.sets)
    ]
    if len(found.mean_over) > 1:
        columns.append(["mean", *("–" if mean is None else f"{mean:.3f}" for mean in found.means)])
    lines = [found.title, "─" * min(config.width, len(found.title)), *_banded(labels, columns, config.width)]
    return "\n".join([*lines, *_folded(found.mean_words, config.width, "")])


def markdown_overview(found: Overview) -> str:
    """The same as a Markdown table."""
    mean = ["mean"] if len(found.mean_over) > 1 else []
    head = ["encoder", "embedding", *(f"{dataset}, {metric_words(metric)}" for dataset, _, metric in found.sets), *mean]
    rows = []
    for (encoder, embedding, resolution), row, value in zip(found.rows, found.cells, found.means, strict=True):
        name = encoder + (" (floor)" if any(score is not None and score.floor for score in row) else "")
        last = [("–" if value is None else f"{value:.3f}")] if mean else []
        rows.append([name, " ".join(filter(None, (embedding, resolution))), *(_Raw(number(score)) for score in row), *last])
    return f"### {escaped(found.title)}\n\n{_piped(head, rows)}\n\n{escaped(found.mean_words)}\n"
