"""The grammar of the story world, as it is in data/grammar/: tables of words, plots, rules, and their check.

How its files are written: data/grammar/README.md. A rule is a Choice of Lines; a line is a sequence of nodes:
str (a literal), Slot (a fact in a form), Ref (another rule), Choice (alternatives in brackets).
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from cli import UserError

GRAMMAR = Path(__file__).with_name("grammar")
LANGUAGES = "en", "zh"
TABLE_OF = {"hero": "character", "friend": "character", "other": "thing", "before": "mood", "after": "mood"}
ROLES = ("hero", "friend", "place", "thing", "other", "colour", "food", "snack", "pattern", "garment",
         "weather", "time", "before", "after", "lesson")
CORE = "plot", "hero", "friend", "place", "thing"           # in every tale; their values decide its split
FORMS = "full", "short"
DEFAULTS = {"weather": "sunny warm breezy cloudy", "time": "morning noon afternoon evening"}
SECTIONS = "goal", "because", "want", "trouble", "help", "end", "short", "summary"
CAPITAL = "\x01"            # the node that opens a sentence or a quotation: what follows gets a capital
ENDS = ".!?。！？\"”"


class Slot(NamedTuple):
    """A fact in one of its forms: {hero.kind}."""
    role: str
    form: str


class Ref(NamedTuple):
    """Another rule: <then>; with a role, the rule named after its value: <sky@weather>."""
    name: str
    role: str


class Line(NamedTuple):
    """One way to say something: a sequence of nodes, and where it stands."""
    nodes: tuple
    where: str


class Choice:
    """Alternatives, each as likely as its weight: a rule, or (a|b) inside a line."""

    def __init__(self, lines, weights):
        self.lines, self.weights = lines, [w / sum(weights) for w in weights]
        bits = [-math.log2(w) for w in self.weights]
        self.entropy = sum(w * b for w, b in zip(self.weights, bits))
        self.picks = [(line.nodes, b) for line, b, w in zip(lines, bits, weights) for _ in range(w)]


class Grammar:
    """Tables, plots and rules as read from a directory; `problems` says what is wrong with them."""

    def __init__(self, directory=GRAMMAR):
        self.directory, self.problems = Path(directory), []
        self.tables = {}                # table -> key -> {"tags": set, "en": {form: text}, "zh": ...}
        self.plots = {}                 # plot -> role -> tuple of keys
        self.rules = {x: {} for x in LANGUAGES}             # language -> (plot or "", name) -> Choice
        self.read_tables(self.directory / "words.txt")
        for language in LANGUAGES:
            for path in sorted(self.directory.glob(f"*.{language}.txt")):
                self.read_rules(path, language)
        for path in sorted(self.directory.glob("plots/*.txt")):
            self.read_rules(path, "")
        self.uses = {x: {} for x in LANGUAGES}
        self.roles = {form: {plot: self.roles_of(plot, form) for plot in self.plots} for form in FORMS}

    def problem(self, where, text):
        self.problems.append(f"{where}: {text}")

    # -- reading

    def lines_of(self, path):
        """Yield (file:line, text) of what is neither blank nor comment; a line that ends in | goes on."""
        text = ""
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                text += line.strip()
                if not text.endswith("|"):
                    yield f"{path.relative_to(self.directory).as_posix()}:{number}", text
                    text = ""

    def read_tables(self, path):
        """Read words.txt."""
        table = header = None
        for where, line in self.lines_of(path):
            cells = [cell.strip() for cell in line.split("|")]
            if line.startswith("table "):
                table, header = self.tables.setdefault(line.split()[1], {}), None
            elif header is None:
                header = cells
            elif len(cells) != len(header):
                self.problem(where, f"{len(cells)} cells, but the heading has {len(header)}")
            else:
                row = dict(zip(header, cells))
                table[row["key"]] = {"tags": set(row.get("tags", "").split()),
                                     **{x: forms_of(row, x) for x in LANGUAGES}}

    def read_rules(self, path, language):
        """Read a file of rules; plot files name the language in each heading."""
        plot, rule, lines = "", None, {}
        for where, line in self.lines_of(path):
            pool = re.fullmatch(r"(\w+):\s*(.*)", line)
            if line.startswith("plot "):
                plot, rule = line.split()[1], None
                self.plots[plot] = {}
            elif line.startswith("[") and line.endswith("]"):
                names = line[1:-1].split()
                spoken = language or names[0]
                rule = lines.setdefault((spoken, plot, names[-1]), [])
            elif rule is None and plot and pool:
                self.plots[plot][pool[1]] = self.read_pool(where, pool[1], pool[2].split("#")[0])
            elif rule is None:
                self.problem(where, f"{line!r} stands before any [rule]")
            else:
                weight, text = re.fullmatch(r"(?:(\d+)x )?(.*)", line).groups()
                try:
                    rule.append((parse_line(text, where), int(weight or 1)))
                except ValueError as error:
                    self.problem(where, str(error))
        for (spoken, plot, name), found in lines.items():
            if found:
                self.rules[spoken][plot, name] = Choice(*zip(*found))

    def read_pool(self, where, role, text):
        """"@trees -bamboo pond" -> the keys of those rows."""
        table, keys, words = self.tables.get(TABLE_OF.get(role, role)), [], text.split()
        if table is None or role not in ROLES:
            self.problem(where, f"unknown role {role!r}; roles are {', '.join(ROLES)}")
            return ()
        if all(word.startswith("-") for word in words):
            words = ["all", *words]
        for word in words:
            name = word.lstrip("-@")
            found = (list(table) if word == "all" else [name] if name in table
                     else [k for k, row in table.items() if name in row["tags"]])
            if not found:
                self.problem(where, f"{word!r} is neither a key nor a tag of table "
                                    f"{TABLE_OF.get(role, role)}")
            keys = [k for k in keys if k not in found] if word.startswith("-") else keys + found
        return tuple(dict.fromkeys(keys))

    # -- looking up

    def pool(self, plot, role):
        """The keys that a role may have in a plot, or ("") in any."""
        if plot and role in self.plots[plot]:
            return self.plots[plot][role]
        if plot and role in DEFAULTS:
            return tuple(DEFAULTS[role].split())
        return tuple(self.tables[TABLE_OF.get(role, role)])

    def row(self, role, key):
        return self.tables[TABLE_OF.get(role, role)][key]

    def rule(self, language, plot, name):
        """The rule of that name: the plot's own, else the shared one."""
        rules = self.rules[language]
        found = rules.get((plot, name)) or rules.get(("", name))
        if found is None:
            raise KeyError(f"no rule <{name}>" + (f" for plot {plot}" if plot else ""))
        return found

    # -- which roles a tale mentions

    def mentions(self, language, plot, name):
        """(roles mentioned in every telling of a rule, roles mentioned in some)."""
        key = plot, name
        if self.uses[language].get(key, ()) is None:
            raise KeyError(f"rule <{name}> calls itself")
        if key not in self.uses[language]:
            self.uses[language][key] = None                 # while it is worked out
            self.uses[language][key] = self.mentioned(language, plot, self.rule(language, plot, name))
        return self.uses[language][key]

    def mentioned(self, language, plot, node):
        """The same for any node."""
        if isinstance(node, str):
            return set(), set()
        if isinstance(node, Slot):
            return {node.role}, {node.role}
        if isinstance(node, Ref):
            if not node.role:
                return self.mentions(language, plot, node.name)
            parts = [self.mentions(language, plot, f"{node.name}.{k}") for k in self.pool(plot, node.role)]
            always = set.intersection(*(a for a, _ in parts))
            return {node.role} | always, {node.role}.union(*(s for _, s in parts))
        if isinstance(node, Line):
            parts = [self.mentioned(language, plot, n) for n in node.nodes]
            return set().union(*(a for a, _ in parts)), set().union(*(s for _, s in parts))
        parts = [self.mentioned(language, plot, line) for line in node.lines]
        return set.intersection(*(a for a, _ in parts)), set().union(*(s for _, s in parts))

    def roles_of(self, plot, form):
        """The roles of a tale in the order of their draw; notes those that only some tellings have."""
        found = {}
        for language in LANGUAGES:
            try:
                always, some = self.mentions(language, plot, form)
            except KeyError as error:
                self.problem(f"plot {plot}", f"{language} {form}: {error.args[0]}")
                continue
            for role in some - always:
                self.problem(f"plot {plot}", f"{language} {form}: {{{role}}} is in some tellings and not in "
                                             "others; put it into all lines of one section, or into none")
            found[language] = always
        if len(found) == 2 and found["en"] != found["zh"]:
            self.problem(f"plot {plot}", f"{form}: {sorted(found['en'] ^ found['zh'])} in one language only")
        return tuple(r for r in ROLES if r in found.get("en", ()))


