r"""Reads mathematical answers: LaTeX, plain text and Python values become one kind of tree.

    from math_parse import read
    read(r"\frac{1}{2}")     # ("div", ("number", Fraction(1, 1), None), ("number", Fraction(2, 1), None))

A recursive-descent parser for what answers look like: expressions with mixed numbers, units, currency,
degrees and per cent; tuples, intervals, sets, lists, matrices, equations, inequalities, ratios, number
bases and words. Nothing is evaluated here and nothing is ever passed to eval; what the parser does not
know is Unreadable, for a misread answer could be counted as right.

Nodes are tuples, the kind first:
    ("number", Fraction, step)    step: one unit in the last decimal place, None for an integer
    ("symbol", name), ("constant", "pi" | "e" | "i" | "inf"), ("call", name, arguments), ("text", words)
    ("add" | "mul" | "div" | "pow", a, b), ("neg", a), ("pm", a, b, sign), ("percent" | "degree", a)
    ("unit", node, unit), ("based", digits, base), ("ratio", nodes), ("reals",), ("union" | "minus", a, b)
    ("list", nodes, separator), ("group", brackets, nodes), ("matrix", rows), ("relation", operators, sides)
"""

import re
from fractions import Fraction

MAX_CHARACTERS = 2000  # of one answer; 2^{4181}, a gold answer of MATH, has 1,259 digits
MAX_ITEMS = 100  # of a list, tuple, set or matrix
MAX_DEPTH = 40  # nested brackets


class Unreadable(Exception):
    """This text is not an answer that the parser knows, or its value is out of range."""


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
    **{r"\vert": "|", r"\varnothing": r"\emptyset", r"\backslash": r"\setminus", r"\degree": r"\circ"},
    **{r"\dbinom": r"\binom", r"\tbinom": r"\binom", r"\tg": r"\tan", r"\ctg": r"\cot", "€": "$", "£": "$"},
}
_FUNCTIONS = {
    *("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt cbrt abs floor ceil".split()),
    *("Rational Matrix array Interval Union FiniteSet Eq factorial binomial open Lopen Ropen".split()),
}
_WORDS = {
    **{name: "\\" + name for name in _FUNCTIONS | {"pi", "theta", "alpha", "beta"}},
    **{
        "asin": r"\arcsin",
        "acos": r"\arccos",
        "atan": r"\arctan",
        "Abs": r"\abs",
        "ceiling": r"\ceil",
        "Fraction": r"\Rational",
    },
    **{"oo": r"\infty", "inf": r"\infty", "infinity": r"\infty", "Reals": r"\Reals", "EmptySet": r"\emptyset"},
    **{"and": "and", "or": "or", "in": r"\in", "union": r"\cup"},
}
_GREEK = set("alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega triangle angle".split())
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Units that contradict each other; any other words after a number ("7 distinct integers") say nothing about it.
UNITS = {
    word: words.split()[0]
    for words in [
        *("$ dollar usd", "cent", "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre"),
        *("m meter metre", "in inch inche", "ft foot feet", "yd yard", "mi mile", "g gram", "kg kilogram", "lb pound"),
        *("oz ounce", "s sec second", "min minute", "h hr hour", "day", "week", "month", "year", "l liter litre"),
        *("ml milliliter millilitre", "mph", "a.m.", "p.m.", "degree deg", "rad radian", "mg milligram"),
    ]
    for word in words.split()
}
# Words that change what stands before them: "5 factorial" is not 5 with a unit.
_NOT_UNITS = {
    *("squared cubed factorial mod modulo plus minus times over base not more less least most to from".split()),
    *("if when unless except above below negative half halves third thirds quarter quarters fifths tenths".split()),
    *("hundredths thousandths millionths".split()),
}


