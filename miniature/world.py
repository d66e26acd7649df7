"""The small world of `make reproduce`: passages, questions of eight tasks, and the teacher's plan for each question.

    python -m miniature.world --out runs/miniature/world --seed 0 --train-questions 600 --test-questions 25

Some pages state real facts that a pretrained model has read (facts.csv: countries, landmarks, rivers, novels, writers).
The others are about invented people, companies, towns and books that no model can know. One seed determines everything.

As in the paper (Sec. 4.1), the student is trained on two tasks and tested on eight:
| task            | test questions                                          | what training never shows             |
|-----------------|---------------------------------------------------------|---------------------------------------|
| hotpotqa        | two hops, half of them about real pages; comparisons    | these questions and invented entities |
| 2wikimultihopqa | two hops, comparisons, yes or no                        | comparing towns or books              |
| musique         | three hops                                              | these chains of three relations       |
| bamboogle       | two hops                                                | these pairs of relations              |
| math            | divisors, equations, sums, means, short stories         | these questions                       |
| gsm_hard        | the same stories                                        | numbers of five to seven digits       |
| aime            | how many n up to N meet two conditions                  | these pairs of conditions, N over 100 |
| olymmath        | how many pairs x < y up to N meet a condition           | these combinations, N over 30         |

30 % of the invented entities occur in no training question; each test question about invented pages starts from one
of them. By guessing, a model gets half of the comparisons and half of the yes-or-no questions.
"""

import ast
import csv
import dataclasses
import random
import re
from pathlib import Path
from typing import NamedTuple

from common import REQUIRED, option, run_command_line, write_json, write_jsonl
from common.report import TASKS

TEST_MIX = {  # task -> shares of the families of questions
    "hotpotqa": {"two hops": 0.75, "comparison": 0.25},
    "2wikimultihopqa": {"two hops": 0.5, "comparison": 0.3, "yes or no": 0.2},
    "musique": {"three hops": 1},
    "bamboogle": {"two hops": 1},
    "math": {"numbers": 0.7, "story": 0.2, "count": 0.1},
    "gsm_hard": {"story": 1},
    "aime": {"count": 1},
    "olymmath": {"pairs": 1},
}
TRAIN_MIX = {  # 60 % of the training questions are those of hotpotqa, 40 % those of math
    "hotpotqa": {"one hop": 0.05, "two hops": 0.4, "three hops": 0.29, "comparison": 0.16, "yes or no": 0.1},
    "math": {"numbers": 0.36, "story": 0.28, "count": 0.18, "pairs": 0.18},
}
HELD_OUT = 0.3  # share of the invented entities that no training question touches

# ------------- Relations and pages


class Relation(NamedTuple):
    """One kind of fact about x, whose value is y. target: the kind of page that y is, "word", or a number's range."""

    target: str | tuple
    statement: str  # what the teacher says when it has read the fact
    questions: tuple  # ways to ask for y
    phrases: tuple = ()  # ways to mention y in a longer question; the first one also reads well around a long x


COUNTRY = Relation("country", "{x} is in {y}.", ("In which country is {x}?", "What country is {x} in?"),
                   ("the country of {x}", "the country that {x} belongs to"))  # fmt: skip
AUTHOR = Relation("person", "{x} was written by {y}.", ("Who wrote {x}?", "Who is the author of {x}?"),
                  ("the author of {x}", "the person who wrote {x}"))  # fmt: skip
