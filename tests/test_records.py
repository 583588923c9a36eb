"""Records: seven formats read as they are, bad ones named by file and line, tokens, masks, packing."""

import gzip
import json

import numpy as np
import pytest
import torch

from cli import UserError
from model import IGNORE_INDEX, LanguageModel, ModelConfig
from records import (Conversations, check_messages, conversation, conversation_rows, pack, read_conversations,
                     read_records, read_weighted, to_messages)
from tokenizer import Tokenizer

TEXT = ["the fox ran to the old mill and sang a song", "user\nassistant\nsystem\n", "小狐狸跑到磨坊里唱歌"] * 4
TOKENIZER = Tokenizer.train(TEXT, 320)
ASK = {"question": "Who ran?", "answer": "The fox."}


def write(path, records):
    text = "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
    (gzip.open if path.name.endswith(".gz") else open)(path, "wt", encoding="utf-8").write(text)
    return str(path)


def say(user, assistant):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


# ---- formats

@pytest.mark.parametrize("record, wanted", [
    ({"question": "q", "answer": "a", "id": 3}, say("q", "a")),
    (say("q", "a"), say("q", "a")),
    ({"messages": say("q", "a")}, say("q", "a")),
    ({"text": "good", "label": 1}, say("Which label fits this text?\ngood", "1")),
    ({"text": "很好", "label": "正面"}, say("这段文字应该标成什么？\n很好", "正面")),
    ({"prompt": "p", "completion": "c"}, say("p", "c")),
    ({"instruction": "i", "output": "o"}, say("i", "o")),
    ({"instruction": "i", "input": "", "output": "o"}, say("i", "o")),
    ({"instruction": "i", "input": "x", "output": ["a", "b"]}, say("i\n\nx", "1. a\n2. b")),
    ({"entity": "Mars", "facts": [{"fact": "colour", "value": "red"}, {"fact": "moons", "value": 2}]},
     say("Tell me about Mars.", "The colour of Mars is red. The moons of Mars is 2.")),
    ({"entity": "火星", "facts": [{"fact": "颜色", "value": "红色"}]}, say("请介绍火星。", "火星的颜色是红色。")),
    ({"input": "i", "target": "t"}, say("i", "t")),
    ({"question": "q", "answer": "a", "input": "i", "target": "t"}, say("q", "a")),     # the first row wins
])
def test_formats(record, wanted):
    assert to_messages(record) == wanted


# ---- what a person must mend

GOOD_TURNS = say("q", "a")
BAD = [     # (record or raw line, words of the message)
    ("{not json", "not a JSON record"), ('"text"', '"text" is not a record'), ("17", "17 is not a record"),
    ({}, "(none)"), ({"question": "q"}, "in none of the formats"),
    ({"Question": "q", "Answer": "a"}, "Question, Answer"),
    ({"question": "q", "answer": ""}, "empty answer"), ({"question": "q", "answer": " \n"}, "empty answer"),
    ({"question": "q", "answer": None}, "answer null"),
    ({"question": ["q"], "answer": "a"}, 'question ["q"] is a list'),
    ({"question": "q", "answer": True}, "answer true is a bool"),
    ({"question": "q", "answer": {}}, "answer {}"), ({"instruction": "i", "output": []}, "empty answer"),
    ({"instruction": "i", "output": [["x"]]}, "is a list"),
    ({"instruction": "i", "input": 3.5, "output": None}, "output null"),
    ({"messages": "hello"}, "not a list of turns"), ({"messages": ["hello"]}, "not a list of turns"),
    ({"messages": []}, "no turn of a user"), ([], "no turn of a user"), ([{"role": "user"}], "no 'content'"),
    ([{"content": "x"}], "no 'role'"), ([{"role": "user", "content": 1}], "the last turn is of user"),
    ([{"role": "robot", "content": "x"}, GOOD_TURNS[1]], 'role "robot"'),
    ([{"role": ["user"], "content": "x"}], 'role ["user"]'),
    (GOOD_TURNS[1:], "turn 1 is of assistant, not of user"),
    ([{"role": "system", "content": "s"}], "no turn of a user"),
    ([{"role": "system", "content": "s"}, *GOOD_TURNS[1:]], "turn 2 is of assistant"),
    ([*GOOD_TURNS, GOOD_TURNS[1]], "turn 3 is of assistant"), (GOOD_TURNS[:1] * 2, "turn 2 is of user"),
    ([*GOOD_TURNS, {"role": "system", "content": "s"}], "turn 3 is of system"),
    ({"entity": "Mars", "facts": "red"}, 'facts "red"'),
    ({"entity": "Mars", "facts": [{"fact": "x"}]}, "facts [{"),
    ({"entity": 1.5, "facts": [{"fact": "x", "value": None}]}, "value null"),
    ({"entity": "Mars", "facts": []}, "empty"), ({"text": "t", "label": None}, "label null"),
    ({"prompt": "p", "completion": "x<|im_end|>"}, "<|im_end|>"),
    ({"prompt": "p<|im_start|>system", "completion": "x"}, "<|im_start|>"),
    ({"input": "<|pad|>", "target": "x"}, "<|pad|>"),
    ({"question": "q", "answer": "fox " * 80}, "does not fit"), ({**ASK, "weight": "much"}, 'weight "much"'),
    ({**ASK, "weight": -1}, "weight -1"), ({**ASK, "weight": True}, "weight true"),
]


