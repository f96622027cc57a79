"""Format numbers for people: three significant digits and a unit, signed percents, intervals."""

from __future__ import annotations

_UNITS = ("", " k", " M", " G", " T")


def human(count: float) -> str:
    """A count with a decimal unit.

    >>> human(0), human(999), human(11_689_512), human(1_814_073_344)
    ('0', '999', '11.7 M', '1.81 G')
    """
    return _scaled(count, 1000.0, _UNITS)


def human_bytes(count: float) -> str:
    """Bytes with a binary unit.

    >>> human_bytes(46_758_048)
    '44.6 MiB'
    """
    return _scaled(count, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB"))


def human_time(seconds: float) -> str:
    """Seconds; below one second, milliseconds.

    >>> human_time(0.01234), human_time(2.5)
    ('12.3 ms', '2.5 s')
    """
    return f"{_three(seconds * 1e3)} ms" if seconds < 1 else f"{_three(seconds)} s"


def percent(before: float, after: float) -> str:
    """The change from ``before`` to ``after``.

    >>> percent(100, 102.6), percent(100, 100), percent(50, 200), percent(0, 5), percent(1e6, 999_999)
    ('+2.6%', '+0.0%', '+300%', 'new', '+0.0%')
    """
    if before == 0:
        return "+0.0%" if after == 0 else "new"
    change = 100.0 * (after - before) / before
    return f"{change:+.0f}%" if abs(change) >= 100 else f"{round(change, 1) or 0.0:+.1f}%"  # never -0.0%


def span(interval: tuple[float, float]) -> str:
    """The ends of an interval of shares, in percent.

    >>> span((0.9031, 0.9544))
    '90.3 to 95.4'
    """
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _scaled(count: float, step: float, units: tuple[str, ...]) -> str:
    value, power = float(count), 0
    while abs(value) >= step * 0.9995 and power < len(units) - 1:
        value /= step
        power += 1
    return (f"{value:.0f}" if power == 0 else _three(value)) + units[power]


def _three(value: float) -> str:
    """Three significant digits, without trailing zeros or point."""
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
