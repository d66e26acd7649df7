r"""Mathematical expressions in LaTeX, plain text or Python's notation: one spelling, a tree, a value. For grading.py.

    read_value(clean(r"6\frac{1}{6}\text{ feet}"))     # Value(("+", ("number", 6), ("/", ...)), unit="foot")

Nothing is passed to eval: Parser knows a white list of operations. Rational values are exact (Fraction), others have 150
digits (mpmath). Expressions with variables are compared at six random rational points: two different polynomials of
degree d agree there with a probability below (d / 10^6)^6 (Schwartz 1980, Zippel 1979). They are real functions: where
both have no real value, they need not agree, so sqrt(1/n) is 1/sqrt(n), but sqrt(n^2) is not n. Lengths, depths and powers
are bounded: what exceeds a bound is Unreadable, and never right.
"""

import dataclasses
import itertools
import math
import operator
import random
import re
from decimal import Decimal
from fractions import Fraction

import mpmath

MAX_NODES = 400  # of one expression: operations, numbers and names
MAX_DEPTH = 40  # nested brackets, signs and powers
MAX_BITS = 20_000  # of an exact numerator or denominator; 2^{4181} is a gold answer of MATH
MAX_FACTORIAL = 1000
mp = mpmath.MPContext()  # a context of its own: the precision that others chose for mpmath stays as it is
mp.dps = 150
LARGEST = mp.mpf(10) ** 40  # of inexact numbers: beyond it and 1 / LARGEST, 150 digits might not tell two sums apart
ROUNDING = mp.mpf(10) ** -90  # smaller differences are errors of the 150-digit arithmetic


class Unreadable(ValueError):
    """The text is no answer that can be read, or its value is out of range."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An expression. unit: the words and the mark after it. step: one unit in the last place of a decimal, or 0.

    tree: ("number", Fraction), ("name", text), or an operation of OPERATIONS with its trees.
    """

    tree: tuple
    unit: str = ""
    step: Fraction = Fraction(0)


# ------------- Operations and names


def power(a, b):
    exact = isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1
    bits = max(a.numerator.bit_length(), a.denominator.bit_length()) if exact else max(abs(mp.mag(a)), 1)
    if abs(b) * bits > MAX_BITS:
        raise Unreadable("too large a power")
    return a ** int(b) if exact else mp.power(mp.convert(a), mp.convert(b))


def natural(*numbers):
    """The numbers as int; refuses what has no factorial here."""
    if any(not isinstance(n, Fraction) or n.denominator > 1 or not 0 <= n <= MAX_FACTORIAL for n in numbers):
        raise Unreadable("a factorial of such a number")
    return map(int, numbers)


EXACT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": power}
EXACT |= {"negative": operator.neg, "abs": abs, "Abs": abs, "Fraction": lambda a, b=1: a / b}
EXACT |= {"!": lambda n: Fraction(math.factorial(*natural(n)))}
EXACT |= {"binomial": lambda n, k: Fraction(math.comb(*natural(n, k)))}
FUNCTIONS = {name: getattr(mp, name) for name in "sqrt cbrt sin cos tan cot sec csc exp log asin acos atan".split()}
FUNCTIONS |= {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.log, "floor": mp.floor, "ceil": mp.ceil}
OPERATIONS = EXACT | FUNCTIONS
CALLS = {name: name for name in OPERATIONS if name.isalpha() and name != "negative"}
CALLS |= {"Rational": "Fraction", "comb": "binomial", "factorial": "!"}
CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "E": +mp.e, "i": mp.mpc(0, 1), "I": mp.mpc(0, 1), "infty": mp.inf}
MARKS = {"percent": Fraction(1, 100), "degree": mp.pi / 180}
GREEK = "alpha beta gamma delta epsilon theta lambda mu phi varphi omega rho sigma tau".split()

# ------------- One spelling for each thing