def read(value):
    """The node for a JSON value or a text. Raises Unreadable."""
    if isinstance(value, str):
        return Parser(value).answer()
    if isinstance(value, bool) or value is None:
        return ("text", str(value).lower())
    if isinstance(value, int | float):
        return Parser(str(value)).answer() if abs(value) < 10**4000 else refuse("out of range")
    if isinstance(value, list | dict) and len(value) > MAX_ITEMS:
        raise Unreadable("too many items")
    if isinstance(value, list):
        return ("group", "json", tuple(read(item) for item in value))
    if isinstance(value, dict):
        nodes = tuple(Parser(f"{name} = {item}").answer() for name, item in value.items())
        return nodes[0] if len(nodes) == 1 else ("list", nodes, ",")
    raise Unreadable(f"a value of type {type(value).__name__}")


def refuse(message):
    raise Unreadable(message)


def clean(text):
    """One line of math without delimiters, closing punctuation and thousands separators."""
    text = re.sub(r"(?i)^\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s+(?=\S)", "", text.strip())
    text = text.translate(_UNICODE).strip().removesuffix(".").strip()
    for opening, closing in (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and len(text) > 2 and opening not in inner:
            text = inner.strip().removesuffix(".").strip()
    text = re.sub(r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\ )(?=\d{3}(?!\d))", "", text)
    if not re.search(r"[(\[]|\\\{", text):  # between brackets, a comma parts two numbers
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"(?i)(:\d\d)\s*([ap])\.?m\b", r"\1\\text{\2.m.}", text)
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
    return bool(re.search(r"\\text|\\mbox|(?<!\\)\b(?!sqrt|infinity)[a-z]{4}", text.lower()))


def same_wording(prediction, answer):
    """Equal words; a choice letter may come with its brackets or its text: (C), C. 14"""
    words, gold = (re.sub(r"^\((\w)\)$", r"\1", _plain_words(text)) for text in (prediction, answer))
    if len(gold) == 1:
        words = re.sub(r"^\(?(\w)[).:](?:\s.*)?$", r"\1", words)
    return re.sub(r"\s*([,;&])\s*", r"\1", words) == re.sub(r"\s*([,;&])\s*", r"\1", gold)


def tokenize(text):
    """A list of (kind, text, spaced): kind is "number", "word", "text" or "sign"; spaced: white space before it."""
    tokens, spaced = [], False
    for match in _TOKEN.finditer(text):
        kind, content = match.lastgroup, match[0]
        if kind == "space":
            spaced = True
            continue
        if kind == "text":
            content = match["text"].strip()
            name = content if content in _WORDS else content.strip("., ").lower()
            if name in ("and", "or") or _WORDS.get(name, "")[1:] in _FUNCTIONS:
                kind, content = "sign", _WORDS[name]
        elif kind == "word" and content == "U" and tokens and tokens[-1][1] in (")", "]"):
            kind, content = "sign", r"\cup"
        elif kind == "word" and content in _WORDS and not (content == "in" and tokens and tokens[-1][0] == "number"):
            kind, content = "sign", _WORDS[content]
        elif kind in ("command", "sign"):
            kind, content = "sign", _SAME_COMMAND.get(content, content)
        tokens.append((kind, content, spaced))
        spaced = False
    return tokens


# 52_8, \\text{A5}_{11}, x = 52_{\\text{base }8}, 52 (base 8)
_BASED = re.compile(
    r"(?:[a-zA-Z]\s*=\s*)?(?:\\text\{)?(-?[0-9A-Z]+)\}?\s*"
    r"(?:_\s*\{?(?:\\text\{\s*base\s*)?|\(?\s*(?:in )?base\s*)(\d{1,2})[\s})]*"
)
_CLOSING = {"(": ")]", "[": ")]", r"\{": (r"\}",), "{": "}", r"\langle": (r"\rangle",)}
_RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in"}