@pytest.mark.parametrize("record, words", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_records_are_named_or_counted(record, words, tmp_path):
    path = write(tmp_path / "d.jsonl", [ASK, record, ASK])
    with pytest.raises(UserError) as error:
        read_conversations(path, TOKENIZER, 64)
    assert words in str(error.value) and str(error.value).startswith(f"{path}:2: ")
    assert "--skip_bad" in str(error.value)
    found = read_conversations(path, TOKENIZER, 64, skip_bad=True)
    assert (found.records, len(found.items), found.bad) == (3, 2, 1) and f"{path}:2: " in found.report()


def test_a_bad_first_record_is_skipped_like_any(tmp_path):
    found = read_conversations(write(tmp_path / "d.jsonl", [{}, ASK]) + ":1.0", TOKENIZER, 64, skip_bad=True)
    assert (len(found.items), found.bad) == (1, 1)


@pytest.mark.parametrize("name, content, words", [
    ("d.jsonl", b'{"question": "\xff", "answer": "a"}\n', "is not UTF-8"),
    ("d.jsonl.gz", b"no gzip", "damaged gzip"), ("d.jsonl", b"", "no record to learn from"),
    ("d.json", b'[{"question": "q"', "not JSON"), ("d.csv", b"a,b", "unknown kind of file"),
    ("d.jsonl", b"\n\n", "no record to learn from"),
])
def test_bad_files(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_conversations(str(tmp_path / name), TOKENIZER, 64, skip_bad=True)


@pytest.mark.parametrize("spec, words", [
    ("", "names no file"), (" , ", "names no file"), ("a.jsonl:0", "above 0"), ("a.jsonl:-2", "above 0"),
    ("a.jsonl:inf", "above 0"), ("no_such_file.jsonl", "no such file"), (".", "not a file")])
def test_bad_names_and_weights(spec, words):
    with pytest.raises(UserError, match=words):
        read_conversations(spec, TOKENIZER, 64)


def test_a_colon_may_be_part_of_a_name():
    assert read_weighted("C:/d.jsonl, e.jsonl:0.5") == [("C:/d.jsonl", 1.0), ("e.jsonl", 0.5)]


def test_json_lists_and_gzip_are_read_as_lines_are(tmp_path):
    records = [ASK, say("q", "a"), {"input": "i", "target": "t"}]
    lines = write(tmp_path / "a.jsonl.gz", records)
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(records))
    (tmp_path / "c.json").write_text(json.dumps(ASK))
    told = [record for _, record in read_records(lines)]
    assert told == [record for _, record in read_records(tmp_path / "b.json")] == records
    assert [record for _, record in read_records(tmp_path / "c.json")] == [ASK]
    with pytest.raises(UserError, match="record 2: "):
        (tmp_path / "b.json").write_text(json.dumps([ASK, {}]))
        read_conversations(str(tmp_path / "b.json"), TOKENIZER, 64)


def test_weights_repeat_and_thin(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"question": f"a{i}", "answer": "x"} for i in range(400)])
    b = write(tmp_path / "b.jsonl", [{"question": "b", "answer": "y"}] * 400)
    found = [read_conversations(f"{a}:2.25,{b}:0.5", TOKENIZER, 64, seed) for seed in (0, 0, 1)]
    asked = [[item.messages[0]["content"] for item in f.items] for f in found]
    counts = [asked[0].count(f"a{i}") for i in range(400)]
    assert set(counts) == {2, 3} and abs(counts.count(3) - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5
    assert abs(asked[0].count("b") - 200) < 5 * 10
    assert asked[0] == asked[1] != asked[2]


# ---- tokens and masks

def pieces(item):
    """[(text of a run, learnt)] of a conversation."""
    runs, start = [], 0
    for i in range(1, len(item.ids) + 1):
        if i == len(item.ids) or item.learn[i] != item.learn[start]:
            runs.append((TOKENIZER.decode(item.ids[start:i].tolist()), bool(item.learn[start])))
            start = i
    return runs


def test_answers_and_their_ends_are_learnt_and_nothing_else():
    item, cut = conversation([{"role": "system", "content": "Be kind."}, *say(" Who? ", "Fox.\n"),
                              *say("Why?", "It ran.")], TOKENIZER, 200)
    assert not cut
    assert pieces(item) == [
        ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
         "<|im_start|>assistant\n", False),
        ("Fox.<|im_end|>", True), ("\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", False),
        ("It ran.<|im_end|>", True)]


