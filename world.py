"""An invented world: passages, questions of eight tasks, and the plans by which each is answered.

    from world import build
    world = build(seed=0)        # world.passages, world.train, world.test[task], world.plans

Everything is drawn from one seed. `miniature.py` writes it to disk, teaches it and makes students for it.

Each task mirrors one of the paper's (Sec. 4.1). "in" means: training asks the same kind of question about
other entities and numbers. "out" means that something in the question is of a kind that training never asks:
| task            | domain | questions                                     | what training never shows             |
|-----------------|--------|-----------------------------------------------|---------------------------------------|
| hotpotqa        | in     | two hops; which of two is lower or higher     | the entities                          |
| 2wikimultihopqa | out    | two hops; lower or higher; the same, or not   | comparing two of the six relations    |
| musique         | out    | three hops                                    | these chains of three relations       |
| bamboogle       | out    | two hops                                      | these pairs but inside longer chains  |
| math            | in     | number theory, equations, sums                | the numbers                           |
| gsm_hard        | out    | word problems with numbers of five digits     | only long numbers: it mixes 2 to 5    |
| aime            | out    | how many n up to N meet two conditions        | these pairs of conditions             |
| olymmath        | out    | how many pairs x < y meet a condition         | these expressions with this condition |

Held out: 30 % of the entities occur in no training question, neither as start nor on the way nor as answer, and
every test question of facts is about such entities. Of the numbers from 100 on, two in seven are used by test
questions only; smaller ones are shared. The passages tell about all entities: they are the library, not the lesson.
"""

import contextlib
import dataclasses
import io
import random
import re

SIZES = {"person": 1000, "company": 300, "town": 200, "river": 60, "book": 240}
HELD_OUT = 0.3
TRAIN_MIX = {  # shares of the training questions; bamboogle has none: its compositions are all unseen
    "onehop": 0.05,
    "hotpotqa": 0.24,
    "2wikimultihopqa": 0.13,
    "musique": 0.20,
    "math": 0.10,
    "gsm_hard": 0.15,
    "aime": 0.07,
    "olymmath": 0.06,
}
DOMAINS = {
    "hotpotqa": "in",
    "2wikimultihopqa": "out",
    "musique": "out",
    "bamboogle": "out",
    "math": "in",
    "gsm_hard": "out",
    "aime": "out",
    "olymmath": "out",
}
MATH_TASKS = ("math", "gsm_hard", "aime", "olymmath")

# Facts: each kind of entity has the same relations, each with one value.

RELATIONS = {
    "person": {
        "employer": "company",
        "birthplace": "town",
        "mentor": "person",
        "rival": "person",
        "birth year": "number",
    },
    "company": {"founder": "person", "seat": "town", "supplier": "company", "founding year": "number"},
    "town": {"mayor": "person", "river": "river", "twin": "town", "population": "number"},
    "river": {"mouth": "town", "length": "number"},
    "book": {"author": "person", "setting": "town", "hero": "person", "publication year": "number"},
}
NUMBERS = {
    "birth year": (1850, 1999),
    "founding year": (1850, 1999),
    "publication year": (1850, 1999),
    "population": (1000, 99999),
    "length": (20, 999),
}
SYNONYMS = {  # what questions may say; passages, plans and queries keep to the first name
    "employer": "workplace",
    "birthplace": "hometown",
    "mentor": "teacher",
    "founder": "creator",
    "seat": "headquarters",
    "mayor": "head",
    "river": "waterway",
    "mouth": "estuary",
    "author": "writer",
    "setting": "scene",
}
BAMBOOGLE_PAIRS = {  # two-hop questions that training never asks; inside three-hop chains it does show them
    ("employer", "seat"),
    ("birthplace", "river"),
    ("founder", "rival"),
    ("supplier", "founding year"),
    ("author", "birthplace"),
    ("twin", "mayor"),
    ("mentor", "employer"),
}
COMPARED = {
    "train": ("birth year", "founding year", "population", "length"),
    "test": ("founding year", "publication year", "length"),
}
SAME = {
    "train": ("birthplace", "employer", "founder", "mayor", "river", "author", "mentor", "seat"),
    "test": ("mentor", "seat", "setting"),
}