class Parser:
    """Recursive descent, one method a grammar level, from answer() down to atom()."""

    def __init__(self, text):
        self.text = clean(text) if len(text) <= MAX_CHARACTERS else refuse("too long")
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
        return self.accept(*signs) or refuse(f"{' or '.join(signs)} expected")

    def answer(self):
        if based := _BASED.fullmatch(self.text):
            return ("based", based[1], int(based[2]))
        node = self.items()
        return node if self.peek()[0] == "end" else refuse(f"unexpected {self.peek()[1]!r}")

    def items(self):
        """One relation, or several between commas, semicolons, "and" or "or"."""
        nodes, separator = [self.relation()], ","
        while self.accept(",", ";") or self.peek()[1] in ("and", "or"):
            separator = self.accept("or") or self.accept("and") or separator
            nodes.append(self.relation())
        if len(nodes) > MAX_ITEMS:
            raise Unreadable("too many items")
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
        kind, text, _ = self.peek()
        if kind == "text" or (kind == "word" and len(text) > 3):
            return ("text", self.unit())
        outer, self.currency = self.currency, False
        parts = [self.sum()]
        while self.accept(":"):
            parts.append(self.sum())
        node = parts[0] if len(parts) == 1 else ("ratio", tuple(parts))
        unit, self.currency = "$" if self.currency else "", outer
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
            is_unit = (spaced and (len(text) > 3 or text in UNITS)) or text in ("cm", "mm", "km", "kg", "ft")
            return len(text) == 1 or not is_unit
        if kind != "sign":
            return kind == "number" and self.peek(-1)[1] == ")"
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
        r"""What a LaTeX command or ^ takes: a {group}, or a letter; \frac takes one digit, ^ a whole number."""
        if self.accept("-"):
            return ("neg", self.argument())
        kind, text, _ = self.peek()
        if len(text) > 1 and (kind == "word" or (single_digit and kind == "number" and text.isdigit())):
            self.tokens[self.at : self.at + 1] = [(kind, text[0], False), (kind, text[1:], False)]
        if kind == "number":
            self.at += 1
            return self.number(self.peek(-1)[1])
        return self.atom()

    def atom(self):
        kind, text, _ = self.peek()
        self.at += 1
        if kind == "number":
            return self.mixed_number(self.number(text))
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
        if re.search(r"[eE].{5}", text):
            raise Unreadable("too large an exponent")
        value = Fraction(text)
        if value.denominator == 1:
            return ("number", value, None)
        mantissa, _, exponent = text.lower().partition("e")
        return ("number", value, Fraction(10) ** (int(exponent or 0) - len(mantissa.partition(".")[2])))

    def mixed_number(self, node):
        r"""The number with the fraction that follows it: 1\frac{4}{5} and 1 4/5. But 2\frac{3}{2} is a product."""
        texts = [self.peek(i)[1] for i in range(7)]
        fraction, length = None, 0
        if texts[:2] == [r"\frac", "{"] and texts[3:5] == ["}", "{"] and texts[6] == "}":
            fraction, length = (texts[2], texts[5]), 7
        elif texts[0] == r"\frac" and len(texts[1]) == 2:
            fraction, length = texts[1], 2
        elif self.peek()[2] and texts[1] == "/":
            fraction, length = (texts[0], texts[2]), 3
        if not self.peek(-1)[1].isdigit() or not fraction or not all(part.isdigit() for part in fraction):
            return node
        above, below = map(int, fraction)
        if not 0 < above < below:
            return node
        self.at += length
        return ("number", node[1] + Fraction(above, below), None)

    def letters(self, word):
        """A variable, i, e, or a product of variables; Python's 2j ends in the imaginary unit."""
        if len(word) > 6:
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
        return ("group", brackets, (node,)) if opening in ("[", r"\{") and node[0] != "matrix" else node

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
        if name == "Eq" and len(arguments) == 2:
            return ("relation", ("=",), tuple(arguments))
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
                self.at += 1 if self.peek()[0] != "end" else refuse("array without columns")
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
