"""Draws size, quality and speed of SmolLM2-135M from the results in docs/results/smollm2.json.

The results are those of two other scripts, which measure them again:

    python benchmarks/smollm2.py --llama          # megabytes and perplexity
    python benchmarks/decode.py --model smollm2   # milliseconds per token behind 64
    python benchmarks/front.py                    # this picture: docs/images/front.svg
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

DOCS = Path(__file__).parent.parent / "docs"
COLORS = {"tfgptopt": "#c2571a", "llama.cpp": "#4a6572"}


def main() -> None:
    rows = json.loads((DOCS / "results" / "smollm2.json").read_text("utf-8"))["rows"]
    # The same bytes each time, and text that stays text.
    with rc_context({"svg.hashsalt": "tfgptopt", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.6, 3.8), layout="constrained")
        axis = figure.subplots()
        for engine, color in COLORS.items():
            own = [row for row in rows if row["engine"] == engine]
            axis.scatter([], [], color=color, label=engine)
            for row in own:
                known = row["ms"] is not None
                speed = f", {1e3 / row['ms']:.0f} tokens/s" if known else ""
                axis.scatter(
                    row["megabytes"],
                    100 * row["rise"],
                    s=22 * (20 / row["ms"]) ** 1.4 if known else 40,
                    color=color if known else "none",
                    edgecolor=color,
                    alpha=0.8,
                )
                axis.annotate(
                    f"{row['name']}{speed}",
                    (row["megabytes"], 100 * row["rise"]),
                    xytext=row.get("offset", (8, 4)),
                    textcoords="offset points",
                    color=color,
                )
        axis.set(
            xlabel="MB of weights",
            ylabel="perplexity over float32, %",
            title="SmolLM2-135M on two cores: left and low is good; hollow: speed not measured",
        )
        axis.margins(x=0.3, y=0.14)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
        figure.savefig(DOCS / "images" / "front.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
