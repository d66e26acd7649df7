r"""Is this answer right? Exact match for facts, equality of value for math, and the answers of CoT replies.

    grade("fact", "The Beatles!", "Beatles")               # Verdict(correct=True, why="exact")
    grade("math", "0.5", r"\frac{1}{2}")                   # Verdict(correct=True, why="equal")
    same("math", 4, "4.0")                                 # True: one vote

A wrong answer that counts as right inflates a result, and as a teacher trajectory it trains the student on an error. A
text that cannot be read is therefore never right.

Math: common/expressions.py reads an answer (LaTeX, plain text, Python's or sympy's notation, a JSON value). Words after
the answer may be left out, but two different units never agree. 50% is 0.5, and 50 if the gold answer has the sign or
the question asks for percent. A decimal equals the numbers that round to it if it has six decimal places, as in
Math-Verify, or seven digits: 3.141593 is pi, 3.14159 is not. "x =" may be left out; two equations are equal if their
differences are proportional. x < 2 is (-oo, 2). "1, 2" is unordered; tuples and vectors are ordered. [2, 5] may be the
list 2, 5, but not the set {2, 5}; a program's list may be any of them. 52_8 needs its base unless the question names
one. Letters are variables, and their case counts; AB and words of four letters are names.

Not read, and right only as the same text: chains (x = 10/4 = 5/2), inequalities in two variables, x > 2 and x < 5 in
words, x \ne 2; set-builder notation, unions that touch, set differences; ratios in other terms; repeating decimals;
[1 2]; products without a sign after a division (1/ab), or after a function without brackets (\sin x/2); odd roots of
negative numbers; factorials of variables; \max, \sum, vectors with arrows; number words (20 million); single letters as
units in plain text (5 m), a unit for each item of a list; sentences around an answer; (B) 16 for the letter.
"""

import dataclasses
import json
import re
import string
import unicodedata

from common import InputError
from common.expressions import Group, clean, is_group, read, same_equation, same_value

MAX_CHARACTERS = 2000  # of one answer; 2^{4181}, a gold answer of MATH, has 1,259 digits


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
    if prediction in (None, []) or (isinstance(prediction, str) and not prediction.strip()):
        return Verdict(False, "no answer")
    if kind == "math":
        return compare(prediction, answer, question or "")
    try:
        text = fact_text(prediction)
    except (RecursionError, ValueError):  # deeply nested lists; an integer that is too long to print
        return Verdict(False, "unreadable")
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

FONT = r"text\w*|math\w*|mbox|emph|operatorname|underline|boxed|fbox|rm|bf|it|[lL]arge|[hH]uge|displaystyle"
LATEX = [  # (pattern, replacement), in this order
    (r"(?<=\d)\\,(?=\d{3})", ""),  # 10\,000
    (r"\\(?:[\\,;: ]|q?quad\b)|(?<=\w)~(?=\w)", " "),  # \text{New}\ \text{York}, Barack~Obama
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°"),  # 60^\circ
    (r"\\([`'^\"~])\s*(?:\{\\?(\w)\}|(\w))", lambda match: (match[2] or match[3]) + ACCENTS[match[1]]),  # M\'elanie
    (r"(?<=\d)\s*(?=\\[dt]?frac)", " "),  # 5\frac{1}{2}
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    (rf"\\(?:{FONT})(?![a-zA-Z])\s*|(?<!\\)[{{}}$]|\\[()\[\]]", ""),  # \text{Paris}, {\rm yes}
    (r"\\(?=[a-zA-Z]|[^\w\s])", ""),  # A\$AP, Steely \& Clevie, \alpha
]
ACCENTS = dict(zip("`'^\"~", "\u0300\u0301\u0302\u0308\u0303", strict=True))  # combining characters


