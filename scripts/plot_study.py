"""Draw the plots of docs/what-makes-it-work.md from results/study/nano.jsonl.

    python scripts/plot_study.py                                  # and docs/images/study-*.svg
    python scripts/plot_study.py results/study/calibrated.jsonl   # other rows

Prints the table of rows and every measure's correlation with the worth.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from scipy.stats import spearmanr

RESULTS = Path("results/study/nano.jsonl")
IMAGES = Path("docs/images")
SMALL = 0.15
MEASURES = {
    "lm_loss": "LM loss",
    "hidden_error": "hidden error",
    "divergence": "KL to global",
    "prompted_divergence": "KL behind the initial prompt",
    "align_start": "alignment at the initial prompt",
    "align_later": "alignment at a trained prompt",
    "align_layers_start": "alignment by layer, initial prompt",
    "align_layers_later": "alignment by layer, trained prompt",
    "align_signs_start": "agreement of signs, initial prompt",
    "align_signs_later": "agreement of signs, trained prompt",
}
Lines = list[dict[str, Any]]


def main(results: Path) -> None:
    """Draw and print."""
    lines: Lines = [json.loads(line) for line in results.read_text().splitlines()]
    print("| row | share | KL behind the prompt | alignment | worth | on test |")
    print("|---|---|---|---|---|---|")
    for line in sorted(lines, key=lambda line: -line["worth"]):
        keys = ("prompted_divergence", "align_start", "worth", "worth_test")
        figures = (line.get(key, math.nan) for key in keys)
        cells = " | ".join("" if math.isnan(x) else f"{x:+.3f}" for x in figures)
        print(f"| {line['name']} | {line['share']:.1%} | {cells} |")
    if results == RESULTS:
        # Of these each is another auxiliary model, and all are trained alike.
        _compare_models([line for line in lines if line["name"].startswith("aux/")])


def _compare_models(models: Lines) -> None:
    print(f"\n{len(models)} auxiliary models\n\n| measure | Spearman with worth |\n|---|---|")
    for name, label in MEASURES.items():
        correlation = spearmanr([m[name] for m in models], [m["worth"] for m in models]).statistic
        print(f"| {label} | {correlation:+.2f} |")
    IMAGES.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = "fedsp"
    scatter(models, ("prompted_divergence", "align_start"))
    rounds(models)


def scatter(models: Lines, names: tuple[str, ...]) -> None:
    """Draw the worth against some measures, one point an auxiliary model."""
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), sharey=True)
    for axis, name in zip(axes, names, strict=True):
        for model in models:
            color = "C0" if model["share"] <= SMALL else "C7"
            axis.plot(model[name], model["worth"], "o", color=color)
            label = model["name"].removeprefix("aux/")
            axis.annotate(
                label, (model[name], model["worth"]), fontsize=6, rotation=20, clip_on=True
            )
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_xlabel(MEASURES[name])
    # The models that do harm lie far below; the page's table has them.
    axes[0].set_xlim(-0.02, 0.9)
    axes[0].set_ylim(-0.01, 0.13)
    axes[0].set_ylabel("worth, nats a token (blue: at most 15 %)")
    save(figure, "study-predictors.svg")


def rounds(models: Lines) -> None:
    """Draw the global model's loss by round: the server alone, the ceiling, and the best."""
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    alone = models[0]["server_only"]["losses"]
    axis.plot(alone, color="black", linestyle="--", label="server alone")
    for model in sorted(models, key=lambda model: -model["worth"])[:6]:
        label = f"{model['name'].removeprefix('aux/')} ({model['share']:.0%})"
        axis.plot(model["fedsp"]["losses"], label=label)
    axis.set_xlabel("round")
    axis.set_ylabel("selection loss, nats a token")
    axis.set_ylim(top=4.95)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, "study-rounds.svg")


def save(figure: Any, name: str) -> None:
    """Write a figure; the same data gives the same file."""
    figure.tight_layout()
    figure.savefig(IMAGES / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
