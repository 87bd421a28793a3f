"""Chemical elements: periodictable's measured facts; what is calculated or depends on the form is dropped."""

import re
from typing import Any

from cosup.data.worldfacts.facts import NUMBERS, Entity, Fact, Facts, fact, words

NOBLE_GASES = (0, 2, 10, 18, 36, 54, 86, 118)
"""Atomic numbers that end a period."""

LATTICES = {
    "BCC": "body-centred cubic",
    "fcc": "face-centred cubic",
    "hcp": "hexagonal close-packed",
    "Diamond": "diamond cubic",
    "Orthorhombic": "orthorhombic",
    "Rhombohedral": "rhombohedral",
    "Tetragonal": "tetragonal",
}
SPELLINGS = {"body-centred cubic": ("BCC",), "face-centred cubic": ("FCC",), "hexagonal close-packed": ("HCP",)}

DOUBTFUL = {
    # several solid forms, or double the hexagonal cell
    "lattice": words("B C P S Se Te La Ce Pr Nd Sm Mn Ga Np Pu Ac Pa Tc Po He"),
    # several solid forms, or newer values differ
    "density": words("C P S Se Sn Np Po Sr Ti Am Pm As"),
    # traces, or only the ratio in ores is known
    "isotopes": words("Th Pa U"),
}
"""Symbols of elements whose value for a side is dropped."""


def elements() -> list[Entity]:
    """The elements, by atomic number.

    Raises:
        ImportError: periodictable is not installed.
    """
    import periodictable

    table = [element for element in periodictable.elements if element.number >= 1]
    followers = [element.name for element in table[1:]]
    return [
        Entity("element", element.name.capitalize(), element.name, _facts(element, following))
        for element, following in zip(table, followers, strict=False)
    ]


def _facts(element: Any, following: str) -> Facts:
    sides = {
        "symbol": {"symbol": fact(element.symbol), "number": fact(str(element.number))},
        "next": {"next": fact(following)},
        "place": _place(element.number),
        "mass": _mass(element),
        "density": _density(element),
        "isotopes": _isotopes(element),
        "radius": _radius(element),
        "lattice": _lattice(element),
    }
    return {side: fields for side, fields in sides.items() if fields and element.symbol not in DOUBTFUL.get(side, ())}


def _place(number: int) -> dict[str, Fact]:
    """Group and period, for the elements whose group nobody disputes."""
    period = next(i for i, last in enumerate(NOBLE_GASES) if number <= last)
    group = _group(number - NOBLE_GASES[period - 1], NOBLE_GASES[period] - number)
    return {"period": fact(str(period)), "group": fact(str(group))} if group else {}


def _group(position: int, to_noble_gas: int) -> int | None:
    """The group of the element at `position` (from 1) of its period, `to_noble_gas` places before the period's end."""
    if to_noble_gas == 0:
        return 18
    if position <= 2:
        return position
    return 18 - to_noble_gas if to_noble_gas < 15 or position + to_noble_gas == 18 else None


def _mass(element: Any) -> dict[str, Fact]:
    """The standard atomic weight; an integer is the mass number of some isotope instead."""
    return {} if float(element.mass).is_integer() else {"mass": fact(f"{element.mass:.8g}")}


def _density(element: Any) -> dict[str, Fact]:
    """The density, if it was measured at room temperature."""
    measured = re.fullmatch(r"(T=[\d.]+)?", str(element.density_caveat or "").strip())
    return {"density": fact(f"{element.density:g}")} if measured and element.density else {}


def _isotopes(element: Any) -> dict[str, Fact]:
    shares = {number: element[number].abundance for number in element.isotopes if element[number].abundance}
    if len(shares) < 2:
        return {}
    commonest = max(shares, key=lambda number: float(shares[number]))
    count = fact(NUMBERS[len(shares)], str(len(shares)))
    return {"commonest": fact(f"{element.name}-{commonest}", str(commonest)), "count": count}


def _radius(element: Any) -> dict[str, Fact]:
    angstroms = getattr(element, "covalent_radius", None)
    return {"radius": fact(str(round(angstroms * 100)))} if angstroms else {}


def _lattice(element: Any) -> dict[str, Fact]:
    symmetry = (getattr(element, "crystal_structure", None) or {}).get("symmetry")
    name = LATTICES.get(str(symmetry))
    return {"lattice": fact(name, *SPELLINGS.get(name, ()))} if name else {}