SPELLINGS = {  # ours: what others write; a spelling that ends in a letter ends a word
    **{
        "*": r"\cdot \times × · ⋅",
        "/": r"\div ÷",
        "-": "− – \u2212",
        "^": "**",
        "^2": "²",
        "^3": "³",
        "=": r"== \in ∈",
    },
    **{"≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "≠": r"\ne \neq !=", "<": r"\lt", ">": r"\gt"},
    **{"≈": r"\approx", "∪": r"\cup", "±": r"\pm", " or ": r"\lor \vee ∨", " and ": r"\land \wedge ∧"},
    **{r"\infty ": "∞ oo inf infinity Infinity", r"\pi ": "π", r"\sqrt ": "√", r"\frac": r"\dfrac \tfrac \cfrac"},
    **{"$": r"\$", "{": r"\{ \lbrace", "}": r"\} \rbrace", "{}": r"\emptyset \varnothing ∅ EmptySet set()"},
    **{" degree ": r"^\circ ^{\circ} ° degrees deg", " percent ": r"\% %", "|": r"\vert \lvert \rvert \mid"},
    **{
        "floor(": r"\lfloor ⌊",
        "ceil(": r"\lceil ⌈",
        "(": r"\langle ⟨",
        ")": r"\rfloor \rceil \rangle ⌋ ⌉ ⟩",
        r"\binom": r"\dbinom \tbinom",
    },
    **{r"\text": r"\textbf \textit \textrm \textnormal \mbox \mathrm \mathbf \operatorname \textsf", "\\\\": "\\\\"},
    **{" ": r"\left \right \boxed \displaystyle \quad \qquad \, \; \: \! ~ \( \) \[ \] \big \Big \bigl \bigr"},
}
SPELLINGS = {old: new for new, spellings in SPELLINGS.items() for old in spellings.split()} | {"\\ ": " "}
SPELLING = re.compile(
    "|".join(
        r"(?<![a-zA-Z\\])" * s[0].isalpha() + re.escape(s) + r"(?![a-zA-Z])" * s[-1].isalpha()
        for s in sorted(SPELLINGS, key=len)[::-1]
    )
)
SCALARS = "u?int|float|complex|str|bool|Integer|Float|Decimal|mpf|mpc"
DIGIT = r"\{?(\d+)\}?"
CLEANING = [  # (pattern, replacement), in this order
    (r"^\$+((?:\\\$|[^$])+)\$+$", r"\1"),  # $5$
    (r"(?<!\\)\$(?=\S)((?:\\\$|[^$])*?(?<=\S))\$(?!\d)", r"\1"),  # $x=5$ or $x=6$; not $5 and $6 (Pandoc's rule)
    (r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\ )(?=\d{3}(?!\d))", ""),  # 10,\!080
    (r"\\\\\s*\[-?[\d.]+\s*[a-z]{2}\]", r"\\\\"),  # the end of a row: \\[6pt]
    (r"(?<!\w)(['\"])([^'\"]*)\1", r"\2"),  # ['A', 'B']
    (r"\b(?:np|numpy|sympy|math|cmath|mpmath|fractions|decimal|collections)\.(?=[a-zA-Z])", ""),  # np.array
    (rf"\b(?:{SCALARS})\d*_?(?=\()|,\s*dtype=[^()]*(?=\))", ""),  # [int64(1), Decimal('0.5')]
    (r"[₀-₉]+", lambda match: "_" + "".join(str(ord(digit) - ord("₀")) for digit in match[0])),  # 52₈
    (r"\s*\(?(?:\bbase|\\text\s*\{\s*base\s*\})\s*(\d+)\)?$|_\s*\{(\w+)\}", r"_\1\2"),  # 52 (base 8), 52_{8}
    (r"\\text\s*\{([^{}]*)\}(?=_)", r"\1"),  # \text{A5}_{11}
    (SPELLING, lambda match: SPELLINGS[match[0]]),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?\s*(\d+)\}?", lambda match: repeating(*match.groups())),  # 0.\overline{3}
    (rf"\\text\s*\{{\s*({'|'.join([*CALLS, *MARKS])})\s*\}}", r" \1 "),  # \text{percent}
    (r"\\text\s*\{([^{}a-zA-Z]*(?:and|or)?[^{}a-zA-Z]*)\}", r" \1 "),  # \text{5 or 6}
    (r"\bEq\(([^,()]*),([^()]*)\)", r"\1=\2"),
    (
        r"\[?\s*\\begin\s*\{([pbB]?matrix|array)\}(?:\s*\{[lcr|]*\})?(.*?)\\end\s*\{\1\}\s*\]?",
        lambda match: rows(match[2]),
    ),
    (r"(?<=\))\s*\|\s*(?=\()", " or "),  # (x < 2) | (3 < x)
    (r"(?<=\))\s*&\s*(?=\()", " and "),
    (r"(?<=[)\]}])\s*U\s*(?=[(\[{])", "∪"),
    (r"(?<=[{,])\s*([a-zA-Z]\w*): ", r"\1="),  # {x: -2, y: 3}
    (r"\(([^()<>≤≥]+[<≤]) (\w)\) and \(\2 ([<≤][^()<>≤≥]+)\)", r"\1 \2 \3"),  # (2 <= x) & (x < 5)
    (r"\s+", " "),
    (
        rf"(?<![\w.^}})/*!])(?<![a-z] )(\d+)(?: ?\\frac ?{DIGIT} ?{DIGIT}| (\d+)/(\d+))(?!\d)",
        r"(\1+\2\4/\3\5)",
    ),  # 1\frac45
    (r"^\[[][\d .eE+-]*\]$", lambda match: re.sub(r"(?<=[\d.\]]) (?=-?[\d.\[])", ",", match[0])),  # [1. 2.] of numpy
    (r"^[^a-df-ik-zA-Z]*$", lambda match: re.sub(r"(?<=[\d.])j", "i", match[0])),  # 6-5j, if j is the only letter
]


