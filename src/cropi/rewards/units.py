r"""Units that may stand beside a value in an answer, in all their writings.

Words that were text in LaTeX are written ⟦so⟧; plain letters are a unit only at the end of a value, and two at least.
"""

from __future__ import annotations

import re
from collections import Counter

Unit = tuple[tuple[str, int], ...]  # units of measure and their powers, in alphabetical order

PERCENT: Unit = (("%", 1),)  # stays with the value: it changes it

# Each with its other writings; plurals in -s and -es are added.
_MEASURES = """
m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|nm nanometer|inch in
foot ft feet|yard yd|mile mi|g gram gramme gm|kg kilogram kilo|mg milligram|ton tonne|pound lb|ounce oz
s sec second|ms millisecond|min minute|h hr hour|day|week wk|month|year yr|decade|century centurie|am|pm
L l liter litre|mL ml milliliter millilitre|gallon gal|quart qt|pint|cup|acre|hectare ha|N newton|J joule|kJ|W watt|kW
V volt|A amp ampere|ohm|Pa pascal|Hz hertz|kHz|MHz|K kelvin|C celsius|F fahrenheit|mol mole|cal calorie|kcal|bit|byte
mile/h mph|km/h kph kmh kmph|rpm|radian rad|degree deg °|dollar usd buck|cent ¢|€ euro|£ gbp|¥ yen|₹ rupee rs
person people|man men|woman women|child children|die dice|vertex vertice|penny pennie|candy candie
"""
_COUNTED = """
unit point time way student boy girl adult kid player member team class game match book page word letter card coin
marble ball toy block tile cube box bag bottle jar piece slice pie cake cookie apple orange banana egg flower tree
plant seed animal dog cat cow bird chicken rabbit fish monkey horse sheep car truck bus train bike plane boat house
room table chair seat desk ticket stamp sticker pencil pen crayon shirt shoe sock hat ribbon nickel dime quarter side
edge face corner diagonal angle triangle square rectangle circle line segment region term digit number integer
solution root factor divisor multiple zero prime pair group set row column step lap trip turn round vote worker
employee customer guest friend family teacher doctor soldier mark arrangement combination permutation outcome element
subset path sequence pupil problem question test goal item object dot muffin cupcake sandwich pizza meal gift present
bead button stick rope brick
"""
_NAMES = {
    writing: line.split()[0]
    for line in [*re.split(r"[|\n]", _MEASURES.strip()), *_COUNTED.split()]
    for name in line.split()
    for writing in ((name, name + "s", name + "es") if len(name) > 1 else (name,))
}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_CURRENCY = {r"\$": "dollar", "€": "€", "£": "£", "¥": "¥", "₹": "₹"}
_PRICE = re.compile(r"(\\\$|[€£¥₹])\s*([-+]?[\d.,]*\d|[^\d,;]*$|\\[^,;]*)|([\d}])\s*(\\\$|[€£¥₹])")
_ELEMENT = (
    r"(?:⟦(?P<text{0}>[^⟧]+)⟧|(?<![A-Za-z\\⟦])(?P<bare{0}>[A-Za-z]{{2,}})(?![A-Za-z⟧])|(?P<sign{0}>[¢°]))\.?"
    r"(?:\s*\^\s*{{?\s*(?P<power{0}>-?\d)\s*}}?|(?<=⟧)(?P<digit{0}>[23])(?!\d))?"
)
_ONE = re.compile(r"(?P<over>/)?\s*(?:\\cdot|[·*-])?\s*" + _ELEMENT.format(""))
_RUN = re.compile(
    rf"(?<=[\w)}}\]|])\s*(?:{_ELEMENT.format(1)})(?:\s*(?:/|\\cdot(?![A-Za-z])|[·*-])?\s*(?:{_ELEMENT.format(2)}))*"
)
_FRACTION = re.compile(r"\\frac\s*{\s*((?:⟦\w+⟧(?:\^\d)?\s*)+)}\s*{\s*((?:⟦\w+⟧(?:\^\d)?\s*)+)}")
_LETTER = re.compile(r"([-+]?[\d.,]*\d)\s+([mgshLlNJWVKF])")  # 5 m, not 5m


def without_units(latex: str) -> tuple[list[str], list[Unit]]:
    """The values of an answer, cut after each unit where these are several, and the different units in their order."""
    latex = re.sub(r"\^\s*{?\s*\\circ\s*}?|\\degree", "°", _FRACTION.sub(r"\1/\2", latex))
    latex = re.sub("°\\s*([CF])$", "°⟦\\1⟧", _LETTER.sub(r"\1⟦\2⟧", latex) if _LETTER.fullmatch(latex) else latex)
    latex = _PRICE.sub(lambda at: f"{at[2] or at[3] or ''}⟦{_CURRENCY[at[1] or at[4]]}⟧", latex)
    found = list[Unit]()

    def cut(run: re.Match[str]) -> str:
        unit = _unit(run[0])
        after = latex[run.end() :].lstrip()
        if unit is None or ("⟦" not in run[0] and after and not re.match(r"[\d,;)\]]", after)):
            return run[0]
        found.append(unit)
        return "\x1f"

    cut_up = _RUN.sub(cut, latex)
    if len(set(found)) > 1:  # 2 hours 30 minutes
        values = [part.strip(" ,") for part in cut_up.split("\x1f")]
        return (values[:-1] if not values[-1] else values), found
    return [cut_up.replace("\x1f", " ").strip()], found[:1]


def _unit(run: str) -> Unit | None:
    """Base units with their powers; None where a word is none."""
    powers, sign, factor = Counter[str](), 1, 1
    elements = list(_ONE.finditer(run))
    for at, one in enumerate(elements):
        name = one["text"] or one["bare"] or one["sign"]
        if name.casefold() == "per":
            sign = -1
            continue
        if name.casefold() in _POWERS and at + 1 < len(elements):
            factor = _POWERS[name.casefold()]
            continue
        known = _NAMES.get(name) or (_NAMES.get(name.casefold()) if len(name) > 1 else None)
        if known is None:
            return None
        top, _, bottom = known.partition("/")
        sign = -1 if one["over"] else sign
        powers[top] += sign * factor * int(one["power"] or one["digit"] or 1)
        if bottom:
            powers[bottom] -= sign
        sign, factor = 1, 1
    return tuple(sorted(powers.items())) or None
