"""What a whole chain reached: one HTML file with curves, numbers and replies, and a table in the terminal.

    python report.py --out_dir out              # after `make demo`; needs matplotlib
    python report.py --out_dir out --check sft  # is this stage where it usually is?

It reads the log.jsonl of each stage, reward/report.json, and what evaluate.py wrote (evaluation.json;
curve.json and curve-few.json of weights that --keep_every kept). expected/demo/STAGE.json holds [low, mean,
high] of the demo's numbers over seeds. The page loads nothing from elsewhere, follows the reader's light or
dark setting, and needs no colour to be read: lines differ in dash.
"""

import html
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, need, option, parse_config, run, write_text

STAGES = {      # directory -> (title, paper, what its numbers mean)
    "pretrain": ("Pretraining", "Radford et al. 2019", "next-token loss on the tales of the story world"),
    "sft": ("Instruction tuning", "Ouyang et al. 2022, step 1", "loss on the assistant's words alone"),
    "reward": ("Reward model", "Ouyang et al. 2022, step 2", "log-likelihood of what annotators preferred"),
    "ppo": ("PPO", "Schulman et al. 2017; Ouyang et al. 2022, step 3",
            "clipped policy gradient on the reward less KL"),
}
INK, SOFT = "#101112", "#808182"                            # stand for the page's colours in the drawings
LINES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":")]          # Okabe & Ito 2008
STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #22251f; --soft: #6b7166; --line: #d9d8d0;
  --box: #fff; }
