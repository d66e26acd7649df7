r"""Is this answer right? Exact match for facts, equality of value for math, and the answers of CoT replies.

    grade("fact", "The Beatles!", "Beatles")               # Verdict(correct=True, why="exact")
    grade("math", "0.5", r"\frac{1}{2}")                   # Verdict(correct=True, why="equal")

A wrong answer that counts as right is worse than a right answer that is missed: it inflates a result, and as a
teacher trajectory it trains the student on an error. A text that cannot be read is therefore never right.

Math: an answer (LaTeX, plain text or a JSON value) is split here at its commas, equals signs and brackets; what is left
are expressions, which common/expressions.py evaluates. Conventions: words after a value may be left out, but two
different units never agree. 50% is 0.5, and 50 if the gold answer has the sign or the question asks for percent. A
decimal with a fractional part stands for the numbers that round to it, if they differ by less than one part in a
million; integers, fractions and 40.0 stand for themselves. "x =" before an answer may be left out. "1, 2" is unordered;
tuples and vectors are ordered; (a, b] is not [a, b]. 52_8 needs its base unless the question names one. Letters are
variables, and their case counts. Inequalities, ratios and number bases are not read: they are right only if the texts
are the same.
"""

import dataclasses
import json
import re
import string
import unicodedata

from common import InputError
from common.expressions import Unreadable, Value, clean, depths, read_value, same_value, split

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
    answer. answer, aliases: gold answers, text or numbers; aliases count for facts only. question: read by the judge,
    and by the math rules for number bases and percentages. judge: callable(question, answers, prediction) ->
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


def normalise_fact(value):
    """Lower case, no punctuation, no articles, single spaces (SQuAD 1.1)."""
    text = "".join(c for c in fact_text(value).lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, answers):
    """Whether the prediction is one of the answers after normalisation."""
    return normalise_fact(prediction) in map(normalise_fact, answers)


# ------------- Answers of chain-of-thought replies