def repeating(whole, start, digits):
    """The fraction of a repeating decimal."""
    return f"({int(whole + start + digits) - int((whole + start) or 0)}/{10 ** len(start) * (10 ** len(digits) - 1)})"


def rows(text):
    """The rows of a LaTeX matrix as a list of lists."""
    return "[" + ",".join(f"[{row.replace('&', ',')}]" for row in text.split("\\\\") if row.strip()) + "]"


def clean(text):
    """The text without delimiters, closing points and thousands separators, and with one spelling per symbol.

    A matrix becomes [[a,b],[c,d]], as sympy prints it.
    """
    text = text.strip().rstrip(" .")
    for pattern, replacement in CLEANING:
        text = re.sub(pattern, replacement, text).strip()
    text = text.rstrip(" .")
    if not re.search(r"[(\[]|(?<!\\text)\{", text):  # between brackets, a comma separates two numbers
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    return text


def depths(text):
    """0, and the depth of brackets after each character."""
    return [0, *itertools.accumulate((c in "([{") - (c in ")]}") for c in text)]


def cuts(text, separators):
    """The positions of those separators (single characters) that stand outside all brackets."""
    return [i for i, depth in enumerate(depths(text)[1:]) if depth == 0 and text[i] in separators]


def split(text, separators):
    """The pieces of a text between those separators."""
    at = cuts(text, separators)
    return [text[i + 1 : j].strip() for i, j in zip([-1, *at], [*at, len(text)], strict=True)]


# ------------- An expression and the words after it