FIRST = (
    "Bal Ber Bol Cal Cor Dan Dor Dun Fal Far Fen Gal Gor Gul Hal Har Hol Jan Jor Jul Kal Kel Kor Lan Lor "
    "Lun Mal Mer Mel Mor Nal Nor Nel Pal Per Por Ral Ren Rol Sal Sen Sol Tal Tor Tul Val Ver Vol Wen Zan"
).split()
SECOND = (
    "bak bim bos bur dak den dis dov fad fet fik fun gam get gis gob hab hek him hov kam ked kis kob lam "
    "lek lis lud mab med mik mok nab neg nit nuk pag pev pid pof rab rek rin rud tam tek tiv tob vam zek"
).split()
GIVEN = (
    "Ada Alma Anna Boris Carl Clara David Dora Edgar Ella Emil Eva Felix Frida Georg Greta Hans Helen Hugo Ida "
    "Irma Ivan Jonas Julia Karin Klara Leo Lena Marta Max Mina Nora Otto Paul Petra Rosa Simon Sofia Tom Vera"
).split()


def possessive(entity, relations):
    """("Ada Malbek", ["employer", "seat"]) -> "Ada Malbek's employer's seat"."""
    return "'s ".join([entity, *relations])


def sentence(entity, facts):
    """The text of a passage: each relation stands right before its value. facts: {relation: value}."""
    kind = next(kind for kind, relations in RELATIONS.items() if list(relations) == list(facts))
    return f"{entity} is a {kind} whose {', '.join(f'{relation} is {value}' for relation, value in facts.items())}."


class World:
    """Entities with their facts, passages, and questions. Everything follows from the seed."""

    def __init__(self, seed, sizes=None):
        rng = random.Random(f"world {seed}")
        words = [first + second for first in FIRST for second in SECOND]
        rng.shuffle(words)
        name = {
            "person": lambda: f"{rng.choice(GIVEN)} {words.pop()}",
            "company": lambda: f"{words.pop()} {rng.choice(['Works', 'Group', 'Labs'])}",
            "book": lambda: f"{words.pop()} {rng.choice(['Tales', 'Songs', 'Letters'])}",
        }
        self.entities = {
            kind: [name.get(kind, words.pop)() for _ in range(count)] for kind, count in (sizes or SIZES).items()
        }
        self.kind = {entity: kind for kind, entities in self.entities.items() for entity in entities}
        self.facts = {}  # entity -> {relation: value}
        for entity, kind in self.kind.items():
            self.facts[entity] = {
                relation: str(rng.randint(*NUMBERS[relation]))
                if target == "number"
                else self._other(rng, target, entity)
                for relation, target in RELATIONS[kind].items()
            }
        self.held_out = {
            entity
            for entities in self.entities.values()
            for entity in rng.sample(entities, round(HELD_OUT * len(entities)))
        }

    def _other(self, rng, kind, entity):
        while (value := rng.choice(self.entities[kind])) == entity:
            pass
        return value

    def follow(self, entity, relations):
        """The entities and values on the way, the start included."""
        path = [entity]
        for relation in relations:
            path.append(self.facts[path[-1]][relation])
        return path

    def may_ask(self, path, split):
        """Training never touches a held-out entity; a test question starts from one."""
        return path[0] in self.held_out if split == "test" else self.held_out.isdisjoint(path)


def chains(length, kind=None):
    """Every chain of relations that fits the schema: [(kind of the start, (relation, ...)), ...]."""
    if length == 0:
        return [(kind, ())]
    kinds = [kind] if kind else RELATIONS
    return [
        (start, (relation, *rest))
        for start in kinds
        for relation, target in RELATIONS[start].items()
        if target != "number" or length == 1
        for _, rest in chains(length - 1, target if length > 1 else "number")
    ]


def is_bamboogle(relations):
    return relations in BAMBOOGLE_PAIRS


def chain_set(task, split):
    """The chains that a task asks in a split. Test chains of musique and bamboogle are never trained."""
    if task == "onehop":
        return chains(1)
    if task == "bamboogle":
        return [chain for chain in chains(2) if is_bamboogle(chain[1])]
    if task == "musique":
        return [chain for i, chain in enumerate(chains(3)) if (i % 4 == 1) == (split == "test")]
    return [chain for chain in chains(2) if not is_bamboogle(chain[1])]


