"""The story world: exact means against enumeration and sampling, recogniser, split, sound text, richness."""

import lzma
import math
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest

import kneser_ney
from cli import UserError
from data import world
from data.rules import CAPITAL, CORE, LANGUAGES, Choice, Grammar, Ref, Slot, check, load
from data.world import (Recogniser, capitals, draw_facts, expected, fact_bits, generator, sentences, split_of,
                        story, tell)
from tokenizer import Tokenizer

TINY = {
    "words.txt": """
table character
key | tags | en | en.he | en.trait | zh | zh.he
ann | a | Ann | she | odd | 安 | 她
bo | b | Bo | he | calm | 波波 | 他
cy | b | Cyril | he | icy | 西 | 他
table place
key | tags | en | zh
mill | | the mill | 磨坊
sea | | the sea | 大海边
table thing
key | tags | en | zh | zh.measure
hat | | hat | 帽 | 顶
urn | | urn | 水缸 | 口
table weather
key | tags | en | zh
wet | | wet | 湿
dry | | dry | 干干
""",
    "tale.en.txt": """
[full]
<want> (<sky@weather> |)<help>
3x <want> <sky@weather> <help>
[sky.wet]
It (rained|poured) on {hero.him}.
[sky.dry]
It was <so> hot.
{hero} said, "I am (hot|<so> hot)."
[so]
so
2x very
""",
    "tale.zh.txt": """
[full]
<want><sky@weather><help>
[sky.wet]
下雨了。
[sky.dry]
{hero}说：“(好|真)热。”
""",
    "plots/a.txt": """
plot a
friend: -ann
weather: all
""" + "".join(f"""
[en {name}]
{{hero}} saw {{thing.a}} at {{place}} on a {{weather}} day(| with {{friend}}| and \
{{hero.he}} took {{friend.him}} along, said {{friend}}).
On a {{weather}} day at {{place}}, {{thing.the}} fell on {{hero}} and {{friend}}.
[zh {name}]
{{hero}}和{{friend}}在{{place}}看见{{thing.one}}{{weather}}的{{thing}}。
""" for name in ("goal", "because", "want", "trouble", "try", "end", "summary")) + """
[en short]
{hero} and {friend} saw {thing.a} at {place}.
[zh short]
{hero}和{friend}在{place}。{thing}(很|不)大。
[en help]
{friend} helped {hero} (|a lot).
{friend} helped on that {weather} day at {place} with {thing.the}.
[zh help]
{friend}帮了{hero}。
""",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A grammar of a few thousand tales."""
    directory = tmp_path_factory.mktemp("grammar")
    (directory / "plots").mkdir()
    for name, text in TINY.items():
        (directory / name).write_text(text, encoding="utf-8")
    grammar = Grammar(directory)
    assert grammar.problems + list(check(grammar)) == []
    return grammar


def tellings(grammar, facts, language, node):
    """Every (probability, text) of a node, by brute force."""
    if isinstance(node, str):
        return [(1.0, node)]
    if isinstance(node, Slot):
        return [(1.0, grammar.row(node.role, facts[node.role])[language][node.form])]
    if isinstance(node, Ref):
        suffix = f".{facts[node.role]}" if node.role else ""
        node = grammar.rule(language, facts["plot"], node.name + suffix)
    found = []
    for weight, line in zip(node.weights, node.lines):
        for parts in product(*(tellings(grammar, facts, language, part) for part in line.nodes)):
            found.append((weight * math.prod(p for p, _ in parts), "".join(text for _, text in parts)))
    return found


def everything(grammar, language):
    """{(form, text): probability of derivations}, and mean bits, by enumerating all facts and tellings."""
    texts, bits = Counter(), 0.0
    for form, share in ("full", 1 - world.SHORT), ("short", world.SHORT):
        roles = grammar.roles[form]["a"]
        for keys in product(*(grammar.pool("a", role) for role in roles)):
            facts = {"plot": "a", "form": form, **dict(zip(roles, keys))}
            if facts["hero"] == facts["friend"]:
                continue
            p = share
            for role in roles:
                pool = grammar.pool("a", role)
                p /= len([k for k in pool if role != "friend" or k != facts["hero"]])
            for q, text in tellings(grammar, facts, language, Ref(form, "")):
                texts[form, capitals(text)] += p * q
                bits -= p * q * math.log2(p * q)
    return texts, bits


@pytest.mark.parametrize("language", LANGUAGES)
def test_means_are_those_of_all_tales(tiny, language):
    """Expected bits and bytes by recursion, against the enumeration of every tale of a small grammar."""
    texts, bits = everything(tiny, language)
    found = expected(language, tiny)
    assert sum(texts.values()) == pytest.approx(1)
    assert found["bits"] == pytest.approx(bits) and sum(found["by_kind"].values()) == pytest.approx(bits)
    assert found["bytes"] == pytest.approx(sum(p * len(text.encode()) for (_, text), p in texts.items()))
    entropy = -sum(p * math.log2(p) for p in texts.values())
    assert entropy <= bits + 1e-9                           # the bound is one


@pytest.mark.parametrize("language", LANGUAGES)
def test_tales_come_as_often_as_they_say(tiny, language):
    """Sampled tales have the probabilities of the enumeration, and frequencies follow.

    Chi-square by text length.
    """
    texts, _ = everything(tiny, language)
    draw, n, seen = generator("test"), 6000, Counter()
    for i in range(n):
        facts = draw_facts(draw, tiny)
        text, bits = tell(facts, language, draw, grammar=tiny)
        assert 2 ** -(bits + sum(fact_bits(tiny, facts).values())) <= texts[facts["form"], text] * (1 + 1e-9)
        seen[len(text)] += 1
    lengths = Counter()
    for (_, text), p in texts.items():
        lengths[len(text)] += p
    common = [k for k, p in lengths.items() if p * n >= 10]
    chi2 = sum((seen[k] - n * lengths[k]) ** 2 / (n * lengths[k]) for k in common)
    assert chi2 < len(common) + 5 * math.sqrt(2 * len(common))


@pytest.mark.parametrize("language", LANGUAGES)
def test_recogniser_takes_what_the_grammar_makes_and_nothing_else(tiny, language):
    """Every tale of the small grammar, whole; of damaged ones just those that are another tale's sentence."""
    texts, _ = everything(tiny, language)
    recogniser, known = Recogniser(language, tiny), set()
    some = sorted({text for _, text in texts})[::41]
    for text in some:
        assert all(good for _, good in recogniser.accepted(text)), text
    for text in some[:40]:
        for damaged in text.lower().capitalize(), text[:-1], text[3:], text + text[-4:], "x" + text:
            known.update(s for s, good in recogniser.accepted(damaged) if good)
    whole = {s for _, text in texts for s in sentences(text, language)}
    assert known <= whole


def test_one_sentence_has_one_set_of_facts(tiny):
    recogniser = Recogniser("en", tiny)
    for text, good in (("Ann and Bo saw a hat at the mill.", True),
                       ("Ann and Ann saw a hat at the mill.", False),
                       ("Bo and Ann saw a hat at the mill.", False),        # Ann is no friend of this plot
                       ("Ann saw an urn at the sea on a dry day and she took him along, said Bo.", True),
                       ("Ann saw an urn at the sea on a dry day and he took him along, said Bo.", False),
                       ("Ann saw a urn at the sea on a dry day.", False)):
        assert [g for _, g in recogniser.accepted(text)] == [good], text


# ---- the real grammar

@pytest.fixture(scope="module")
def tales():
    return {language: [story(seed, language) for seed in range(2000)] for language in LANGUAGES}


def monte_carlo(language, n):
    """z-scores of the mean bits and bytes of n unconditioned tales against the exact, and their ratio."""
    grammar, found, exact = load(), [], expected(language)
    for i in range(n):
        draw = generator("monte carlo", language, i)
        facts = draw_facts(draw, grammar)
        text, bits = tell(facts, language, draw)
        found.append((bits + sum(fact_bits(grammar, facts).values()), len(text.encode())))
    found = np.array(found)
    z = (found.mean(0) - [exact["bits"], exact["bytes"]]) / (found.std(0, ddof=1) / math.sqrt(n))
    ratio = found[:, 0] - exact["bits_per_byte"] * found[:, 1]
    return [*z, ratio.mean() / (ratio.std(ddof=1) / math.sqrt(n))]


@pytest.mark.parametrize("language", LANGUAGES)
def test_means_agree_with_sampling(language):
    assert max(abs(z) for z in monte_carlo(language, 3000)) < 3


@pytest.mark.full
@pytest.mark.parametrize("language", LANGUAGES)
def test_means_agree_with_much_sampling(language):
    z = monte_carlo(language, 40_000)
    print(f"{language}: z of bits, bytes, ratio {z}")
    assert max(abs(x) for x in z) < 3


def test_entropy_is_rich_and_comes_from_phrasing():
    for language in LANGUAGES:
        found = expected(language)
        share = 1 - found["by_kind"]["things"] / found["bits"]
        print(f"{language}: {found}, {share:.2f} of it phrasing and plot")
        assert found["bits_per_byte"] >= 0.3 and share >= 0.4
        assert found["bits"] > 60                           # 2 ** 60 > 10 ** 18 tales


def test_facts_have_the_promised_numbers():
    grammar = load()
    sizes = {name: len(table) for name, table in grammar.tables.items()}
    assert len(grammar.plots) >= 40 and sizes["character"] >= 30
    assert sizes["place"] >= 30 and sizes["thing"] >= 60


def test_same_seed_same_facts_in_both_languages():
    for seed in range(200):
        assert story(seed, "en").facts == story(seed, "zh").facts
        assert story(seed, "en") == story(seed, "en")


def test_draws_are_the_same_everywhere():
    """Constants, so that another Python or platform that draws otherwise is seen."""
    draw = generator("facts", 7, "train")
    assert [draw.random() for _ in range(3)] == [0.42956446628504563, 0.6398652118971218, 0.6666479902743032]


def test_held_out_facts_never_train(tales):
    grammar = load()
    validation = [story(seed, "en", "val") for seed in range(100)]
    assert {split_of(tale.facts) for tale in validation} == {"val"}
    assert {split_of(tale.facts) for tale in tales["en"]} == {"train"}
    core = [tuple(tale.facts[role] for role in CORE) for tale in validation]
    assert not set(core) & {tuple(tale.facts[role] for role in CORE) for tale in tales["en"]}
    share = np.mean([split_of(draw_facts(generator(i), grammar)) == "val" for i in range(20_000)])
    assert share == pytest.approx(1 / world.HELD_OUT, abs=4 * math.sqrt(0.05 * 0.95 / 20_000))
    for form, roles in grammar.roles.items():
        assert all(set(CORE[1:]) <= set(r) for r in roles.values()), form


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match="fr"):
        story(0, "fr")
    with pytest.raises(UserError, match="test"):
        story(0, "en", "test")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_is_recognised(tales, language):
    recogniser = Recogniser(language)
    found = [pair for tale in tales[language][:150] for pair in recogniser.accepted(tale.text)]
    assert [sentence for sentence, good in found if not good] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_damaged_sentences_are_not_recognised(tales, language):
    """Words swapped, a fact of another language, a sentence cut: nearly all are refused."""
    recogniser, draw, refused, n = Recogniser(language), generator("damage"), 0, 0
    for tale in tales[language][:60]:
        for sentence in sentences(tale.text, language)[:4]:
            words = sentence.split(" ") if language == "en" else list(sentence)
            i = int(draw.random() * (len(words) - 2))
            words[i], words[i + 1] = words[i + 1], words[i]
            damaged = (" " if language == "en" else "").join(words)
            if words[i] != words[i + 1]:
                n += 1
                refused += not all(good for _, good in recogniser.accepted(damaged))
    assert refused >= 0.97 * n


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_is_well_set(tales, language):
    """Articles, spaces, capitals, punctuation, doubled words."""
    wrong = {"en": [r"\b[Aa] [aeiou]", r"\b[Aa]n [^aeiouh]", r"  ", r" [.,!?]", r"[.!?] [a-z]", r'"[a-z]',
                    r"[{}<>|()\x01]", r"\b(\w+) \1\b", r"[,.!?][,.!?]", r"[^\x00-\x7f]", r"^[a-z]",
                    r"[^.!?\"]$"],
             "zh": [r"[ -~]", r"[，。！？：；]{2}", r"(?<![谢慢])(?!滴答|一点|一步)(\w{2,3})\1(?!地|的)",
                    r"[^。！？”]$"]}[language]
    for tale in tales[language]:
        for pattern in wrong:
            found = re.search(pattern, tale.text)
            assert not found, (f"{pattern}: ...{tale.text[max(0, found.start() - 40):found.end() + 20]}... "
                               f"{tale.facts}")


