r"""Do two mathematical answers mean the same? LaTeX, plain text and Python values, without eval.

    from math_equal import compare
    compare("0.5", r"\frac{1}{2}")        # (True, "symbolic")
    compare([3, 1.5707963267948966], r"\left( 3, \frac{\pi}{2} \right)")     # (True, "numeric")

math_parse.py reads both, and their values are compared: exactly where all is rational, with 150 digits
elsewhere, and, where there are variables, at six random rational points. (Two different polynomials of
degree d agree at all six with a probability below (d / 10^6)^6; Schwartz 1980, Zippel 1979.) Nothing is
simplified, so nothing can run away: the length of a text, the size of a number and the range of every
function are limited. What exceeds a limit is unreadable, and unreadable is never right.

Conventions. A unit, currency or degree sign may be left out, but two known units must agree. 50% is
0.5, and 50 where the gold answer has the sign or the question asks for per cent. A decimal with a
fractional part stands for the number that rounds (or is cut) to it, if they differ by less than one
part in a million; integers, fractions and 40.0 stand for themselves. "x =" before an answer may be
left out. "1, 2" is unordered; tuples, vectors and texts are ordered; (a, b] is not [a, b]. 52_8 needs
its base unless the question names one. Letters are variables, and their case counts.
"""

import re
from fractions import Fraction

from math_parse import MAX_CHARACTERS, UNITS, Unreadable, is_wording, read, refuse, same_wording, surface
from math_value import equal_numbers, evaluate, floating, mp, multiply, near, parts, power, real_values, symbols

_APPROXIMATELY = re.compile(r"\\approx|≈")  # a gold answer may say both: \$\dfrac23 \approx \$0.67


def compare(prediction, answer, question=None):
    """Whether a prediction (JSON value or text) equals the gold answer (text or number), and why.

    why: "exact", "text", "symbolic", "numeric" (a decimal within the tolerance) if they are equal;
    "different" or "unreadable" if not.
    """
    answer = answer if isinstance(answer, str) else str(answer)
    if isinstance(prediction, str) and len(prediction) > MAX_CHARACTERS:
        return False, "unreadable"
    if isinstance(prediction, str) and surface(prediction) == surface(answer):
        return True, "exact"
    comparison = Comparison(question or "")
    try:
        if is_wording(answer):
            words = prediction if isinstance(prediction, list) else [prediction]
            same = same_wording(", ".join(map(str, words)), answer)
            return same, "text" if same else "different"
        golds = [read(part) for part in _APPROXIMATELY.split(answer)]
        value, *others = map(read, _APPROXIMATELY.split(prediction) if isinstance(prediction, str) else [prediction])
        if others and is_name(value, gold=False):
            value = others[0]
        equal = any(comparison.same(value, gold) for gold in golds)
    except (Unreadable, ZeroDivisionError, RecursionError, ValueError):  # ValueError: an integer too long to print
        return False, "unreadable"
    return (True, comparison.why) if equal else (False, "different")


# Comparison of whole answers: what they are called, how they are bracketed, in which order their parts stand.


def is_name(node, gold):
    """Whether "node = ..." only names the answer: x, f(x), words; in a prediction also a product such as AB."""
    if node[0] in ("symbol", "text"):
        return True
    if node[0] != "mul" or not all(part[0] in ("mul", "symbol") for part in parts(node)):
        return False
    return not gold or (node[1][0] == "symbol" and node[1][1] in "fghpqrFGHPQR")


def named_value(node, gold):
    r"""The answer in "x = 5", "x \in [0, 1]" or "1 + 1 = 2"; the node itself where that is not its form."""
    if node[0] != "relation":
        return node
    operators, sides = node[1:]
    if operators == (r"\in",) and sides[0][0] == "symbol":
        return sides[1]
    if set(operators) == {"="}:
        if is_name(sides[0], gold) and (len(sides) == 2 or not gold):
            return sides[-1]
        if not any(map(symbols, sides)):
            first, *others = (evaluate(side, {}) for side in sides)
            return sides[-1] if all(equal_numbers(first, other) for other in others) else node
    return node