def fact_text(value):
    """Returns a JSON value as plain text: True is yes, 1969.0 is 1969, a list has commas, LaTeX is replaced."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(fact_text, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if re.search(r"\\|\w~\w|[\^_]\{", value):
        for pattern, replacement in LATEX:
            value = re.sub(pattern, replacement, value)
    return unicodedata.normalize("NFC", value)


# A number's sign, its decimal point and other signs between two digits are not punctuation; the comma of 1,000 is.
IN_NUMBERS = r"(?<!\w)-(?=[$€£¥]?\.?\d)|(?<=\d)\^(?=-?\d)|(?<!\w)\.(?=\d)|(?<=\d)(?:[^\w\s,]|,(?!\d{3}(?!\d)))(?=\d)"
PUNCTUATION = re.compile(f"({IN_NUMBERS})|[{re.escape(string.punctuation)}]")
QUOTES = str.maketrans("‘’´ʼ′“”–—−‐‑", 5 * "\u0027" + '""-----')


def exact_match(prediction, answers):
    """Returns whether the prediction is one of the answers after normalisation."""
    return normalise_fact(prediction) in map(normalise_fact, answers)


def normalise_fact(value):
    """Lower case, no punctuation, no articles, single spaces (SQuAD 1.1), but 3.5 is not 35 and -5 is not 5.

    Where nothing is left ("A", "!!!"), articles and then punctuation are kept.
    """
    original = fact_text(value).translate(QUOTES).lower().strip()
    text = PUNCTUATION.sub(r"\1", original)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or text.strip() or original


# ------------- Answers of chain-of-thought replies

BRACES = r"(?:[^{}\\]|\\.)*+"  # the text between two braces
for _ in range(8):
    BRACES = rf"(?:[^{{}}\\]|\\.|\{{{BRACES}\}})*+"
BOX = re.compile(  # \boxed{5} or \boxed 5
    rf"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:\{{({BRACES})\}}|(\\?[^\s$\\{{}}]*[^\s$\\{{}}.,;]))", re.DOTALL
)
# What a box holds where a reply repeats its instructions: \boxed{}, \boxed{...}, \boxed{\text{answer}}
NO_ANSWER = re.compile(r"(?i)(?:\\text)?[\s{}.…_]*(?:\\[lc]?dots|(?:(?:your|the|final)\s+)*answer)?[\s{}.…_]*")

# How a reply states its answer without a box. What follows the sign is the answer, up to the end of the sentence.
STATED = re.compile(
    r"""(?imx)
    (?: ^\W{0,20} (?:(?:the|my|our)\s+)? (?:(?:final|correct|right)\s+)? (?:ans\.?: | answer \W{0,20}? [:=\n])
      | \b (?:the|my|our|final|correct|right)\ answer \W{0,20}? [:=\n]  # Step 3: the final answer: 9
      | (?:\b(?:the|my|our|final|correct|right)\ )*+ (?<!\bthis\ )(?<!\bthat\ )\banswers?
        (?:\ (?:to|for)\ [^.\n]{1,80}?)? \s+ (?:is|are|equals|(?:will|would|should|must)\ be)\b
        (?!\s+(?:not|consistent|correct|reasonable|plausible|valid|verified|confirmed)\b)  # so the answer is 9
      | ^[ \t]*\#{4}(?!\#)(?=.*\s*\Z)  # #### 9, at the end
    )
    (?:(?<=\n)[ \t]*(?:[-*•>]|\d{1,2}[.)])[ \t]+ | [\s:=*] | (?:\$\$|\\\[)\s*\n)*+ (.*\w.*)"""  # also in a list
)
# What a statement after another one must have, to be no remark: "The answer is given above."
SUBSTANCE = re.compile(r"\d|\\|[A-Z]|[\"“']\w|\b(?:yes|no)\b")
# The point of an abbreviation does not end a sentence, unless the next word can only begin one.
SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\b(?:St|Mt|Ft|Dr|Mr|Ms|Jr|Sr|Lt|No|vs|Co))(?<!\b(?:Mrs|Inc|Ltd|Gen|Col|Rev|Sgt|Gov|Sen|Rep))\.\s+[A-Z]"
    r"|[.!?]\s+(?:It|This|That|These|He|She|They|We|I|The|There|Therefore|So|Because|Since|Note)\b"
    r"|,?\s+(?:because|since)\s|,\s+(?:which|who|as)\s|(?<=\S)\*\*(?=[\s.,;:(])|(?<=^[Yy]es),|(?<=^[Nn]o),"
)


def cot_answer(text):
    r"""Returns the content of the last complete \boxed{...} or \fbox{...} with an answer; else of <answer>...</answer>;
    else what the last "Final answer: ...", "The answer is ..." or "#### ..." states, up to the end of its sentence."""
    boxes = [(in_braces or bare).strip() for in_braces, bare in BOX.findall(text)]
    if boxes := [box for box in boxes if not NO_ANSWER.fullmatch(box)]:
        return boxes[-1]
    tagged = re.findall(r"<(?:final_)?answer>((?:(?!<(?:final_)?answer>).)+?)</(?:final_)?answer>", text, re.S | re.I)
    if tagged := [tag.strip() for tag in tagged if tag.strip()]:
        return tagged[-1]
    answer = None
    while found := list(STATED.finditer(text)):  # "Final Answer: The final answer is 5."
        weighty = [statement[1] for statement in found if SUBSTANCE.search(statement[1])]
        if not weighty and answer and found[0].start() > 0:
            break
        answer = text = (weighty or [found[-1][1]])[-1]
    return answer and SENTENCE_END.split(answer)[0].strip(" *`").removesuffix(".").rstrip(" *`")


# ------------- Math: comparison

# Words or a letter: \text{(C)}, east, No solution
WORDING = re.compile(r"\\text\s*\{[a-zA-Z ,.()'-]+\}|(?=.*[a-zA-Z]{4})[a-zA-Z]+( [a-zA-Z]+)*")
# \text{5 cm} is 5 cm, \text{(B)} 16 is 16
TEXT_OR_CHOICE = re.compile(r"^(?:\\text\s*\{([^{}]*)\}$|(?:\\text\s*\{)?\([A-Z]\)\s*\}?\s+(?!.*[A-Z]))")


def compare(prediction, answer, question=""):
    """Returns the Verdict on a prediction (JSON value or text) for a gold answer (text or number).

    why: exact (the same text), text (the same words) or equal (in value); different or unreadable.
    """
    try:
        if max(len(str(prediction)), len(str(answer))) > MAX_CHARACTERS:
            return Verdict(False, "unreadable")
        text, gold_text = clean(str(prediction)), clean(str(answer))
        if text == gold_text:
            return Verdict(True, "exact")
        if WORDING.fullmatch(gold_text):
            equal = words_of(text) == words_of(gold_text)
            return Verdict(equal, "text" if equal else "different")
        if re.search(r"\bbase\b|binary|octal|hexadecimal", question) and re.fullmatch(r"-?\d+", text):
            answer = re.sub(r"_\d{1,2}$", "", gold_text)
        readings = [prediction]
        if isinstance(prediction, list) and len(prediction) == 1 and isinstance(prediction[0], list):
            readings.append(prediction[0])  # a list with one tuple, as SymPy's solutions are
        if isinstance(prediction, str):  # 81,256 is a number or two
            readings = [TEXT_OR_CHOICE.sub(r"\1", text), prediction.replace(",", ", ")]
        gold_unit, gold = read(answer)
        for unit, node in map(read, readings):
            if (not unit or not gold_unit or unit == gold_unit) and same_node(node, gold, question.lower()):
                return Verdict(True, "equal")
        return Verdict(False, "different")
    except (ValueError, ArithmeticError, TypeError, SyntaxError, RecursionError, MemoryError):
        return Verdict(False, "unreadable")


def words_of(text):
    """Returns the words of a text in lower case, without LaTeX's \\text: "(C)" is ["c"]."""
    return re.findall(r"\w+", text.replace(r"\text", " ").lower())


