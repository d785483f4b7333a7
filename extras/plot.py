"""
Curves of one or several runs, from their metrics.jsonl.

    python -m extras.plot out/pretrain                            # writes out/pretrain/curves.png
    python -m extras.plot out/sft out/dpo --out=curves.svg --smooth=20

One panel for each of PANELS that a run has: a line a run, points where it was evaluated. Needs the
extra `plot` (matplotlib).
"""

import json
import math
import os
import sys

from common.errors import UserError, show_user_errors

# title of a panel -> keys of metrics.jsonl; "val_..." ones are drawn as points
PANELS = {
    "loss": ["loss", "val_loss"],
    "bits per byte": ["val_bits_per_byte"],
    "divergence from the teacher": ["kd", "val_kd"],
    "reward": ["reward", "val_reward"],
    "pass@1": ["pass", "val_pass"],
    "accuracy of pairs": ["accuracy", "val_accuracy"],
    "margin": ["margin"],
    "KL": ["kl"],
    "entropy": ["entropy"],
    "answer length": ["length"],
    "load balance of experts": ["balance"],
    "learning rate": ["lr"],
    "gradient norm": ["grad_norm"],
    "tokens per second": ["tok_per_s"],
}


def read_metrics(run):
    """-> list of dicts, the records of a run's metrics.jsonl; a last line cut short is left out"""
    path = os.path.join(run, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name run directories of train_*.py") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if line.endswith("\n"):
                raise UserError(f"{path}:{number}: not a line of JSON") from None
    return records


def curve(records, key):
    """-> steps, values of a key where it is a number; a training step counts as done: step + 1"""
    steps, values = [], []
    for record in records:
        value = record.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            # a training step has a loss, in every stage
            steps.append(record["step"] + ("loss" in record))
            values.append(value)
    return steps, values


def smoothed(values, window):
    """Mean of each value and up to window - 1 before it"""
    windows = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in windows]


def draw(runs, out, smooth=1):
    """
    runs: dict of label to records; out: path that ends in .png, .svg or .pdf; smooth: steps to
    average over -> titles of the panels drawn
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "matplotlib is missing, which draws curves: pip install matplotlib, "
            'or this package with its extra "plot"'
        ) from None
    panels = {
        title: keys
        for title, keys in PANELS.items()
        if any(curve(records, key)[0] for records in runs.values() for key in keys)
    }
    if not panels:
        raise UserError(f"{', '.join(runs)}: nothing to draw yet")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    for i, (title, keys) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for number, (label, records) in enumerate(runs.items()):
            for key in keys:
                steps, values = curve(records, key)
                style = dict(color=f"C{number % 10}", linewidth=1.2, label=label)
                if key.startswith("val_"):
                    style.update(linewidth=1, label=f"{label}, validation")
                    axes.plot(steps, values, "o--", markersize=4, **style)
                elif steps:
                    axes.plot(steps, smoothed(values, smooth), **style)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if i >= len(panels) - columns:
            axes.set_xlabel("steps", fontsize=8)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=2 * columns, fontsize=8)
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={out}: {error}") from None
    return list(panels)


if __name__ == "__main__":  # the only part that knows other modules
    from dataclasses import dataclass

    from common.config import parse_config

    @dataclass(frozen=True)
    class Config:
        out: str = ""  # picture to write, .png, .svg or .pdf; "" = RUN/curves.png
        smooth: int = 1  # steps that a point of the curve is the mean of

    show_user_errors()
    arguments = sys.argv[1:] or ["--help"]
    options = [argument for argument in arguments if argument.startswith("-")]
    folders = [argument for argument in arguments if argument not in options]
    cfg = parse_config(Config, options)
    if not folders or cfg.smooth < 1:
        raise UserError(
            "expected: python -m extras.plot RUN [RUN ...] [--out=FILE.png] [--smooth=STEPS]"
        )
    out = cfg.out or os.path.join(folders[0], "curves.png")
    runs = {os.path.normpath(folder): read_metrics(folder) for folder in folders}
    titles = draw(runs, out, cfg.smooth)
    print(f"{out}: {', '.join(titles)}")
