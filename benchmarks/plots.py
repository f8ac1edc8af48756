"""Plot what eval.py and the benchmarks wrote: one SVG for each JSON file, by what is in it.

Reads   FILES   perplexity.json and summary.json of eval.py, the --output of benchmarks/retrieval.py, and of
                benchmarks/build.py, benchmarks/paper/efficiency.py and sensitivity.py
Writes  OUTPUT_DIR/{name of the file}.svg   the same bytes for the same file; on no background, in colours that can be
                read on a light page and on a dark one
Run     python benchmarks/plots.py perplexity.json retrieval.json --output_dir benchmarks/plots
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.cli import Parser, run_script
from utils.files import InputError, make_folder, replacing
from utils.json_io import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Greys and hues of middle lightness: at least 3.5 to 1 in contrast with both white and GitHub's dark page.
INK, GRID = "#7a828e", "#7a828e40"
BLUE, ORANGE, GREEN, PURPLE, RED = COLOURS = ("#2f81f7", "#d9730d", "#2da44e", "#a371f7", "#e5534b")
STYLE: Any = {
    "svg.hashsalt": "chunk-distilled",  # names in the file, which are drawn at random otherwise
    "svg.fonttype": "none",
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
WIDTH, HEIGHT = 4.2, 3.0  # inches, of one panel

BUILD_STAGES = {"stage 3": "3, chunks", "stage 4": "4, context vectors", "flattening": "5, flattening"}

Point = tuple[float, float, float, float]  # place, value, lower, upper


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="JSON files of eval.py and of benchmarks")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the plots")
    parser.add_argument("--png", action="store_true", help="also write each as a PNG, on white, to look at")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    documents = {path: read_json(path) for path in args.files}
    drawings = {path: drawing_of(path, document) for path, document in documents.items()}
    names = [path.stem for path in documents]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{twice[0]}.json: two files have this name, and plots are named after them; rename one")
    require_matplotlib()
    import matplotlib
    from matplotlib import pyplot

    make_folder(args.output_dir)
    for path, draw in drawings.items():
        with matplotlib.rc_context(STYLE):
            try:
                figure = draw(documents[path])
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise InputError(f"{path}: lacks what its plot shows ({error!r}); write it anew") from error
            save(figure, args.output_dir / f"{path.stem}.svg", args.png)
            pyplot.close(figure)
        print(args.output_dir / f"{path.stem}.svg")


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise InputError("matplotlib is not installed; pip install -r requirements-dev.txt") from None


def save(figure: "Figure", path: Path, png: bool) -> None:
    metadata = {"Date": None, "Creator": None}  # else the bytes are other ones each day, and with each version
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", transparent=True, bbox_inches="tight", metadata=metadata)
    if png:
        figure.savefig(path.with_suffix(".png"), dpi=150, facecolor="white", bbox_inches="tight")


# ---- Which plot


def drawing_of(path: Path, document: Any) -> Callable[[Any], "Figure"]:
    """The function that draws a document; raises InputError where it is of none of the known kinds."""
    results = document.get("results") if isinstance(document, dict) else None
    for needed, where, draw in (
        ({"base", "cdlm"}, document, draw_perplexity),
        ({"runs"}, document, draw_summary),
        ({"gammas", "thetas"}, results, draw_sensitivity),
        ({"rows", "settings"}, results, draw_efficiency),
        ({"cases", "copy_bytes_per_second"}, results, draw_retrieval),
        ({"sizes"}, results, draw_build),
    ):
        if isinstance(where, dict) and needed <= where.keys():
            return draw
    raise InputError(f"{path}: is of no kind that is plotted; give a file of eval.py or of a benchmark (see --help)")


def panels(n: int, width: float = WIDTH, height: float = HEIGHT) -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, n, figsize=(n * width, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def curve(axes: "Axes", points: Sequence[Point], label: str | None, colour: str) -> None:
    """A line through values with their intervals; a point without one has its value for both ends."""
    places, values, lower, upper = zip(*sorted(points), strict=True)
    axes.plot(places, values, marker="o", color=colour, label=label)
    axes.fill_between(places, lower, upper, color=colour, alpha=0.2, linewidth=0)


def level(axes: "Axes", value: float, label: str, colour: str, style: str = "--") -> None:
    axes.axhline(value, color=colour, linestyle=style, linewidth=1.4, label=label)


# ---- eval.py


def draw_perplexity(document: Mapping[str, Any]) -> "Figure":
    """Perplexity against θ with its 95% interval, beside the base LM, the best constant q and the fitted map."""
    figure, (axes, close) = panels(2)
    base, of_settings = document["base"], document["cdlm"]
    names = {"constant": ("best constant q", PURPLE), "fitted": ("fitted map", GREEN)}
    points = [
        (float(name), found["perplexity"] / base["perplexity"], found["ratio_lower"], found["ratio_upper"])
        for name, found in of_settings.items()
        if name not in names
    ]
    for panel in (axes, close):
        level(panel, 1.0, f"LM alone, {base['perplexity']:.2f}", INK)
        if points:
            curve(panel, points, "map of θ", BLUE)
        for name, (label, colour) in names.items():
            if name in of_settings:
                found = of_settings[name]
                ratio = found["perplexity"] / base["perplexity"]
                level(panel, ratio, f"{label}, {found['perplexity']:.2f}", colour, "-")
                panel.axhspan(found["ratio_lower"], found["ratio_upper"], color=colour, alpha=0.2, linewidth=0)
        panel.set_xlabel("θ (cosine similarity)")
    axes.set_ylabel("perplexity / the LM's")
    axes.set_title(f"{base['tokens']:,} tokens of {document['text']['file']}")
    axes.set_yscale("log")
    plain_numbers(axes.yaxis, steps=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    legend_below(figure, axes)
    lowest = min([found["ratio_lower"] for found in of_settings.values()], default=1.0)
    margin = max(0.05, 1.5 * (1 - lowest))
    close.set_ylim(1 - margin, 1 + margin)
    near = [theta for theta, _, lower, _ in sorted(points) if lower < 1 + margin]
    if len(near) > 1:
        close.set_xlim(near[0] - 0.01, near[-1] + 0.01)
    close.set_title("the same, near 1")
    return figure


def plain_numbers(axis: "Axis", steps: Sequence[float] = (1.0,)) -> None:
    """Ticks of a logarithmic axis at these steps of each decade, as 0.1 or 1,000."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=tuple(steps)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: "Figure", axes: "Axes") -> None:
    """One legend for all panels, of what is in this one."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def draw_summary(document: Mapping[str, Any]) -> "Figure":
    """Forward passes and time saved against θ, over prompts."""
    runs = {
        float(name.removeprefix("generation_t")): run
        for name, run in document["runs"].items()
        if name.startswith("generation_t")
    }
    if not runs:
        raise ValueError("no run in chunk mode")
    figure, (passes, time) = panels(2)
    for axes, key, label in ((passes, "fps", "forward passes saved (%)"), (time, "tts", "time per token saved (%)")):
        points = [
            (theta, 100 * run[key], *(100 * run["spread"][key][end] for end in ("lower_quartile", "upper_quartile")))
            for theta, run in runs.items()
            if run.get(key) is not None and run["spread"].get(key) and (key == "fps" or run.get("tts_same_run", True))
        ]
        if points:
            curve(axes, points, None, BLUE)
        level(axes, 0.0, "LM alone", INK)
        axes.set_xlabel("θ (cosine similarity)")
        axes.set_ylabel(label)
    passes.set_title("line: all prompts; band: quartiles of prompts")
    return figure


# ---- Tables of the paper


def draw_efficiency(document: Mapping[str, Any]) -> "Figure":
    """Heat maps over θ for each γ and δ: passes saved, perplexity to the baseline's, repeated 4-grams; means over seeds."""
    results = document["results"]
    of_grid = {name: setting for name, setting in results["settings"].items() if setting["auto"] is None}
    thetas = sorted({setting["similarity_threshold"] for setting in of_grid.values()})
    rules: dict[str, dict[float, Any]] = {}
    for name, setting in of_grid.items():
        repeats = ",\nno repeats" if setting["reject_repeats"] else ""
        rule = f"γ {setting['gamma']:g}, δ {setting['min_first_token_prob']:g}{repeats}"
        rules.setdefault(rule, {})[setting["similarity_threshold"]] = results["rows"][name]
    figure, axes = panels(3, width=4.0, height=max(HEIGHT, 0.35 * len(rules) + 1))
    columns = (
        ("fps", 100.0, "forward passes saved (%)", "{:.0f}", "YlGnBu"),
        ("perplexity_ratio", 1.0, "perplexity / the plain text's", "{:.2f}", "YlOrRd"),
        ("repeated", 100.0, "repeated 4-grams (%)", "{:.0f}", "YlOrRd"),
    )
    for panel, (key, scale, label, form, colours) in zip(axes, columns, strict=True):
        values = [
            [scale * by_theta[theta][key]["value"] if theta in by_theta else float("nan") for theta in thetas]
            for by_theta in rules.values()
        ]
        heat_map(panel, list(rules), [f"{theta:g}" for theta in thetas], values, label, form, colours)
    return figure


