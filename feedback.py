"""Human feedback: several replies to each prompt, what people think of them, data for a reward model.

    python feedback.py sample --models out/sft --prompts prompts_train.jsonl --out samples.jsonl
    python feedback.py rate --samples samples.jsonl --out ratings.jsonl --annotator ada     # you are asked
    python feedback.py simulate --samples samples.jsonl --requests requests.jsonl --out ratings.jsonl
    python feedback.py collect --samples samples.jsonl --ratings ratings.jsonl --out rankings.jsonl

Rubric and ranking are those of Ouyang et al. 2022 in small. Simulated annotators mark by data/gold.py and say
so in every record. A rating is appended as one line the moment it is made; where one annotator judges a
sample twice in the same way, the later one counts. Not here: learning from it (reward.py).
"""

import json
import math
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import checkpoint
from cli import UserError, numbers, option, parse_config, progress_bar, run, write_text
from data.gold import rate as gold_marks
from generate import generate, reply_logprobs, uniforms
from metrics import interval, krippendorff_alpha, nominal
from model import LanguageModel
from ratings import (ASPECTS, FORMS, KINDS, append, check_rating, in_order_of, levels, pair, read_ratings,
                     read_samples, read_thumbs, records_of)
from records import read_prompts, read_records, shown
from training import draw_seed, pick_device

AT_ONCE = 64                    # replies sampled together
ODD = 0.15                      # a rater that agrees this much less with the others than they do is named


# ---- sample

@dataclass
class SampleConfig:
    """Sample several replies to each prompt."""
    models: str = option("out/sft", "OUT directories or checkpoints, separated by commas; all answer each "
                                    "prompt")
    prompts: str = option("", "prompts, .jsonl: {id, messages}")
    out: str = option("out/samples.jsonl", "file to write")
    replies: int = option(4, "of each prompt and model, before equal ones are dropped")
    limit: int = option(0, "prompts to take from the start of the file; 0 = all")
    temperature: str = option("1.0", "of sampling; a prompt's replies take turns with several, as in "
                                     "1.0,0.7, and so differ more (Touvron et al. 2023b, section 3.2.1)")
    max_new_tokens: int = option(48, "longest reply, tokens")
    seed: int = option(0, "of the replies")
    device: str = option("auto", "cpu, cuda, mps or auto")


