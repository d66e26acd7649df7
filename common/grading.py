r"""Is this answer right? Exact match for facts, equality of value for math, and the answers of CoT replies.

    grade("fact", "The Beatles!", "Beatles")               # Verdict(correct=True, why="exact")
    grade("math", "0.5", r"\frac{1}{2}")                   # Verdict(correct=True, why="equal")

A wrong answer that counts as right is worse than a right answer that is missed: it inflates a result, and as a
teacher trajectory it trains the student on an error. A text that cannot be read is therefore never right.

Math: an answer (LaTeX, plain text or a JSON value) is split here at its commas, relations and brackets; what is left
are expressions, which common/expressions.py evaluates. Conventions: a unit may be left out, but two different known
units never agree. 50% is 0.5, and 50 if the gold answer has the sign or the question asks for percent. A decimal with
a fractional part stands for the numbers that round (or are cut) to it, if they differ by less than one part in a
million; integers, fractions and 40.0 stand for themselves. "x =" before an answer may be left out. "1, 2" is
unordered; tuples and vectors are ordered; (a, b] is not [a, b]. 52_8 needs its base unless the question names one.
Letters are variables, and their case counts.
"""

import ast
import dataclasses
import itertools
import json
import re
import string

from common import InputError
from common.expressions import CONSTANTS, Unreadable, Value, clean, depths, proportional, read_value, same_number, split

MAX_CHARACTERS = 2000  # of one answer; 2^{4181}, a gold answer of MATH, has 1,259 digits
MAX_DEPTH = 40  # nested brackets
MAX_ITEMS = 100  # of a list


@dataclasses.dataclass(frozen=True)
class Verdict:
    """why: exact, alias, equal, text, judge: correct; different, no answer, no gold answer, unreadable, judge: ..."""

    correct: bool
    why: str


def grade(kind, prediction, answer, aliases=(), question="", judge=None):
    """Returns the Verdict on one answer.

    kind: "fact" or "math". prediction: the JSON value given to final_answer, or the text of a CoT answer; None is no
    answer. answer, aliases: gold answers, text or numbers; aliases count for facts only. question: read by the judge,
    and by the math rules for number bases, ratios and percentages. judge: callable(question, answers, prediction) ->
    True, False or None (no verdict), called for facts without an exact match. Raises InputError for another kind.
    """
    if kind not in ("fact", "math"):
        raise InputError(f"kind {kind!r}: a task is of kind 'fact' or 'math'")
    if answer is None or not str(answer).strip():
        return Verdict(False, "no gold answer")  # three MATH training rows have none
    if kind == "math":
        if prediction is None or (isinstance(prediction, str) and not prediction.strip()):
            return Verdict(False, "no answer")
        return compare(prediction, answer, question or "")
    try:
        text = fact_text(prediction)
    except (RecursionError, ValueError):  # deeply nested lists; an integer that is too long to print
        return Verdict(False, "unreadable")
    if not text.strip():
        return Verdict(False, "no answer")
    if exact_match(text, [answer]):
        return Verdict(True, "exact")
    if exact_match(text, aliases):
        return Verdict(True, "alias")
    if judge is None:
        return Verdict(False, "different")
    verdict = judge(question or "", [fact_text(gold) for gold in (answer, *aliases)], text)
    words = {True: "correct", False: "incorrect", None: "no verdict"}
    return Verdict(verdict is True, f"judge: {words[verdict]}")


# ------------- Facts: exact match as the evaluation scripts of SQuAD and HotpotQA define it


def fact_text(value):
    """A JSON value as a person would write it: True is yes, 1969.0 is 1969, a list has commas."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return ", ".join(map(fact_text, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def normalise_fact(value):
    """Lower case, no punctuation, no articles, single spaces (SQuAD 1.1)."""
    text = "".join(c for c in fact_text(value).lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, answers):
    """Whether the prediction is one of the answers after normalisation."""
    return normalise_fact(prediction) in map(normalise_fact, answers)


# ------------- Answers of chain-of-thought replies


def boxed_answer(text):
    r"""The content of the last complete \boxed{...} or \fbox{...} (also `\boxed 5`), or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            if token := re.match(r"\\?[^\s$\\{}]+", rest):
                return token[0].rstrip(".,;")
            continue
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are characters of the answer
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                return rest[1 : brace.start()].strip()
    return None