@pytest.mark.parametrize("language", LANGUAGES)
def test_lengths(tales, language):
    for tale in tales[language]:
        n = len(tale.text.split()) if language == "en" else len(tale.text)
        least, most = {("en", "full"): (60, 200), ("zh", "full"): (100, 350),
                       ("en", "short"): (10, 45), ("zh", "short"): (20, 90)}[language, tale.facts["form"]]
        assert least <= n <= most, (n, tale.text)
        assert tale.facts["form"] == "full" or 2 <= len(sentences(tale.text, language)) <= 3, tale.text


def test_sentences_are_split():
    english = '"Oh!" said Mia. "I am so sad." Then, Pip saw. Mia said, "Go on!" "Yes," said he. The end'
    assert sentences(english, "en") == [
        '"Oh!" said Mia.', '"I am so sad."', "Then, Pip saw.", 'Mia said, "Go on!"', '"Yes," said he.',
        "The end"]
    chinese = "“糟糕！”米娅说，“我很难过。”皮皮来了。皮皮问：“怎么了？”他笑了！“好吗？”他问"
    assert sentences(chinese, "zh") == [
        "“糟糕！”米娅说，“我很难过。”", "皮皮来了。", "皮皮问：“怎么了？”", "他笑了！", "“好吗？”他问"]
    assert sentences("", "en") == sentences(" ", "zh") == []


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_by_hand(order):
    """The yardstick itself: counted by sorting, against dictionaries and the formula's recursion."""
    rng, vocab_size = np.random.default_rng(0), 8
    train, test = rng.integers(1, 6, 300).tolist(), rng.integers(1, 7, 40).tolist()
    seen, new = [0] * (order - 1) + train, [0] * (order - 1) + test
    starts = range(order - 1, len(seen))
    counts = [Counter(g[1:] for g in {tuple(seen[i - k - 1:i + 1]) for i in starts})
              for k in range(order - 1)]
    counts.append(Counter(tuple(seen[i - order + 1:i + 1]) for i in starts))

    def probability(k, context, token):
        if k < 0:
            return 1 / vocab_size
        ones, twos = (sum(v == m for v in counts[k].values()) for m in (1, 2))
        d = ones / (ones + 2 * twos) if ones else 0.5
        after = {gram: v for gram, v in counts[k].items() if gram[:-1] == context}
        lower = probability(k - 1, context[1:], token)
        own = max(after.get((*context, token), 0) - d, 0)
        return (own + d * len(after) * lower) / sum(after.values()) if after else lower

    bits = -sum(math.log2(probability(order - 1, tuple(new[i - order + 1:i]), new[i]))
                for i in range(order - 1, len(new)))
    assert kneser_ney.bits(train, test, order, vocab_size) == pytest.approx(bits)