# The words after a value: those in \text{...}, others of four letters, and short units. Other letters are variables.
WORDS = re.compile(
    r"(?:(?:\s*\\text\s*\{[^{}]*\}|\s+(?!degree|percent|sin|cos|tan|log|sqrt)(?:[a-zA-Z]{4,}|cm|mm|km|kg|in|ft|mph|sq|USD|(?i:[ap]\.?m))\b\.?)"
    r"(?:\s*\^\s*\{?\d\}?)?)*$"
)
NOT_UNITS = re.compile(  # digits, and words that change the value before them: "5 factorial" is not 5 with a unit
    r"(?<!\^)\d|\b(squared|cubed|factorial|mod|modulo|plus|minus|times|over|base|not|more|less|least|most|to|from|if|"
    r"when|unless|except|above|below|negative|hal(f|ves)|(third|quarter|fifth|tenth|hundredth|thousandth|millionth)s?|"
    r"dozen|hundred|thousand|million|billion|trillion)\b"
)
UNITS = {"centimeter": "cm", "millimeter": "mm", "kilometer": "km", "meter": "m", "kilogram": "kg", "gram": "g"}
UNITS |= {"inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "usd": "dollar", "mph": "mile per hour", "h": "hour"}


def read_value(text):
    """The Value of a cleaned expression, with or without words after it."""
    text = re.sub(r"^(-?)\s*\$(.*)", r"\1\2 dollars", text)
    start = WORDS.search(text).start()
    text, words = text[:start], text[start:].lower()
    if NOT_UNITS.search(words):
        raise Unreadable(f"{words!r} after a value")
    words = re.sub(r"\\text|s\b|[^a-z^\d ]", "", words.replace("metre", "meter"))  # cm^{2} is cm^2, hours are an hour
    words = re.sub(r"[a-z]+", lambda match: UNITS.get(match[0], match[0]), words).replace(" ", "")
    words = re.sub(r"^sq(?:uare)?(.*)", r"\1^2", words)
    unit = " ".join(re.findall("degree|percent", text) + [words] * bool(words))
    step = Fraction(0)
    if re.fullmatch(r"-?\d*\.?\d+([eE]-?\d{1,3})?", text) and Fraction(text).denominator > 1:
        step = Fraction(10) ** Decimal(text).as_tuple().exponent
    return Value(Parser(text).parse(), unit, step)


# ------------- From a text to a tree

TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d*[.^]))?)|(?P<name>\\?[a-zA-Z]+)|(?P<sign>.))"
)
CLOSING = {"(": ")", "[": "]", "{": "}"}


