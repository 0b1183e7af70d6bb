"""Training curves of train.py as a picture: python experiments/specks/curves.py --work WORK --out curves.png

Needs matplotlib (extra: viz). Reads the log of each stage; accuracies are of training batches.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEASURES = {
    "stage 1: image tokens": ("cell_color", "cell_shape", "cell_character", "cell_box"),
    "stages 2-4: answers": ("presence", "color", "shape", "read2", "stepwise", "where", "relation", "look"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder that train.py worked in")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args()
    logs, starts, minutes = [], [], 0.0
    for stage in range(1, 5):
        lines = (args.work / f"stage{stage}" / "log.jsonl").read_text().splitlines()
        # A restart from a checkpoint logs some steps again.
        records = sorted({r["step"]: r for r in map(json.loads, lines)}.values(), key=lambda r: r["step"])
        starts.append(minutes)
        logs += [(stage, minutes + r["seconds"] / 60, r) for r in records]
        minutes += records[-1]["seconds"] / 60
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for panel, (title, names), stages in zip(panels, MEASURES.items(), ((1,), (2, 3, 4)), strict=True):
        for name in names:
            points = [(t, r[name]) for stage, t, r in logs if stage in stages and r.get(name)]
            panel.plot(*zip(*points, strict=True), label=name)
        for start in starts[2:] if 2 in stages else ():
            panel.axvline(start, color="gray", linewidth=0.8, linestyle=":")
        panel.set(title=title, xlabel="minutes of training", ylim=(0, 1))
        panel.legend(fontsize=8, loc="lower center", ncols=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    main()
