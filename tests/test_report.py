"""The report: one self-contained page, text as text, numbers beside where they usually are."""

import json
import re
from html.parser import HTMLParser

import pytest

from cli import UserError
from report import (STAGES, ReportConfig, check, drawing, main, minutes, page, read_log, reached, smooth,
                    terminal_table)

VOID = {"meta", "br", "img", "link"}


class Balanced(HTMLParser):
    """Tags that are open, and everything that would be loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data")
                       or name == "xlink:href" and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def out(tmp_path):
    """What a chain leaves, made up."""
    extra = {"pretrain": {"bits_per_byte_en": 0.5, "bits_per_byte_zh": 0.6, "val_loss": 1.5},
             "sft": {"val_loss": 1.0, "val_accuracy": 0.7}, "reward": {"val_loss": 0.6},
             "ppo": {"kl_k3": 1.0}}
    for stage in STAGES:
        (tmp_path / stage).mkdir()
        lines = [{"step": n, "time": 100.0 + 6 * n, "loss": 3 / n, "lr": 0.1 / n, "grad_norm": 1.0,
                  "score": 0.1 * n, "kl": 0.2 * n, "entropy": 1.0, "length": 20.0, "eos_rate": 0.9,
                  "clipfrac": 0.1} for n in range(1, 21)]
        lines.append({"step": 20, "time": 221.0, **extra[stage]})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / stage / "log.jsonl").write_text(text + '{"step": 21, "ti', encoding="utf-8")
    (tmp_path / "reward" / "report.json").write_text(json.dumps({
        "accuracy": 0.7, "calibration_error": 0.04,
        "by_margin": {"0-0.5": [10, 0.5], "2-inf": [9, 0.9], "1-2": [0, None]},
        "baselines": {"length": 0.5},
        "gate": {"metric": "accuracy", "value": 0.7, "low": 0.65, "passed": True}}))
    row = dict(gold=2.0, gold_units=0.0, gold_same_length=0.0, win_rate=0.5, kl=0.0, score=0.0, length=30.0,
               ended=0.9)
    (tmp_path / "evaluation.json").write_text(json.dumps({
        "policies": [{"model": "out/sft", **row}, {"model": "out/ppo", **row, "gold_units": 0.8, "kl": 3.0}],
        "best_of": [{"best_of": 1, "kl": 0.0, "score": 0.0, "gold_units": 0.0},
                    {"best_of": 4, "kl": 0.6, "score": 1.0, "gold_units": 0.5}],
        "transcripts": [{"messages": [{"role": "user",
                                       "content": "Tell </figure> <script>alert(1)</script> 故事"}],
                         "replies": {"out/sft": "<img src=x>", "out/ppo": ""}}]}), encoding="utf-8")
    return tmp_path


def test_the_page_is_whole_loads_nothing_and_shows_replies_as_text(out):
    pytest.importorskip("matplotlib")
    reader = Balanced()
    reader.feed(page(out, "nowhere"))
    assert reader.open == [] and reader.loads == []
    text = " ".join(reader.text)
    assert ("Tell </figure> <script>alert(1)</script> 故事" in text and "<img src=x>" in text
            and "(nothing)" in text)
    for words in ("Pretraining", "Reward model", "Was it worth it?", "bits_per_byte_en", "gate is passed",
                  "best of n: gold"):
        assert words in text, words


def test_a_chain_that_has_only_begun_has_a_page(out):
    pytest.importorskip("matplotlib")
    for name in ("sft/log.jsonl", "reward/log.jsonl", "reward/report.json", "ppo/log.jsonl",
                 "evaluation.json"):
        (out / name).unlink()
    assert "Pretraining" in page(out, "nowhere") and "PPO" not in terminal_table(out, "nowhere")
    (out / "pretrain" / "log.jsonl").unlink()
    with pytest.raises(UserError, match="no log of"):
        main(ReportConfig(out_dir=str(out)))


def test_a_drawing_has_the_page_s_colours_and_the_data(out):
    pytest.importorskip("matplotlib")
    svg = drawing(lambda axes: axes.plot([0, 1, 2], [1, 5, 2], label="line"))
    assert "var(--ink)" in svg and "#ffffff" not in svg and not re.search(r"<svg[^>]*(width|height)=", svg)
    assert drawing(lambda axes: axes.plot([0, 1], [1, 5])) == drawing(lambda axes: axes.plot([0, 1], [1, 5]))


def test_numbers_stand_beside_where_they_usually_are(out, tmp_path, capsys):
    (tmp_path / "sft.json").write_text(json.dumps({"val_loss": [0.9, 1.0, 1.1],
                                                   "val_accuracy": [0.8, 0.85, 0.9]}))
    assert reached(out, "sft") == {"val_loss": 1.0, "val_accuracy": 0.7}
    lines = check("sft", out, tmp_path)
    assert "as expected: 0.9 to 1.1" in lines[0] and "NOT AS EXPECTED: 0.8 to 0.9" in lines[1]
    assert reached(out, "ppo") == {"gold_units": 0.8, "kl": 3.0, "win_rate": 0.5, "ended": 0.9}
    assert reached(out, "pretrain") == {"bits_per_byte_en": 0.5, "bits_per_byte_zh": 0.6}
    assert reached(out, "reward") == {"accuracy": 0.7, "calibration_error": 0.04}
    main(ReportConfig(out_dir=str(out), check="ppo", expected="nowhere"))
    assert capsys.readouterr().out.splitlines()[0] == "ppo: gold_units 0.800"
    with pytest.raises(UserError, match="--check tea"):
        main(ReportConfig(check="tea"))


def test_minutes_leave_a_pause_out(out):
    log = read_log(out / "sft" / "log.jsonl")
    assert len(log) == 21 and minutes(log) == pytest.approx((221 - 106) / 60)
    assert minutes([{"time": 0}, {"time": 60}, {"time": 10_000}, {"time": 10_060}]) == pytest.approx(2)


def test_smoothing_keeps_a_constant_and_follows_the_plain_sum():
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)
    values, w = [1.0, 4.0, 2.0, 7.0], 0.95
    weights = [w ** k for k in range(3, -1, -1)]
    assert smooth(values)[-1] == pytest.approx(sum(a * b for a, b in zip(values, weights)) / sum(weights))