def test_too_long_a_conversation_loses_its_oldest_turns_then_the_start_of_its_question():
    system, last = {"role": "system", "content": "Be kind."}, say("Who ran to the mill?", "The fox.")
    whole, _ = conversation([system, *last], TOKENIZER, 500)
    item, cut = conversation([system, *say("old " * 30, "answer " * 9), *last], TOKENIZER, len(whole.ids))
    assert cut and item.ids.tolist() == whole.ids.tolist()
    shorter, cut = conversation([system, *last], TOKENIZER, len(whole.ids) - 3)
    assert cut and len(shorter.ids) == len(whole.ids) - 3 and pieces(shorter)[1:] == pieces(whole)[1:]
    question = TOKENIZER.encode("Who ran to the mill?")
    text = pieces(shorter)[0][0]
    assert text == pieces(whole)[0][0].replace("Who ran to the mill?", TOKENIZER.decode(question[3:]))
    least, cut = conversation([system, *last], TOKENIZER, len(whole.ids) - len(question))
    assert cut and pieces(least)[0][0].endswith("user\n<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(UserError, match="does not fit"):
        conversation([system, *last], TOKENIZER, len(whole.ids) - len(question) - 1)


def test_typed_specials_are_refused_and_would_be_text():
    with pytest.raises(UserError, match="im_end"):
        check_messages(say("x<|im_end|>", "y"))
    assert TOKENIZER.im_end_id not in TOKENIZER.encode("x<|im_end|>")


# ---- rows

def several(n, seed=0):
    draw = np.random.default_rng(seed)
    found = Conversations()
    for i in range(n):
        words = " ".join(draw.choice("the fox ran to old mill sang song".split(), draw.integers(1, 12)))
        item, _ = conversation({**ASK, "answer": words, "weight": float(draw.integers(1, 4))}, TOKENIZER, 64)
        found.items.append(item)
    return found.items


def test_rows_hold_every_conversation_once_and_little_else():
    items = several(300)
    rows = pack(items, 64, seed=3)
    assert sorted(i for row in rows for i in row) == list(range(300))
    lengths = [sum(len(items[i].ids) - 1 for i in row) for row in rows]
    assert max(lengths) <= 64 and sum(lengths) / (64 * len(rows)) > 0.85
    assert rows == pack(items, 64, seed=3) != pack(items, 64, seed=4)
    assert sorted(pack(items, 64, packing=False)) == [[i] for i in range(300)]


def test_a_pack_has_the_loss_and_gradient_of_its_conversations_alone():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=320, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2,
                                      d_ff=48, max_seq_len=64)).double()
    items = several(9)
    rows = pack(items, 64)
    assert max(map(len, rows)) > 2

    def loss_and_gradient(batch):
        model.zero_grad()
        total, count = model(batch[0], batch[1], batch[3])
        total.backward()
        return total.item(), count.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    total, count, gradient = loss_and_gradient(conversation_rows(items, rows, 64))
    singles = []
    for item in items:                                      # each alone, without this file's rows
        ids = torch.from_numpy(item.ids).long()[None]
        targets = torch.where(torch.from_numpy(item.learn)[None], ids, IGNORE_INDEX)[:, 1:]
        singles.append(loss_and_gradient((ids[:, :-1], targets, None, None)))
    assert count == sum(s[1] for s in singles) == sum(item.learn.sum() for item in items)
    assert abs(total - sum(s[0] for s in singles)) < 1e-5 * total
    wanted = sum(s[2] for s in singles)
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


def test_first_answer_token_and_end_are_targets_and_a_neighbours_tokens_are_not():
    items = several(5)
    ids, targets, weights, doc_ids = conversation_rows(items, [[0, 1, 2], [3]], 128)
    at = 0
    for number, item in enumerate(items[:3]):
        n = len(item.ids)
        learnt = [i for i in range(n) if item.learn[i]]
        assert targets[0, at + learnt[0] - 1] == item.ids[learnt[0]]            # at the prompt's last token
        assert targets[0, at + n - 2] == TOKENIZER.im_end_id == item.ids[-1]
        assert (targets[0, at:at + learnt[0] - 1] == IGNORE_INDEX).all()
        assert (doc_ids[0, at:at + n - 1] == number).all()
        assert (weights[0, at:at + n - 1] == item.weight * item.learn[1:]).all()
        at += n - 1
    assert ((targets[0, at:] == IGNORE_INDEX).all() and (doc_ids[0, at:] == 3).all()
            and not weights[0, at:].any())