# ---- richness: full counts

@pytest.mark.full
@pytest.mark.parametrize("language", LANGUAGES)
def test_twenty_thousand_tales_are_different_and_wide(language):
    texts = [story(seed, language).text for seed in range(20_000)]
    assert len(set(texts)) == len(texts)
    words = {w for text in texts for w in (re.findall(r"[a-z']+", text.lower()) if language == "en"
                                           else re.findall(r"[\u4e00-\u9fff]", text))}
    print(f"{language}: {len(words)} distinct {'words' if language == 'en' else 'characters'}")
    assert len(words) >= (1500 if language == "en" else 1000)


def sample(language, size, start=0):
    """Tales from number `start` on, `size` bytes of them."""
    texts, n = [], 0
    while n < size:
        texts.append(story(start + len(texts), language).text)
        n += len(texts[-1].encode())
    return texts


@pytest.mark.full
@pytest.mark.parametrize("language", LANGUAGES)
def test_text_does_not_compress_like_a_template(language):
    data = "\n".join(sample(language, 5e6)).encode()
    ratio = len(data) / len(lzma.compress(data, preset=6))
    print(f"{language}: xz -6 makes 5 MB {ratio:.2f} times smaller")
    assert ratio < 8


@pytest.mark.full
@pytest.mark.parametrize("language", LANGUAGES)
def test_five_grams_stay_far_above_the_bound(language):
    """A Kneser-Ney 5-gram model of tokens, of 20 MB, on held-out tales.

    Long-range facts are worth a third of the bits.
    """
    train, test = sample(language, 20e6), sample(language, 5e5, start=10_000_000)
    tokenizer = Tokenizer.train(train[:5000], 4096)
    stream = [np.array([t for ids in tokenizer.encode_batch(texts) for t in (*ids, tokenizer.eot_id)])
              for texts in (train, test)]
    bits = kneser_ney.bits(*stream, 5, tokenizer.vocab_size) / sum(len(t.encode()) for t in test)
    bound = expected(language)["bits_per_byte"]
    print(f"{language}: 5-gram {bits:.3f} bits/byte, bound {bound:.3f}, {bits / bound:.2f} times")
    assert bits > 1.5 * bound


def test_text_of_no_language_is_counted_apart(tmp_path, capsys):
    """An untrained model says such things; the demo's chain once ended there."""
    (tmp_path / "t.txt").write_text("--- 1\n0 7 %%\n--- 2\nBao was here.\n--- 3\n你好。\n", encoding="utf-8")
    world.report_recognised(tmp_path / "t.txt", 10)
    said = capsys.readouterr().out
    assert "other: 0 of 0 sentences (0%) of 1 tales" in said and "en: 0 of 1 sentences" in said
    (tmp_path / "t.txt").write_text("--- 1\nBao was here.\n", encoding="utf-8")
    world.report_recognised(tmp_path / "t.txt", 10)
    assert "other" not in capsys.readouterr().out