RELATIONS = {  # kind of page -> relation -> Relation
    "country": {
        "capital": Relation("word", "The capital of {x} is {y}.", ("What is the capital of {x}?",)),
        "currency": Relation("word", "The currency of {x} is the {y}.",
                             ("What is the currency of {x}?", "Which currency do people use in {x}?")),
        "language": Relation("word", "The language of {x} is {y}.",
                             ("What is the main language of {x}?", "Which language do people speak in {x}?")),
    },
    "landmark": {"country": COUNTRY},
    "river": {"country": COUNTRY},
    "novel": {"author": AUTHOR._replace(target="writer")},
    "writer": {
        "country": Relation("country", "{x} was from {y}.", ("Which country was {x} from?",),
                            ("the home country of {x}", "the country that {x} came from")),
    },
    "person": {
        "birthplace": Relation("town", "{x} was born in {y}.", ("Where was {x} born?", "In which town was {x} born?"),
                               ("the birthplace of {x}", "the town where {x} was born")),
        "employer": Relation("company", "{x} works for {y}.", ("Which company does {x} work for?", "Who employs {x}?"),
                             ("the employer of {x}", "the company that {x} works for")),
        "birth year": Relation((1900, 1999), "{x} was born in {y}.", ("In which year was {x} born?",)),
    },
    "company": {
        "founder": Relation("person", "{x} was founded by {y}.", ("Who founded {x}?", "Who is the founder of {x}?"),
                            ("the founder of {x}", "the person who founded {x}")),
        "seat": Relation("town", "{x} is based in {y}.", ("Where is {x} based?", "In which town is {x} based?"),
                         ("the seat of {x}", "the town where {x} is based")),
        "founding year": Relation((1900, 1999), "{x} was founded in {y}.", ("In which year was {x} founded?",)),
    },
    "town": {
        "country": COUNTRY,
        "mayor": Relation("person", "The mayor of {x} is {y}.", ("Who is the mayor of {x}?",), ("the mayor of {x}",)),
        "population": Relation((100, 9999), "{x} has {y} people.",
                               ("How many people live in {x}?", "What is the population of {x}?")),
    },
    "book": {
        "author": AUTHOR,
        "setting": Relation("town", "{x} is set in {y}.", ("Where is {x} set?", "In which town is {x} set?"),
                            ("the setting of {x}", "the town where {x} is set")),
        "publication year": Relation((1950, 2019), "{x} was published in {y}.", ("In which year was {x} published?",)),
    },
}  # fmt: skip
PAGES = {  # several wordings of each kind of page, with the facts in different orders
    "country": ["The capital of {x} is {capital}. Its language is {language} and its currency is the {currency}.",
                "In {x} people speak {language} and pay with the {currency}. The capital is {capital}."],
    "landmark": ["{x} can be seen in {country}.", "{country} is famous for {x}."],
    "river": ["{x} is a river in {country}."],
    "novel": ["{x} is a famous work by {author}.", "{x} was written by {author}."],
    "writer": ["{x} was a writer from {country}.", "{x} is one of the best known writers from {country}."],
    "person": ["{x} was born in {birthplace} in {birth year} and works for {employer}.",
               "{x} works for {employer} as a {job}. Born in {birth year} in {birthplace}.",
               "A {job} who works for {employer}. Born in {birthplace} in {birth year}."],
    "company": ["{x} makes {goods} in {seat}. It was founded by {founder} in {founding year}.",
                "{founder} founded {x} in {founding year}. It is based in {seat} and makes {goods}.",
                "A maker of {goods}, founded in {founding year} by {founder}. It is based in {seat}."],
    "town": ["{x} is a town in {country}. Its mayor is {mayor}, and {population} people live there.",
             "{x} has {population} people and lies in {country}. The mayor is {mayor}.",
             "A town of {population} people, led by its mayor {mayor}. It is in {country}."],
    "book": ["{x} is a book by {author}, published in {publication year}. It is set in {setting}.",
             "{author} wrote {x}, a story set in {setting}. It was published in {publication year}.",
             "A novel set in {setting}, written by {author} and published in {publication year}."],
}  # fmt: skip
COMPARISONS = {  # (kind, relation): how to ask for the lower value, how to ask for the higher one
    ("person", "birth year"): ("Who was born first, {a} or {b}?", "Who was born later, {a} or {b}?"),
    ("company", "founding year"): ("Which was founded first, {a} or {b}?", "Which was founded later, {a} or {b}?"),
    ("town", "population"): ("Which town has fewer people, {a} or {b}?", "Which town has more people, {a} or {b}?"),
    ("book", "publication year"): ("Which book came out first, {a} or {b}?", "Which book came out later, {a} or {b}?"),
}
YES_OR_NO = {  # (kind, relation): do both have the same value?
    ("person", "birthplace"): "Were {a} and {b} born in the same town?",
    ("person", "employer"): "Do {a} and {b} work for the same company?",
    ("company", "seat"): "Are {a} and {b} based in the same town?",
    ("town", "country"): "Are {a} and {b} in the same country?",
    ("book", "author"): "Were {a} and {b} written by the same person?",
}
# What training never shows; the test questions of 2wikimultihopqa and of bamboogle do.
UNSEEN_COMPARED = {"town", "book"}
UNSEEN_PAIRS = {("birthplace", "mayor"), ("employer", "founding year"), ("founder", "birth year"), ("seat", "country"),
                ("author", "employer"), ("setting", "population"), ("mayor", "birthplace")}  # fmt: skip

