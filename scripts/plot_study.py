"""Draw the plots of docs/what-makes-it-work.md from results/study/*.jsonl.

python scripts/plot_study.py

Writes docs/images/study-*.svg and prints the correlation of every measure with the worth.
"""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
from scipy.stats import pearsonr, spearmanr

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "fedsp"
import matplotlib.pyplot as plt  # noqa: E402 - the backend is chosen first

RESULTS = Path("results/study/nano.jsonl")
IMAGES = Path("docs/images")
MEASURES = {
    "lm_loss": "LM loss",
    "hidden_error": "hidden error",
    "divergence": "KL to global",
    "prompted_divergence": "KL behind the initial prompt",
    "align_start": "alignment at the initial prompt",
    "align_later": "alignment at a trained prompt",
    "align_layers_start": "alignment by layer, initial",
    "align_layers_later": "alignment by layer, trained",
    "align_signs_start": "agreement of signs, initial",
    "align_signs_later": "agreement of signs, trained",
}


def main() -> None:
    """Draw and print."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    # one auxiliary model is one point: rows that only change the training are left out
    same = [line for line in lines if line["name"].startswith("aux/")]
    print(f"{len(same)} auxiliary models\n\n| measure | Pearson | Spearman |\n|---|---|---|")
    worth = [line["worth"] for line in same]
    for name, label in MEASURES.items():
        values = [line[name] for line in same]
        print(
            f"| {label} | {pearsonr(values, worth).statistic:+.2f} "
            f"| {spearmanr(values, worth).statistic:+.2f} |"
        )
    IMAGES.mkdir(parents=True, exist_ok=True)
    scatter(same, ("divergence", "prompted_divergence", "align_start", "align_later"))
    rounds(lines)


def scatter(lines: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Worth against some measures, one point an auxiliary model."""
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.2), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for line in lines:
            small = line["share"] <= 0.15
            axis.plot(
                line[name], line["worth"], "o" if small else "s", color="C0" if small else "C7"
            )
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xlabel(MEASURES[name])
    axes[0].set_ylabel("worth: nats a token gained\nover the server alone")
    save(figure, "study-predictors.svg")


def rounds(lines: list[dict[str, Any]]) -> None:
    """The global model's loss by round for some rows."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    chosen = [line for line in lines if line.get("plot", True)]
    best = sorted(chosen, key=lambda line: -line["worth"] if line["share"] <= 0.15 else math.inf)
    alone = lines[0]["server_only"]["losses"]
    axis.plot(alone, color="black", linestyle="--", label="server alone")
    for line in [lines[0], *best[:3]]:
        axis.plot(line["fedsp"]["losses"], label=f"{line['name']} ({line['share']:.0%})")
    axis.set_xlabel("round")
    axis.set_ylabel("selection loss, nats a token")
    axis.set_ylim(top=4.95)
    axis.legend(fontsize=8)
    save(figure, "study-rounds.svg")


def save(figure: Any, name: str) -> None:
    """Write a figure that is the same for the same data."""
    figure.tight_layout()
    figure.savefig(IMAGES / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