def ask_chain(world, rng, task, split):
    options = chain_set(task, split)
    while True:
        kind, relations = rng.choice(options)
        path = world.follow(rng.choice(world.entities[kind]), relations)
        if world.may_ask(path, split) and len(set(path)) == len(path):
            break
    entity = path[0]
    said = [SYNONYMS[r] if r in SYNONYMS and rng.random() < 0.3 else r for r in relations]
    question = f"What is {possessive(entity, said)}?"
    return question, path[-1], {"shape": "chain", "entities": [entity], "relations": list(relations)}


def ask_pair(world, rng, split, shape, relation):
    """Compare one relation of two entities: which is lower or higher, or is it the same?"""
    kind = next(kind for kind, relations in RELATIONS.items() if relation in relations)
    same = rng.random() < 0.5
    while True:
        pair = rng.sample(world.entities[kind], 2)
        values = [world.facts[entity][relation] for entity in pair]
        if shape == "same" and same and values[0] != values[1]:  # chance would hardly ever find such a pair
            pair[1] = rng.choice([e for e in world.entities[kind] if world.facts[e][relation] == values[0]])
            values[1] = values[0]
        fits = pair[0] != pair[1] and (values[0] == values[1]) == (shape == "same" and same)
        clear = split == "train" or pair[1] in world.held_out
        if fits and clear and world.may_ask([*pair, *values], split):
            break
    plan = {"shape": shape, "entities": pair, "relations": [relation]}
    if shape == "same":
        return f"Do {pair[0]} and {pair[1]} have the same {relation}?", "yes" if same else "no", plan
    order = min if shape == "lower" else max
    question = f"Which has the {shape} {relation}, {pair[0]} or {pair[1]}?"
    return question, pair[values.index(order(values, key=int))], plan


def ask_fact(world, rng, task, split):
    draw = rng.random()
    if task == "hotpotqa" and draw < 0.25:
        return ask_pair(world, rng, split, rng.choice(["lower", "higher"]), rng.choice(COMPARED["train"]))
    if task == "2wikimultihopqa" and draw < 0.6:
        if draw < 0.3:
            return ask_pair(world, rng, split, rng.choice(["lower", "higher"]), rng.choice(COMPARED[split]))
        return ask_pair(world, rng, split, "same", rng.choice(SAME[split]))
    return ask_chain(world, rng, task, split)


# Math: a question, the plan in words (what the first thought says), and the code that carries it out.
# Each has a wrong plan beside it, as teachers have, which differs in one place.


def is_test_number(number):
    return number >= 100 and number % 7 in (2, 5)


def draw_number(rng, split, low, high):
    while True:
        number = rng.randint(low, high)
        if number < 100 or is_test_number(number) == (split == "test"):
            return number


def draw_digits(rng, split, fewest, most):
    digits = rng.randint(fewest, most)
    return draw_number(rng, split, 10 ** (digits - 1), 10**digits - 1)


def run_code(code):
    """The answer that a piece of our own code gives (the world's code, never a model's)."""
    given = []
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, {"final_answer": given.append})
    return str(given[-1])


def math_plan(need, wrong, values, template="final_answer({})", imports="", rewrite=lambda need: need):
    """values: {variable: number}, set at the head of the code, so that the formula names what it means."""
    head = imports + "".join(f"{name} = {value}\n" for name, value in values.items())
    code, wrong_code = (head + template.format(rewrite(text)) for text in (need, wrong))
    return {"shape": "math", "need": need, "wrong": wrong, "code": code, "wrong_code": wrong_code, "values": values}