def draw_sensitivity(document: Mapping[str, Any]) -> "Figure":
    """Heat maps over γ and θ: perplexity to the base LM's, also of what is fitted at each γ, and forward passes saved."""
    results = document["results"]
    base = results["base"]["perplexity"]
    figure, (perplexity, saved) = panels(2, width=5.0)
    thetas = [f"{theta:g}" for theta in results["thetas"]]
    fitted = [
        [found["perplexity"] for found in of_gamma]
        for of_gamma in zip(results["constant"], results["fitted"], strict=True)
    ]
    ratios = [
        [value / base for value in [*row, *more]] for row, more in zip(results["perplexity"], fitted, strict=True)
    ]
    percent = [[100 * value for value in row] for row in results["fps"]]
    columns = [*thetas, "best\nq", "fitted"]
    gammas = [f"γ {gamma:g}" for gamma in results["gammas"]]
    heat_map(perplexity, gammas, columns, ratios, "perplexity / the LM's", "{:.2f}", "YlOrRd", is_log=True)
    heat_map(saved, gammas, thetas, percent, "forward passes saved (%)", "{:.0f}", "YlGnBu")
    return figure


def heat_map(
    axes: "Axes",
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    title: str,
    form: str,
    colours: str,
    is_log: bool = False,
) -> None:
    """values: of each column, of each row, NaN for none. A cell says its number, in black or white, whichever can be read."""
    import numpy as np
    from matplotlib.colors import LogNorm

    table = np.array(values)
    image = axes.imshow(table, aspect="auto", cmap=colours, norm=LogNorm() if is_log else None)
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"
        axes.text(column, row, form.format(value), ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("θ")
    axes.set_title(title)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


# ---- Retrieval


def draw_retrieval(document: Mapping[str, Any]) -> "Figure":
    """Milliseconds of a search against rows, a panel for each number of dimensions."""
    cases = [case for case in document["results"]["cases"] if case["vectors"] != "random"] or document["results"][
        "cases"
    ]
    dimensions = sorted({case["dimensions"] for case in cases})
    figure, axes = panels(len(dimensions), width=3.6)
    ways = {"torch.mv": ("all rows multiplied (torch.mv)", INK), "ours": ("exact search here", BLUE)}
    for panel, n_dimensions in zip(axes, dimensions, strict=True):
        for way, (label, colour) in ways.items():
            points = [
                (
                    case["rows"],
                    *(1e3 * case["seconds"][way][end] for end in ("median", "low_quartile", "high_quartile")),
                )
                for case in cases
                if case["dimensions"] == n_dimensions
            ]
            curve(panel, points, label, colour)
        panel.set_xscale("log")
        panel.set_yscale("log")
        plain_numbers(panel.xaxis)
        plain_numbers(panel.yaxis)
        panel.set_xlabel("rows of a token trie")
        panel.set_title(f"{n_dimensions} dimensions")
    axes[0].set_ylabel("one search (ms)")
    legend_below(figure, axes[0])
    return figure


# ---- Building


def draw_build(document: Mapping[str, Any]) -> "Figure":
    """Tokens a second of each stage against tokens of the text, without what a command takes on a text of one window."""
    sizes = document["results"]["sizes"]
    figure, (axes,) = panels(1, width=6.0)
    for (stage, label), colour in zip(BUILD_STAGES.items(), COLOURS, strict=False):
        points = []
        for size in sizes:
            start = size[stage]["start_seconds"]["median"]
            seconds = (
                max(size[stage]["seconds"][end] - start, 1e-3) for end in ("median", "high_quartile", "low_quartile")
            )
            points.append((size["tokens"], *(size["tokens"] / each for each in seconds)))
        curve(axes, points, label, colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_numbers(axes.xaxis, steps=(1.0, 3.0))
    plain_numbers(axes.yaxis, steps=(1.0, 3.0))
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("tokens/s")
    legend_below(figure, axes)
    return figure


if __name__ == "__main__":
    run_script(main)
