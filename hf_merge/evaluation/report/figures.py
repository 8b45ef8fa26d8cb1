"""The figures of a report, each from [`ReportData`], or nothing where the data do not have what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import MissingDependencyError
from .data import LINEAR_KINDS, ReportData, block_of, by_module, mean


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

MERGED, EXPERT, ACCENT = "#2563eb", "#cbd5e1", "#d97706"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "xtick.color": "#334155",
    "ytick.color": "#334155",
    "legend.frameon": False,
    "figure.dpi": 110,
}


@dataclass
class Figure:
    """One figure.

    Args:
        name (`str`): The name of its file, without suffix.
        caption (`str`): What it shows and how to read it.
        canvas ([`~matplotlib.figure.Figure`]): The drawing.
    """

    name: str
    caption: str
    canvas: Canvas


def all_figures(data: ReportData) -> Iterator[Figure]:
    """The figures that the data allow, in the order of the page."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "The report", extra="report") from error
    with mpl.rc_context(STYLE):
        for draw in (quality, comparison, task_vectors, conflicts, wudi, blocks, coefficients, cost):
            figure = draw(data)
            if figure is not None:
                yield figure


def quality(data: ReportData) -> Figure | None:
    """Bars of merged model and expert by task; with three tasks or more also the shares of the experts on a radar."""
    if data.evaluation is None:
        return None
    scores = data.evaluation.tasks
    tasks, positions = list(scores), np.arange(len(scores))
    radar = len(tasks) > 2 and all(score.normalized is not None for score in scores.values())
    canvas = _canvas(9 if radar else 6, 3.4)
    axes = canvas.add_subplot(1, 2, 1) if radar else canvas.add_subplot()
    experts = [math.nan if score.expert is None else score.expert for score in scores.values()]
    bars = [axes.bar(positions - 0.2, experts, 0.38, color=EXPERT, label="expert")]
    bars.append(axes.bar(positions + 0.2, [s.value for s in scores.values()], 0.38, color=MERGED, label="merged"))
    for container in bars:
        axes.bar_label(container, fmt=lambda value: "" if math.isnan(value) else f"{value:.3g}", fontsize=7, padding=1)
    axes.set_xticks(positions, tasks, rotation=20 if len(tasks) > 5 else 0)
    metrics = {score.metric for score in scores.values()}
    axes.set_ylabel(metrics.pop() if len(metrics) == 1 else "value")
    axes.set_title("merged model and experts", pad=18)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 0.98), borderaxespad=0.2)
    if radar:
        _radar(canvas.add_subplot(1, 2, 2, projection="polar"), tasks, [s.normalized for s in scores.values()])
    return Figure("quality", "Each task under its own head, beside the task's own expert.", canvas)


def _radar(axes: Axes, tasks: Sequence[str], shares: Sequence[float]) -> None:
    angles = [*np.linspace(0, 2 * math.pi, len(tasks), endpoint=False), 0.0]
    axes.plot(angles, [1.0] * len(angles), color="#94a3b8", linewidth=1, linestyle="--")
    axes.plot(angles, [*shares, shares[0]], color=MERGED)
    axes.fill(angles, [*shares, shares[0]], color=MERGED, alpha=0.15)
    axes.set_xticks(angles[:-1], tasks)
    axes.tick_params(axis="x", pad=7)
    axes.grid(color="#e2e8f0")
    axes.spines["polar"].set_visible(False)
    axes.set_ylim(0, max(1.05, *shares))
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "50 %", "", "100 %"], fontsize=7)
    axes.set_title("share of the expert", pad=14)


def comparison(data: ReportData) -> Figure | None:
    """Quality over time, with the Pareto front."""
    if data.comparison is None or not data.comparison.rows:
        return None
    compared = data.comparison
    canvas = _canvas(7, 3.6)
    axes = canvas.add_subplot()
    front = compared.front("seconds")
    for row in compared.rows:
        on_front = row.name in front
        axes.scatter(row.seconds, row.mean, color=MERGED if on_front else "#94a3b8", zorder=3, s=28)
        axes.annotate(row.name, (row.seconds, row.mean), xytext=(5, 3), textcoords="offset points", fontsize=7)
    points = sorted((row.seconds, row.mean) for row in compared.rows if row.name in front)
    axes.plot(*zip(*points, strict=True), color=MERGED, linewidth=1, drawstyle="steps-post")
    axes.axhline(
        compared.individual.mean, color=ACCENT, linewidth=1, linestyle="--", label="experts, each on its task"
    )
    axes.set_xscale("log")
    axes.set_xlabel("seconds for the merge")
    axes.set_ylabel("mean on calibration rows")
    axes.set_title("quality and time")
    axes.margins(x=0.2, y=0.12)
    axes.legend(fontsize=8)
    caption = "The candidates of a comparison. Blue: no other candidate is better in the same time."
    return Figure("comparison", caption, canvas)


