"""The value of a parsed answer: exact where it is rational, else real or complex with 150 digits.

Every step is bounded, so that no answer can use up time or memory: the size of exact numbers, the range
of inexact ones, and the arguments of every function. What exceeds a bound is Unreadable.
"""

import math
import random
from fractions import Fraction

import mpmath

from math_parse import Unreadable, refuse

MAX_BITS = 20_000  # of an exact numerator or denominator; 2^{4181} is a gold answer of MATH

mp = mpmath.MPContext()
mp.dps = 150
EPSILON = mp.mpf(10) ** -100  # a smaller relative difference is rounding error
LARGEST = mp.mpf(10) ** 40  # beyond LARGEST and 1 / LARGEST, 150 digits might not tell two sums apart
RELATIVE = mp.mpf("1e-6")  # how near a rounded decimal must be
NOISE = mp.mpf("1e-12")  # relative error of ordinary double arithmetic
PLACES = mp.mpf("6e-11")  # GSM-Hard's gold answers are rounded to 10 decimal places


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
        return value.real if not value.imag else refuse("undefined")
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
        return Fraction(0) if not isinstance(b, mp.mpc) and b > 0 else refuse("0 to a power that is not positive")
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
    if isinstance(node, tuple):
        if node and isinstance(node[0], str):
            yield node
        for child in node:
            yield from parts(child)


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
            except Unreadable:  # out of range, just here
                if not names:
                    raise
                break
        if len(values) < len(nodes) or all(value is None for value in values):
            continue
        yield None if any(value is None for value in values) else values
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


def floating(value):
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def near(p, g, a, b):
    """Whether values a and b of nodes p and g agree within the tolerance for decimals (see the module's head)."""
    if not any(part[0] == "number" and part[2] for node in (p, g) for part in parts(node)):
        return False
    a, b = floating(a), floating(b)
    difference, size = abs(a - b), abs(b)
    if difference <= NOISE * (size or 1) or (decimal_step(g) and difference <= min(PLACES, size / 1000)):
        return True
    steps = [(floating(step), x, y) for node, x, y in ((p, a, b), (g, b, a)) if (step := decimal_step(node))]
    if not steps or difference > RELATIVE * size or any(isinstance(x, mp.mpc) for x in (a, b)):
        return False
    step, x, y = max(steps, key=lambda item: item[0])
    return difference <= step / 2 or 0 <= abs(y) - abs(x) < step