def forms_of(row, language):
    """All forms of a table row in a language: those in its columns and those that follow from them."""
    forms = {("" if c == language else c.split(".", 1)[1]): text
             for c, text in row.items() if c.split(".")[0] == language}
    if language == "en":
        for name, text in list(forms.items()):
            article = "an " if re.match("[aeiou]|honest", text) else "a "
            forms.setdefault(f"a_{name}" if name else "a", article + text)
        forms.setdefault("the", "the " + forms[""])
    for name, measure in ("one", "一"), ("this", "这"), ("that", "那"):
        if "measure" in forms:
            forms[name] = measure + forms["measure"]
    if "he" in forms:
        cases = {"he": ("him", "his", "himself"), "she": ("her", "her", "herself")}.get(forms["he"])
        forms |= dict(zip(("him", "his", "himself"), cases or [forms["he"]]))
    return forms


TOKEN = re.compile(CAPITAL + r"|[(|)]|<([\w.]+)(?:@(\w+))?>|\{(\w+)(?:\.(\w+))?\}|[<>{}]|[^(|)<>{}\x01]+")


def parse_line(text, where):
    """Parse "(a|b) {hero} <then>" into a Line; a whole sentence gets marks for its capitals."""
    if text[-1] in ENDS:
        text = CAPITAL + re.sub(r'(?<=[.!?] )(?=\S)|(?:(?<= )|^)"|(?<=[。！？])(?=[^”])',
                                lambda m: m[0] + CAPITAL, text)
    stack = [[[]]]                      # open groups, each a list of alternatives
    for match in TOKEN.finditer(text):
        token, (name, at, role, form) = match[0], match.groups()
        if token == "(":
            stack.append([[]])
        elif token == "|" and len(stack) > 1:
            stack[-1].append([])
        elif token == ")" and len(stack) > 1:
            lines = [Line(tuple(nodes), where) for nodes in stack.pop()]
            stack[-1][-1].append(Choice(lines, [1] * len(lines)))
        elif name:
            stack[-1][-1].append(Ref(name, at or ""))
        elif role in ROLES:
            stack[-1][-1].append(Slot(role, form or ""))
        elif role or token in "|)<>{}":
            raise ValueError(f"cannot read {token!r} in {text.strip(CAPITAL)!r}")
        else:
            stack[-1][-1].append(token)
    if len(stack) > 1:
        raise ValueError(f"a ( is not closed in {text.strip(CAPITAL)!r}")
    return Line(tuple(stack[0][0]), where)