def task_vectors(data: ReportData) -> Figure | None:
    """The cosines between the experts' task vectors, and their norms."""
    if data.inspection is None or not data.inspection.layers:
        return None
    names = data.inspection.expert_names
    size = max(2.6, 0.55 * len(names) + 1.4)
    canvas = _canvas(2.1 * size + 1, size)
    left, right = canvas.subplots(1, 2)
    cosines = np.array(data.inspection.cosines)
    limit = max(0.1, float(np.abs(cosines - np.eye(len(names))).max()))
    _heat(left, cosines, names, names, "cosine of task vectors", cmap="RdBu_r", limits=(-limit, limit), text="{:.2f}")
    right.barh(names, [100 * norm for norm in data.inspection.relative_norms], color=MERGED)
    right.invert_yaxis()
    right.set_xlabel("‖τ‖ / ‖base‖, %")
    right.set_title("size of task vectors")
    caption = "Task vectors that are nearly orthogonal and of similar size merge well."
    return Figure("task_vectors", caption, canvas)


def conflicts(data: ReportData) -> Figure | None:
    """Mean cosine and sign conflict of every linear layer, by block."""
    if data.inspection is None:
        return None
    layers = [layer for layer in data.inspection.layers if layer.kind in LINEAR_KINDS]
    if len(data.inspection.expert_names) < 2 or not layers:
        return None
    cosines = {layer.name: _mean_cosine(layer.norms, layer.products) for layer in layers}
    signs = {layer.name: 100 * layer.conflicts / max(layer.count, 1) for layer in layers}
    caption = "Where the experts disagree: the mean cosine of their changes, and the entries they change in opposite directions."
    return _maps("conflicts", caption, [("mean cosine", cosines, "RdBu_r"), ("sign conflict, %", signs, "Oranges")])


def _mean_cosine(norms: Sequence[float], products: Sequence[Sequence[float]]) -> float:
    pairs = [(i, j) for i in range(len(norms)) for j in range(i)]
    return mean(products[i][j] / (norms[i] * norms[j]) for i, j in pairs if norms[i] and norms[j])


def wudi(data: ReportData) -> Figure | None:
    """What WUDI leaves of the interference, and the effective rank, of every linear layer."""
    rows = data.parameters_with("wudi_loss_before")
    if not rows:
        return None
    left = {
        name: 100 * row["wudi_loss_after"] / row["wudi_loss_before"]
        for name, row in rows.items()
        if row["wudi_loss_before"]
    }
    maps = [("interference left, %", left, "Purples")]
    ranks = {name: row["effective_rank"] for name, row in data.parameters_with("effective_rank").items()}
    if ranks:
        maps.append(("effective rank", ranks, "Greens"))
    return _maps("wudi", "WUDI's loss after the merge as a share of that of the summed task vectors.", maps)


def blocks(data: ReportData) -> Figure | None:
    """The loss of every block before and after it was trained."""
    rows = {name: row for name, row in data.report["blocks"].items() if row.get("first_loss") and row.get("last_loss")}
    if not rows:
        return None
    canvas = _canvas(max(5, 0.35 * len(rows) + 2), 3)
    axes = canvas.add_subplot()
    positions = np.arange(len(rows))
    axes.bar(positions - 0.2, [row["first_loss"] for row in rows.values()], 0.38, color=EXPERT, label="first epoch")
    axes.bar(positions + 0.2, [row["last_loss"] for row in rows.values()], 0.38, color=MERGED, label="at the end")
    axes.set_xticks(positions, _short(list(rows)), rotation=0 if len(rows) < 20 else 90)
    losses = [row[key] for row in rows.values() for key in ("first_loss", "last_loss")]
    if min(losses) > 0 and max(losses) > 50 * min(losses):
        axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("loss")
    axes.set_title("distillation of each block", pad=18)
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 0.98), borderaxespad=0.2)
    return Figure(
        "blocks", "How far each block was from the experts' blocks, on the samples, before and after.", canvas
    )