# Few words in many combinations, so that pages compete in a search.
GIVEN = (
    "Ada Alma Anna Boris Carl Clara David Dora Edgar Ella Emil Eva Felix Greta Hans Helen Hugo Ida Ivan Julia Karin "
    "Leo Lena Marta Max Mina Nora Otto Paul Petra Rosa Simon Sofia Tom Vera"
).split()
STARTS, ENDS = "Har Mar Win Col Ash Brad Thorn Whit Lang Hol", "low wick field ton croft mere den by combe stead"
SURNAMES = [start + end for start in STARTS.split() for end in ENDS.split()]
THINGS = "Road Garden River House Letters Island Song Door Crown Forest Bell Map Sea Train Tower".split()
INVENTED = {  # kind -> (how many, all names)
    "person": (320, [f"{given} {surname}" for given in GIVEN for surname in SURNAMES]),
    "company": (120, [f"{surname} {what}" for surname in SURNAMES for what in ("Foods", "Labs", "Motors", "Press")]),
    "town": (120, [f"{surname} {what}" for surname in SURNAMES for what in ("Mill", "Bridge", "Hill", "Bay")]),
    "book": (120, [f"The {of} {thing}" for of in "Salt Glass Silver Paper Winter Amber Night Summer".split()
                   for thing in THINGS]),
}  # fmt: skip
JOBS = "baker chemist designer driver lawyer painter sailor singer teacher writer".split()
GOODS = "bells bicycles boats chairs clocks gloves hats lamps pianos shoes soap toys".split()


class World:
    """The pages and their facts, all of them drawn from the seed.

    entities: {kind: names}; kind: {name: kind}; facts: {name: {relation: value}}; held_out: the names that training
    questions never touch; passages: rows {"id", "contents"} for the retriever.
    """

    def __init__(self, seed):
        rng = random.Random(f"world {seed}")
        self.entities = {kind: rng.sample(names, count) for kind, (count, names) in INVENTED.items()}
        self.held_out = {e for names in self.entities.values() for e in rng.sample(names, round(HELD_OUT * len(names)))}
        self.facts = {}
        with open(Path(__file__).with_name("facts.csv"), encoding="utf-8") as file:
            for kind, name, *values in csv.reader(file):  # the values are in the order of RELATIONS[kind]
                self.entities.setdefault(kind, []).append(name)
                self.facts[name] = dict(zip(RELATIONS[kind], values, strict=True))
        for kind in INVENTED:
            for name in self.entities[kind]:
                self.facts[name] = {
                    relation: str(rng.randint(*target))
                    if isinstance(target, tuple)
                    else rng.choice([other for other in self.entities[target] if other != name])
                    for relation, (target, *_) in RELATIONS[kind].items()
                }
        self.kind = {name: kind for kind, names in self.entities.items() for name in names}
        self.passages = []
        for name in rng.sample(list(self.facts), len(self.facts)):
            fields = {"x": name, "job": rng.choice(JOBS), "goods": rng.choice(GOODS), **self.facts[name]}
            text = rng.choice(PAGES[self.kind[name]]).format_map(fields)
            contents = f'"{title(name)}"\n{text[0].upper()}{text[1:]}'
            self.passages.append({"id": str(len(self.passages)), "contents": contents})

    def hops(self, name, relations):
        """Follow relations from an entity: [[entity, relation, value, statement], ...]."""
        path = []
        for relation in relations:
            value = self.facts[name][relation]
            statement = RELATIONS[self.kind[name]][relation].statement.format(x=name, y=value)
            path.append([name, relation, value, statement[0].upper() + statement[1:]])
            name = value
        return path

    def may_ask(self, path, split):
        """Training never touches a held-out entity; a test question about invented pages starts from one."""
        start = path[0][0]
        if split == "train":
            return self.held_out.isdisjoint([start, *(value for _, _, value, _ in path)])
        return start in self.held_out or self.kind[start] not in INVENTED


