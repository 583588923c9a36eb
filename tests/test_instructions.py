"""Instructions: seven formats read as they are, right answers, held-out facts and words, stable bytes."""

import json
from collections import Counter

import pytest

from records import to_messages
from cli import UserError
from data.instructions import SHARES, InstructionsConfig, example, plan, write_files
from data.rules import LANGUAGES, load
from data.world import sentences, split_of

FORMATS = {"tale": {"instruction", "output"}, "summary": {"instruction", "input", "output"},
           "list": {"instruction", "input", "output"}, "continue": {"prompt", "completion"},
           "translate": {"input", "target"}, "mood": {"text", "label"}, "about": {"entity", "facts"},
           **dict.fromkeys(("who", "where", "what", "why"), {"question", "answer"})}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of a small run, and another run's bytes."""
    runs = []
    for name in ("one", "two"):
        out = tmp_path_factory.mktemp(name)
        write_files(InstructionsConfig(out_dir=str(out), examples=220, prompts=40))
        runs.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert runs[0] == runs[1]
    return {name: ([json.loads(line) for line in data.decode().splitlines()] if name.endswith("l")
                   else data.decode())
            for name, data in runs[0].items()}


def test_what_is_said_is_there_as_text(written):
    said = written["said_train.txt"].removesuffix("\n").split("\n<|endoftext|>\n")
    assert said == [m["content"] for r in written["sft_train.jsonl"] for m in to_messages(r)]


def test_every_file_is_there(written):
    assert sorted(written) == sorted([f"{kind}_{split}.jsonl" for kind in ("sft", "eval", "prompts")
                                      for split in ("train", "val")]
                                     + ["copying_train.jsonl", "requests.jsonl", "said_train.txt"])
    assert len(written["sft_train.jsonl"]) == 220 and len(written["prompts_train.jsonl"]) == 40
    ids = [r["id"] for r in written["requests.jsonl"]]
    assert len(set(ids)) == len(ids)
    for name in ("eval_train", "eval_val", "prompts_train", "prompts_val"):
        assert {r["id"] for r in written[f"{name}.jsonl"]} <= set(ids)
    assert all(set(r) == {"id", "messages"} for r in written["prompts_val.jsonl"])
    assert all(set(r) == {"id", "task", "language", "messages", "references", "labels"}
               for r in written["eval_val.jsonl"])
    lists = [isinstance(r["output"], list) for r in written["copying_train.jsonl"]]
    assert len(lists) == 44 and sum(lists) == 22
    for record in written["eval_val.jsonl"]:
        assert record["messages"][-1]["role"] == "user" and all(record["references"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_opening_ends_with_the_sentence_that_names_the_place(language):
    for seed in range(60):
        found = example(seed, "opening", language, "train")
        assert found.request["task"] == "tale" and "place" in found.request["elements"]
        reply = to_messages(found.record)[-1]["content"]
        parts = sentences(reply, language)
        names = load().row("place", found.request["facts"]["place"])[language].values()
        there = [any(name.lower() in part.lower() for name in names) for part in parts]
        assert there == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize("task", ["who", "where", "what", "list", "summary"])
def test_what_an_answer_names_stands_in_the_text(task):
    """Else nobody could know it, and a model would learn to make things up."""
    for language in LANGUAGES:
        for seed in range(60):
            found = example(seed, task, language, "train")
            asked, facts = found.messages[-1]["content"], found.request["facts"]
            for role in ("hero", "friend", "thing", "place"):
                name = load().row(role, facts[role])[language][""].removeprefix("the ")
                assert name in asked or not any(name in said for said in found.references), (asked, name)


def test_wishes_stay_out_of_the_training_files(written):
    """The structured request is gold's alone."""
    for name, records in written.items():
        if name != "requests.jsonl":
            assert not any({"request", "facts", "elements"} <= set(record)
                           for record in records if isinstance(record, dict))


def test_all_formats_and_tasks_occur(written):
    found = Counter("list" if isinstance(r, list) else tuple(sorted(r)) for r in written["sft_train.jsonl"])
    assert set(found) == {"list", *(tuple(sorted(keys)) for keys in FORMATS.values())}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", SHARES)
def test_examples(task, language):
    """The format of the task; messages that are the record's; facts of the split."""
    for split in ("train", "val"):
        for seed in range(10):
            found = example(seed, task, language, split)
            assert found == example(seed, task, language, split)
            messages = to_messages(found.record)
            assert messages[:-1] == found.messages and messages[-1]["role"] == "assistant"
            assert all(m["content"].strip() for m in messages)
            assert split_of(found.request["facts"]) == split
            if task != "chat":
                assert set(found.record) == FORMATS[task]
            json.dumps(found.request)


def test_some_phrasings_are_held_out():
    """Validation asks half the time in words that training never has."""
    def asked(split):
        return [example(seed, "who", "en", split).record["question"].split("\n")[1] for seed in range(80)]
    new = [q for q in asked("val") if "came to" in q and "'s help" in q]
    assert 20 <= len(new) <= 60 and not any("'s help" in q and "came" in q for q in asked("train"))


def test_plan_follows_the_shares():
    jobs = plan(len(LANGUAGES) * sum(SHARES.values()) * 5, SHARES)
    counts = Counter(jobs)
    assert counts == {(task, language): share * 5 for task, share in SHARES.items() for language in LANGUAGES}


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("record, messages", [
    ({"messages": [{"role": "system", "content": "s"}, *MESSAGES], "label": "x", "text": "y"},
     [{"role": "system", "content": "s"}, *MESSAGES]),
    (MESSAGES, MESSAGES),
    ({"entity": "Mars", "facts": [{"fact": "moons", "value": "two"}, {"fact": "colour", "value": "red"}]},
     [{"role": "user", "content": "Tell me about Mars."},
      {"role": "assistant", "content": "The moons of Mars is two. The colour of Mars is red."}]),
    ({"entity": "火星", "facts": [{"fact": "颜色", "value": "红色"}]},
     [{"role": "user", "content": "请介绍火星。"}, {"role": "assistant", "content": "火星的颜色是红色。"}]),
    ({"instruction": "q", "output": "a"}, MESSAGES),
    ({"instruction": "q", "input": "", "output": "a", "question": "z", "answer": "z"}, MESSAGES),
    ({"instruction": "q", "input": "more", "output": ["a", "b"]},
     [{"role": "user", "content": "q\n\nmore"}, {"role": "assistant", "content": "1. a\n2. b"}]),
    ({"question": "q", "answer": "a"}, MESSAGES), ({"prompt": "q", "completion": "a"}, MESSAGES),
    ({"text": "fine", "label": 1},
     [{"role": "user", "content": "Which label fits this text?\nfine"},
      {"role": "assistant", "content": "1"}]),
    ({"text": "很好", "label": "正面"},
     [{"role": "user", "content": "这段文字应该标成什么？\n很好"},
      {"role": "assistant", "content": "正面"}]),
    ({"input": "q", "target": "a"}, MESSAGES)])
def test_records_become_messages(record, messages):
    """The table of formats, by hand; the first row whose keys are all there wins."""
    assert to_messages(record) == messages


def test_an_unknown_record_is_named():
    with pytest.raises(UserError, match="keys foo, bar"):
        to_messages({"foo": 1, "bar": 2})


def test_bad_numbers_are_named():
    with pytest.raises(UserError, match="--examples 3"):
        InstructionsConfig(examples=3)
