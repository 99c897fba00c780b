"""Pictures from the JSON of the other benchmarks: ratios to the product over the number of latents.

python recipes/benchmark/draw.py recipes/benchmark/results/cpu
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(sys.argv[1])
    for file in sorted(folder.glob("*.json")):
        for section, rows in json.loads(file.read_text())["sections"].items():
            figure, axes = plt.subplots(figsize=(6, 4))
            for name in dict.fromkeys(name for row in rows for name in row["times"]):
                held = [row for row in rows if (row["times"].get(name) or {}).get("ratio")]
                points = sorted((row["d_sae"], row["times"][name]["ratio"]) for row in held)
                axes.plot(*zip(*points, strict=True), "o-", ms=3, label=name) if points else None
            axes.set(xscale="log", yscale="log", xlabel="latents", ylabel="products", title=section)
            axes.legend(fontsize=6)
            figure.tight_layout()
            figure.savefig(folder / f"{section.replace(' ', '_').replace(',', '')}.png", dpi=120)
            plt.close(figure)


if __name__ == "__main__":
    main()