class Parser:
    r"""Recursive descent. Products may be written without a sign: 2xy, 3\sqrt{2}, (a+5)(b+2).

    What may mean two things is Unreadable: 1/ab, \sin x/2, 2\frac{3}{2}, 5!!.
    """

    def __init__(self, text):
        self.text = text
        self.at = 0
        self.nodes = 0
        self.bars = 0  # open bars of |x|
        self.tokens = []  # of (kind, text): kinds "number", "name", "call", "command" and "sign"
        for match in TOKEN.finditer(text):
            self.tokens += (
                self.split_names(match[0].strip()) if match["name"] else [(match.lastgroup, match[0].strip())]
            )

    def split_names(self, name):
        """The tokens of a run of letters: xy is a product, AB and \\theta are names, sin is a function."""
        plain = name.lstrip("\\")
        if plain in CALLS:
            return [("call", plain)]
        if plain in ("frac", "binom"):
            return [("command", plain)]
        if plain in CONSTANTS or plain in MARKS or plain in GREEK:
            return [("name", plain)]
        if name != plain or plain in ("nan", "zoo") or (len(plain) > 3 and not plain.isupper()):
            raise Unreadable(f"the word {name!r}")
        return [("name", name) for name in ([plain] if plain.isupper() else plain)]

    def fail(self):
        raise Unreadable(f"{self.text[:80]!r} at token {self.at}")

    def node(self, *tree):
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise Unreadable("too long an expression")
        return tree

    def peek(self, ahead=0):
        """(kind, text) of a token that is not read yet; ("end", "") after the last."""
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "")

    def take(self, *texts):
        """Read the next token if it is one of these; returns its text, or None."""
        text = self.peek()[1]
        if text not in texts:
            return None
        self.at += 1
        return text

    def parse(self):
        tree = self.sum()
        if self.at < len(self.tokens):
            self.fail()
        return tree

    def sum(self):
        tree = self.product()
        while sign := self.take("+", "-"):
            tree = self.node(sign, tree, self.product())
        return tree

    def product(self):
        tree = self.factor()
        divided = False  # by something other than a number: 1/ab
        while True:
            if sign := self.take("*", "/"):
                tree = self.node(sign, tree, self.factor())
                divided = sign == "/" and self.tokens[self.at - 1][0] != "number"
            elif self.starts_factor() and not divided:
                tree = self.node("*", tree, self.power())
            else:
                return tree

    def starts_factor(self):
        kind, text = self.peek()
        after_bracket = self.at > 0 and self.tokens[self.at - 1][1] in CLOSING.values()
        opening = text in CLOSING or (text == "|" and not self.bars)
        return kind in ("name", "call", "command") or opening or (kind == "number" and after_bracket)

    def factor(self):
        """A power with signs before it."""
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        tree = self.power()
        return self.node("negative", tree) if negative else tree

    def power(self):
        tree = self.operand()
        if self.take("!"):
            tree = self.node("!", tree)
        return self.node("^", tree, self.exponent()) if self.take("^") else tree

    def exponent(self):
        if self.take("-"):
            return self.node("negative", self.exponent())
        tree = self.operand()
        return self.node("^", tree, self.exponent()) if self.take("^") else tree

    def operand(self):
        """A number, a name, a call, a fraction, or a sum in brackets."""
        kind, text = self.peek()
        self.at += 1
        if kind == "number":
            return self.node("number", Fraction(text))
        if kind == "name":
            if self.take("_"):
                text += "_" + (self.peek()[1] or self.fail())
                self.at += 1
            return self.node("name", text)
        if kind == "command":
            numbers = self.argument(), self.argument()
            return self.node("/" if text == "frac" else "binomial", *numbers)
        if kind == "call":
            return self.call(text)
        if text in CLOSING:
            tree = self.sum()
            return tree if self.take(CLOSING[text]) else self.fail()
        if text == "|":
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            return self.node("abs", tree) if self.take("|") else self.fail()
        self.fail()

    def argument(self):
        r"""The argument of a LaTeX command: {...}, or one digit as in \frac43, or one name."""
        kind, text = self.peek()
        if kind == "number" and len(text) > 1 and text.isdigit():
            self.tokens[self.at : self.at + 1] = [(kind, text[0]), (kind, text[1:])]
        return self.operand()

    def call(self, name):
        r"""A function after its name: f(x), f^2(x), \sqrt[3]{x}, \log_2 8, \sin 2x."""
        if name == "sqrt" and self.take("["):
            index = self.sum()
            self.take("]") or self.fail()
            return self.node("^", self.argument(), self.node("/", ("number", Fraction(1)), index))
        base = [self.operand()] if name == "log" and self.take("_") else []
        exponent = self.exponent() if self.take("^") else None
        bracket = self.take("(", "{")
        arguments = [self.sum() if bracket else self.operand() if name == "sqrt" else self.bare_argument()]
        while bracket and self.take(","):
            arguments.append(self.sum())
        if bracket and not self.take(CLOSING[bracket]):
            self.fail()
        if exponent == ("negative", ("number", 1)):
            name, exponent = f"a{name}", None  # \tan^{-1}
        arguments += base
        if name not in CALLS or len(arguments) not in ARGUMENTS.get(name, (1,)):
            self.fail()
        tree = self.node(CALLS[name], *arguments)
        return self.node("^", tree, exponent) if exponent else tree

    def bare_argument(self):
        r"""2x in \sin 2x: a product of numbers, names, fractions and roots."""
        self.peek()[0] != "call" or self.peek()[1] == "sqrt" or self.fail()
        tree = self.power()
        while self.peek()[0] in ("name", "command") or self.peek()[1] == "sqrt":
            tree = self.node("*", tree, self.power())
        if self.peek()[1] in ("/", "*", "|", "!", *CLOSING) and self.peek(1)[0] != "call":
            self.fail()
        return tree


ARGUMENTS = {"binomial": (2,), "comb": (2,), "log": (1, 2), "Fraction": (1, 2), "Rational": (1, 2)}  # else one

# ------------- Values