def sample(config):
    """Write samples.jsonl; says how many replies there are, are different and ended by themselves."""
    if config.replies < 1 or config.limit < 0:
        raise UserError(f"replies {config.replies} must be at least 1, limit {config.limit} not negative")
    if not config.prompts:
        raise UserError("--prompts '' holds no prompts; name a file of {id, messages}, one a line")
    temperatures = numbers(config.temperature, "temperature", float, 0, "1.0,0.7")
    prompts = read_prompts(config.prompts)[:config.limit or None]
    found, made = [[] for _ in prompts], 0
    for number, name in enumerate(name for name in config.models.split(",") if name.strip()):
        model, tokenizer, _ = checkpoint.load_model(name.strip(), pick_device(config.device))
        if not isinstance(model, LanguageModel):
            raise UserError(f"model {name} gives scores, not text; use one of pretrain, sft or ppo")
        with progress_bar(total=len(prompts) * config.replies, desc="replies") as bar:
            for temperature, part in parts(len(prompts), config.replies, temperatures):
                seeds = [draw_seed(config.seed, f"reply {p} {number}", r) for p, r in part]
                replies = replies_to(model, tokenizer, [prompts[p][1] for p, _ in part], temperature,
                                     config.max_new_tokens, seeds)
                for (p, _), reply in zip(part, replies):
                    if reply["text"] not in [other["text"] for other in found[p]]:
                        found[p].append({"id": f"r{len(found[p]) + 1}", **reply, "checkpoint": name.strip()})
                made += len(part)
                bar.update(len(part))
    lines = [{"id": id, "messages": messages, "replies": replies}
             for (id, messages), replies in zip(prompts, found)]
    write_text(Path(config.out), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    kept = [reply for replies in found for reply in replies]
    print(f"{config.out}: {len(prompts):,} prompts, {made:,} replies, {len(kept):,} different; "
          f"{sum(reply['ended'] for reply in kept) / max(1, len(kept)):.1%} of them ended")


def parts(n_prompts, n_replies, temperatures):
    """Yield (temperature, AT_ONCE pairs of prompt and reply): a prompt's replies take turns with those."""
    for turn, temperature in enumerate(temperatures):
        jobs = [(p, r) for p in range(n_prompts) for r in range(turn, n_replies, len(temperatures))]
        for start in range(0, len(jobs), AT_ONCE):
            yield temperature, jobs[start:start + AT_ONCE]


def replies_to(model, tokenizer, conversations, temperature, max_new_tokens, seeds):
    """One reply to each conversation, as samples.jsonl holds it."""
    prompts = [tokenizer.encode_chat(messages, add_generation_prompt=True)[0] for messages in conversations]
    room = model.config.max_seq_len - max_new_tokens
    for prompt, messages in zip(prompts, conversations):
        if len(prompt) > room:
            raise UserError(f"prompt {shown(messages[-1]['content'])} has {len(prompt)} tokens, which leaves "
                            f"no room for {max_new_tokens} more in {model.config.max_seq_len}; shorten it")
    ends = tokenizer.im_end_id, tokenizer.eot_id
    found = generate(model, prompts, max_new_tokens, temperature=temperature, stop_ids=ends, seeds=seeds)
    chances = reply_logprobs(model, prompts, found, temperature or 1.0)
    return [{"text": tokenizer.decode([id for id in ids if id not in ends]).strip(), "ids": ids,
             "logprob": round(chance, 4), "ended": ids[-1] == tokenizer.im_end_id,
             "temperature": temperature, "seed": seed}
            for ids, chance, seed in zip(found, chances, seeds)]


# ---- rate: a person in the terminal

@dataclass
class RateConfig:
    """Judge replies in the terminal."""
    samples: str = option("out/samples.jsonl", "replies to judge, from feedback.py sample")
    out: str = option("out/ratings.jsonl", "file that ratings are appended to")
    annotator: str = option("", "your name, which keeps your ratings apart from others'")
    kind: str = option("ranking", "ranking (1>3>2, ties 1>2=3), choice (better or worse of two) or rubric")


HELP = {
    "ranking": "order them, best first: 1>3>2, equal ones 1>2=3",
    "choice": "1 or 2 is better, = they are equal",
    "rubric": "for each reply four marks 1-5, " + " ".join(ASPECTS) + ", such as 5443 for one and 5443 3352 "
                                                                      "for two",
}


def rate(config, ask=input):
    """Ask for a judgement of each sample that this annotator has not judged; returns how many were made."""
    samples = read_samples(config.samples)
    if not config.annotator.strip():
        raise UserError("--annotator is missing; give your name")
    if config.annotator.startswith("simulated"):
        raise UserError(f"annotator {config.annotator!r}: that name is for programs; give another")
    if config.kind not in KINDS:
        raise UserError(f"kind {config.kind!r} is unknown; use {', '.join(KINDS)}")
    done = {r["sample"] for r in read_ratings(config.out, samples)
            if (r["annotator"], r["kind"]) == (config.annotator, config.kind)}
    todo = [s for s in samples.values() if s["id"] not in done and len(s["replies"]) > 1]
    print(f"{len(done)} judged, {len(todo)} to go. {HELP[config.kind]}. u = undo, s = skip, q = stop.")
    at = made = 0
    while at < len(todo):
        replies = show(todo[at], config)
        try:
            answer = ask(f"[{at + 1}/{len(todo)}] {config.kind}> ").strip()
        except (EOFError, KeyboardInterrupt):
            answer = "q"
        if answer in ("u", "s"):
            at = max(0, at - 1) if answer == "u" else at + 1    # the later judgement of a sample counts
            continue
        if answer == "q":
            break
        try:
            judged = judgement(answer, [reply["id"] for reply in replies], config.kind)
            record = {"sample": todo[at]["id"], "annotator": config.annotator, "time": round(time.time(), 1),
                      "kind": config.kind, **judged}
            check_rating(record, samples)
        except UserError as error:
            print(f"! {error}. {HELP[config.kind]}")
            continue
        append(config.out, record)
        at, made = at + 1, made + 1
    print(f"{made} judgements are in {config.out}")
    return made


def show(found, config):
    """Print a sample's replies in an order of this annotator's own; returns them in that order."""
    replies = in_order_of(config.annotator, found, config.kind)
    print("\n" + "\n".join(f"{turn['role']}: {turn['content']}" for turn in found["messages"]))
    for number, reply in enumerate(replies, 1):
        print(f"  {number}) {reply['text']}")
    return replies


def judgement(answer, ids, kind):
    """What was typed as {"ranking"} or {"scores"}; ids: of the replies in the order they were shown in."""
    answer = answer.replace(" ", "") if kind != "rubric" else answer
    if kind == "rubric":
        marks = answer.split()
        if len(marks) != len(ids) or not all(len(m) == len(ASPECTS) and m.isdigit() for m in marks):
            raise UserError(f"{answer!r} is not {len(ids)} times four marks")
        return {"scores": {id: dict(zip(ASPECTS, map(int, m))) for id, m in zip(ids, marks)}}
    if kind == "choice":
        typed = {"1": [[ids[0]], [ids[1]]], "2": [[ids[1]], [ids[0]]], "=": [ids[:2]]}
        if answer not in typed:
            raise UserError(f"{answer!r} is not 1, 2 or =")
        return {"ranking": typed[answer]}
    try:
        numbers = [[int(n) for n in tie.split("=")] for tie in answer.split(">")]
    except ValueError:
        raise UserError(f"{answer!r} is not a ranking") from None
    for n in sum(numbers, []):
        if not 1 <= n <= len(ids):
            raise UserError(f"there is no reply {n}; they are numbered 1 to {len(ids)}")
    return {"ranking": [[ids[n - 1] for n in tie] for tie in numbers]}


# ---- simulate: programs that mark by gold

@dataclass
class SimulateConfig:
    """Judge replies to requests of the story world by programs, with the noise and the habits of people."""
    samples: str = option("out/samples.jsonl", "replies to judge, from feedback.py sample")
    requests: str = option("out/instructions/requests.jsonl", "what was wished, from data.instructions")
    out: str = option("out/ratings.jsonl", "file that ratings are appended to; samples judged in it are left")
    annotators: int = option(1, "programs, each judging every sample")
    kind: str = option("ranking", "ranking, choice or rubric")
    temperature: float = option(0.0, "noise: the better reply wins with sigmoid(gold difference / "
                                     "temperature); 0 = none, equal ones tie")
    bias: float = option(0.0, "standard deviation over annotators of what each adds to all marks")
    scale: float = option(0.0, "standard deviation over annotators of the logarithm by which each spreads "
                               "marks")
    shuffle: bool = option(False, "labels at random, to see that nothing is learnt from them")
    seed: int = option(0, "of noise and habits")


def simulate(config):
    """Append the ratings; prints the Bayes accuracy: how often the better reply is the one preferred."""
    if config.annotators < 1 or min(config.temperature, config.bias, config.scale) < 0:
        raise UserError("annotators must be at least 1; temperature, bias and scale not negative")
    if config.kind not in KINDS:
        raise UserError(f"kind {config.kind!r} is unknown; use {', '.join(KINDS)}")
    samples = read_samples(config.samples)
    requests = {record["id"]: record["request"] for _, record in read_records(config.requests)}
    done = {(r["sample"], r["annotator"], r["kind"]) for r in read_ratings(config.out, samples)}
    chances = []
    for found in progress_bar(iterable=samples.values(), desc="ratings"):
        if found["id"] not in requests:
            raise UserError(f"{config.requests}: no request for sample {found['id']!r}; give the "
                            f"requests.jsonl that was written with the prompts")
        marks = {reply["id"]: gold_marks(requests[found["id"]], reply["text"]) for reply in found["replies"]}
        gold = {id: sum(m.values()) / len(m) for id, m in marks.items()}
        chances += [chance(abs(gold[a] - gold[b]), config) for a, b in combinations(gold, 2)
                    if gold[a] != gold[b]]
        for number in range(1, config.annotators + 1):
            name = f"simulated-{number}"
            if len(marks) > 1 and (found["id"], name, config.kind) not in done:
                record = {"sample": found["id"], "annotator": name, "time": round(time.time(), 1),
                          "kind": config.kind, **opinion(marks, gold, number, found["id"], config)}
                append(config.out, record)
    print(f"{config.out}: {len(samples):,} samples, {config.annotators} simulated annotators. Of pairs with "
          f"unequal gold the better reply wins {sum(chances) / max(1, len(chances)):.4f} (Bayes accuracy)")


def chance(difference, config):
    """That the better of two replies is preferred."""
    if config.shuffle:
        return 0.5
    return 1 / (1 + math.exp(-difference / config.temperature)) if config.temperature else 1.0


def opinion(marks, gold, number, id, config):
    """One annotator's ranking, choice or marks of the replies of a sample.

    Gumbel noise on gold makes every pair come out by Bradley and Terry's model (1952; Luce 1959).
    """
    of_rater = uniforms(draw_seed(config.seed, "rater", number), 4)
    bias, spread = (math.sqrt(-2 * math.log(1 - of_rater[i])) * math.cos(2 * math.pi * of_rater[i + 1])
                    for i in (0, 2))                            # two normal draws (Box & Muller 1958)
    draw = uniforms(draw_seed(config.seed, f"opinion {id}", number),
                    8 * len(marks) + 8).clamp(min=1e-12).tolist()
    noise = iter(-math.log(-math.log(u)) for u in draw)
    if config.kind == "rubric":
        rated = {}
        for reply, m in marks.items():
            rated[reply] = {aspect: int(min(5, max(1, round(
                3 + (mark - 3) * math.exp(config.scale * spread) + config.bias * bias
                + config.temperature * (next(noise) - 0.5772)))))
                for aspect, mark in m.items()}
        return {"scores": rated}
    values = {reply: next(noise) if config.shuffle else gold[reply] + config.temperature * next(noise)
              for reply in gold}
    replies = list(values)[:2] if config.kind == "choice" else list(values)
    order = sorted({values[reply] for reply in replies}, reverse=True)
    return {"ranking": [[reply for reply in replies if values[reply] == value] for value in order]}


# ---- collect: training data

@dataclass
class CollectConfig:
    """Turn ratings and thumbs into data for reward.py; say how far the annotators agree."""
    samples: str = option("", "the replies that were judged")
    ratings: str = option("", "what was said of them")
    thumbs: str = option("", "thumbs up and down from serving logs: {messages, reply, model, thumb, time}")
    out: str = option("out/rankings.jsonl", "file to write")
    form: str = option("rankings", "rankings, pairs, triples (question, accepted, rejected) or scores (1-5)")


def collect(config):
    """Write the training data; prints counts, ties and agreement."""
    if config.form not in FORMS:
        raise UserError(f"form {config.form!r} is unknown; use {', '.join(FORMS)}")
    if bool(config.samples) != bool(config.ratings) or not (config.ratings or config.thumbs):
        raise UserError("give --samples and --ratings, or --thumbs, or all three")
    lines = []
    if config.ratings:
        samples = read_samples(config.samples)
        ratings = read_ratings(config.ratings, samples)
        print("\n".join(agreement(ratings)))
        lines = records_of(ratings, samples, config.form)
    if config.thumbs:
        lines += thumb_records(read_thumbs(config.thumbs), config.form)
    if not lines:
        raise UserError(f"nothing to write as {config.form}; rankings and choices make rankings, pairs and "
                        "triples, rubrics all four")
    write_text(Path(config.out), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{config.out}: {len(lines):,} records as {config.form}")


def thumb_records(thumbs, form):
    """An up and a down on equal messages make a pair; as scores an up is a 5, a down a 1."""
    by_messages = defaultdict(dict)
    for thumb in thumbs:
        key = json.dumps(thumb["messages"], ensure_ascii=False)
        by_messages[key][thumb["reply"]] = thumb["thumb"]           # the last one on a reply counts
    lines = []
    for key, replies in by_messages.items():
        messages = json.loads(key)
        if form in ("pairs", "triples"):
            lines += [pair(messages, a, b, form) for a, up in replies.items() for b, down in replies.items()
                      if up > down]
        elif form == "scores":
            lines.append({"messages": messages, "outputs": [
                {"response": reply, "score": 3 + 2 * thumb} for reply, thumb in replies.items()]})
        elif len(set(replies.values())) == 2:
            lines.append({"messages": messages, "outputs": [
                {"response": reply, "rank": 1 if thumb == 1 else 2} for reply, thumb in replies.items()]})
    return lines


def agreement(ratings):
    """Lines on how many ratings there are, how often replies tie, and how far the annotators agree."""
    by_rater = defaultdict(int)
    opinions = defaultdict(dict)            # {(sample, reply, reply): {annotator: 1, 0 or -1}}
    marks = defaultdict(list)               # {(sample, reply): mean marks, one an annotator}
    for rating in ratings:
        by_rater[rating["annotator"]] += 1
        by_reply = levels(rating)
        for a, b in combinations(sorted(by_reply), 2):
            opinions[rating["sample"], a, b][rating["annotator"]] = (by_reply[a] > by_reply[b]) - (
                by_reply[a] < by_reply[b])
        if rating["kind"] == "rubric":
            for id, mark in by_reply.items():
                marks[rating["sample"], id].append(mark)
    said = [v for by_name in opinions.values() for v in by_name.values()]
    lines = [f"{len(ratings):,} ratings: " + ", ".join(f"{name} {n:,}" for name, n
                                                       in sorted(by_rater.items())),
             f"{len(said):,} comparisons, {said.count(0) / max(1, len(said)):.1%} of them ties"]
    with_others = {name: [] for name in by_rater}
    for by_name in opinions.values():
        for a, b in combinations(by_name, 2):
            for name in (a, b):
                with_others[name].append(by_name[a] == by_name[b])
    if any(with_others.values()):
        share = {name: sum(same) / len(same) for name, same in with_others.items() if same}
        same = [same for list_ in with_others.values() for same in list_]
        alpha = krippendorff_alpha([list(v.values()) for v in opinions.values()], nominal)
        of_marks = f", of the marks {krippendorff_alpha(list(marks.values()), interval):.3f}" if marks else ""
        lines.append(f"two annotators agree on {sum(same) / len(same):.1%} of comparisons; Krippendorff's "
                     f"alpha {alpha:.3f}{of_marks}")
        for name, same in share.items():
            rest = [v for other, v in share.items() if other != name]
            if len(share) > 2 and same < sum(rest) / len(rest) - ODD:
                lines.append(f"{name} is at odds with the rest: agrees on {same:.1%}, they on "
                             f"{sum(rest) / len(rest):.1%}")
    return lines


COMMANDS = {"sample": (SampleConfig, sample), "rate": (RateConfig, rate),
            "simulate": (SimulateConfig, simulate), "collect": (CollectConfig, collect)}


def parse(argv):
    """The configuration of the command that the first argument names."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        for name, (config, _) in COMMANDS.items():
            print(f"\n---- {name}")
            with suppress(SystemExit):
                parse_config(config, ["--help"])
        sys.exit(0)
    if not argv or argv[0] not in COMMANDS:
        raise UserError(f"command {argv[0] if argv else '(none)'!r} is unknown; use {', '.join(COMMANDS)}, "
                        "each with --help")
    return parse_config(COMMANDS[argv[0]][0], argv[1:])


def main(config):
    """Run the command that a configuration is of."""
    dict(COMMANDS.values())[type(config)](config)


if __name__ == "__main__":
    run(lambda: main(parse(sys.argv[1:])))