def title(name):
    """Returns the title of an entity's page: its name without the article."""
    return name.removeprefix("the ")


# ------------- Questions about facts: a plan holds the hops, and what is needed in words, right and wrong


def chain_set(task, family, split):
    """Returns [(kind of the start, relations), ...] that a family of questions asks about."""
    length = {"one hop": 1, "two hops": 2, "three hops": 3}[family]
    found = [(kind, (), kind) for kind in (RELATIONS if task == "hotpotqa" and length < 3 else INVENTED)]
    for _ in range(length):
        found = [
            (kind, (*chain, relation), target)
            for kind, chain, end in found
            for relation, (target, *_) in RELATIONS.get(end, {}).items()
        ]
    if length < 3:
        return [(kind, chain) for kind, chain, _ in found if (chain in UNSEEN_PAIRS) == (task == "bamboogle")]
    found = [(kind, chain) for kind, chain, _ in found if len(set(chain)) == 3]
    return [pair for i, pair in enumerate(found) if (i % 4 == 1) == (split == "test")]


def ask_chain(world, rng, task, family, split):
    """Returns (question, answer, plan) for a chain of relations; the wrong plan forgets the last one."""
    options = chain_set(task, family, split)
    if family == "two hops" and task == "hotpotqa":
        real = rng.random() < 0.5
        options = [(kind, chain) for kind, chain in options if (kind not in INVENTED) == real]
    while True:
        kind = rng.choice(sorted({kind for kind, _ in options}))
        relations = rng.choice([chain for start, chain in options if start == kind])
        path = world.hops(rng.choice(world.entities[kind]), relations)
        names = {path[-1][2], *(hop[0] for hop in path)}
        if world.may_ask(path, split) and len(names) == len(path) + 1:  # no page is visited twice
            break
    said = path[0][0]
    for i, (name, relation, _, _) in enumerate(path[:-1]):
        phrases = RELATIONS[world.kind[name]][relation].phrases
        said = rng.choice(phrases if i == 0 else phrases[:1]).format(x=said)
    question = rng.choice(RELATIONS[world.kind[path[-1][0]]][relations[-1]].questions).format(x=said)
    wrong = need([path[:-1]]) if len(path) > 1 else None
    return question, path[-1][2], {"shape": "chain", "branches": [path], "need": need([path]), "wrong": wrong}


def ask_pair(world, rng, task, family, split):
    """Returns (question, answer, plan) that compares two entities; the wrong plan compares the other way round."""
    questions = YES_OR_NO if family == "yes or no" else COMPARISONS
    allowed = [pair for pair in questions if task == "2wikimultihopqa" or pair[0] not in UNSEEN_COMPARED]
    kind, relation = rng.choice(allowed)
    shape = "same" if family == "yes or no" else rng.choice(["lower", "higher"])
    equal = shape == "same" and rng.random() < 0.5
    while True:
        first, second = rng.sample(world.entities[kind], 2)
        if equal:  # chance would hardly ever find such a pair
            value = world.facts[first][relation]
            second = rng.choice([name for name in world.entities[kind] if world.facts[name][relation] == value])
        branches = [world.hops(name, [relation]) for name in (first, second)]
        values = [path[-1][2] for path in branches]
        if first != second and (values[0] == values[1]) == equal and all(world.may_ask(p, split) for p in branches):
            break
    plan = {"shape": shape, "branches": branches}
    plan |= {"need": need(branches, shape), "wrong": need(branches, OPPOSITE[shape])}
    if shape == "same":
        return questions[kind, relation].format(a=first, b=second), "yes" if equal else "no", plan
    question = questions[kind, relation][shape == "higher"].format(a=first, b=second)
    return question, (first, second)[(int(values[0]) < int(values[1])) == (shape == "higher")], plan


