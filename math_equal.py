r"""Do two mathematical answers mean the same? LaTeX, plain text and Python values, without eval.

    from math_equal import compare
    compare("0.5", r"\frac{1}{2}")        # (True, "symbolic")
    compare([3, 1.5707963267948966], r"\left( 3, \frac{\pi}{2} \right)")     # (True, "numeric")

An answer is read by a small recursive-descent parser into nested tuples, and two readings are
compared by value: exactly where all is rational, with 150 digits elsewhere, and, where they contain
variables, at random rational points (two rational functions that agree at six random points are
equal but for a chance below 1e-15; Schwartz 1980, Zippel 1979). Nothing is simplified, so nothing
can run away: the length of a text, the size of numbers and the range of every function are limited,
and what exceeds a limit is unreadable, which is never right.

Conventions. A unit, currency or degree sign may be left out, but two known units must agree. 50% is
0.5, and 50 where the gold answer has the sign or the question asks for per cent. A decimal with a
fractional part stands for the number that rounds (or is cut) to it, if they differ by less than one
part in a million; integers, fractions and 40.0 stand for themselves. "x =" before an answer may be
left out. "1, 2" is unordered; tuples, vectors and texts are ordered; (a, b] is not [a, b]. 52_8 needs
its base unless the question names one. Letters are variables, and their case counts.
"""

import json
import math
import random
import re
from fractions import Fraction

import mpmath

MAX_CHARACTERS = 1000  # of one answer; the longest gold answer of the eight benchmarks has 92
MAX_DEPTH = 40  # nested brackets
MAX_BITS = 20_000  # of an exact numerator or denominator; 2^{4181} is a gold answer of MATH
RELATIVE = Fraction(1, 10**6)  # how near a rounded decimal must be
NOISE = Fraction(1, 10**12)  # relative error of ordinary double arithmetic
PLACES = Fraction(6, 10**11)  # GSM-Hard's gold answers are rounded to 10 decimal places

mp = mpmath.MPContext()
mp.dps = 150
EPSILON = mp.mpf(10) ** -100  # a smaller relative difference is rounding error
LARGEST = mp.mpf(10) ** 40  # beyond LARGEST and 1 / LARGEST, 150 digits might not tell two sums apart


class Unreadable(Exception):
    """This text is not an answer that the parser knows, or its value is out of range."""


def compare(prediction, answer, question=None):
    """Whether a prediction (JSON value or text) equals the gold answer (text or number), and why.

    why: "exact", "text", "symbolic", "numeric" (a decimal within the tolerance) if they are equal;
    "different" or "unreadable" if not.
    """
    if isinstance(prediction, list) and prediction and all(isinstance(item, str) for item in prediction):
        prediction = ", ".join(prediction) if len(prediction) > 1 else prediction[0]
    if isinstance(prediction, str) and isinstance(answer, str) and surface(prediction) == surface(answer):
        return True, "exact"
    if isinstance(answer, str) and is_wording(answer):
        same = isinstance(prediction, str) and same_wording(prediction, answer)
        return same, "text" if same else "different"
    comparison = Comparison(question or "")
    try:
        golds = [read(part) for part in re.split(r"\\approx|≈", answer)] if isinstance(answer, str) else [read(answer)]
        value = read(prediction)
    except (Unreadable, RecursionError):
        return False, "unreadable"
    for gold in golds:
        try:
            if comparison.same(value, gold):
                return True, comparison.why
        except (Unreadable, ZeroDivisionError, RecursionError):
            continue
    return False, "different"


# Reading. Text is cleaned, cut into tokens and parsed; a parsed answer ("node") is a tuple:
#   ("number", Fraction, step)    step: one unit in the last decimal place, None for an integer
#   ("symbol", name), ("constant", "pi" | "e" | "i" | "inf"), ("call", name, arguments)
#   ("add" | "mul" | "div" | "pow", a, b), ("neg", a), ("pm", a, b, sign), ("percent" | "degree", a)
#   ("unit", node, unit), ("text", words), ("based", digits, base), ("ratio", nodes)
#   ("list", nodes, separator), ("group", brackets, nodes), ("matrix", rows), ("reals",)
#   ("union" | "minus", a, b), ("relation", operators, sides)

