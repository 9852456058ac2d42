"""Draws docs/results.png from the table of the losses in docs/results.md.

    python3 docs/plot_results.py

Means with standard deviations, which is what the table keeps of the runs; reproduce.py, which makes the table, draws a
point for each run.
"""

import os

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 (after its backend)

DOCS = os.path.dirname(os.path.abspath(__file__))
PANELS = "rsum", "i2t N10 skewness", "t2i N10 skewness"


def read_table(path):
    """{loss: {figure: (mean, deviation)}} of the Markdown table whose first column is called `loss`."""
    with open(path, encoding="utf-8") as file:
        rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in file if line.startswith("|")]
    header = next(row for row in rows if row[0] == "loss")
    start = rows.index(header) + 2
    body = [row for row in rows[start:] if len(row) == len(header)]
    return {row[0]: {name: tuple(map(float, cell.split("±"))) for name, cell in zip(header[1:], row[1:])}
            for row in body}


def main():
    """One panel a figure, one mark a loss."""
    losses = read_table(os.path.join(DOCS, "results.md"))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3), layout="constrained")
    for axis, panel in zip(axes, PANELS):
        for place, figures in enumerate(losses.values()):
            mean, deviation = figures[panel]
            axis.errorbar(place, mean, deviation, fmt="o", capsize=6, color=f"C{place}")
        axis.set_xticks(range(len(losses)), losses, fontsize=8)
        axis.set_xlim(-0.6, len(losses) - 0.4)
        axis.set_title(panel, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(os.path.join(DOCS, "results.png"), dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