def evaluate(tree, names):
    """The number that a tree stands for, a Fraction or an mpmath number; names: the values of the names.

    Raises ValueError or ArithmeticError where there is none, or where it is out of range.
    """
    operation, *parts = tree
    if operation == "number":
        return parts[0]
    if operation == "name":
        return names[parts[0]]
    values = [evaluate(part, names) for part in parts]
    if operation == "negative":
        return -values[0]
    if operation not in EXACT or not all(isinstance(value, Fraction) for value in values):
        values = map(mp.convert, values)
    value = OPERATIONS[operation](*values)
    if isinstance(value, Fraction):
        in_range = max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS
    else:
        value = mp.chop(value, tol=ROUNDING)
        in_range = not value or 1 / LARGEST < abs(value) < LARGEST
    if not in_range:
        raise Unreadable("out of range")
    return value


def variables(tree):
    """The names in a tree that are no constants, marks included."""
    if tree[0] == "name":
        return {tree[1]} - set(CONSTANTS)
    return set().union(*map(variables, tree[1:])) if tree[0] != "number" else set()


def values_at_points(prediction, gold, constants):
    """The values of two trees at six random points, the first three positive; at one point if there is no variable."""
    names = sorted((variables(prediction) | variables(gold)) - set(constants))
    generator = random.Random(0)
    for i in range(6 if names else 1):
        point = {name: Fraction(generator.randrange(-2_000_000 * (i > 2), 2_000_000), 1_000_003) for name in names}
        yield evaluate(prediction, constants | point), evaluate(gold, constants | point)


def close(a, b, allowed=0):
    """Whether two numbers differ by no more than allowed, or by rounding. Fractions have no rounding."""
    if a == b or (isinstance(a, Fraction) and isinstance(b, Fraction)):
        return a == b or abs(a - b) <= allowed
    a, b = mp.convert(a), mp.convert(b)
    return bool(abs(a - b) <= max(ROUNDING * max(abs(a), abs(b), 1), mp.convert(allowed)) < mp.inf)


def is_real(number):
    return isinstance(number, Fraction) or not mp.im(number)


def same_value(prediction, gold, question):
    """Whether two Values agree, with the marks ° and % or without them: 90 is 90°, and so is pi/2."""
    if prediction.unit and gold.unit and prediction.unit != gold.unit:
        return False
    if same_number(prediction, gold, CONSTANTS | MARKS):
        return True
    needless = "percent" not in prediction.unit or "percent" in gold.unit or re.search("percent|per cent|%", question)
    return bool(needless) and same_number(prediction, gold, CONSTANTS | dict.fromkeys(MARKS, Fraction(1)))


def same_number(prediction, gold, constants):
    """Whether two Values are equal at all points where one is real; if there are no variables, within a tolerance."""
    pairs = list(values_at_points(prediction.tree, gold.tree, constants))
    if len(pairs) == 1:
        a, b = pairs[0]
        size = b and max(abs(a), abs(b), key=mp.convert)
        return close(a, b, tolerance(size, max(prediction.step, gold.step), gold.step))
    real = [(a, b) for a, b in pairs if is_real(a) or is_real(b)]
    return all(close(a, b) for a, b in real or pairs)


def tolerance(size, step, gold_step):
    """How far apart two numbers of that size may be if one is a decimal, with `step` in its last place."""
    if not step:
        return 0
    number = Fraction if isinstance(size, Fraction) else mp.convert
    doubles = (size or 1) / number(10**12)
    rounded = min(number(step / 2), size / 10**6)
    gsm_hard = min(number(Fraction(6, 10**11)), size / 1000) if gold_step else 0  # it rounds its answers to 10 places
    return max(doubles, rounded, gsm_hard)


def proportion(prediction, gold):
    """The constant factor between two trees that have variables; None if there is none: 2x - 4 is 2 times x - 2."""
    pairs = list(values_at_points(prediction, gold, CONSTANTS | MARKS))
    (a0, b0), *others = pairs
    if not others or not a0 or not b0 or not all(close(a * b0, b * a0) for a, b in others):
        return None
    return a0 / b0