STATED = re.compile(
    r"(?im)(?:\bfinal\ answer(?:\s+is\b|\s*[:=*\n])|\b(?:the|my)\ answer\ is\b|^\W*answer\W*?:|^\s*\#{4}(?!\#))"
    r"[\s:=*]*(.*\w.*)"
)


def cot_answer(text):
    """The boxed answer; else what the last "Final answer: ...", "The answer is ...", "Answer: ..." or "#### ..."
    states, up to the end of its line; else None."""
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    stated = STATED.findall(text)
    return stated[-1].strip(" *").removesuffix(".").rstrip(" *") if stated else None


# ------------- Math: words


def words_of(text):
    """The words of a text without LaTeX's \\text; "(c)" is "c"."""
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text.replace(r"\ ", " "))
    text = re.sub(r"\s*([,;&])\s*", r"\1", " ".join(text.strip().strip("$.").split()).lower())
    return re.sub(r"^\((\w)\)$", r"\1", text)


def is_wording(gold):
    r"""Whether a gold answer is words or a choice letter (\text{(C)}, two lines), not math with a unit."""
    if not re.fullmatch(r"[a-z' ,;.&()-]+", words_of(gold)) or re.search(r"[_^=]", gold):
        return False
    return bool(re.search(r"\\text|\\mbox|(?<!\\)\b(?!sqrt|infinity)[a-z]{4}", gold.lower()))


# ------------- Math: the structure of an answer. A node is a Value, a Group, or a str (words, or digits with a base).


@dataclasses.dataclass(frozen=True)
class Group:
    """kind: the brackets "()", "(]", "{}", ..., "" for a bare list, "json" for a Python list, "⟨⟩" for a matrix,
    ":" for a ratio, "∪" for a union; "=" for an equation and for "x in ..." (two items, the left side as a text)."""

    kind: str
    items: tuple


RELATIONS = "=∈<>≤≥≠"
CONSTRUCTORS = {"Interval": "[]", "Interval.open": "()", "Interval.Lopen": "(]", "Interval.Ropen": "[)"}
CONSTRUCTORS |= {"Union": "∪", "FiniteSet": "{}", "Tuple": "()"}
BASED = re.compile(  # 52_8, \text{A5}_{11}, x = 52_{\text{base }8}, 52 (base 8)
    r"(?:[a-zA-Z]\s*=\s*)?(?:\\text\s*\{)?(-?[0-9A-Z]+)\}?\s*"
    r"(?:_\s*\{?(?:\\text\s*\{\s*base\s*)?|\(?\s*(?:in )?base\s*)(\d{1,2})[\s})]*"
)


def read(value):
    """The node of a JSON value or a text. Raises Unreadable."""
    if isinstance(value, str) and len(value) <= MAX_CHARACTERS:
        text = clean(value)
        if not 0 <= min(depths(text)) <= max(depths(text)) <= MAX_DEPTH:
            raise Unreadable("brackets")
        return read_text(text)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float) and value == value:
        return read(str(value))
    if isinstance(value, dict):
        return read(", ".join(f"{name} = {item}" for name, item in value.items()))
    if isinstance(value, list) and len(value) <= MAX_ITEMS:
        return group("json", map(read, value))
    raise Unreadable("too long, or no answer")


def group(kind, items):
    """A Group; a single item stands for itself, unless it is a row of numbers."""
    items = tuple(items)
    if kind == "∪":
        items = sum((item.items if isinstance(item, Group) and item.kind == "∪" else (item,) for item in items), ())
    single = len(items) == 1 and (not isinstance(items[0], Group) or items[0].kind == "⟨⟩" != kind)
    return items[0] if single else Group(kind, items)


def is_named(node):
    return isinstance(node, Group) and node.kind == "="


def read_list(pieces):
    """The nodes of some texts; one with \\pm gives two, with the upper signs and with the lower ones."""
    for piece in pieces if pieces[-1] else pieces[:-1]:  # Python's (5,)
        for plus, minus in ("+-", "-+") if re.search("[±∓]", piece) else ("+-",):
            yield read_text(piece.replace("±", plus).replace("∓", minus))


