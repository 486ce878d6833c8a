"""Draws the study of features: study.png beside this file.

pip install -e '.[docs]'
python benchmarks/feature_study.py --runs=DIR,DIR,DIR,DIR --output=OUT
python docs/figures/study.py OUT/study.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

_KINDS = ("blur", "noise", "jpeg", "codes", "classes", "collapse", "copies")
_COLUMNS = ("frechet", "kid", "recall", "copies")


def main() -> None:
    """Reads the study and draws a row of panels for each network."""
    study = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    nets = study["nets"]
    size = (3.1 * (len(_COLUMNS) + 1), 2.7 * len(nets))
    figure, panels = plt.subplots(len(nets), len(_COLUMNS) + 1, figsize=size, squeeze=False)
    for row, (net, told) in zip(panels, nets.items(), strict=True):
        found = told["figures"]
        for panel, name in zip(row, _COLUMNS, strict=False):
            for kind in _KINDS:
                grades = [found[f"{kind} {grade}"][name] for grade in range(1, 9)]
                panel.plot(range(1, 9), grades, label=kind, marker=".")
            if name in ("frechet", "kid"):
                # Unbiased kernel distances may be a little below 0.
                panel.set_yscale("symlog", linthresh=1e-3)
            panel.set_title(f"{name}, {net}", fontsize=9)
            panel.set_xlabel("grade", fontsize=8)
        runs = {}
        for checkpoint, accuracy in study["accuracy"].items():
            runs.setdefault(checkpoint.split()[0], []).append((accuracy, found[checkpoint]["kid"]))
        for run, points in runs.items():
            row[-1].plot(*zip(*points, strict=True), ".-", label=run)
        rho = told["rho"]["kid"]["checkpoints"]
        row[-1].set_title(f"checkpoints: kid, rho {rho:.2f}", fontsize=9)
        row[-1].set_xlabel("share of attributes that are right", fontsize=8)
        row[-1].legend(fontsize=7)
    panels[0][0].legend(fontsize=7)
    for panel in panels.flat:
        panel.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("study.png"), dpi=80)


if __name__ == "__main__":
    main()