OPPOSITE = {"chain": "chain", "lower": "higher", "higher": "lower", "same": "different"}
GOALS = {"chain": "", "lower": ", and the lower one", "higher": ", and the higher one",
         "same": ", and whether they are the same", "different": ", and whether they are different"}  # fmt: skip


def need(branches, shape="chain"):
    """Returns a plan in words, of the hops still to be done: "the employer of Ada Harlow, then the seat"."""
    texts = []
    for (name, relation, *_), *rest in branches:
        texts.append(", then the ".join([f"the {relation} of {name}", *(hop[1] for hop in rest)]))
    return " and ".join(texts) + GOALS[shape]


# ------------- Questions about numbers: a plan is a formula, which the agent runs as code, and CoT works out by hand


def work_out(expression, names):
    """Returns an expression step by step: ("2 * 3 + x", {"x": 4}) -> (["2 * 3 = 6.", "6 + 4 = 10."], 10).

    A function call is one step; of a count, only the result is told.
    """
    steps = []

    def value(node):
        if isinstance(node, ast.BinOp):
            node.left, node.right = ast.Constant(value(node.left)), ast.Constant(value(node.right))
        text = ast.unparse(node)
        result = eval(text, names)  # the world's own expression
        if isinstance(node, ast.BinOp | ast.Call):
            steps.append(f"I count {result}." if text.startswith("sum(1 ") else f"{text} = {result}.")
        return result

    return steps, value(ast.parse(expression, mode="eval").body)


def math_plan(formula, wrong, first="", template="{}", words="{}", by_hand=None):
    """Returns the plan of a math question, right and wrong.

    first: what the code does before the formula. template: the expression around the formula; words: how the first
    thought names it. by_hand: the expression that a chain of thought works out, if it is another one.
    """
    plan, names = {"shape": "math", "need": words.format(formula), "wrong": words.format(wrong)}, {}
    exec(first, names)
    for prefix, text in (("", formula), ("wrong_", wrong)):
        expression = template.format(text)
        steps, result = work_out(by_hand if by_hand and not prefix else expression, names)
        code = f"{first}final_answer({expression})"
        plan |= {prefix + "code": code, prefix + "steps": steps, prefix + "result": str(result)}
    return plan


def ask_numbers(rng, task, split):
    """Returns (question, plan) with small numbers, in the style of MATH's easy levels."""
    family = rng.choice(["divisor", "multiple", "equation", "sum", "mean"])
    a, b, c = (rng.randint(2, 20) for _ in range(3))
    if family in ("divisor", "multiple"):
        factor = rng.randint(2, 9)
        a, b = (factor * n for n in rng.sample(range(2, 10), 2))
        name, other = ("gcd", "lcm") if family == "divisor" else ("lcm", "gcd")
        words = {"gcd": "greatest common divisor", "lcm": "least common multiple"}[name]
        question = rng.choice([f"What is the {words} of {a} and {b}?", f"Find the {words} of {a} and {b}."])
        return question, math_plan(f"{name}({a}, {b})", f"{other}({a}, {b})", "from math import gcd, lcm\n")
    if family == "equation":
        right = a * c + b
        question = rng.choice([f"Solve {a}x + {b} = {right} for x.", f"If {a}x + {b} = {right}, what is x?"])
        return question, math_plan(f"({right} - {b}) // {a}", f"({right} + {b}) // {a}")
    if family == "sum":
        c = a + b
        question = f"What is the sum of the integers from {a} to {c}?"
        by_hand = f"({a} + {c}) * ({c} - {a} + 1) // 2"
        return question, math_plan(f"sum(range({a}, {c} + 1))", f"sum(range({a}, {c}))", by_hand=by_hand)
    c = 3 * rng.randint(15, 30) - a - b  # so that the mean is a whole number
    return f"What is the mean of {a}, {b} and {c}?", math_plan(f"({a} + {b} + {c}) // 3", f"({a} + {b} + {c}) // 2")


