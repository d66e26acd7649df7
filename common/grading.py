r"""Is this answer right? Exact match for facts, equality of value for math, and the answers of CoT replies.

    grade("fact", "The Beatles!", "Beatles")               # Verdict(correct=True, why="exact")
    grade("math", "0.5", r"\frac{1}{2}")                   # Verdict(correct=True, why="equal")
    same("math", 4, "4.0")                                 # True: one vote

A wrong answer that counts as right is worse than a right answer that is missed: it inflates a result, and as a
teacher trajectory it trains the student on an error. A text that cannot be read is therefore never right.

Math: an answer (LaTeX, plain text, Python's or sympy's notation, a JSON value) is split here at its commas, equals
signs and brackets; what is left are expressions, which common/expressions.py evaluates. Conventions: words after a
value may be left out, but two different units never agree. 50% is 0.5, and 50 if the gold answer has the sign or the
question asks for percent. A decimal with a fractional part stands for the numbers that round to it, if they differ by
no more than one part in a million; integers, fractions and 40.0 stand for themselves. "x =" before an answer may be
left out; two equations are equal if their differences are proportional. x < 2 is (-oo, 2). "1, 2" is unordered;
tuples and vectors are ordered; (a, b] is not [a, b], but a Python list may be any of them. 52_8 needs its base unless
the question names one. Letters are variables, and their case counts; AB and words of four letters are names.

Not read, and right only as the same text: inequalities in two variables and x > 2 and x < 5 in words, set-builder
notation, unions that touch, set differences; ratios in other terms; products without a sign after a division (1/ab);
products after a function without brackets (\sin x/2); odd roots of negative numbers; factorials of variables; \max,
\sum, vectors with arrows; number words (20 million); single letters as units in plain text (5 m); sentences around an
answer.
"""

import dataclasses
import json
import re
import string
import unicodedata

from common import InputError
from common.expressions import Unreadable, Value, clean, cuts, depths, proportional, read_value, same_value, split

MAX_CHARACTERS = 2000  # of one answer; 2^{4181}, a gold answer of MATH, has 1,259 digits
MAX_DEPTH = 40  # nested brackets


@dataclasses.dataclass(frozen=True)
class Verdict:
    """why: exact, alias, equal, text, judge: correct; different, no answer, no gold answer, unreadable, judge: ..."""

    correct: bool
    why: str


def grade(kind, prediction, answer, aliases=(), question="", judge=None):
    """Returns the Verdict on one answer.

    kind: "fact" or "math". prediction: the JSON value given to final_answer, or the text of a CoT answer; None is no
    answer. answer: text, number or list. A list of facts holds alternatives, a list in math is one answer in several
    parts. aliases: further gold answers, for facts only: a list, one text, or None. question: read by the judge, and by
    the math rules for number bases and percentages. judge: callable(question, answers, prediction) -> True, False or
    None (no verdict), called for facts without an exact match. Raises InputError for another kind.
    """
    if kind not in ("fact", "math"):
        raise InputError(f"kind {kind!r}: a task is of kind 'fact' or 'math'")
    answers = answer if isinstance(answer, list) and kind == "fact" else [answer]
    answers = [gold for gold in answers if gold not in (None, []) and str(gold).strip()]
    if not answers:
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
    aliases = [aliases] if isinstance(aliases, str) else aliases or []
    if exact_match(text, answers):
        return Verdict(True, "exact")
    if exact_match(text, aliases):
        return Verdict(True, "alias")
    if judge is None:
        return Verdict(False, "different")
    verdict = judge(question or "", [fact_text(gold) for gold in (*answers, *aliases)], text)
    words = {True: "correct", False: "incorrect", None: "no verdict"}
    return Verdict(verdict is True, f"judge: {words[verdict]}")


# ------------- Facts: exact match as the evaluation scripts of SQuAD and HotpotQA define it