def read_text(text):
    """The node of a cleaned text: first what binds loosest (commas), at last an expression."""
    if based := BASED.fullmatch(text):
        return read_text(based[1]) if based[2] == "10" else f"{based[1]}_{based[2]}"
    listed, alternatives = re.subn(r"\bor\b", ",", re.sub(r"\band\b", ",", text))
    if len(pieces := split(listed, ",;")) > 1:
        items = tuple(read_list(pieces))
        sets = [item.items for item in items if is_named(item) and isinstance(item.items[1], Group)]
        if alternatives and len(sets) == len(items) and len({name for name, _ in sets}) == 1:  # x < 2 or x > 3
            return Group("=", (sets[0][0], group("∪", (node for _, node in sets))))
        return group("", items)
    if len(sides := split(text, RELATIONS)) > 1:
        return relation(sides, [c for c in text if c in RELATIONS])
    for symbol in "∪:":
        if len(pieces := split(text, symbol)) > 1:
            return group(symbol, map(read_text, pieces))
    name = re.match(r"[A-Z][a-zA-Z.]+(?=\()|", text)[0]  # a constructor, as sympy prints it
    brackets = text[len(name) :]
    if brackets[:1] in tuple("([{⟨") and brackets[-1] in ")]}⟩" and min(depths(brackets[:-1])[1:]) > 0:
        pieces = split(brackets[1:-1], ",;")
        if name == "Eq":
            return relation(pieces, ["="])
        if name == "Matrix":
            return read_text(pieces[0])
        if name in CONSTRUCTORS:
            kind = CONSTRUCTORS[name]
            if name.startswith("Interval"):  # sympy prints Interval(-oo, 2)
                kind = ("(" if "infty" in pieces[0] else kind[0]) + (")" if "infty" in pieces[-1] else kind[1])
            return group(kind, read_list(pieces))
        if not name:
            items = tuple(read_list(pieces))
            return items[0] if len(items) == 1 and text[0] == "(" else group(text[0] + text[-1], items)
    return group("", read_list([text])) if re.search("[±∓]", text) else read_value(text)


def relation(sides, operators):
    """Group("=", (left side, node)); an inequality for one variable is rewritten to "x in an interval"."""
    if operators in (["="], ["∈"]):
        return Group("=", (sides[0], read_text(sides[1])))
    if operators[0] in ">≥":
        sides, operators = sides[::-1], ["<≤"[">≥".index(c)] for c in operators[::-1]]
    if operators == ["≠"]:
        below, above = (rf"(-\infty,{sides[1]})", rf"({sides[1]},\infty)")
        return Group("=", (sides[0], Group("∪", (read_text(below), read_text(above)))))
    if len(sides) == 2 and sides[0].isalpha():
        sides, operators = [r"-\infty", *sides], ["<", *operators]
    elif len(sides) == 2:
        sides, operators = [*sides, r"\infty"], [*operators, "<"]
    if len(sides) != 3 or len(sides[1]) != 1 or not set(operators) <= set("<≤"):
        raise Unreadable("this relation")
    kind = "([]"["<≤".index(operators[0])] + ")]"["<≤".index(operators[1])]
    return Group("=", (sides[1], Group(kind, (read_text(sides[0]), read_text(sides[2])))))


# ------------- Math: comparison


def compare(prediction, answer, question=""):
    """The Verdict on a prediction (JSON value or text) for a gold answer (text or number).

    why: exact (the same text), text (the same words) or equal (in value); different or unreadable.
    """
    answer = str(answer)
    if isinstance(prediction, str) and len(prediction) <= MAX_CHARACTERS and surface(prediction) == surface(answer):
        return Verdict(True, "exact")
    try:
        if is_wording(answer):
            words = words_of(", ".join(map(str, prediction if isinstance(prediction, list) else [prediction])))
            gold = words_of(answer)
            if len(gold) == 1:  # a choice letter may come with its text: C. 14
                words = re.sub(r"^\(?(\w)[).:](?:\s.*)?$", r"\1", words)
            return Verdict(words == gold, "text" if words == gold else "different")
        if re.search(r"\bbase\b|binary|octal|hexadecimal", question) and re.fullmatch(r"\s*-?\d+\s*", str(prediction)):
            answer = re.sub(r"_\s*\{?\d{1,2}\}?$", "", answer)
        golds = [read(part) for part in re.split(r"\\approx|≈", answer)]
        predictions = map(read, re.split(r"\\approx|≈", prediction) if isinstance(prediction, str) else [prediction])
        if len(golds) == 1:  # x = 2\sqrt{3} \approx 3.46
            predictions = itertools.islice(predictions, 1)
        equal = all(any(same(p, gold, question.lower()) for gold in golds) for p in predictions)
        return Verdict(equal, "equal" if equal else "different")
    except (ValueError, ArithmeticError, RecursionError):  # ValueError: also an integer that is too long to print
        return Verdict(False, "unreadable")


