"""Everything that is said of a fact: passages, slots, questions, claims and clues, as tables of templates.

In a template `{name}` is the entity, `{value}` the fact in question, and in passages any field of the side its fact.
The name stands where "the country whose capital is Oslo" can stand too, for questions of two hops. Questions often
avoid the passages' words, so that matching words is not enough to find the passage.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """What can be asked of one field of a side.

    Args:
        slots: what follows the entity in slot filling.
        questions: plain questions.
        claims: statements that are true of the fact and false of another's; none where the value names its entity.
    """

    slots: tuple[str, ...]
    questions: tuple[str, ...]
    claims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Clue:
    """A way to name an entity by a fact, for the first hop of two.

    Args:
        side: side of the passage that decides it.
        field: the field whose text is `{value}`.
        phrase: names the entity inside a longer question.
        question: asks for the entity.
    """

    side: str
    field: str
    phrase: str
    question: str


PASSAGES: dict[str, tuple[str, ...]] = {
    "capital": (
        "{name} is governed from {capital}, its capital, where ministries and foreign embassies have their offices.",
        "{capital} is the capital of {name}. Visitors find most national institutions of the country there.",
        "The capital of {name} is {capital}, and the national government does its daily work in that place.",
    ),
    "currency": (
        "Shops and banks in {name} deal in the {currency}. International transfers abbreviate this currency to {code}.",
        "The currency of {name} is the {currency}, for which exchange offices and price lists use the code {code}.",
        "People in {name} are paid in the {currency}, a currency that banks around the world write as {code}.",
    ),
    "language": (
        "Laws and school books in {name} are written in {language}, the official language of the country.",
        "{language} is the official language of {name}. Public offices and courts work in it.",
        "The official language of {name} is {language}, which is heard in parliament and on the national news.",
    ),
    "borders": (
        "On the map {name} is bordered by {count} other states, to be precise {neighbours}.",
        "Travelling overland from {name} leads across a border into {neighbours}: {count} in all.",
        "The land borders of {name} run along the territory of {neighbours}, which makes {count}.",
    ),
    "area": (
        "{name} has an area of {area} square kilometres according to a widely used table of countries.",
        "The area of {name}, land and inland waters together, is given as {area} square kilometres.",
        "Statisticians put the area of {name} at {area} square kilometres, counting lakes and rivers.",
    ),
    "code": (
        "The ISO standard for country codes lists {name} as {alpha3} in letters and {numeric} in digits.",
        "In ISO country codes, as printed in passports and statistics, {name} is {alpha3} or, in digits, {numeric}.",
        "{name} carries the ISO code {alpha3}; the same standard also assigns the number {numeric} to it.",
    ),
    "domain": (
        "Web sites registered in {name} usually have addresses that end in {domain}, its top-level domain.",
        "The top-level domain {domain} belongs to {name} and closes many addresses of local companies and newspapers.",
        "On the internet {name} has been given the top-level domain {domain} for its sites and mailboxes.",
    ),
    "calling": (
        "Telephone numbers in {name} start with the calling code {calling} when dialled from another country.",
        "The international calling code of {name} is {calling}, followed by the subscriber's local number.",
        "{calling} is the calling code that connects callers from elsewhere with telephones in {name}.",
    ),
    "symbol": (
        "The symbol for {name} in chemical formulas is {symbol}, and its atomic number in tables is {number}.",
        "Chemists abbreviate {name} with the symbol {symbol}. The atomic number of the element is {number}.",
        "With the atomic number {number}, {name} appears in the periodic table under the symbol {symbol}.",
    ),
    "next": (
        "Reading the periodic table in order of atomic number, {name} is directly followed by {next}.",
        "In the sequence of the chemical elements the one that follows {name} is {next}, one proton heavier.",
        "Add one proton to an atom of {name} and the element that follows it, {next}, is obtained.",
    ),
    "place": (
        "In the periodic table {name} is found where group {group}, a column, crosses period {period}, a row.",
        "{name} is a member of group {group} of the periodic table and stands in period {period}.",
        "Period {period} and group {group} are the coordinates of {name} in the periodic table.",
    ),
    "mass": (
        "The standard atomic weight of {name}, averaged over its natural isotopes, is {mass} daltons.",
        "A typical sample of {name} has an atomic weight of {mass} daltons, according to reference tables.",
        "Reference works give {name} an atomic weight of {mass} daltons, a mean over samples found on Earth.",
    ),
    "density": (
        "At room temperature the density of {name} is about {density} grams per cubic centimetre.",
        "{name} has a density of {density} grams per cubic centimetre under ordinary laboratory conditions.",
        "Handbooks list a density of {density} grams per cubic centimetre for {name} in its usual form.",
    ),
    "isotopes": (
        "{name} in nature is a mixture of {count} isotopes, of which {commonest} has the largest share.",
        "Among the {count} natural isotopes of {name} that are found on Earth, the most abundant is {commonest}.",
        "Natural {name} has {count} isotopes. The most abundant one, {commonest}, outweighs each of the others.",
    ),
    "radius": (
        "The covalent radius of an atom of {name}, derived from bond lengths in crystals, is {radius} picometres.",
        "In molecules {name} shows a covalent radius of {radius} picometres, as measured by diffraction.",
        "Bond lengths in compounds of the element lead to a covalent radius of {radius} picometres for {name}.",
    ),
    "lattice": (
        "Solid {name} crystallises in a {lattice} lattice, as X-ray diffraction of its crystals shows.",
        "The crystal lattice of solid {name} is {lattice}, a regular pattern repeated in all directions.",
        "When {name} is solid, its atoms form a {lattice} crystal lattice that continues from cell to cell.",
    ),
}
"""Side -> passages about it."""

RELATIONS: dict[tuple[str, str], Relation] = {
    ("capital", "capital"): Relation(
        slots=("capital", "capital city", "seat of government"),
        questions=(
            "Which city is the seat of government of {name}?",
            "Where does the government of {name} sit?",
            "In which city would you look for the head of state of {name}?",
            "What is the capital of {name}?",
        ),
        claims=("{value} is the seat of government of {name}.", "The capital city of {name} is {value}."),
    ),
    ("currency", "currency"): Relation(
        slots=("currency", "money", "legal tender"),
        questions=(
            "What money do shops in {name} take?",
            "Which banknotes does an exchange office sell to people who visit {name}?",
            "What is the name of the currency of {name}?",
            "Which currency is used in {name}?",
        ),
        claims=("You can pay with the {value} in {name}.", "The legal tender in {name} is the {value}."),
    ),
    ("currency", "code"): Relation(
        slots=("currency code", "code of its money"),
        questions=(
            "Which code stands for the money of {name} on price lists?",
            "How do banks abbreviate the money of {name}?",
        ),
        claims=("Banks abbreviate the money of {name} to {value}.",),
    ),
    ("language", "language"): Relation(
        slots=("official language", "language", "tongue of the state"),
        questions=(
            "What should you learn to speak before moving to {name}?",
            "In which tongue does the state address citizens of {name}?",
            "Which language is official in {name}?",
            "What do civil servants in {name} write in?",
        ),
        claims=("Civil servants in {name} write in {value}.", "{value} has official status as a language in {name}."),
    ),
    ("borders", "count"): Relation(
        slots=("number of neighbours", "how many land borders"),
        questions=(
            "How many states touch {name} on land?",
            "How many neighbours share a border with {name}?",
            "How many nations lie along the land borders of {name}?",
        ),
        claims=("The number of states that border {name} is {value}.",),
    ),
    ("area", "area"): Relation(
        slots=("area", "size in square kilometres", "surface"),
        questions=(
            "How many square kilometres does {name} cover?",
            "How large is {name}, lakes and rivers included?",
            "What is the size of {name} in km²?",
        ),
        claims=("{name} covers {value} km².", "The surface of {name} measures {value} km²."),
    ),
    ("code", "alpha3"): Relation(
        slots=("ISO code", "three-letter country code"),
        questions=(
            "Which three letters identify {name} in the ISO standard?",
            "Which letters stand for {name} in passports?",
        ),
        claims=("In the ISO standard {name} is abbreviated to {value}.",),
    ),
    ("code", "numeric"): Relation(
        slots=("numeric ISO code", "three-digit country code"),
        questions=(
            "Which three digits stand for {name} in the ISO standard?",
            "What is the ISO number of {name}?",
        ),
        claims=("The numeric identifier of {name} in international standards is {value}.",),
    ),
    ("domain", "domain"): Relation(
        slots=("internet domain", "top-level domain", "web address ending"),
        questions=(
            "How do web addresses from {name} end?",
            "What suffix do web pages from {name} have?",
            "What is at the end of internet addresses from {name}?",
        ),
        claims=("The web suffix of {name} is {value}.", "URLs from {name} end with {value}."),
    ),
    ("calling", "calling"): Relation(
        slots=("calling code", "phone code", "dialling prefix"),
        questions=(
            "Which code do you dial to phone somebody in {name}?",
            "What comes before the local number when calling a friend in {name}?",
            "What is the phone prefix of {name}?",
        ),
        claims=("To phone somebody in {name} you first dial {value}.",),
    ),
    ("symbol", "symbol"): Relation(
        slots=("symbol", "chemical abbreviation", "letters in formulas"),
        questions=(
            "How is {name} written in chemical formulas?",
            "Which letters denote {name}?",
            "What is the chemical abbreviation for {name}?",
        ),
        claims=("{name} is denoted by {value}.", "The chemical abbreviation for {name} is {value}."),
    ),
    ("symbol", "number"): Relation(
        slots=("atomic number", "number of protons"),
        questions=(
            "How many protons are in the nucleus of {name}?",
            "How many electrons does a neutral atom of {name} have?",
            "What is the number of {name} in the periodic table?",
        ),
        claims=("The nucleus of {name} holds {value} protons.",),
    ),
    ("next", "next"): Relation(
        slots=("following element", "next in the periodic table"),
        questions=(
            "What comes right after {name} in the periodic table?",
            "Which element follows on {name}?",
            "Which element has one proton more than {name}?",
        ),
        claims=("{value} comes right after {name} in the list of elements.", "The successor of {name} is {value}."),
    ),
    ("place", "group"): Relation(
        slots=("group", "column of the table"),
        questions=(
            "Which column of the periodic table holds {name}?",
            "Which group does {name} belong to?",
        ),
        claims=("{name} belongs to column {value} of the table of elements.",),
    ),
    ("place", "period"): Relation(
        slots=("period", "row of the table"),
        questions=(
            "In which row of the periodic table is {name}?",
            "Which line of Mendeleev's table contains {name}?",
        ),
        claims=("{name} is in row {value} of the table of elements.",),
    ),
    ("mass", "mass"): Relation(
        slots=("atomic weight", "atomic mass", "molar mass"),
        questions=(
            "What is the atomic mass of {name} in daltons?",
            "How heavy is one mole of {name} in grams?",
            "How much does {name} weigh, averaged over its isotopes?",
        ),
        claims=("One mole of {name} weighs {value} g.", "The mean mass of an atom of {name} is {value} u."),
    ),
    ("density", "density"): Relation(
        slots=("density", "weight of a cubic centimetre", "specific gravity"),
        questions=(
            "How many grams does a cubic centimetre of {name} weigh?",
            "What is the specific gravity of {name}?",
            "How heavy is a small cube of {name}, one centimetre on each edge?",
        ),
        claims=("1 cm³ of {name} weighs {value} g.", "The specific gravity of {name} is {value}."),
    ),
    ("isotopes", "commonest"): Relation(
        slots=("most abundant isotope", "commonest nuclide"),
        questions=(
            "Which isotope makes up most of {name} on Earth?",
            "Which nucleus is the commonest one in atoms of {name}?",
        ),
        claims=(),
    ),
    ("isotopes", "count"): Relation(
        slots=("number of natural isotopes", "how many nuclides"),
        questions=(
            "How many kinds of nuclei of {name} occur on Earth?",
            "How many nuclides make up {name} as it is mined or collected?",
        ),
        claims=("The number of nuclides of {name} that occur on Earth is {value}.",),
    ),
    ("radius", "radius"): Relation(
        slots=("covalent radius", "atomic size in pm", "size of the atom"),
        questions=(
            "How big is a bonded atom of {name} in picometres?",
            "What size in pm does an atom of {name} have in a bond?",
            "What radius do bond lengths give for {name}?",
        ),
        claims=("In a bond the size of an atom of {name} is {value} pm.",),
    ),
    ("lattice", "lattice"): Relation(
        slots=("lattice", "crystal structure", "packing of atoms"),
        questions=(
            "How are the atoms of solid {name} arranged?",
            "How do atoms of {name} pack in a crystal?",
            "Which crystal structure does {name} have?",
        ),
        claims=("The packing of atoms of {name} in a crystal is {value}.",),
    ),
}
"""Side and field -> what is asked of it."""

CLUES: dict[str, tuple[Clue, ...]] = {
    "country": (
        Clue("capital", "capital", "the country whose capital is {value}", "Which country has {value} as its capital?"),
        Clue(
            "domain", "domain", "the country with the web suffix {value}", "Which country has the web suffix {value}?"
        ),
        Clue(
            "calling",
            "calling",
            "the country with the phone prefix {value}",
            "Which country do you reach with {value}?",
        ),
        Clue("code", "alpha3", "the country with the ISO code {value}", "Which country has the ISO code {value}?"),
    ),
    "element": (
        Clue("symbol", "symbol", "the element written as {value}", "Which element is written as {value}?"),
        Clue("symbol", "number", "the element with {value} protons", "Which element has {value} protons?"),
        Clue("mass", "mass", "the element with atomic weight {value}", "Which element has the atomic weight {value}?"),
    ),
}
"""Kind of entity -> clues that lead back to the entity of the passage."""

LINKS: dict[str, Clue] = {
    "country": Clue(
        "borders",
        "neighbours",
        "the only country that borders {name}",
        "Which country is the only one to border {name}?",
    ),
    "element": Clue("next", "next", "the element right after {name}", "Which element comes right after {name}?"),
}
"""Kind of entity -> clue that leads from the entity of the passage on to another one."""