def both_signs(nodes):
    r"""The nodes, and for one with \pm two: with the upper signs, and with the lower ones."""
    result = []
    for node in nodes:
        result += [with_sign(node, 1), with_sign(node, -1)] if is_two_valued(node) else [node]
    return result


def is_two_valued(node):
    return node[0] not in ("list", "group", "matrix") and any(part[0] == "pm" for part in parts(node))


def with_sign(node, sign):
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "pm":
        a, b = with_sign(node[1], sign), with_sign(node[2], sign)
        return ("add", a, b if node[3] == sign else ("neg", b))
    return tuple(with_sign(child, sign) for child in node)


def without_marks(node):
    """A value without its degree and per cent signs; those inside a function (tan 15°) stay."""
    if node[0] in ("degree", "percent"):
        return without_marks(node[1])
    if node[0] in ("add", "mul", "div", "neg"):
        return (node[0], *map(without_marks, node[1:]))
    return node


def marks(node):
    """Which of "degree" and "percent" without_marks would take away."""
    return {part[0] for part in parts(node)} & {"degree", "percent"} if without_marks(node) != node else set()


def unit_name(words):
    """One spelling for a known unit ("square inches" is "in^2"); None for other words."""
    words = re.sub(r"\b(?:square|sq\.?)\s+(\w+)", r"\1^2", words.lower())
    words = re.sub(r"\bcubic\s+(\w+)", r"\1^3", words)
    names = []
    for word in re.sub(r"\s*(?:/|\bper\b)\s*", " / ", words).split():
        name, _, exponent = word.partition("^")
        spellings = (name, name.removesuffix("."), name.removesuffix("s"), name.removesuffix("es"))
        known = "/" if name == "/" else next((UNITS[spelling] for spelling in spellings if spelling in UNITS), None)
        if known is None:
            return None
        names.append(known + ("^" + exponent if exponent else ""))
    return " ".join(names)


def real_set(node):
    """A set of reals as sorted disjoint (low, low closed, high, high closed); None for what is no such set."""
    match node:
        case ("reals",):
            return [(-mp.inf, False, mp.inf, False)]
        case ("group", "{}", items):
            return merged((value, True, value, True) for value in map(real_constant, both_signs(items)))
        case ("group", brackets, (low, high)) if brackets[0] in "([":
            return merged([(real_constant(low), brackets[0] == "[", real_constant(high), brackets[1] == "]")])
        case ("union" | "minus", a, b):
            a, b = real_set(a), real_set(b)
            if a is None or b is None:
                return None
            return merged(a + b) if node[0] == "union" else without_points(a, b)
        case ("list", items, "or") if all(item[0] == "relation" for item in items):
            sets = [real_set(item) for item in items]
            if None in sets or len(symbols(node)) > 1:
                return None
            return merged([interval for part in sets for interval in part])
        case ("relation", (r"\in",), (("symbol", _), values)):
            return real_set(values)
        case ("relation", operators, sides):
            return solutions(operators, sides)
    return None


def real_constant(node):
    value = floating(evaluate(node, {})) if not symbols(node) else refuse("not a constant")
    return value if not isinstance(value, mp.mpc) else refuse("not real")


def merged(intervals):
    result = []
    for low, low_closed, high, high_closed in sorted(intervals, key=lambda interval: (interval[0], not interval[1])):
        if low > high or (low == high and not (low_closed and high_closed)):
            raise Unreadable("an interval that ends before it begins")
        if result and (low < result[-1][2] or (low == result[-1][2] and (low_closed or result[-1][3]))):
            before = result.pop()
            low, low_closed = before[:2]
            high, high_closed = max(before[2:], (high, high_closed))
        result.append((low, low_closed, high, high_closed))
    return result


def without_points(intervals, removed):
    for point, _, end, _ in removed:
        if point != end:
            return None
        cut = []
        for low, low_closed, high, high_closed in intervals:
            if low < point < high:
                cut += [(low, low_closed, point, False), (point, False, high, high_closed)]
            elif low != high or low != point:
                cut.append((low, low_closed and low != point, high, high_closed and high != point))
        intervals = cut
    return intervals