def ask_math(rng, split):
    def digits(fewest, most):
        return draw_digits(rng, split, fewest, most)

    family = rng.choice(["gcd", "lcm", "power", "equation", "sum"])
    if family in ("gcd", "lcm"):
        while True:
            factor = rng.randint(11, 99)
            a, b = (factor * rng.randint(5, 99) for _ in range(2))
            if a != b and all(n >= 100 and is_test_number(n) == (split == "test") for n in (a, b)):
                break
        words = "greatest common divisor" if family == "gcd" else "least common multiple"
        question = f"What is the {words} of a = {a} and b = {b}?"
        other = "lcm" if family == "gcd" else "gcd"
        plan = math_plan(f"{family}(a, b)", f"{other}(a, b)", {"a": a, "b": b}, imports="from math import gcd, lcm\n")
    elif family == "power":
        a, b, m = digits(2, 4), digits(2, 3), digits(3, 3)
        question = f"What is a to the power b modulo m for a = {a}, b = {b} and m = {m}?"
        plan = math_plan("a ** b % m", "a * b % m", {"a": a, "b": b, "m": m})
    elif family == "equation":
        while True:
            a, x, b = rng.randint(2, 99), digits(2, 4), digits(2, 4)
            if a * x + b < 100 or is_test_number(a * x + b) == (split == "test"):
                break
        question = f"Solve a * x + b = c for x, with a = {a}, b = {b} and c = {a * x + b}."
        plan = math_plan("(c - b) // a", "(c + b) // a", {"a": a, "b": b, "c": a * x + b})
    else:
        a, b = digits(2, 3), digits(4, 5)
        question = f"What is the sum of the integers from a = {a} to b = {b}?"
        plan = math_plan("sum(range(a, b + 1))", "sum(range(a, b))", {"a": a, "b": b})
    return question, plan


# The word right before a number names it, in the question and in the code.
WORD_PROBLEMS = [
    (
        "{who} grows {grows} pears, buys {buys} more and charges {charges} coins for each. How many coins come in?",
        "(grows + buys) * charges",
        "grows + buys * charges",
    ),
    (
        "{who} fills {fills} boxes, puts {puts} nails into each and then drops {drops} nails. How many nails are left?",
        "fills * puts - drops",
        "fills * puts + drops",
    ),
    (
        "{who} owns {owns} plums, loses {loses} of them and asks {asks} coins for each of the others. "
        "How many coins come in?",
        "(owns - loses) * asks",
        "owns * asks - loses",
    ),
    (
        "{who} picks {picks} figs, takes {takes} more, gets {gets} coins for each and then spends {spends} coins. "
        "How many coins are left?",
        "(picks + takes) * gets - spends",
        "(picks + takes) * gets + spends",
    ),
    (
        "{who} earns {earns} coins a day, works {works} days and then pays {pays} coins of rent. "
        "How many coins are left?",
        "earns * works - pays",
        "earns * works + pays",
    ),
    (
        "{who} saves {saves} coins, finds {finds} more and then gives {gives} coins away. How many coins are left?",
        "saves + finds - gives",
        "saves - finds - gives",
    ),
]


def ask_word_problem(rng, split):
    text, need, wrong = rng.choice(WORD_PROBLEMS)
    names = re.findall(r"{(\w+)}", text)[1:]
    while True:
        values = {name: draw_digits(rng, split, *((2, 5) if split == "train" else (5, 5))) for name in names}
        if eval(need, None, values) > 0:
            break
    return text.format(who=rng.choice(GIVEN), **values), math_plan(need, wrong, values)


CONDITIONS = (  # the first and the second condition on n; of the numbers a, r < a and k, each takes its own
    ("n mod {a} = {r}", "n mod {a} < {r}", "n mod {a} > {r}", "n mod {a} != {r}", "n * n mod {a} = {r}"),
    ("n > {k}", "n < {k}", "n >= {k}", "n <= {k}", "n != {k}"),
)
AIME_PAIRS = set(zip(*CONDITIONS, strict=True))  # asked in test questions only


def as_python(condition):
    return condition.replace("mod", "%").replace(" = ", " == ")


def ask_count(rng, split):
    while True:
        pair = tuple(rng.choice(options) for options in CONDITIONS)
        a = rng.randint(3, 19)
        conditions = [c.format(a=a, r=rng.randint(1, a - 1), k=rng.randint(30, 99)) for c in pair]
        n = draw_number(rng, split, 200, 999)
        first, second = map(as_python, conditions)
        prefix = "the n up to N with "
        plan = math_plan(
            f"{prefix}{first} and {second}",
            f"{prefix}{first}",
            {"N": n},
            "final_answer(sum(1 for n in range(1, N + 1) if {}))",
            rewrite=lambda text: text.removeprefix("the n up to N with "),
        )
        if (pair in AIME_PAIRS) == (split == "test") and run_code(plan["code"]) != "0":
            return f"How many n from 1 to N = {n} have {conditions[0]} and {conditions[1]}?", plan