_UNICODE = str.maketrans(
    {
        **{"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "∕": "/"},
        **{"π": r"\pi ", "θ": r"\theta ", "√": r"\sqrt ", "∞": r"\infty ", "°": r"^\circ ", "±": r"\pm "},
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "ℝ": " Reals ", "∅": r"\emptyset "},
        **{"½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ", "⅓": r"\frac13 ", "⅔": r"\frac23 "},
        **{"⟨": r"\langle ", "⟩": r"\rangle ", "¢": " cents", "\u00a0": " ", "\u202f": " ", "’": "'"},
        **{digit: f"^{i}" for i, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{digit: f"_{i}" for i, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    }
)
_TOKEN = re.compile(
    r"""(?P<space>\s+|~|\\[,!;:>\ ]|\\(?:left|right)(?![a-zA-Z])\.?|\\(?:displaystyle|q?quad|[bB]igg?[lr]?)(?![a-zA-Z]))
    |\\(?:text(?:bf|it|rm|normal)?|mbox|textnormal|mathrm|operatorname|mathbf)\s*\{(?P<text>[^{}]*)\}
    |(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+(?!\d*[.^]))?)
    |(?P<command>\\[a-zA-Z]+|\\.)|(?P<word>[a-zA-Z]+)|(?P<sign>\*\*|<=|>=|==|!=|.)""",
    re.VERBOSE | re.DOTALL,
)
_SAME_COMMAND = {
    **{r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", "**": "^", "==": "=", "!=": r"\ne"},
    **{"<=": r"\le", ">=": r"\ge", r"\leq": r"\le", r"\geq": r"\ge", r"\leqslant": r"\le", r"\geqslant": r"\ge"},
    **{r"\lt": "<", r"\gt": ">", r"\neq": r"\ne", r"\cdot": "*", r"\times": "*", r"\div": "/", r"\%": "%", r"\$": "$"},
    **{r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\lvert": "|", r"\rvert": "|"},
    **{r"\vert": "|", r"\varnothing": r"\emptyset", r"\backslash": r"\setminus", r"\degree": r"\circ", "€": "$", "£": "$"},
    **{r"\dbinom": r"\binom", r"\tbinom": r"\binom", r"\tg": r"\tan", r"\ctg": r"\cot"},
}
_FUNCTIONS = {
    *("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt cbrt abs floor ceil".split()),
    *("Rational Matrix array Interval Union FiniteSet factorial binomial open Lopen Ropen".split()),
}
_WORDS = {
    **{name: "\\" + name for name in _FUNCTIONS | {"pi", "theta", "alpha", "beta"}},
    **{"asin": r"\arcsin", "acos": r"\arccos", "atan": r"\arctan", "Abs": r"\abs", "ceiling": r"\ceil"},
    **{"oo": r"\infty", "inf": r"\infty", "infinity": r"\infty", "Reals": r"\Reals", "EmptySet": r"\emptyset"},
    **{"and": "and", "or": "or", "in": r"\in", "union": r"\cup"},
}
_GREEK = set("alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega triangle angle".split())
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Units that contradict each other; any other words after a number ("7 distinct integers") say nothing about it.
_UNITS = {
    word: words.split()[0]
    for words in [
        *("$ dollar buck usd", "cent", "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre"),
        *("m meter metre", "in inch inche", "ft foot feet", "yd yard", "mi mile", "g gram", "kg kilogram", "lb pound"),
        *("oz ounce", "s sec second", "min minute", "h hr hour", "day", "week", "month", "year", "l liter litre"),
        *("ml milliliter millilitre", "mph", "a.m. am", "p.m. pm", "degree deg", "rad radian", "mg milligram"),
    ]
    for word in words.split()
}
# Words that change what stands before them: "5 factorial" is not 5 with a unit.
_NOT_UNITS = set("squared cubed factorial mod modulo plus minus times over base not more less least most to from".split())


def read(value):
    """The node for a JSON value or a text. Raises Unreadable."""
    if isinstance(value, str):
        return Parser(value).answer()
    if isinstance(value, bool) or value is None:
        return ("text", str(value).lower())
    if isinstance(value, int | float):
        return Parser(str(value)).answer() if abs(value) < 10**4000 else _refuse("out of range")
    if isinstance(value, list):
        return ("group", "json", tuple(read(item) for item in value))
    if isinstance(value, dict):
        return ("list", tuple(Parser(f"{name} = {item}").answer() for name, item in value.items()), ",")
    raise Unreadable(f"a value of type {type(value).__name__}")


def _refuse(message):
    raise Unreadable(message)


def clean(text):
    """One line of math without delimiters, closing punctuation and thousands separators."""
    text = re.sub(r"(?i)^\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s+(?=\S)", "", text.strip())
    text = text.translate(_UNICODE).strip().removesuffix(".").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and len(text) > 2 and opening not in inner:
            text = inner.strip().removesuffix(".").strip()
    text = re.sub(r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\ )(?=\d{3}(?!\d))", "", text)
    if not re.search(r"[(\[]|\\\{", text):  # between brackets, a comma parts two numbers
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(\d*)\.(\d*)\\overline\{(\d+)\}", _repeating_decimal, text)
    return text.replace(r"\mathbb{R}", " Reals ").replace(r"\mathbb R", " Reals ")


def _repeating_decimal(match):
    whole, fixed, repeated = match.groups()
    nines = 10 ** len(repeated) - 1
    return rf"\frac{{{int(whole + fixed + repeated) - int(whole + fixed or 0)}}}{{{nines * 10 ** len(fixed)}}}"


def surface(text):
    """A text without what never carries meaning: spacing (but for that between digits), \\left, \\dfrac's d."""
    text = re.sub(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;:]", " ", text.strip().strip("$").removesuffix("."))
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\s+", " ", text))
    return re.sub(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", "", text)


def _plain_words(text):
    text = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text.replace(r"\ ", " "))
    return " ".join(text.strip().strip("$.").split()).lower()


def is_wording(text):
    """Whether an answer is words or a choice letter (\\text{(C)}, two lines), not math with a unit."""
    words = _plain_words(text)
    if not re.fullmatch(r"[a-z' ,;.&()-]+", words) or re.search(r"[_^=]", text):
        return False
    known = {name.lower() for name in _WORDS}
    return "\\text" in text or "\\mbox" in text or any(len(w) > 2 and w not in known for w in re.findall("[a-z]+", words))


def same_wording(prediction, answer):
    """Equal words; a choice letter may come with its brackets or its text: (C), C. 14"""
    words, gold = (re.sub(r"^\((\w)\)$", r"\1", _plain_words(text)) for text in (prediction, answer))
    if len(gold) == 1:
        words = re.sub(r"^\(?(\w)[).:](?:\s.*)?$", r"\1", words)
    return re.sub(r"\s*([,;&])\s*", r"\1", words) == re.sub(r"\s*([,;&])\s*", r"\1", gold)


def tokenize(text):
    """A list of (kind, text, spaced): kind is "number", "word", "text" or "sign"; spaced: white space before it."""
    if len(text) > MAX_CHARACTERS:
        raise Unreadable("too long")
    tokens, spaced = [], False
    for match in _TOKEN.finditer(text):
        kind, content = match.lastgroup, match[0]
        if kind == "space":
            spaced = True
            continue
        if kind == "text":
            content = match["text"].strip()
            joint = content.strip("., ").lower()
            if joint in ("and", "or") or content in _FUNCTIONS:
                kind, content = "sign", joint if joint in ("and", "or") else "\\" + content
        elif kind == "word" and content == "U" and tokens and tokens[-1][1] in (")", "]"):
            kind, content = "sign", r"\cup"
        elif kind == "word" and content in _WORDS:
            kind, content = "sign", _WORDS[content]
        elif kind in ("command", "sign"):
            kind, content = "sign", _SAME_COMMAND.get(content, content)
        tokens.append((kind, content, spaced))
        spaced = False
    return tokens


_CLOSING = {"(": ")]", "[": ")]", r"\{": (r"\}",), "{": "}", r"\langle": (r"\rangle",)}
_RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in"}


class Parser:
    """Recursive descent, one method a grammar level, from answer() down to atom()."""

    def __init__(self, text):
        self.text = clean(text)
        self.tokens = tokenize(self.text)
        self.at = 0
        self.depth = 0
        self.bars = 0  # open |: inside, the next | closes
        self.currency = False

    def peek(self, ahead=0):
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "", False)

    def accept(self, *signs):
        """The next token's text if it is one of these signs (then it is consumed), else None."""
        kind, text, _ = self.peek()
        if kind == "sign" and text in signs:
            self.at += 1
            return text
        return None

    def expect(self, *signs):
        return self.accept(*signs) or _refuse(f"{' or '.join(signs)} expected")

    def answer(self):
        based = re.fullmatch(
            r"(?:\\text\{)?(-?[0-9A-Z]+)\}?\s*(?:_\s*\{?(?:\\text\{\s*base\s*)?|\(?\s*(?:in )?base\s*)(\d+)[\s})]*", self.text
        )
        if based:
            return ("based", based[1], int(based[2]))
        node = self.items()
        return node if self.peek()[0] == "end" else _refuse(f"unexpected {self.peek()[1]!r}")

    def items(self):
        """One relation, or several between commas, semicolons, "and" or "or"."""
        nodes, separator = [self.relation()], ","
        while self.accept(",", ";") or self.peek()[1] in ("and", "or"):
            separator = self.accept("or") or self.accept("and") or separator
            nodes.append(self.relation())
        return nodes[0] if len(nodes) == 1 else ("list", tuple(nodes), separator)

    def relation(self):
        operators, sides = [], [self.set_value()]
        while operator := self.accept(*_RELATIONS):
            operators.append(operator)
            sides.append(self.set_value())
        return ("relation", tuple(operators), tuple(sides)) if operators else sides[0]

    def set_value(self):
        node = self.value()
        while operator := self.accept(r"\cup", r"\setminus"):
            node = ("union" if operator == r"\cup" else "minus", node, self.value())
        return node

    def value(self):
        """A sum or ratio with the unit that follows or, as a currency, precedes it; or words alone."""
        self.currency = False
        kind, text, _ = self.peek()
        if kind == "text" or (kind == "word" and len(text) > 3):
            return ("text", self.unit())
        parts = [self.sum()]
        while self.accept(":"):
            parts.append(self.sum())
        node = parts[0] if len(parts) == 1 else ("ratio", tuple(parts))
        unit = "$" if self.currency else ""
        self.currency = False
        words = self.unit()
        if words in ("percent", "per cent", "degrees", "degree"):
            return ("percent" if words[0] == "p" else "degree", node)
        scale = _SCALES.get(words.split()[0]) if words else None
        if scale:
            node, words = ("mul", node, ("number", Fraction(scale), None)), " ".join(words.split()[1:])
        return ("unit", node, words or unit) if words or unit else node

    def unit(self):
        """The words, with powers and slashes, that follow a value: "cm^2", "miles per hour"; "" if none."""
        words = ""
        while True:
            kind, text, _ = self.peek()
            after_word = self.peek(1)[0] in ("text", "word")
            if kind in ("text", "word") or text == "$" or (words and text == "/" and after_word):
                words += f" {text}" if kind in ("text", "word") else text
                self.at += 1
            elif words and self.accept("^"):
                words += "^" + str(self.argument()[1])
            elif words and self.accept("."):
                pass
            else:
                break
        words = words.strip()
        if any(word.lower() in _NOT_UNITS for word in words.split()) or re.search(r"\d", re.sub(r"\^\d", "", words)):
            raise Unreadable(f"{words!r} after a value")
        return words

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")
        node = self.product()
        while operator := self.accept("+", "-", r"\pm", r"\mp"):
            right = self.product()
            if operator in "+-":
                node = ("add", node, right if operator == "+" else ("neg", right))
            else:
                node = ("pm", node, right, 1 if operator == r"\pm" else -1)
        self.depth -= 1
        return node

    def product(self, of_functions=True):
        """Factors with *, / or nothing between them. of_functions=False: the argument of "sin 2x cos x" is 2x."""
        node = self.signed()
        while True:
            if of_functions and (operator := self.accept("*", "/")):
                node = ("mul" if operator == "*" else "div", node, self.signed())
            elif self.starts_factor(of_functions):
                node = ("mul", node, self.power())
            else:
                return node

    def starts_factor(self, of_functions):
        """Whether the next token multiplies what stands before it without a sign."""
        kind, text, spaced = self.peek()
        if kind == "word":
            is_unit = (len(text) > 2 and (spaced or len(text) > 3)) or (len(text) == 2 and text in _UNITS)
            return not is_unit
        if kind != "sign":
            return False
        if text == "|":
            return not self.bars
        if text[1:] in _FUNCTIONS:
            return of_functions
        return text in ("(", "{", r"\frac", r"\binom", r"\pi", r"\boxed") or text[1:] in _GREEK

    def signed(self):
        if self.accept("-"):
            return ("neg", self.signed())
        if self.accept("+"):
            return self.signed()
        if operator := self.accept(r"\pm", r"\mp"):
            return ("pm", ("number", Fraction(0), None), self.signed(), 1 if operator == r"\pm" else -1)
        if self.accept("$"):
            self.currency = True
            return self.signed()
        return self.power()

    def power(self):
        node = self.postfix(self.atom())
        while self.accept("^"):
            if self.accept(r"\circ") or (self.peek()[1] == "{" and self.peek(1)[1] == r"\circ" and self.skip(3)):
                node = ("degree", node)
            else:
                node = ("pow", node, self.exponent())
            node = self.postfix(node)
        return node

    def exponent(self):
        """x^y^z is x^(y^z)."""
        node = self.argument()
        return ("pow", node, self.exponent()) if self.accept("^") else node

    def skip(self, count):
        self.at += count
        return True

    def postfix(self, node):
        while operator := self.accept("!", "%"):
            node = ("call", "factorial", (node,)) if operator == "!" else ("percent", node)
        return node

    def argument(self, single_digit=False):
        r"""What a LaTeX command or ^ takes: a {group}, or one token; \frac takes one digit, ^ the whole number."""
        kind, text, _ = self.peek()
        if single_digit and kind == "number" and text.isdigit() and len(text) > 1:
            self.tokens[self.at] = (kind, text[1:], False)
            return ("number", Fraction(int(text[0])), None)
        if self.accept("-"):
            return ("neg", self.argument())
        return self.atom()

    def atom(self):
        kind, text, _ = self.peek()
        self.at += 1
        if kind == "number":
            return self.number(text)
        if kind == "word":
            return self.letters(text)
        if kind != "sign":
            raise Unreadable("a value expected")
        if text in _CLOSING:
            return self.group(text)
        if text == "|":
            self.bars += 1
            node = ("call", "abs", (self.sum(),))
            self.bars -= 1
            self.expect("|")
            return node
        if text == r"\frac":
            return ("div", self.argument(single_digit=True), self.argument(single_digit=True))
        if text == r"\binom":
            return ("call", "binomial", (self.argument(single_digit=True), self.argument(single_digit=True)))
        if text in (r"\lfloor", r"\lceil"):
            node = ("call", text[2:], (self.sum(),))
            self.expect(r"\r" + text[2:])
            return node
        if text == r"\begin":
            return self.matrix()
        if text in (r"\pi", r"\infty"):
            return ("constant", "pi" if text == r"\pi" else "inf")
        if text in (r"\emptyset", r"\Reals"):
            return ("group", "{}", ()) if text == r"\emptyset" else ("reals",)
        if text == r"\boxed":
            return self.argument()
        if text[1:] in _FUNCTIONS:
            return self.function(text[1:])
        if text[1:] in _GREEK:
            return self.subscript(text[1:])
        raise Unreadable(f"unexpected {text!r}")

    def number(self, text):
        """A number; "1\\frac{4}{5}" and "1 4/5" are mixed numbers, "2\\frac{3}{2}" is a product."""
        if len(text) > 4000 or len(re.sub(r".*[eE]", "", text)) > 4 and re.search("[eE]", text):
            raise Unreadable("too long a number")
        value = Fraction(text)
        if not text.isdigit():
            if value.denominator == 1:
                return ("number", value, None)
            mantissa, _, exponent = text.lower().partition("e")
            return ("number", value, Fraction(10) ** (int(exponent or 0) - len(mantissa.partition(".")[2])))
        texts = [self.peek(i)[1] for i in range(7)]
        parts = None
        if texts[:2] == [r"\frac", "{"] and texts[3:5] == ["}", "{"] and texts[6] == "}":
            parts, length = (texts[2], texts[5]), 7
        elif texts[0] == r"\frac" and re.fullmatch(r"\d\d", texts[1]):
            parts, length = texts[1], 2
        elif self.peek()[2] and texts[1] == "/":
            parts, length = (texts[0], texts[2]), 3
        if parts and parts[0].isdigit() and parts[1].isdigit() and 0 < int(parts[0]) < int(parts[1]):
            self.at += length
            value += Fraction(int(parts[0]), int(parts[1]))
        return ("number", value, None)

    def letters(self, word):
        """A variable, i, e, or a product of up to three variables; Python's 2j ends in the imaginary unit."""
        if len(word) > 3:
            raise Unreadable(f"the word {word!r}")
        nodes = [("constant", {"I": "i"}.get(c, c)) if c in "ieI" else ("symbol", c) for c in word]
        if word == "j" and self.at > 1 and self.peek(-2)[0] == "number":
            nodes = [("constant", "i")]
        if len(word) == 1:
            return self.subscript(word) if nodes[0][0] == "symbol" else nodes[0]
        node = nodes[0]
        for factor in nodes[1:]:
            node = ("mul", node, factor)
        return node

    def subscript(self, name):
        if not self.accept("_"):
            return ("symbol", name)
        braced = self.accept("{")
        label = self.peek()[1]
        self.at += 1
        if braced:
            self.expect("}")
        return ("symbol", f"{name}_{label}")

    def group(self, opening):
        """(a) and {a} are a itself; else a tuple, interval, set, vector or list, told apart by its brackets."""
        bars, self.bars = self.bars, 0
        if self.accept(*_CLOSING[opening]):
            return ("group", opening.strip("\\") + self.peek(-1)[1].strip("\\"), ())
        node = self.items()
        self.accept(",")  # Python's (5,)
        closing = self.expect(*_CLOSING[opening])
        self.bars = bars
        brackets = {r"\{\}": "{}", r"\langle\rangle": "()"}.get(opening + closing, opening + closing)
        if node[0] == "list":
            return ("group", brackets, node[1])
        return ("group", brackets, (node,)) if opening in ("[", r"\{") else node

    def function(self, name):
        if name == "sqrt":
            degree = None
            if self.accept("["):
                degree = self.sum()
                self.expect("]")
            return ("call", "root", (self.argument(), degree or ("number", Fraction(2), None)))
        if name == "Interval" and self.accept("."):
            name = self.expect(r"\open", r"\Lopen", r"\Ropen")[1:]
        base = exponent = None
        while sign := self.accept("_", "^"):
            if sign == "_":
                base = self.argument()
            else:
                exponent = self.argument()
        if self.accept("("):
            node = self.items()
            self.expect(")")
            arguments = node[1] if node[0] == "list" else (node,)
        else:
            arguments = (self.product(of_functions=False),)
        if exponent == ("neg", ("number", Fraction(1), None)):
            name, exponent = "arc" + name, None
        node = self.call(name, arguments + ((base,) if base else ()))
        return ("pow", node, exponent) if exponent else node

    def call(self, name, arguments):
        """Python's constructors become the nodes that the same thing in LaTeX would be."""
        if name in ("Matrix", "array") and len(arguments) == 1:
            return arguments[0]
        brackets = {"Interval": "[]", "open": "()", "Lopen": "(]", "Ropen": "[)", "FiniteSet": "{}"}.get(name)
        if brackets:
            infinite = [a in (("constant", "inf"), ("neg", ("constant", "inf"))) for a in arguments]
            if brackets != "{}" and len(arguments) == 2:
                brackets = ("(" if infinite[0] else brackets[0]) + (")" if infinite[1] else brackets[1])
            return ("group", brackets, tuple(arguments))
        if name == "Union" and len(arguments) > 1:
            node = arguments[0]
            for part in arguments[1:]:
                node = ("union", node, part)
            return node
        if name == "Rational" and len(arguments) == 2:
            return ("div", *arguments)
        return ("call", name, tuple(arguments))

    def matrix(self):
        self.expect("{")
        kind = self.peek()[1]
        self.at += 1
        self.expect("}")
        if kind not in ("pmatrix", "bmatrix", "matrix", "smallmatrix", "Bmatrix", "array"):
            raise Unreadable(f"the environment {kind}")
        if kind == "array":
            while not self.accept("}"):
                self.at += 1 if self.peek()[0] != "end" else _refuse("array without columns")
        rows = [[self.sum()]]
        while not self.accept(r"\end"):
            if self.expect("&", "\\\\") == "&":
                rows[-1].append(self.sum())
            elif self.peek()[1] != r"\end":
                rows.append([self.sum()])
        self.at += 3
        if len({len(row) for row in rows}) > 1:
            raise Unreadable("rows of different lengths")
        return ("matrix", tuple(map(tuple, rows)))


# Values. Rational ones are Fractions and exact; all others are real or complex numbers of 150 digits.


def evaluate(node, point):
    """The number that a node stands for, its symbols taken from `point`. Raises Unreadable, ZeroDivisionError."""
    match node:
        case ("number", value, _):
            return value
        case ("symbol", name):
            return point[name]
        case ("constant", "inf"):
            return mp.inf
        case ("constant", name):
            return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[name]
        case ("add", a, b):
            return add(evaluate(a, point), evaluate(b, point))
        case ("neg", a):
            return -evaluate(a, point)
        case ("mul", a, b):
            return multiply(evaluate(a, point), evaluate(b, point))
        case ("div", a, b):
            return multiply(evaluate(a, point), power(evaluate(b, point), Fraction(-1)))
        case ("pow", a, b):
            return power(evaluate(a, point), evaluate(b, point))
        case ("percent", a):
            return evaluate(a, point) / 100
        case ("degree", a):
            return multiply(evaluate(a, point), mp.pi / 180)
        case ("unit", a, _):
            return evaluate(a, point)
        case ("call", name, arguments):
            return call(name, [evaluate(argument, point) for argument in arguments])
    raise Unreadable(f"{node[0]} is not a number")


def bounded(value):
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Unreadable("too large a number")
        return value
    if mp.isnan(value):
        raise Unreadable("undefined")
    return value


def inexact(value):
    return tidy(mp.mpf(value.numerator) / value.denominator) if isinstance(value, Fraction) else value


def tidy(value, scale=None):
    """An inexact result without the parts that are rounding error beside `scale` (its own size by default).

    Where all of it is, it is an exact zero. Refuses what is too large or small for 150 digits.
    """
    value = mp.mpc(bounded(value))
    if mp.isinf(value):
        return value.real if not value.imag else _refuse("undefined")
    noise = EPSILON * (abs(value) if scale is None else scale)
    real, imaginary = (part if abs(part) > noise else mp.zero for part in (value.real, value.imag))
    if not real and not imaginary:
        return Fraction(0)
    if not 1 / LARGEST < abs(value) < LARGEST:
        raise Unreadable("out of range")
    return mp.mpc(real, imaginary) if imaginary else real


def add(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return bounded(a + b)
    if not a or not b:
        return a or b
    a, b = inexact(a), inexact(b)
    return tidy(a + b, scale=max(abs(a), abs(b)))


def multiply(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return bounded(a * b)
    if not a or not b:
        return Fraction(0)
    return tidy(inexact(a) * inexact(b))


def power(a, b):
    if isinstance(b, Fraction):
        if isinstance(a, Fraction):
            if b.denominator == 1:
                bits = max(a.numerator.bit_length(), a.denominator.bit_length())
                if abs(b) * bits > MAX_BITS and abs(a) not in (0, 1):
                    raise Unreadable("too large a power")
                return a ** int(b)
            root = exact_root(a, b.denominator)
            if root is not None:
                return power(root, Fraction(b.numerator))
        if b.denominator % 2 and b.denominator > 1 and not isinstance(a, mp.mpc) and a < 0:  # real odd roots
            return power(-a, b) * (-1) ** (b.numerator % 2)
    if not a:
        return Fraction(0) if not isinstance(b, mp.mpc) and b > 0 else _refuse("0 to a power that is not positive")
    a, b = inexact(a), inexact(b)
    if abs(b) * max(abs(mp.log(a)), 1) > 1000:
        raise Unreadable("too large a power")
    return tidy(mp.power(a, b))


def exact_root(a, n):
    """The rational n-th root of a Fraction >= 0, or None."""
    if a < 0 or n > 64:
        return None
    roots = []
    for part in (a.numerator, a.denominator):
        if n == 2:
            root = math.isqrt(part)
        elif part.bit_length() < 400:
            root = int(mp.nint(mp.root(part, n)))
        else:
            return None
        if root**n != part:
            return None
        roots.append(root)
    return Fraction(*roots)


def call(name, arguments):
    """One of the functions the parser knows, where it is defined and of a reasonable size."""
    if name == "root":
        return power(arguments[0], power(arguments[1], Fraction(-1)))
    if name == "cbrt":
        return power(arguments[0], Fraction(1, 3))
    if name in ("factorial", "binomial"):
        if not all(isinstance(n, Fraction) and n.denominator == 1 and 0 <= n <= 1500 for n in arguments):
            raise Unreadable(f"{name} of this number")
        return Fraction((math.factorial if name == "factorial" else math.comb)(*map(int, arguments)))
    x = arguments[0]
    if name == "abs" and len(arguments) == 1:
        return abs(x)
    if name in ("floor", "ceil") and len(arguments) == 1 and isinstance(x, Fraction):
        return Fraction(math.floor(x) if name == "floor" else math.ceil(x))
    if name in ("log", "ln", "lg") and x and (len(arguments) == 1 or (name == "log" and arguments[1])):
        base = [mp.mpf(10)] if name == "lg" else map(inexact, arguments[1:])
        return tidy(mp.log(inexact(x), *base), scale=1)
    function = {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan}.get(name) or getattr(mp, name, None)
    if function is None or len(arguments) != 1 or name in ("log", "ln", "lg"):
        raise Unreadable(f"{name} with {len(arguments)} arguments")
    x = mp.mpf(0) if not x else inexact(x)
    if abs(x) > (80 if name in ("exp", "sinh", "cosh", "tanh") else 10**9):
        raise Unreadable(f"{name} of too large a number")
    return tidy(function(x), scale=1)


def parts(node):
    """A node and all nodes within it."""
    yield node
    for child in node[1:]:
        if isinstance(child, tuple):
            for item in child if child and isinstance(child[0], tuple) else (child,):
                if isinstance(item, tuple) and item and isinstance(item[0], str):
                    yield from parts(item)


def symbols(node):
    return {part[1] for part in parts(node) if part[0] == "symbol"}


def points(names):
    """Random rational values for symbols, near 1 first and then farther out, always the same ones."""
    generator = random.Random(0)
    for i in range(24):
        scale = 1 if i < 12 else 9
        yield {
            name: scale * generator.choice((-1, 1)) * Fraction(generator.randrange(500_000, 2_000_000), 1_000_003)
            for name in sorted(names)
        }


def real_values(nodes, imaginary):
    """Values of some nodes at up to six points where they are defined, and real unless `imaginary`.

    Yields None where some are defined, or real, and others not: their domains differ.
    """
    found = 0
    names = set().union(*map(symbols, nodes))
    for point in points(names) if names else [{}]:
        values = []
        for node in nodes:
            try:
                value = evaluate(node, point)
                values.append(None if isinstance(value, mp.mpc) and names and not imaginary else value)
            except ZeroDivisionError:
                values.append(None)
        if any(value is None for value in values):
            if any(value is not None for value in values):
                yield None
            continue
        yield values
        found += 1
        if found == 6:
            return
    if names and found < 3:
        yield None


def equal_numbers(a, b):
    if any(not isinstance(x, Fraction) and mp.isinf(x) for x in (a, b)):
        return a == b
    return not add(a, -b)


def decimal_step(node):
    """One unit in the last place of a decimal that stands alone, or None."""
    while node[0] in ("neg", "percent", "degree", "unit"):
        node = node[1]
    return node[2] if node[0] == "number" else None


def near(p, g, a, b):
    """Whether values a and b of nodes p and g agree within the tolerance for decimals (see the module's head)."""
    if not any(part[0] == "number" and part[2] for node in (p, g) for part in parts(node)):
        return False
    difference, size = abs(inexact(a) - inexact(b)), abs(inexact(b))
    if not size or difference <= inexact(NOISE) * max(size, 1) or difference <= inexact(PLACES) < size * inexact(Fraction(1, 1000)):
        return difference <= inexact(PLACES) if size else difference <= inexact(NOISE)
    if any(isinstance(x, mp.mpc) for x in (a, b)) or (a < 0) != (b < 0) or difference > inexact(RELATIVE) * size:
        return False
    steps = [(step, x, y) for node, x, y in ((p, a, b), (g, b, a)) if (step := decimal_step(node))]
    if not steps:
        return False
    step, x, y = max(steps, key=lambda item: item[0])
    return difference <= inexact(step) / 2 or 0 <= abs(y) - abs(x) < step