_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def solutions(operators, sides):
    r"""The reals that x < 5, -2 \le x < 7 or x \ne 3 leave for x; None for other relations."""
    if (len(operators) == 2 and operators[0] in (">", r"\ge")) or (len(operators) == 1 and sides[0][0] != "symbol"):
        operators, sides = tuple(_FLIPPED.get(operator) for operator in operators[::-1]), sides[::-1]
    if len(operators) == 2 and set(operators) <= {"<", r"\le"} and sides[1][0] == "symbol":
        return merged(
            [(real_constant(sides[0]), operators[0] == r"\le", real_constant(sides[2]), operators[1] == r"\le")]
        )
    if len(operators) != 1 or sides[0][0] != "symbol" or operators[0] not in _FLIPPED:
        return None
    value, operator = real_constant(sides[1]), operators[0]
    below, above = (-mp.inf, False, value, operator == r"\le"), (value, operator == r"\ge", mp.inf, False)
    return [below, above] if operator == r"\ne" else [below] if operator in ("<", r"\le") else [above]


# Which brackets of a prediction can stand for which of a gold answer ("": none, "json": a Python list or tuple),
# and whether the order counts there. A Python list cannot say that an end of an interval is open.
_BRACKETS = {
    "": ("", "json", "[]", "{}", "()"),
    "{}": ("{}", "json", "[]", ""),
    "()": ("()", "json"),
    "[]": ("[]", "json"),
    "(]": ("(]",),
    "[)": ("[)",),
}