EXPRESSIONS = {  # with bounds that some pairs exceed and some do not
    "x + y": (15, 60),
    "x * y": (50, 900),
    "y - x": (3, 20),
    "x * x + y": (50, 900),
    "x + y * y": (50, 900),
    "x * x + y * y": (200, 1500),
    "2 * x + y": (20, 90),
    "3 * y - x": (20, 90),
}
PAIR_CONDITIONS = ("mod {k} = {r}", "mod {k} < {r}", "mod {k} > {r}", "< {bound}", "> {bound}")
# Asked in test questions only: one condition for each expression.
OLYMMATH_PAIRS = {(e, PAIR_CONDITIONS[i % 5]) for i, e in enumerate(EXPRESSIONS)}


def ask_pairs(rng, split):
    while True:
        expression, condition = rng.choice(list(EXPRESSIONS)), rng.choice(PAIR_CONDITIONS)
        n, k = rng.randint(20, 60), rng.randint(3, 19)
        bound = draw_number(rng, split, *EXPRESSIONS[expression])
        said = condition.format(k=k, r=rng.randint(1, k - 1), bound=bound)
        wrong = said.translate(str.maketrans("<>=", "><<"))
        prefix = "the x < y up to N with "
        plan = math_plan(
            f"{prefix}({expression}) {as_python(said)}",
            f"{prefix}({expression}) {as_python(wrong)}",
            {"N": n},
            "final_answer(sum(1 for y in range(1, N + 1) for x in range(1, y) if {}))",
            rewrite=lambda text: text.removeprefix("the x < y up to N with "),
        )
        if ((expression, condition) in OLYMMATH_PAIRS) == (split == "test") and run_code(plan["code"]) != "0":
            return f"How many pairs with 1 <= x < y <= {n} have ({expression}) {said}?", plan


def ask(world, rng, task, split):
    """One question: (question, answer, plan)."""
    if task not in MATH_TASKS:
        return ask_fact(world, rng, task, split)
    makers = {"math": ask_math, "gsm_hard": ask_word_problem, "aime": ask_count, "olymmath": ask_pairs}
    while True:
        question, plan = makers[task](rng, split)
        answer = run_code(plan["code"])
        if answer != run_code(plan["wrong_code"]):
            return question, answer, plan


@dataclasses.dataclass
class Build:
    world: World
    passages: list  # {"id", "contents"}
    train: list  # {"id", "task", "kind", "domain", "question", "answer"}
    test: dict  # task -> rows of the same format
    plans: list  # {"id", "question", "shape", ...}: the teacher's script, for training and test questions


def build(seed, train_questions=8000, test_questions=50, sizes=None):
    """The whole world of one seed. Questions are all different, and the training questions are shuffled."""
    world = World(seed, sizes)
    pages = [(entity, sentence(entity, facts)) for entity, facts in world.facts.items()]
    random.Random(f"passages {seed}").shuffle(pages)
    passages = [{"id": str(i), "contents": f'"{title}"\n{text}'} for i, (title, text) in enumerate(pages)]
    plans, seen = [], set()

    def questions(task, split, count):
        rng, rows = random.Random(f"{split} {task} {seed}"), []
        while len(rows) < count:
            question, answer, plan = ask(world, rng, task, split)
            if question not in seen:
                seen.add(question)
                kind = "math" if task in MATH_TASKS else "fact"
                name = "hotpotqa" if task == "onehop" else task
                row = {"id": f"{split}-{task}-{len(rows)}", "task": name, "kind": kind}
                rows.append(row | {"domain": DOMAINS[name], "question": question, "answer": answer})
                plans.append({"id": row["id"], "question": question, "answer": answer} | plan)
        return rows

    train = [
        row for task, share in TRAIN_MIX.items() for row in questions(task, "train", round(share * train_questions))
    ]
    random.Random(f"order {seed}").shuffle(train)
    test = {task: questions(task, "test", test_questions) for task in DOMAINS}
    return Build(world, passages, train, test, plans)