@media (prefers-color-scheme: dark) { :root { --paper: #171a17; --ink: #e6e8e2; --soft: #9aa196;
  --line: #363b35; --box: #1f2320; } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Micro Hei",
  sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; } p { margin: .3rem 0; }
.soft, figcaption, th { color: var(--soft); font-weight: normal; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 1rem; }
figure { margin: 0 0 .8rem; padding: .6rem; max-width: 60rem; background: var(--box);
  border: 1px solid var(--line); border-radius: .6rem; }
figure svg { width: 100%; height: auto; display: block; } figcaption { font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td:first-child { white-space: nowrap; } .alone { max-width: 34rem; }
blockquote { margin: .2rem 0 .6rem; white-space: pre-wrap; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass
class ReportConfig:
    """Put what a chain reached on one page."""
    out_dir: str = option("out", "directory that holds pretrain, sft, reward, ppo and evaluation.json")
    expected: str = option(str(Path(__file__).parent / "expected" / "demo"),
                           "directory of the usual numbers, a file a stage")
    check: str = option("", "only say whether this stage is where it usually is")


def main(config):
    out = Path(config.out_dir)
    if config.check:
        if config.check not in STAGES:
            raise UserError(f"--check {config.check}: there are {', '.join(STAGES)}")
        print(*check(config.check, out, config.expected), sep="\n")
        return
    if not any((out / stage / "log.jsonl").exists() for stage in STAGES):
        raise UserError(f"--out_dir {out}: no log of {', '.join(STAGES)} in it; "
                        "run make demo, or give its OUT")
    need("matplotlib", "matplotlib")
    write_text(out / "report.html", page(out, config.expected))
    print(terminal_table(out, config.expected))
    print(f"curves and replies: {out / 'report.html'}")


# ---- what there is to tell

def read_log(path):
    """The lines of a log.jsonl; one that a kill cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def read_json(path):
    """What a JSON file holds, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def series(log, name):
    """([steps], [values]) of a metric."""
    points = [(line["step"], line[name]) for line in log if isinstance(line.get(name), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def minutes(log):
    """Minutes from the first to the last line, pauses of more than ten minutes left out (a broken run)."""
    times = [line["time"] for line in log]
    return sum(b - a for a, b in zip(times, times[1:]) if b - a < 600) / 60


def reached(out, stage):
    """{metric: value} of the numbers that a stage is judged by."""
    log, found = read_log(out / stage / "log.jsonl"), {}
    for line in log:
        found |= {k: v for k, v in line.items()
                  if k.startswith(("bits_per_byte_", "val_loss", "val_accuracy"))}
    if stage == "reward":
        report = read_json(out / "reward" / "report.json")
        found = {k: report[k] for k in ("accuracy", "pearson", "calibration_error")
                 if report.get(k) is not None}
    if stage == "ppo":
        rows = [row for row in read_json(out / "evaluation.json").get("policies", [])
                if Path(row["model"]).name == "ppo"]
        found = {k: rows[-1][k] for k in ("gold_units", "kl", "win_rate", "ended")} if rows else {}
    return {k: v for k, v in found.items() if stage != "pretrain" or k.startswith("bits")}


def check(stage, out, usual):
    """A line for each number of a stage: where it is beside where it usually is."""
    expected = read_json(Path(usual) / f"{stage}.json")
    lines = []
    for name, value in reached(out, stage).items():
        band = expected.get(name)
        place = "" if not band else (
            f"  ({'as expected' if band[0] <= value <= band[2] else 'NOT AS EXPECTED'}: "
            f"{band[0]:g} to {band[2]:g}, mean {band[1]:g})")
        lines.append(f"{stage}: {name} {value:.3f}{place}")
    return lines or [f"{stage}: nothing is there yet"]


def terminal_table(out, usual):
    """One line a number: stage, minutes, what it reached, the expected band."""
    lines = [f"{'stage':20} {'minutes':>7}  reached, and where the demo usually is"]
    for stage, (title, *_) in STAGES.items():
        log = read_log(out / stage / "log.jsonl")
        for i, line in enumerate(check(stage, out, usual) if log else ()):
            first = f"{title:20} {minutes(log):7.1f}" if i == 0 else " " * 28
            lines.append(f"{first}  {line.removeprefix(f'{stage}: ')}")
    return "\n".join(lines)


# ---- drawings

def drawing(draw, size=(4.6, 2.9)):
    """The SVG that draw(axes) makes, in the colours of the page."""
    matplotlib = need("matplotlib", "matplotlib")
    figure_of = need("matplotlib.figure", "matplotlib")
    canvas = need("matplotlib.backends.backend_svg", "matplotlib")
    settings = {"svg.fonttype": "none", "svg.hashsalt": "sprout", "font.size": 9, "text.color": INK,
                "axes.edgecolor": SOFT,
                "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
                "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.4}
    with matplotlib.rc_context(settings):
        figure = figure_of.Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        canvas.FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.S)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
                 r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" \1 role="img">', svg,
                 count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="patch_[12]">.*?</g>', "", svg, flags=re.S)         # the white grounds
    return svg.replace(INK, "var(--ink)").replace(SOFT, "var(--soft)")


def smooth(values, weight=0.95):
    """Exponential mean without the bias of its start, so that noise does not hide the curve."""
    mean, result = 0.0, []
    for n, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight ** n))
    return result


def curves(log, names, label="", bounds=(), smoothed=(), log_scale=False):
    """A figure of one or several metrics over steps; "" where the log has none of them."""
    there = [(name, *series(log, name)) for name in names]
    there = [(name, steps, values) for name, steps, values in there if values]
    if not there:
        return ""

    def draw(axes):
        for (name, steps, values), (colour, dash) in zip(there, LINES):
            few = {"marker": "o", "markersize": 3} if len(values) < 12 else {}
            axes.plot(steps, smooth(values) if name in smoothed else values, dash, color=colour, label=name,
                      **few)
        for (name, value), (colour, dash) in zip(bounds, LINES):
            axes.axhline(value, color=colour, linestyle=dash, linewidth=0.8, label=name)
        if log_scale:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(there) > 1 or not label:
            axes.legend(fontsize=8)
    return drawing(draw)


def figure(svg, caption):
    """A drawing with its caption; nothing where there is no drawing."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" if svg else ""


def against_kl(rows, best_of):
    """Gold and score against KL: kept weights of PPO, and best-of-n."""
    def draw(axes):
        for key, (colour, dash) in zip(("gold_units", "score"), LINES):
            for part, marker, name in ((rows, "o", "PPO"), (best_of, "s", "best of n")):
                points = [(row["kl"], row[key]) for row in part]            # in the order of training
                if points:
                    style = {"markerfacecolor": "none"} if marker == "s" else {}
                    axes.plot(*zip(*points), dash, marker=marker, markersize=4, color=colour, **style,
                              label=f"{name}: {'gold' if key == 'gold_units' else 'score'}")
        axes.set_xlabel("KL from SFT, nats a reply")
        axes.set_ylabel("standard deviations of SFT")
        axes.legend(fontsize=8)
    return drawing(draw) if rows or best_of else ""


def calibration(report):
    """How often the reward model is right, by how sure it is."""
    bins = {name: (n, share) for name, (n, share) in report.get("by_margin", {}).items() if n}

    def draw(axes):
        axes.bar(list(bins), [share for _, share in bins.values()], color=LINES[0][0], width=0.6)
        edges = [[float(x) for x in name.split("-")] for name in bins]
        sure = [1 / (1 + math.exp(-(low + min(high, low + 1)) / 2)) for low, high in edges]
        axes.plot(list(bins), sure, "D", color=LINES[1][0], label="what the margin says")
        axes.axhline(0.5, color=SOFT, linewidth=0.8)
        axes.set_ylim(0, 1.15)
        axes.set_xlabel("margin between the two scores")
        axes.set_ylabel("accuracy")
        axes.legend(fontsize=8, loc="upper left")
    return drawing(draw) if bins else ""


# ---- the page

def page(out, usual):
    """The whole HTML."""
    logs = {stage: read_log(out / stage / "log.jsonl") for stage in STAGES}
    evaluation, curve, few, report = (read_json(out / name) for name in (
        "evaluation.json", "curve.json", "curve-few.json", "reward/report.json"))
    bound = read_json(out / "text" / "entropy_bound.json")
    parts = [f"<h1>Sprout: what this run reached</h1>{stage_table(out, logs, usual)}"]
    panels = {
        "pretrain": [
            (curves(logs["pretrain"], ["loss", "val_loss"], "nats a token", smoothed=["loss"]),
             "Loss; that of steps smoothed."),
            (curves(logs["pretrain"], [f"bits_per_byte_{lang}" for lang in ("en", "zh", "other")],
                    "bits a byte",
                    [(f"entropy {lang}", value) for lang, value in bound.items()]),
             "Validation text, and the entropy of the language, which no model can beat."),
            *optimiser(logs["pretrain"])],
        "sft": [(curves(logs["sft"], ["loss", "val_loss"], "nats a learnt token", smoothed=["loss"]),
                 "Loss."),
                (curves(logs["sft"], ["val_accuracy"], "accuracy"),
                 "Share of answer tokens that are the likeliest."),
                *optimiser(logs["sft"])],
        "reward": [(curves(logs["reward"], ["loss", "val_loss"], "nats a comparison", smoothed=["loss"]),
                    "Loss."),
                   (calibration(report),
                    "Right on held-out comparisons, by margin; diamonds: as sure as it was."),
                   *optimiser(logs["reward"])],
        "ppo": [(curves(logs["ppo"], ["score"], "score"), "Mean score of the replies."),
                (curves(logs["ppo"], ["kl", "kl_k3"], "nats a reply"), "KL from SFT by two estimators."),
                (curves(logs["ppo"], ["entropy"], "nats a token"), "Entropy."),
                (curves(logs["ppo"], ["length"], "tokens"), "Length of a reply."),
                (curves(logs["ppo"], ["eos_rate", "explained_variance", "clipfrac"]),
                 "Replies that end; variance the values "
                 "explain; share of clipped tokens."), *optimiser(logs["ppo"])],
    }
    for stage, figures in panels.items():
        if logs[stage]:
            title, paper, what = STAGES[stage]
            parts.append(f"<h2>{title}</h2><p class='soft'>{html.escape(f'{paper}: {what}')}</p>"
                         f"{verdict(stage, report)}"
                         f"<div class='grid'>{''.join(figure(*f) for f in figures)}</div>")
    rows = [row for row in curve.get("policies", []) or evaluation.get("policies", []) if row["kl"] < 50]
    drawn = figure(against_kl(rows, curve.get("best_of") or evaluation.get("best_of", [])),
                   "True quality (gold) and the reward model's score against the distance from SFT. "
                   "Where the score rises and gold falls, the reward model is being fooled.")
    if drawn:
        parts.append(f"<h2>Was it worth it?</h2>{policy_table(evaluation)}<div class='alone'>{drawn}</div>")
    if few:
        drawn = figure(against_kl(few["policies"], []), "The same for a reward model of 200 comparisons and "
                                                        "kl_coef 0: what over-optimisation looks like.")
        parts.append(f"<div class='alone'>{drawn}</div>")
    if evaluation.get("transcripts"):
        parts.append(f"<h2>The same requests, answered by each</h2>{transcripts(evaluation['transcripts'])}")
    return ("<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>Sprout report</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts)
            + "\n</body></html>\n")


def optimiser(log):
    """Figures of learning rate and gradient norm."""
    return [(curves(log, ["lr"], "learning rate"), "Learning rate."),
            (curves(log, ["grad_norm"], "L2 norm", log_scale=True), "Gradient before clipping.")]


def verdict(stage, report):
    """What the reward model's own report says, in a sentence."""
    if stage != "reward" or not report.get("gate"):
        return ""
    gate = report["gate"]
    baselines = ", ".join(f"{name.replace('_', ' ')} {value:.3f}"
                          for name, value in report.get("baselines", {}).items()
                          if value is not None)
    return (f"<p>Held-out {gate['metric']} {gate['value']:.3f}, at least {gate['low']:.3f} with 95% "
            f"confidence: the gate is {'passed' if gate['passed'] else 'not passed'}. "
            f"Without a model: {html.escape(baselines)}.</p>")


def stage_table(out, logs, usual):
    """Stages with minutes, numbers and expected bands, as HTML."""
    rows = "".join(
        f"<tr><td>{title}</td><td>{minutes(logs[stage]):.1f}</td><td>"
        + "<br>".join(html.escape(line.removeprefix(f"{stage}: "))
                      for line in check(stage, out, usual)) + "</td></tr>"
        for stage, (title, *_) in STAGES.items() if logs[stage])
    return ("<div class='wide'><table><tr><th>stage</th><th>minutes</th><th>reached</th></tr>"
            f"{rows}</table></div>")


def policy_table(evaluation):
    """The rows of evaluate.py's comparison, as HTML."""
    names = {"model": "model", "gold": "gold, 1-5", "gold_units": "against SFT, units",
             "gold_same_length": "at equal length",
             "win_rate": "wins", "kl": "KL", "score": "score", "length": "tokens", "ended": "ended"}
    rows = "".join("<tr>" + "".join(
        f"<td>{html.escape(Path(row[k]).name) if k == 'model' else format(row[k], '.2f')}</td>"
        for k in names) + "</tr>"
        for row in evaluation.get("policies", []))
    head = "".join(f"<th>{title}</th>" for title in names.values())
    return f"<div class='wide'><table><tr>{head}</tr>{rows}</table></div>" if rows else ""


def transcripts(found):
    """Requests with the reply of each model; all of it is text."""
    return "".join(
        f"<figure><blockquote>{html.escape(t['messages'][-1]['content'])}</blockquote><dl>" + "".join(
            f"<dt>{html.escape(Path(name).name)}</dt><dd>{html.escape(text) or '(nothing)'}</dd>"
            for name, text in t["replies"].items()) + "</dl></figure>" for t in found)


if __name__ == "__main__":
    run(lambda: main(parse_config(ReportConfig)))