class Comparison:
    """Compares a prediction's node with a gold node, and remembers in `why` whether a tolerance was needed."""

    def __init__(self, question):
        self.question = question.lower()
        self.why = "symbolic"

    def same(self, p, g):
        if p[0] == g[0] == "relation" and self.same_relations(p, g):
            return True
        p, g = (p, g) if p[0] == g[0] else (named_value(p, gold=False), named_value(g, gold=True))
        if g[0] not in ("group", "list", "matrix"):
            p = only_item(p, ("json", "[]", "{}"))
        if p[0] not in ("group", "list", "matrix"):
            g = only_item(g, ("{}",))
        kinds = {p[0], g[0]}
        if "text" in kinds:
            return p[0] == g[0] and p[1].lower() == g[1].lower()
        if "based" in kinds:
            return self.same_based(p, g)
        if kinds & {"union", "minus", "reals", "relation"} or (kinds == {"list"} and "or" in (p[2], g[2])):
            sets = real_set(p), real_set(g)
            if None not in sets:
                return same_sets(*sets)
        if "relation" in kinds:
            return False
        p, g = (("list", (node,), ",") if is_two_valued(node) else node for node in (p, g))
        if "matrix" in (p[0], g[0]):
            return self.same_matrices(p, g)
        if {p[0], g[0]} & {"list", "group"}:
            return self.same_collections(p, g)
        if "ratio" in kinds:
            return self.same_ratios(p, g)
        return self.same_values(p, g)

    def same_relations(self, p, g):
        """Equations are equal if the differences of their sides are proportional, inequalities if solved alike."""
        (p_operators, p_sides), (g_operators, g_sides) = p[1:], g[1:]
        if p_operators == g_operators == ("=",):
            if p_sides[0] == g_sides[0]:
                return self.same(p_sides[1], g_sides[1])
            return proportional(*(("add", left, ("neg", right)) for left, right in (p_sides, g_sides)))
        if p_operators == g_operators and p_sides[0] == g_sides[0]:
            return all(map(self.same, p_sides, g_sides))
        sets = (real_set(p), real_set(g)) if symbols(p) == symbols(g) else (None, None)
        return None not in sets and same_sets(*sets)

    def same_based(self, p, g):
        """The same digits in the same base, which may be left out where the question names it."""
        if p[0] == g[0]:
            return p[1:] == g[1:]
        if g[0] == "based":
            named = g[2] == 10 or re.search(r"\bbase\b|binary|octal|hexadecimal", self.question)
            return bool(named) and re.fullmatch(r"-?\d+", g[1]) and self.same(p, integer(g[1]))
        return p[2] == 10 and re.fullmatch(r"-?\d+", p[1]) and self.same(integer(p[1]), g)

    def same_matrices(self, p, g):
        """Same shape, same entries; a flat tuple or list is a column vector, or a row vector if the other is one."""
        p_rows, g_rows = rows(p), rows(g)
        if p_rows is None or g_rows is None:
            return False
        if p[0] == "group" and len(g_rows) == 1 and {*map(len, p_rows)} == {1}:
            g_rows = tuple((entry,) for entry in g_rows[0])
        return [*map(len, p_rows)] == [*map(len, g_rows)] and all(map(self.same, sum(p_rows, ()), sum(g_rows, ())))

    def same_collections(self, p, g):
        brackets = [{"list": "", "group": node[1]}.get(node[0]) for node in (p, g)]
        if None in brackets or brackets[0] not in _BRACKETS[brackets[1]]:
            return False
        items, golds = (both_signs(node[2] if node[0] == "group" else node[1]) for node in (p, g))
        if len(items) != len(golds):
            return False
        names = {item[2][0] for item in items if item[0] == "relation"}  # x = 1, y = 2 is not x = 2, y = 1
        ordered = brackets[1] not in ("", "{}") or brackets[0] == "()" or len(names) > 1
        if ordered or any(gold[0] == "text" for gold in golds):
            return all(map(self.same, items, golds))
        for gold in golds:
            match = next((item for item in items if self.same(item, gold)), None)
            if match is None:
                return False
            items.remove(match)
        return True

    def same_ratios(self, p, g):
        """3:5 is 3:5; where the question asks for a ratio, 6:10 and 3/5 are too."""
        if p[0] == g[0] and len(p[1]) == len(g[1]) and all(map(self.same_values, p[1], g[1])):
            return True
        if not re.search(r"\bratio\b|\bodds\b", self.question):
            return False
        p, g = (("div", *node[1]) if node[0] == "ratio" and len(node[1]) == 2 else node for node in (p, g))
        return "ratio" not in (p[0], g[0]) and self.same_values(p, g)

    def same_values(self, p, g):
        units = [unit_name(node[2]) if node[0] == "unit" else None for node in (p, g)]
        if None not in units and units[0] != units[1]:
            return False
        p, g = (node[1] if node[0] == "unit" else node for node in (p, g))
        if "ratio" in (p[0], g[0]):
            return self.same_ratios(p, g)
        if self.equal(p, g):
            return True
        p_marks, g_marks = marks(p), marks(g)
        if g_marks and not p_marks:
            return self.equal(p, without_marks(g))
        asked = "percent" not in p_marks or re.search(r"percent|per cent|%", self.question)
        return bool(p_marks and not g_marks and asked) and self.equal(without_marks(p), g)

    def equal(self, p, g):
        """Whether two expressions have the same value, at every point where they have one."""
        if p == g:
            return True
        imaginary = any(part == ("constant", "i") for node in (p, g) for part in parts(node))
        agreed = False
        for values in real_values((p, g), imaginary):
            if values is None:
                return False
            if not equal_numbers(*values):
                if symbols(p) or symbols(g) or not near(p, g, *values):
                    return False
                self.why = "numeric"
            agreed = True
        return agreed


def same_sets(a, b):
    return len(a) == len(b) and all(
        (low_closed, high_closed) == other[1::2] and equal_numbers(low, other[0]) and equal_numbers(high, other[2])
        for (low, low_closed, high, high_closed), other in zip(a, b, strict=True)
    )


def only_item(node, brackets):
    return node[2][0] if node[0] == "group" and node[1] in brackets and len(node[2]) == 1 else node


def rows(node):
    """The rows of a matrix, or of the tuples or lists that write one; None for other nodes."""
    if node[0] == "matrix":
        return node[1]
    if node[0] != "group" or node[1] not in ("json", "[]", "()"):
        return None
    return tuple(item[2] if item[0] == "group" else (item,) for item in node[2])


def proportional(p, g):
    """Whether p is a constant (not zero) times g, wherever both are real."""
    ratios = []
    for values in real_values((p, g), imaginary=False):
        if values is None or not all(values):
            return False
        ratios.append(multiply(values[0], power(values[1], Fraction(-1))))
    return len(ratios) > 1 and all(equal_numbers(ratio, ratios[0]) for ratio in ratios)


def integer(digits):
    return ("number", Fraction(int(digits)), None)