@cache
def load(directory=GRAMMAR):
    """The grammar of a directory, checked."""
    grammar = Grammar(directory)
    problems = grammar.problems + list(check(grammar))
    if problems:
        more = f" (and {len(problems) - 1} more: python -m data.world --check)" if len(problems) > 1 else ""
        raise UserError(f"grammar: {problems[0]}{more}")
    return grammar


def check(grammar):
    """Yield what is wrong in the rules: names and forms that do not exist."""
    for plot in grammar.plots:
        for language in LANGUAGES:
            for name in SECTIONS:
                if (plot, name) not in grammar.rules[language]:
                    yield f"plot {plot}: no [{language} {name}]"
        for role in CORE[1:]:
            if len(grammar.pool(plot, role)) < 2:
                yield f"plot {plot}: {role} has fewer than two rows to choose from"
        if set(grammar.pool(plot, "thing")) & set(grammar.plots[plot].get("other", ())):
            yield f"plot {plot}: thing and other may be the same"
    for language, rules in grammar.rules.items():
        for (plot, name), rule in rules.items():
            for line in rule.lines if plot and name not in ("goal", "because") else ():
                if line.nodes[0] != CAPITAL and not all(isinstance(node, (Ref, str)) for node in line.nodes):
                    yield f"{line.where}: a sentence must end in one of {ENDS}"
            yield from check_node(grammar, language, plot, rule, "")


def check_node(grammar, language, plot, node, where):
    """Yield what is wrong under a node."""
    if isinstance(node, Choice):
        for line in node.lines:
            for part in line.nodes:
                yield from check_node(grammar, language, plot, part, line.where)
    elif isinstance(node, Slot):
        rows = [grammar.row(node.role, key)[language] for key in grammar.pool(plot, node.role)]
        if not all(node.form in row for row in rows):
            yield f"{where}: {node.role} has no form .{node.form} in {language}"
    elif isinstance(node, Ref):
        names = [node.name]
        if node.role:
            names = [f"{node.name}.{key}" for key in grammar.pool(plot, node.role)]
        known = {name for p, name in grammar.rules[language] if p in ("", plot) or not plot}
        for name in names:
            if name not in known:
                yield f"{where}: no rule <{name}>"
