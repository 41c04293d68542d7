"""Numbers and names as people read them."""

import math

DECADE = math.log(10)  # nats
_SHARES = (
    (1 / 10, "a tenth"),
    (1 / 6, "a sixth"),
    (1 / 5, "a fifth"),
    (1 / 4, "a quarter"),
    (1 / 3, "a third"),
    (2 / 5, "two fifths"),
    (1 / 2, "half"),
    (3 / 5, "three fifths"),
    (2 / 3, "two thirds"),
    (3 / 4, "three quarters"),
    (4 / 5, "four fifths"),
    (9 / 10, "nine tenths"),
    (1.0, "all"),
)


def share(fraction: float) -> str:
    """A fraction between 0 and 1 in words, to the nearest common one."""
    if fraction < 0.075:
        return "less than a tenth"
    return min(_SHARES, key=lambda entry: abs(entry[0] - fraction))[1]


def number(value: float, places: int | None = None) -> str:
    """Three significant digits, or ``places`` after the point; plain where it is short enough."""
    if not math.isfinite(value):
        return "infinite" if value > 0 else ("-infinite" if value < 0 else "undefined")
    if places is not None:
        return f"{round(value, places) + 0.0:.{places}f}"  # + 0.0 turns -0.0 into 0.0
    rounded = float(f"{value:.3g}")
    if rounded == 0 or 1e-3 <= abs(rounded) < 1e5:
        return f"{rounded:,.10g}"
    mantissa, _, exponent = f"{rounded:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def signed(value: float) -> str:
    """Two digits after the point and a sign, with a minus as wide as the plus."""
    return f"{value + 0.0:+.2f}".replace("-", "−")


def percent(fraction: float) -> str:
    """A fraction as a percentage, with one digit after the point where that says something."""
    amount = 100 * fraction
    return f"{amount:.0f} %" if amount >= 10 or amount == round(amount) else f"{amount:.1f} %"


def readable(name: str) -> str:
    """A name without characters that move the cursor or break a page; they appear escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