def coefficients(data: ReportData) -> Figure | None:
    """Mean and spread of the trained coefficients' changes, by block and expert."""
    rows = data.parameters_with("coefficient_changes")
    found: dict[int, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        block = block_of(name)
        if block is not None:
            found.setdefault(block, []).append(row["coefficient_changes"])
    if not found:
        return None
    canvas = _canvas(max(5, 0.4 * len(found) + 2), 3)
    axes = canvas.add_subplot()
    order = sorted(found)
    count = len(data.experts)
    for expert, name in enumerate(data.experts):
        means = [mean(one["mean"][expert] for one in found[block]) for block in order]
        spreads = [mean(one["std"][expert] for one in found[block]) for block in order]
        shift = (expert - (count - 1) / 2) * 0.6 / count
        axes.errorbar(np.arange(len(order)) + shift, means, spreads, fmt="o", markersize=3, linewidth=1, label=name)
    axes.axhline(0, color="#94a3b8", linewidth=0.8)
    axes.set_xticks(range(len(order)), [str(block) for block in order])
    axes.set_xlabel("block")
    axes.set_ylabel("change of α")
    axes.set_title("trained coefficients", pad=18)
    axes.legend(ncols=count, fontsize=7, loc="lower left", bbox_to_anchor=(-0.02, 0.98), borderaxespad=0.2)
    return Figure(
        "coefficients",
        "Mean and standard deviation of what training added to the coefficients of each expert.",
        canvas,
    )


def cost(data: ReportData) -> Figure | None:
    """Wall time by phase."""
    total = sum(data.report["seconds"].values())
    seconds = {phase: value for phase, value in data.report["seconds"].items() if value > 1e-3 * total}
    if not seconds:
        return None
    canvas = _canvas(6, 0.45 * len(seconds) + 1)
    axes = canvas.add_subplot()
    bars = axes.barh(list(seconds), list(seconds.values()), color=MERGED, height=0.55)
    axes.bar_label(bars, fmt=lambda value: f" {value:.3g} s", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("seconds")
    axes.set_title("time by phase")
    return Figure("cost", "Wall time of the merge.", canvas)


def _maps(name: str, caption: str, maps: Sequence[tuple[str, dict[str, float], str]]) -> Figure | None:
    """Heat maps side by side: modules over blocks."""
    tables = [(title, by_module(values), cmap) for title, values, cmap in maps]
    tables = [one for one in tables if one[1][0]]
    if not tables:
        return None
    modules, columns = len(tables[0][1][0]), len(tables[0][1][1])
    width = max(3.0, 0.28 * columns + 1.2)
    canvas = _canvas(len(tables) * width + 2.2, max(2.2, 0.27 * modules + 1.2))
    grid = canvas.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, (title, (names, numbers, cells), cmap) in zip(grid, tables, strict=True):
        values = np.array(cells)
        limits = (float(np.nanmin(values)), float(np.nanmax(values)))
        if cmap == "RdBu_r":
            limits = (-max(map(abs, limits)), max(map(abs, limits)))
        _heat(axes, values, names, [str(number) for number in numbers], title, cmap, limits)
        axes.set_xlabel("block")
    return Figure(name, caption, canvas)


def _heat(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    cmap: str,
    limits: tuple[float, float],
    text: str | None = None,
) -> None:
    """A heat map with its scale; cells without a value stay white."""
    image = axes.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    step = math.ceil(len(columns) / 24)
    axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(title)
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    if text is not None and len(rows) <= 12:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                dark = abs(value) > 0.6 * limits[1]
                axes.text(j, i, text.format(value), ha="center", va="center", fontsize=7, color="w" if dark else "k")


def _short(names: list[str]) -> list[str]:
    """Numbers of blocks, where names have one."""
    return [str(index) if (index := block_of(f"{name}.x")) is not None else name for name in names]


def _canvas(width: float, height: float) -> Canvas:
    from matplotlib.figure import Figure as Canvas

    return Canvas(figsize=(width, height), layout="constrained")