def boxed_answer(text):
    r"""The content of the last complete \boxed{...} or \fbox{...} (also `\boxed 5`) that is not empty, or None."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*", text))):
        rest = text[match.end() :]
        content = ""
        if not rest.startswith("{"):
            if token := re.match(r"\\?[^\s$\\{}]+", rest):
                content = token[0].rstrip(".,;")
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", rest if rest.startswith("{") else "", re.DOTALL):  # \{ is no bracket
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0 and brace[0] == "}":
                content = rest[1 : brace.start()].strip()
                break
        if not NO_ANSWER.fullmatch(content):
            return content
    return None


# What a box holds where a reply repeats its instructions: \boxed{}, \boxed{...}, \boxed{\text{answer}}
NO_ANSWER = re.compile(r"(?i)(?:\\text)?[\s{}.…_]*(?:\\[lc]?dots|(?:(?:your|the|final)\s+)*answer)?[\s{}.…_]*")

# How a reply states its answer without a box. What follows the sign is the answer, up to the end of the sentence.
STATED = re.compile(
    r"""(?imx)
    (?: ^\W* (?:(?:the|my|our)\s+)? (?:(?:final|correct|right)\s+)? answer \W*? [:=\n]  # **Answer:** 9, ### Answer\n9
      | \b (?:the|my|our|final|correct|right)\ answer \W*? [:=\n]                       # Step 3: the final answer: 9
      | \b answer (?:\ to\ [^.\n]{1,80}?)? \s+ (?:is|would\ be|should\ be|must\ be)\b(?!\s+not\b)   # so the answer is 9
      | ^\s*\#{4}(?!\#)                                                                 # #### 9
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
    """kind: the brackets "()", "(]", "{}", ..., "" for a bare list, "json" for a Python list, "∪" for a union; "=" for
    an equation (two items, the left side as a text)."""

    kind: str
    items: tuple


def read(value):
    """The node of a JSON value or a text. Raises Unreadable."""
    if isinstance(value, list):
        return group("json", map(read, value))
    text = clean(str(value))
    if not 0 <= min(depths(text)) <= max(depths(text)) <= MAX_DEPTH:
        raise Unreadable("brackets")
    return read_text(text)


def read_text(text):
    """The node of a cleaned text: first what binds loosest (commas), at last an expression."""
    text = re.sub(r"\b(and|or)\b", ",", text)
    if len(split(text, ",;±")) > 1:
        return group("", read_items(text))
    if len(sides := split(text, "=")) == 2:
        return Group("=", (sides[0], read_text(sides[1])))
    if len(pieces := split(text, "∪")) > 1:
        return group("∪", map(read_text, pieces))
    if text[:1] in ("(", "[", "{") and text[-1] in ")]}" and min(depths(text[:-1])[1:]) > 0:
        items = read_items(text[1:-1])
        return items[0] if len(items) == 1 and text[0] == "(" else group(text[0] + text[-1], items)
    return read_value(text)


def read_items(text):
    """The nodes of the texts between commas; one with \\pm gives two."""
    pieces = split(text, ",;")
    return [read_text(piece.replace("±", sign)) for piece in pieces for sign in ("+-" if "±" in piece else "+")]


def group(kind, items):
    """A Group; a single item stands for itself, unless it is a row of numbers."""
    items = tuple(items)
    return items[0] if len(items) == 1 and isinstance(items[0], Value) else Group(kind, items)


# ------------- Math: comparison

WORDING = re.compile(r"\\text\s*\{[a-zA-Z ,.()'-]+\}")  # a gold answer that is words or a choice letter: \text{(C)}


def compare(prediction, answer, question=""):
    """The Verdict on a prediction (JSON value or text) for a gold answer (text or number).

    why: exact (the same text), text (the same words) or equal (in value); different or unreadable.
    """
    answer = str(answer)
    try:
        if max(len(str(prediction)), len(answer)) > MAX_CHARACTERS:
            return Verdict(False, "unreadable")
        if isinstance(prediction, str) and clean(prediction) == clean(answer):
            return Verdict(True, "exact")
        if WORDING.fullmatch(clean(answer)):
            equal = words_of(str(prediction)) == words_of(answer)
            return Verdict(equal, "text" if equal else "different")
        if re.search(r"\bbase\b|binary|octal|hexadecimal", question) and re.fullmatch(r"\s*-?\d+\s*", str(prediction)):
            answer = re.sub(r"_\s*\{?\d{1,2}\}?$", "", answer)
        if isinstance(prediction, str):
            prediction = re.split(r"\\approx|≈", prediction)[0]  # x = 2\sqrt{3} \approx 3.46
        equal = same(read(prediction), read(answer), question.lower())
        return Verdict(equal, "equal" if equal else "different")
    except (ValueError, ArithmeticError, RecursionError):  # ValueError: also an integer that is too long to print
        return Verdict(False, "unreadable")


def words_of(text):
    """The words of a text in lower case, without LaTeX's \\text: "(C)" is ["c"]."""
    return re.findall(r"\w+", clean(text).replace(r"\text", " ").lower())


NAME = re.compile(r"[a-zA-Z](\([a-z]\))?")  # the x or f(x) of "x = 5" and "f(x) = 2x", which may be left out


def same(p, g, question):
    """Whether two nodes mean the same."""
    p_named, g_named = is_equation(p), is_equation(g)
    if p_named and g_named and p.items[0] != g.items[0]:
        left = same(read_text(p.items[0]), read_text(g.items[0]), question)
        return left and same(p.items[1], g.items[1], question)
    if p_named and (g_named or NAME.fullmatch(p.items[0])):
        p = p.items[1]
    if g_named and (p_named or NAME.fullmatch(g.items[0])):
        g = g.items[1]
    if isinstance(p, Value) and isinstance(g, Value):
        return same_value(p, g, question)
    return isinstance(p, Group) and isinstance(g, Group) and same_group(p, g, question)


def is_equation(node):
    return isinstance(node, Group) and node.kind == "="


# Which brackets of a prediction may stand for which of a gold answer. A Python list cannot say that an end is open.
BRACKETS = {"": ("json", "[]", "{}", "()"), "{}": ("json", "[]", ""), "()": ("json",), "[]": ("json",)}


def same_group(p, g, question):
    if (p.kind != g.kind and p.kind not in BRACKETS.get(g.kind, ())) or len(p.items) != len(g.items):
        return False
    names = {item.items[0] for item in p.items if is_equation(item)}
    ordered = g.kind not in ("", "{}", "∪") or p.kind == "()" or len(names) > 1  # x = 1, y = 2 is not x = 2, y = 1
    items = list(p.items)
    for gold in g.items:
        i = next((i for i, item in enumerate(items) if same(item, gold, question)), None)
        if i is None or (i and ordered):
            return False
        del items[i]
    return True
