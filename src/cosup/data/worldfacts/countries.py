"""Countries: countryinfo's facts, named by pycountry; what is stale, disputed or ambiguous is dropped."""

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from cosup.data.worldfacts.facts import NUMBERS, Entity, Fact, Facts, fact, words

Raw = dict[str, Any]

TERRITORIES = words(
    """AS AI AQ AW AX BM BQ BL BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC NF NU
    PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF XK YT"""
)
"""ISO codes that countryinfo lists and that are dependent, uninhabited, disputed, dissolved, or entered twice."""

FUNDS = frozenset({"BOV", "CHE", "CHW", "CLF", "COU", "MXV", "USN", "UYI", "UYW"})
"""ISO 4217 codes that are no money in circulation."""

DOUBTFUL = {
    # moved or renamed since, or not where the government sits
    "capital": words("BI BJ BO CI GQ ID IL KZ LK MY NL NR SZ TZ YE ZA"),
    # changed since, or another one beside it
    "currency": words("BG CU HR LR ZW"),
    # other languages are official too, or none is
    "language": words("DZ ET KI ML MA MU MX NE NG PE PG PH SB TL US ZM AU FM TV IQ LY SD SO EC SL GH"),
    # the border, and with it the area, is disputed or counted in several ways
    "area": words("AM AZ CN CY EG ET FR GE IL IN KM MA NP PK RS RU SD SO SR SS SY UA US VE GY"),
    "borders": words("AM AZ CA CY DK EG ES FR GB IL JO LK MA NL SR"),
    # shared with Russia
    "calling": words("KZ"),
}
"""ISO codes of countries whose value for a side is dropped, found by comparison with Unicode CLDR and by reading."""

NAMES = {
    "BN": "Brunei",
    "CD": "Democratic Republic of the Congo",
    "CG": "Republic of the Congo",
    "CI": "Ivory Coast",
    "CV": "Cape Verde",
    "FM": "Micronesia",
    "RU": "Russia",
    "TL": "East Timor",
    "TR": "Turkey",
}
"""Usual names in English, where the ISO standard has another."""

WITH_ARTICLE = words("AE BS CD CF CG DO GB GM KM MH MV NL PH SB SC US")
"""ISO codes of the countries that English speaks of with "the"."""


def countries() -> list[Entity]:
    """The countries, by ISO code.

    Raises:
        ImportError: countryinfo or pycountry is not installed.
    """
    raw = {alpha2: country for alpha2, country in _raw_countries() if alpha2 not in TERRITORIES}
    names = {country["ISO"]["alpha3"]: _with_article(alpha2) for alpha2, country in raw.items()}
    borders = {country["ISO"]["alpha3"]: set(country.get("borders", ())) for country in raw.values()}
    return [
        Entity("country", _title(alpha2), _with_article(alpha2), _facts(alpha2, country, names, borders))
        for alpha2, country in sorted(raw.items())
    ]


def _raw_countries() -> Iterator[tuple[str, Raw]]:
    for path in (resources.files("countryinfo") / "data").iterdir():
        if path.name.endswith(".json"):
            country = json.loads(path.read_text(encoding="utf-8"))
            if country.get("area"):
                yield country["ISO"]["alpha2"], country


def _title(alpha2: str) -> str:
    import pycountry

    country: Any = pycountry.countries.get(alpha_2=alpha2)
    return NAMES.get(alpha2) or str(getattr(country, "common_name", country.name))


def _with_article(alpha2: str) -> str:
    return f"the {_title(alpha2)}" if alpha2 in WITH_ARTICLE else _title(alpha2)


def _facts(alpha2: str, raw: Raw, names: dict[str, str], borders: dict[str, set[str]]) -> Facts:
    sides = {
        "capital": _capital(raw),
        "currency": _currency(raw),
        "language": _language(raw),
        "borders": _borders(raw["ISO"]["alpha3"], names, borders),
        "area": {"area": fact(f"{raw['area']:,}")},
        "code": {"alpha3": fact(raw["ISO"]["alpha3"]), "numeric": fact(raw["ISO"]["numeric"])},
        "domain": {"domain": fact(raw["tld"][0])},
        "calling": _calling(raw),
    }
    return {side: fields for side, fields in sides.items() if fields and alpha2 not in DOUBTFUL.get(side, ())}


def _capital(raw: Raw) -> dict[str, Fact]:
    capital = raw["capital"]
    return {"capital": fact(capital)} if capital else {}


def _currency(raw: Raw) -> dict[str, Fact]:
    """The currency, if there is just one; codes that ISO 4217 has withdrawn are stale and don't count."""
    import pycountry

    current = [pycountry.currencies.get(alpha_3=code) for code in raw["currencies"] if code not in FUNDS]
    match [currency for currency in current if currency]:
        case [currency]:
            return {"currency": fact(currency.name), "code": fact(currency.alpha_3)}
    return {}


def _language(raw: Raw) -> dict[str, Fact]:
    """The official language, if there is just one."""
    import pycountry

    match [pycountry.languages.get(alpha_2=code) for code in raw["languages"]]:
        case [language] if language:
            return {"language": fact(language.name.partition(" (")[0].removeprefix("Modern "))}
    return {}


def _borders(alpha3: str, names: dict[str, str], borders: dict[str, set[str]]) -> dict[str, Fact]:
    """The neighbours, if there are any and each of them lists this country too."""
    neighbours = borders[alpha3]
    if not neighbours or any(alpha3 not in borders.get(other, ()) for other in neighbours):
        return {}
    listed = _joined(sorted(names[other] for other in neighbours))
    return {"neighbours": fact(listed), "count": fact(NUMBERS[len(neighbours)], str(len(neighbours)))}


def _calling(raw: Raw) -> dict[str, Fact]:
    """The dialling code, if there is just one and it has no area code in it."""
    match raw["callingCodes"]:
        case [code] if code.isdigit() and len(code) <= 3:
            return {"calling": fact(f"+{code}")}
    return {}


def _joined(names: list[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