STORIES = [  # text, formula, wrong formula; the word behind a number is its name in the formula
    ("{who} packs {boxes} boxes with {pens} pens in each and then sells {sold} pens. How many pens are left?",
     "boxes * pens - sold", "boxes * pens + sold"),
    ("{who} has {eggs} eggs, gets {more} more and sells them all for {coins} coins each. "
     "How many coins does that bring?", "(eggs + more) * coins", "eggs + more * coins"),
    ("A baker made {loaves} loaves, burnt {burnt} of them and sold the rest for {coins} coins each. "
     "How many coins did the baker take in?", "(loaves - burnt) * coins", "loaves * coins - burnt"),
    ("{who} earns {coins} coins a day for {days} days and pays {rent} coins of rent. How many coins remain?",
     "coins * days - rent", "coins * days + rent"),
    ("A library owned {books} books. It bought {new} new ones and gave {old} old ones away. "
     "How many books does it own now?", "books + new - old", "books - new - old"),
    ("{who} drives {miles} miles each day for {days} days, and then another {extra} miles. "
     "How many miles is that in total?", "miles * days + extra", "miles * (days + extra)"),
    ("A hall has {rows} rows of {seats} seats, and {guests} guests are seated. How many seats are free?",
     "rows * seats - guests", "rows + seats - guests"),
    ("{who} buys {cups} cups at {price} coins each and {plates} plates at {cost} coins each. "
     "How many coins does {who} spend?", "cups * price + plates * cost", "cups * price - plates * cost"),
]  # fmt: skip


def ask_story(rng, task, split):
    """Returns (question, plan): a word problem. Training numbers have one to four digits, gsm_hard's five to seven."""
    if task == "gsm_hard":
        low, high = 10**4, 10**7 - 1
    else:
        low, high = (2, 40) if split == "test" else rng.choice(((2, 40), (40, 9999)))
    text, formula, wrong = rng.choice(STORIES)
    values = {name: rng.randint(low, high) for name in dict.fromkeys(re.findall(r"{(?!who)(\w+)}", text))}
    question = text.format(who=rng.choice(GIVEN), **values)
    return question, math_plan(formula, wrong, "".join(f"{name} = {number}\n" for name, number in values.items()))


CONDITIONS = [  # in words and as code; a count meets one of the first four and one of the last four
    ("are divisible by {a}", "n % {a} == 0"), ("are not divisible by {a}", "n % {a} != 0"),
    ("leave remainder {r} when divided by {a}", "n % {a} == {r}"), ("end in the digit {r}", "n % 10 == {r}"),
    ("are odd", "n % 2 == 1"), ("are even", "n % 2 == 0"),
    ("are greater than {k}", "n > {k}"), ("are less than {k}", "n < {k}"),
]  # fmt: skip


def ask_count(rng, task, split):
    """Returns (question, plan): how many n up to N meet a condition (math), or two (aime, and in training)."""
    i, j = rng.randrange(4), rng.randrange(4)
    if task == "aime":
        j = i  # training never combines the first with the fifth condition, and so on
    elif i == j:
        j = (i + 1) % 4
    single = task == "math" and (split == "test" or rng.random() < 0.3)
    a, top = rng.randint(3, 9), rng.randint(101, 999) if task == "aime" else rng.randint(20, 99)
    fields = {"a": a, "r": rng.randint(1, a - 1), "k": rng.randint(10, top - 5)}
    words, code = zip(*([part.format(**fields) for part in CONDITIONS[i]] for i in (i, j + 4)), strict=True)
    formula, wrong = (code[0], negated(code[0])) if single else (" and ".join(code), code[0])
    plan = math_plan(formula, wrong, template=f"sum(1 for n in range(1, {top} + 1) if {{}})",
                     words=f"the number of n from 1 to {top} with {{}}")  # fmt: skip
    return f"How many integers from 1 to {top} {words[0] if single else ' and '.join(words)}?", plan


EXPRESSIONS = [("the sum x + y", "x + y"), ("the product xy", "x * y"), ("the difference y - x", "y - x"),
               ("x + 2y", "x + 2 * y"), ("3x + y", "3 * x + y"), ("xy + x", "x * y + x")]  # fmt: skip