def same_node(prediction, gold, question=""):
    """Returns whether two nodes mean the same."""
    if is_group(prediction, "=") and is_group(gold, "=") and prediction.items[0] != gold.items[0]:
        return same_equation(prediction, gold)
    nodes = [prediction, gold]
    nodes = [node.items[1] if is_group(node, "=") and isinstance(node.items[0], str) else node for node in nodes]
    groups = [isinstance(node, Group) for node in nodes]
    if any(groups):
        return all(groups) and same_group(*nodes, question)
    return same_value(*nodes, question)


# The brackets of a gold answer, and which others are accepted for them. A Python list cannot say that an end is open.
ALLOWED = {"": ("json", "[]", "{}", "()"), "{}": ("json", ""), "()": ("json", "∈()"), "[]": ("json", "∈[]")}
ALLOWED |= {"json": ("[]", "()", "{}", ""), "∈()": ("()",), "∈[]": ("[]", "json")}


def same_group(prediction, gold, question):
    """Returns whether the items are the same; in any order, where it does not matter."""
    kinds = (prediction.kind, gold.kind)
    # (1, 2) is x = 1, y = 2, but neither x = 2, y = 1 nor {1, 2}
    named = ", " in "".join(kinds) and not any(is_group(item, "=") for item in prediction.items + gold.items)
    allowed = kinds[0] in (kinds[1], *ALLOWED.get(kinds[1], ())) or (named and {"", "()", "[]", "json"} & set(kinds))
    ordered = named or "()" in kinds or gold.kind not in ("", "{}", "∪")
    if not allowed or len(prediction.items) != len(gold.items):
        return False
    items = list(prediction.items)
    for item in gold.items:
        i = next((i for i, other in enumerate(items) if same_node(other, item, question)), None)
        if i is None or (i and ordered):
            return False
        del items[i]
    return True


def same(kind, a, b):
    """Returns whether two predictions are the same answer, whichever comes first; used by votes. None is no answer."""
    if a is None or b is None:
        return False
    if kind == "fact":
        return exact_match(a, [b])
    return compare(a, b).correct or compare(b, a).correct