def surface(text):
    """The cleaned text without spaces that never carry meaning: all but those between letters and digits."""
    space = r"(?<![0-9a-zA-Z])\s+|\s+(?![0-9a-zA-Z])"
    return re.sub(space, "", clean(re.sub(space, "", text)))


def math_equal(a, b, question=""):
    """Whether answer a (JSON value or text) has the value of the gold answer b."""
    return compare(a, b, question).correct


def same(p, g, question):
    """Whether two nodes mean the same."""
    p_named, g_named = is_named(p), is_named(g)
    if p_named and g_named and p.items[0] != g.items[0]:
        return same_equation(p, g)
    if p_named and (g_named or re.fullmatch(r"[a-zA-Z ]+(\([a-z]\))?", p.items[0])):
        p = p.items[1]
    if g_named and (p_named or re.fullmatch(r"[a-zA-Z]|[fghpqr]\([a-z]\)", g.items[0])):
        g = g.items[1]
    if isinstance(p, str) and isinstance(g, str):
        return p.lower() == g.lower()
    if re.search(r"\bratio\b|\bodds\b", question):
        p, g = quotient(p), quotient(g)
    if isinstance(p, Value) and isinstance(g, Value):
        return same_value(p, g, question)
    return isinstance(p, Group) and isinstance(g, Group) and same_group(p, g, question)


def same_equation(p, g):
    """Whether the differences of the sides of two equations have a constant quotient."""
    sides = [side for equation in (p, g) for side in (read_text(equation.items[0]), equation.items[1])]
    if not all(isinstance(side, Value) for side in sides):
        return False
    left, right = (Value(ast.BinOp(a.tree, ast.Sub(), b.tree)) for a, b in (sides[:2], sides[2:]))
    return proportional(left, right)


# Which brackets of a prediction may stand for which of a gold answer. A Python list cannot say that an end is open.
BRACKETS = {
    **{"": ("json", "[]", "{}", "()"), "{}": ("json", "[]", ""), "()": ("json", "⟨⟩"), "[]": ("json", "⟨⟩")},
    **{"⟨⟩": ("json", "[]", "()")},
}


def same_group(p, g, question):
    if (p.kind != g.kind and p.kind not in BRACKETS.get(g.kind, ())) or len(p.items) != len(g.items):
        return False
    names = {item.items[0] for item in p.items if is_named(item)}
    ordered = g.kind not in ("", "{}", "∪") or p.kind == "()" or len(names) > 1  # x = 1, y = 2 is not x = 2, y = 1
    items = list(p.items)
    for gold in g.items:
        i = next((i for i, item in enumerate(items) if same(item, gold, question)), None)
        if i is None or (i and (ordered or isinstance(gold, str))):
            return False
        del items[i]
    return True


def quotient(node):
    """The Value of the ratio a:b; other nodes as they are."""
    if isinstance(node, Group) and node.kind == ":" and len(node.items) == 2:
        return Value(ast.BinOp(node.items[0].tree, ast.Div(), node.items[1].tree))
    return node


def same_value(p, g, question):
    """Whether two Values with their units and marks (degree, percent) agree."""
    if p.unit and g.unit and p.unit != g.unit:
        return False
    if p.unit != g.unit and same_number(p, g, CONSTANTS.get(p.unit, 1), CONSTANTS.get(g.unit, 1)):
        return True
    asked = p.unit != "percent" or p.unit == g.unit or re.search("percent|per cent|%", question)
    return bool(asked) and same_number(p, g)