def fact_text(value):
    """A JSON value as a person would write it: True is yes, 1969.0 is 1969, a list has commas, LaTeX is plain text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return ", ".join(map(fact_text, value))
    return without_latex(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


FONT = r"\\(?:text\w*|math\w*|mbox|emph|operatorname|underline|boxed|fbox)\s*(?=\{)"
LATEX = [  # (pattern, replacement), in this order
    (r"(?<=\d)\\,(?=\d{3})", ""),  # 10\,000
    (r"\\(?:[\\,;: ]|q?quad\b)|(?<!\\)~", " "),  # \text{New}\ \text{York}
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°"),  # 60^\circ
    (r"\\([`'^\"~])\s*(?:\{\\?(\w)\}|(\w))", lambda match: (match[2] or match[3]) + ACCENTS[match[1]]),  # M\'elanie
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    (rf"{FONT}|(?<!\\)[{{}}$]|\\[()\[\]]", ""),  # \text{Paris}, $\mathbf{yes}$
    (r"\\(?=[a-zA-Z]|[^\w\s])", ""),  # A\$AP, Steely \& Clevie, \alpha
]
ACCENTS = dict(zip("`'^\"~", "\u0300\u0301\u0302\u0308\u0303", strict=True))  # combining characters


def without_latex(text):
    r"""A fact in plain text: \text{A\$AP Rocky} is A$AP Rocky. A text without LaTeX stays as it is."""
    if "\\" in text:
        for pattern, replacement in LATEX:
            text = re.sub(pattern, replacement, text)
    return unicodedata.normalize("NFC", text)


# The sign and the decimal point of a number, and what else stands between two digits, are no punctuation; "1,000" is.
IN_NUMBERS = r"(?<![^\s(])-(?=\$?\.?\d)|(?<!\w)\.(?=\d)|(?<=\d)(?:[^\w\s,]|,(?!\d{3}(?!\d)))(?=\d)"
PUNCTUATION = re.compile(f"({IN_NUMBERS})|[{re.escape(string.punctuation)}]")
QUOTES = str.maketrans("‘’´“”–—−", "\u0027\u0027\u0027" + '""---')


def normalise_fact(value):
    """Lower case, no punctuation, no articles, single spaces (SQuAD 1.1), but 3.5 is not 35 and -5 is not 5.

    Where nothing is left ("A", "!!!"), articles and then punctuation stay.
    """
    original = fact_text(value).translate(QUOTES).lower().strip()
    text = PUNCTUATION.sub(r"\1", original)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or text.strip() or original


def exact_match(prediction, answers):
    """Whether the prediction is one of the answers after normalisation."""
    return normalise_fact(prediction) in map(normalise_fact, answers)


# ------------- Answers of chain-of-thought replies

# \boxed{ or \boxed 5; \{ and \}; { and }
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:\{|(\\?[^\s$\\{}]*[^\s$\\{}.,;]))|\\.|[{}]", re.DOTALL)


def boxed_answer(text):
    r"""The content of the last complete \boxed{...} or \fbox{...} (also `\boxed 5`) that is not empty, or None."""
    boxes = []  # (start, end) of the contents
    opened = []  # (start, whether it is a box) of the braces
    for match in BOX.finditer(text):
        if match[1]:
            boxes.append(match.span(1))
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append((match.end(), len(match[0]) > 1))
        elif match[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                boxes.append((start, match.start()))
    for start, end in sorted(boxes, reverse=True):
        content = text[start:end].strip()
        if not NO_ANSWER.fullmatch(content):
            return content
    return None


# What a box holds where a reply repeats its instructions: \boxed{}, \boxed{...}, \boxed{\text{answer}}
NO_ANSWER = re.compile(r"(?i)(?:\\text)?[\s{}.…_]*(?:\\[lc]?dots|(?:(?:your|the|final)\s+)*answer)?[\s{}.…_]*")

# How a reply states its answer without a box. What follows the sign is the answer, up to the end of the sentence.
STATED = re.compile(
    r"""(?imx)
    (?: ^\W{0,20} (?:(?:the|my|our)\s+)? (?:(?:final|correct|right)\s+)? answer \W{0,20}? [:=\n]  # **Answer:** 9
      | \b (?:the|my|our|final|correct|right)\ answer \W{0,20}? [:=\n]  # Step 3: the final answer: 9
      | \b answer (?:\ to\ [^.\n]{1,80}?)? \s+ (?:is|would\ be|should\ be|must\ be)\b(?!\s+not\b)  # so the answer is 9
      | ^[ \t]*\#{4}(?!\#)  # #### 9
    )
    (?:[\s:=*] | (?:\$\$|\\\[)\s*\n)* (.*\w.*)"""
)
# An abbreviation's point ends no sentence, unless a word follows that can only begin one.
SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\b(?:St|Mt|Ft|Dr|Mr|Ms|Jr|Sr|Lt|No|vs|Co))(?<!\b(?:Mrs|Inc|Ltd|Gen|Col|Rev|Sgt|Gov|Sen|Rep))\.\s+[A-Z]"
    r"|[.!?]\s+(?:It|This|That|These|He|She|They|We|I|The|There|Therefore|So|Because|Since|Note)\b"
    r"|,?\s+(?:because|since)\s|,\s+(?:which|who|as)\s"
)


def cot_answer(text):
    """The boxed answer; else what the last "Final answer: ...", "The answer is ...", "Answer: ..." or "#### ..."
    states, up to the end of its sentence; else None."""
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    stated = STATED.findall(text)
    return SENTENCE_END.split(stated[-1])[0].strip(" *").removesuffix(".").rstrip(" *") if stated else None


# ------------- Math: the structure of an answer; a node is a Value or a Group


@dataclasses.dataclass(frozen=True)
class Group:
    """Several nodes, or texts for "_" and the name of "=".

    kind: the brackets "()", "(]", "{}", ...; "" for a bare list, "json" for a Python list, "names" for equations with
    different names, "∪" for a union, ":" for a ratio, "_" for digits and their base; "=" for an equation (its left side
    and its right side).
    """

    kind: str
    items: tuple


def read(value):
    """The node of a JSON value or a text. Raises Unreadable."""
    if isinstance(value, list):
        return group("json", map(read, value))
    if isinstance(value, dict):
        return group("{}", [Group("=", (str(name), read(item))) for name, item in value.items()])
    text = clean(str(value))
    if not 0 <= min(depths(text)) <= max(depths(text)) <= MAX_DEPTH:
        raise Unreadable("brackets")
    return read_text(text)


# How sympy and numpy write sets and rows: the brackets that they stand for
CONTAINERS = {"Interval": "[]", "Interval.open": "()", "Interval.Lopen": "(]", "Interval.Ropen": "[)"}
CONTAINERS |= {"Union": "∪", "FiniteSet": "{}", "Tuple": "()", "Point2D": "()"}
CONTAINERS |= dict.fromkeys(["array", "Matrix", "ImmutableDenseMatrix", "list", "tuple", "set", "frozenset"], "json")
NAME = r"[a-zA-Z](?:_\w+)?(?:\^\{-1\})?(?:\([a-z]\))?"  # x, x_1, f(x)
# What may stand before "=" and be left out: also (x, y), P(A), AB, Area
LEFT_OUT = re.compile(
    rf"{NAME}|\({NAME}(?:, ?{NAME})+\)|[A-Z]+\([^()]*\)|[A-Z][A-Za-z]+|\\text ?\{{[^{{}}]*\}}|\\[a-z]+|"
    r"(?:m ?)?\\(?:angle|overline) ?\{?[A-Z]+\}?"
)
RELATIONS = "<>≤≥"
INTERVALS = ("()", "[]", "(]", "[)")


def read_text(text):
    """The node of a cleaned text: first what binds loosest (commas), at last an expression."""
    if cuts(text, RELATIONS) and " and " in text:
        raise Unreadable(text)
    if len(pieces := text.split(" or ")) > 1 and re.search(f"[{RELATIONS}]", text):
        return group("∪", map(read_text, pieces))  # x < 2 or x > 3
    text = re.sub(r"(, ?)?\b(and|or)\b", ",", text)
    if len(split(text, ",;")) > 1 or ("±" in text and "," not in text):
        return group("", read_items(text))
    if cuts(text, RELATIONS):
        return read_inequality(text)
    if len(sides := split(text, "=∈")) == 2:
        right = read_text(sides[1])
        return Group("∈" if "∈" in text and is_group(right, *INTERVALS) else "=", (sides[0], right))
    if len(pieces := split(text, ":")) > 1:
        return Group(":", tuple(map(read_value, pieces)))
    if len(pieces := split(text, "∪")) > 1:
        return group("∪", map(read_text, pieces))
    if digits := re.fullmatch(r"(-?(?:\d[\dA-Z]*|[A-Z]\d[\dA-Z]*))_(\d+)", text.replace("- ", "-")):
        return Group("_", digits.groups())
    name = re.match(r"[\w.]*", text)[0]
    inside = text[len(name) :]
    if (not name or name in CONTAINERS) and inside[:1] in ("(", "[", "{") and inside[-1] in ")]}":
        if min(depths(inside[:-1])[1:]) > 0:
            return read_brackets(name, inside)
    return read_value(text)


def read_brackets(name, text):
    """The node of "(1, 2]" or, with a name of CONTAINERS, of "Interval(1, 2)"."""
    items = read_items(text[1:-1]) if text[1:-1].strip() else []
    if (name or text[0] == "(") and len(items) == 1:
        inner = items[0]
        return group("json", inner.items) if is_group(inner, "[]") or (name and is_group(inner, "{}")) else inner
    node = group(CONTAINERS[name] if name else text[0] + text[-1], items)
    return Group("∈", ("", node)) if name.startswith("Interval") else node


def read_items(text):
    """The nodes of the texts between commas; one with \\pm gives two."""
    pieces = split(text, ",;")
    if len(pieces) > 1 and not pieces[-1]:
        pieces.pop()  # (5,)
    return [read_text(piece.replace("±", sign)) for piece in pieces for sign in ("+-" if "±" in piece else "+")]


def read_inequality(text):
    """x < 2, 1 < x < 2 or x ≠ 2 as an equation of x with an interval. Other inequalities are Unreadable."""
    sides = split(text, RELATIONS)
    signs = [text[i] for i in cuts(text, RELATIONS)]
    if signs[0] in ">≥":
        sides = sides[::-1]
        signs = [sign.translate(str.maketrans("<≤>≥", ">≥<≤")) for sign in signs[::-1]]
    names = [bool(re.fullmatch(NAME, side)) for side in sides]
    if names == [True, False]:
        sides, signs, names = [r"-\infty", *sides], ["<", *signs], [False, *names]
    elif names == [False, True]:
        sides, signs, names = [*sides, r"\infty"], [*signs, "<"], [*names, False]
    if not set(signs) <= set("<≤") or names != [False, True, False]:
        raise Unreadable(text)
    kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Group("∈", (sides[1], group(kind, map(read_text, sides[::2]))))


def group(kind, items):
    """A Group; a single item stands for itself, unless it is a row of numbers. x=1, x=2 becomes x = (1, 2)."""
    items = tuple(items)
    if kind == "[]" and any(isinstance(item, Group) for item in items):
        kind = "json"  # what a program printed
    names = [item.items[0] for item in items if is_group(item, "=")]
    single = items[0] if len(items) == 1 else None
    if isinstance(single, Value) or (is_group(single, "=", "∈", "()", "{}", "names") and single.items):
        return single
    if len(items) == len(set(names)) > 1:
        return Group("names", items)
    if len(set(names)) == 1 and is_group(items[0], "=") and len(names) in (1, len(items)):
        return Group("=", (names[0], group(kind, [item.items[1] if is_group(item, "=") else item for item in items])))
    if kind[:1] == "[" and items and items[0] == MINUS_INFINITY:
        kind = "(" + kind[1:2]
    if kind[1:2] == "]" and items and items[-1] == INFINITY:
        kind = kind[0] + ")"
    return Group(kind, items)


def is_group(node, *kinds):
    return isinstance(node, Group) and node.kind in kinds


# ------------- Math: comparison

INFINITY = read_value(r"\infty")
MINUS_INFINITY = read_value(r"-\infty")
WORDING = re.compile(r"\\text\s*\{[a-zA-Z ,.()'-]+\}|[a-zA-Z]{4,}( [a-zA-Z]+)*")  # words or a letter: \text{(C)}, east
LABEL = re.compile(r"(?:\\text\s*\{)?\(?([A-Z])[).:]+\s*\}?\s+(?!.*\b[A-Z]\b)(\S.*)")  # \text{(B)} 16, not (A) or (B)


def compare(prediction, answer, question=""):
    """The Verdict on a prediction (JSON value or text) for a gold answer (text or number).

    why: exact (the same text), text (the same words) or equal (in value); different or unreadable.
    """
    try:
        if max(len(str(prediction)), len(str(answer))) > MAX_CHARACTERS:
            return Verdict(False, "unreadable")
        if clean(str(prediction)) == clean(str(answer)):
            return Verdict(True, "exact")
        label = LABEL.fullmatch(clean(prediction)) if isinstance(prediction, str) else None
        if WORDING.fullmatch(clean(str(answer))):
            equal = words_of(label[1] if label else str(prediction)) == words_of(str(answer))
            return Verdict(equal, "text" if equal else "different")
        if re.search(r"\bbase\b|binary|octal|hexadecimal", question) and re.fullmatch(r"\s*-?\d+\s*", str(prediction)):
            answer = re.sub(r"_\s*\{?\d{1,2}\}?$", "", str(answer))
        readings = [prediction]
        if isinstance(prediction, str):
            readings = [re.sub(r"^\\text\s*\{([^{}]*)\}$", r"\1", label[2] if label else clean(prediction))]
            if re.fullmatch(r"\s*-?\d{1,3}(,\d{3})+\s*", prediction):
                readings.append(prediction.replace(",", ", "))  # 81,256 is a number or two
        gold = read(exact_part(answer))
        equal = any(same_node(read(exact_part(reading)), gold, question.lower()) for reading in readings)
        return Verdict(equal, "equal" if equal else "different")
    except (ValueError, ArithmeticError, RecursionError):  # ValueError: also an integer that is too long to print
        return Verdict(False, "unreadable")


def exact_part(answer):
    r"""Without what follows the value in x = 2\sqrt{3} \approx 3.46; `x \approx 3.46` has no other value."""
    if not isinstance(answer, str):
        return answer
    pieces = [piece for piece in re.split(r"\\approx|≈", answer) if not LEFT_OUT.fullmatch(clean(piece) or "x")]
    return pieces[0] if pieces else answer


def words_of(text):
    """The words of a text in lower case, without LaTeX's \\text: "(C)" is ["c"]."""
    return re.findall(r"\w+", clean(text).replace(r"\text", " ").lower())


def same_node(prediction, gold, question=""):
    """Whether two nodes mean the same."""
    p_named, g_named = is_group(prediction, "=", "∈"), is_group(gold, "=", "∈")
    if p_named and g_named and prediction.items[0] != gold.items[0] and "" not in (prediction.items[0], gold.items[0]):
        return prediction.kind == gold.kind == "=" and same_equation(prediction, gold)
    if (p_named and is_group(gold, "names")) or (g_named and is_group(prediction, "names")):
        return False  # x = -2, y = 3 are not two values of x
    interval = is_group(prediction, "∈") or is_group(gold, "∈")
    if p_named and (g_named or not prediction.items[0] or LEFT_OUT.fullmatch(prediction.items[0])):
        prediction = prediction.items[1]
    if g_named and (p_named or not gold.items[0] or LEFT_OUT.fullmatch(gold.items[0])):
        gold = gold.items[1]
    if isinstance(prediction, Value) and isinstance(gold, Value):
        return same_value(prediction, gold, question)
    if not isinstance(prediction, Group) or not isinstance(gold, Group):
        return False
    kinds = (prediction.kind, gold.kind)
    if interval and kinds[0] != kinds[1] and kinds != ("json", "[]"):
        return False  # x in [2,5] is not 2, 5
    return same_group(prediction, gold, question)


def same_equation(prediction, gold):
    """Whether the differences of their sides are proportional: 2x - 4 = 0 is x = 2."""
    if not all(isinstance(node.items[1], Value) for node in (prediction, gold)):
        return False
    return proportional(*(("-", read_value(node.items[0]).tree, node.items[1].tree) for node in (prediction, gold)))


# Which brackets of a prediction may stand for which of a gold answer. A Python list cannot say that an end is open.
BRACKETS = {"": ("json", "[]", "{}", "()", "names"), "{}": ("json", ""), "()": ("json", "names")}
BRACKETS |= {"json": ("[]", "()", "{}", ""), "names": ("json", "[]", "()", ""), "[]": ("json",)}


def same_group(prediction, gold, question):
    kinds = [prediction.kind, gold.kind]
    if prediction.kind not in (gold.kind, *BRACKETS.get(gold.kind, ())) or len(prediction.items) != len(gold.items):
        return False
    if gold.kind == "_":
        return prediction.items == gold.items
    # x = 1, y = 2 is not 2, 1, but it is y = 2, x = 1
    names = [item.items[0] for item in (*prediction.items, *gold.items) if is_group(item, "=")]
    letters = {name[:1] for name in names}
    named = kinds.count("names") == 1 and len(letters) > 1
    if named and names != sorted(names):
        return False  # y = 1, x = 2 is not (1, 2)
    ordered = gold.kind not in ("", "{}", "∪", "names") or "()" in kinds or named
    items = list(prediction.items)
    for item in gold.items:
        i = next((i for i, other in enumerate(items) if same_node(other, item, question)), None)
        if i is None or (i and ordered):
            return False
        del items[i]
    return True


def same(kind, a, b):
    """Whether two predictions are the same answer, whichever comes first; used by votes. None is no answer."""
    if a is None or b is None:
        return False
    if kind == "fact":
        return exact_match(a, [b])
    return compare(a, b).correct or compare(b, a).correct
