"""The demo's page: table, curves and samples in one HTML file that needs nothing else."""

import base64
import html
import importlib.util
import platform

import torch

from extras import plot

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 600 }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; vertical-align: top }
table:not(.samples) :nth-child(n + 3):is(td, th) {
    text-align: right; font-variant-numeric: tabular-nums
}
.samples { table-layout: fixed }
.samples td { white-space: pre-wrap; overflow-wrap: anywhere; font-family: serif }
.prompt { background: #f4f4f4; font-family: monospace }
img { max-width: 100% } .note { color: #666 }
"""
ABOUT = dict(
    pretrain="Shakespeare's works, token by token. Before: random weights.",
    sft="Learns to answer requests for a line: its first letter, number of words and last mark.",
    dpo="Prefers a line that meets the request to one that nearly does.",
    grpo="Rewarded for what a program can check of the lines that it writes itself.",
    kd="A model of a third of the size, trained on text alone, and taught by the pretrained one.",
)


def curves(folder, names):
    """-> HTML: the curves of these runs in one picture, or how to get them"""
    if importlib.util.find_spec("matplotlib") is None:
        return (
            '<p class="note">Curves are drawn with matplotlib: pip install matplotlib, and run '
            "this again.</p>"
        )
    path = folder / names[-1] / "curves.svg"
    runs = {name: plot.read_metrics(str(folder / name)) for name in names}
    plot.draw(runs, str(path), smooth=5)
    picture = base64.b64encode(path.read_bytes()).decode()
    title = html.escape(", ".join(names))
    return f'<img alt="curves of {title}" src="data:image/svg+xml;base64,{picture}">'


def cells(*values, kind="td"):
    """Texts and numbers -> HTML of a row"""
    row = ""
    for value in values:
        text = f"{value:,.3f}" if isinstance(value, float) else str(value)
        row += f"<{kind}>{html.escape(text)}</{kind}>"
    return f"<tr>{row}</tr>"


def table_rows(summary, digits):
    """
    -> rows of the table, its head first: stage, what was measured, before, after, seconds with so
    many digits; what else was measured of a stage has only the middle ones
    """
    rows = [("stage", "measured on held-out data", "before", "after", "seconds")]
    for stage, row in summary.items():
        seconds = f"{row['seconds']:.{digits}f}"
        rows.append((stage, row["measure"], row["before"], row["after"], seconds))
        for more in row["also"]:
            rows.append(("", more["measure"], more["before"], more["after"], ""))
    return rows


def write(folder, summary, samples, runs):
    """
    Write folder/report.html. summary: as in summary.json; samples: dict of stage to list of
    (prompt, text before, after); runs: dict of stage to names of its runs in the folder
    """
    total = sum(row["seconds"] for row in summary.values())
    head, *rows = table_rows(summary, digits=0)
    page = [
        "<h1>llm-stages: what each stage of the demo changed</h1>",
        f"<p>{total / 60:.1f} minutes on {html.escape(platform.machine())}, "
        f"{torch.get_num_threads()} threads, torch {html.escape(torch.__version__)}.</p>",
        f"<table>{cells(*head, kind='th')}{''.join(cells(*row) for row in rows)}</table>",
    ]
    for stage, texts in samples.items():
        names = ("before", "after") if len(runs[stage]) == 1 else ("alone", "taught")
        page += [
            f"<h2>{stage}</h2>",
            f"<p>{html.escape(ABOUT[stage])}</p>",
            curves(folder, runs[stage]),
            f'<table class="samples">{cells(*names, kind="th")}',
        ]
        for prompt, old, new in texts:
            page.append(f'<tr><td class="prompt" colspan="2">{html.escape(prompt)}</td></tr>')
            page.append(cells(old.strip(), new.strip()))
        page.append("</table>")
    (folder / "report.html").write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>llm-stages demo</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(page)
        + "\n</body></html>\n",
        encoding="utf-8",
    )