PAIR_CONDITIONS = [("is divisible by {a}", "% {a} == 0"), ("leaves remainder {r} when divided by {a}", "% {a} == {r}"),
                   ("is less than {k}", "< {k}"), ("is greater than {k}", "> {k}")]  # fmt: skip


def ask_pairs(rng, task, split):
    """Returns (question, plan): how many pairs x < y up to N meet a condition."""
    i, j = rng.randrange(6), rng.randrange(4)
    if task == "olymmath":
        j = i % 4  # training never combines these
    elif j == i % 4:
        j = (i + 1) % 4
    a, top = rng.randint(3, 9), rng.randint(31, 90) if task == "olymmath" else rng.randint(5, 30)
    fields = {"a": a, "r": rng.randint(1, a - 1), "k": rng.randint(5, top)}
    (said, expression), (words, condition) = EXPRESSIONS[i], PAIR_CONDITIONS[j]
    code = f"({expression}) {condition.format(**fields)}"
    plan = math_plan(code, negated(code), template=f"sum(1 for y in range(1, {top} + 1) for x in range(1, y) if {{}})",
                     words=f"the number of pairs x < y up to {top} with {{}}")  # fmt: skip
    said = f"{said} {words.format(**fields)}"
    return f"For how many pairs of integers 1 <= x < y <= {top} is it true that {said}?", plan


def negated(code):
    """Returns a condition with the opposite sign: "n % 3 == 0" -> "n % 3 != 0"."""
    return re.sub("==|!=|<|>", lambda sign: {"==": "!=", "!=": "==", "<": ">", ">": "<"}[sign[0]], code)


# ------------- The files

MATH_FAMILIES = {"numbers": ask_numbers, "story": ask_story, "count": ask_count, "pairs": ask_pairs}


def ask(world, rng, task, split):
    """Returns (question, answer, plan) of a family drawn from the task's mix."""
    mix = (TRAIN_MIX if split == "train" else TEST_MIX)[task]
    family = rng.choices(list(mix), mix.values())[0]
    if family in MATH_FAMILIES:
        while True:  # a wrong plan must show, and an answer of 0 or below is no story
            question, plan = MATH_FAMILIES[family](rng, task, split)
            if int(plan["result"]) > 0 and plan["wrong_result"] not in ("0", plan["result"]):
                return question, plan["result"], plan
    return (ask_pair if family in ("comparison", "yes or no") else ask_chain)(world, rng, task, family, split)


@dataclasses.dataclass(kw_only=True)
class Config:
    out: str = option(REQUIRED, "folder to write")
    seed: int = option(0, "another seed is another world")
    train_questions: int = option(600, "training questions", above=0)
    test_questions: int = option(25, "test questions per task", above=0)


def write(config):
    """Write passages, training and test questions, and the teacher's plans, of one seed."""
    world, out, plans = World(config.seed), Path(config.out), {}

    def questions(task, split, count):
        rng, rows = random.Random(f"{split} {task} {config.seed}"), []
        about = {"task": task, "kind": TASKS[task].kind, "domain": TASKS[task].domain}
        while len(rows) < count:
            question, answer, plan = ask(world, rng, task, split)
            if question not in plans:  # all questions differ
                row = {"id": f"{split}-{task}-{len(rows)}", **about, "question": question, "answer": answer}
                rows.append(row)
                plans[question] = {"id": row["id"], "question": question, "answer": answer, **plan}
        return rows

    for task in TASKS:
        write_jsonl(out / "test" / f"{task}.jsonl", questions(task, "test", config.test_questions))
    facts = round(0.6 * config.train_questions)
    train = questions("hotpotqa", "train", facts) + questions("math", "train", config.train_questions - facts)
    random.Random(f"order {config.seed}").shuffle(train)
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "passages.jsonl", world.passages)
    write_jsonl(out / "plans.jsonl", plans.values())
    write_json(out / "run.json", dataclasses.asdict(config))
    print(f"{out}: {len(world.passages)} passages, {len(train)} training and {len(plans) - len(train)} test questions")


if __name__ == "__main__":
    run_command_line(__doc__, {"write": (Config, write)}, default="write")
