"""Generated claims: invented subjects, of whom the evidence tells some facts and not others.

Evidence tells one to three facts of a subject (topics.yaml). Claims about the facts that it leaves
out are NOT ENOUGH INFO, whether they would follow or not, so the form of a claim does not give its
label away. Other passages compare two things.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

SUPPORTS, REFUTES, UNKNOWN = "SUPPORTS", "REFUTES", "NOT ENOUGH INFO"
TOPICS: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("topics.yaml").read_text(encoding="utf-8")
)
FIRST_NAMES = [
    *("Agnes", "Alma", "Astor", "Beata", "Bela", "Bruno", "Carla", "Cosima", "Dario", "Dora"),
    *("Edda", "Elias", "Elin", "Emeka", "Enzo", "Esra", "Farid", "Flora", "Gerda", "Hana", "Ines"),
    *("Irma", "Kamal", "Kaya", "Lars", "Leila", "Lena", "Luca", "Magda", "Malik", "Mirko", "Nadia"),
    *("Nils", "Noor", "Olga", "Pavel", "Ramon", "Selim", "Sonja", "Stefan", "Tamar", "Theo"),
    *("Ulla", "Vera", "Viktor", "Wanda", "Yusuf", "Zora"),
]
STARTS = [
    *("Ab", "Bal", "Bren", "Cas", "Dor", "Eck", "Fal", "Gar", "Hal", "Holm", "Jar", "Kal", "Kest"),
    *("Lan", "Lor", "Mol", "Nor", "Ost", "Pel", "Quin", "Sal", "Stein", "Tar", "Thor", "Ul", "Var"),
    *("Wes", "Zel"),
]
ENDS = [
    *("ada", "berg", "bury", "by", "dal", "den", "dorf", "eno", "field", "ford", "gate", "holt"),
    *("ina", "is", "mont", "mark", "more", "ner", "ov", "sund", "stad", "ton", "tova", "ura"),
    *("vik", "wick", "wood"),
]
NUMBERS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen"),
]
CENTURIES = ["sixteenth", "seventeenth", "eighteenth", "nineteenth", "twentieth"]
FREE = {
    "building": ["tower", "chapel", "castle", "lighthouse", "mill", "palace", "hall"],
    "adjective": ["spotted", "grey", "lesser", "giant", "crested", "striped", "golden", "pale"],
    "sport": ["rowing", "handball", "hockey", "cycling", "swimming", "football"],
    "first": ["The", "My", "One", "This", "A"],
    "second": ["Quiet", "Broken", "Silver", "Long", "Bitter", "Distant", "Hidden", "Last"],
    "third": ["Harvest", "Mirror", "Lantern", "Letter", "Road", "Orchard", "Shore", "Candle"],
}


@dataclass(frozen=True)
class Passage:
    """Evidence, and pairs of a label and a claim."""

    evidence: str
    claims: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Fact:
    """Predicates of a subject: those that evidence uses, those that follow, those it denies."""

    told: Sequence[str]
    follows: Sequence[str]
    denied: Sequence[str]


def place(random: Random) -> str:
    """An invented name, of a place or a family."""
    return random.choice(STARTS) + random.choice(ENDS)


def person(random: Random) -> str:
    return f"{random.choice(FIRST_NAMES)} {place(random)}"


def several(random: Random, make: Callable[[Random], str], count: int) -> list[str]:
    """So many different names."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(random)] = None
    return list(found)


def values(random: Random) -> dict[str, str]:
    """What the fields of topics.yaml stand for, this time."""
    found: dict[str, str] = {}
    for kind, choices in TOPICS["values"].items():
        for name, value in zip(
            (kind, f"other_{kind}"), random.sample(list(choices), 2), strict=True
        ):
            found[name] = value
            if isinstance(choices, dict):
                found[f"{name}_form"] = choices[value]
    kinds = ("place", "town", "region", "old_name")
    named = iter(several(random, place, 2 * len(kinds)))
    for kind in kinds:
        found[kind], found[f"other_{kind}"] = next(named), next(named)
    found["person"], found["other_person"] = several(random, person, 2)
    found |= {kind: random.choice(choices) for kind, choices in FREE.items()}
    found["title"] = f"{found['first']} {found['second']} {found['third']}"
    found["dish"], found["beast"] = place(random).lower(), place(random).lower()
    found["mineral"] = place(random).lower() + "ite"
    age, year = random.randint(31, 93), random.randint(1820, 1980)
    found |= {
        "age": str(age),
        "age_less": str(age - random.randint(2, 12)),
        "age_more": str(age + random.randint(2, 12)),
        "age_other": str(age + random.choice([-14, 13, 20])),
        "year": str(year),
        "year_earlier": str(year - random.randint(3, 50)),
        "year_later": str(year + random.randint(3, 9)),
    }
    return found


def fact_of(random: Random, entry: Mapping[str, Any], filled: Mapping[str, str]) -> Fact:
    """A fact of topics.yaml with its fields filled."""
    if "dated" in entry:
        return dated(random, **entry["dated"])
    if "measured" in entry:
        return measured(random, **entry["measured"])
    if "counted" in entry:
        return counted(random, **entry["counted"])
    told, follows, denied = (
        [text.format_map(filled) for text in entry[key]] for key in ("told", "follows", "denied")
    )
    return Fact(told, follows, denied)


def dated(random: Random, verb: str, years: tuple[int, int]) -> Fact:
    """Something that `verb`, such as "was founded", in a year between two."""
    year = random.randint(*years)
    index = (year - 1501) // 100
    century = CENTURIES[index]
    other = random.choice([name for name in CENTURIES if name != century])
    later, earlier = year + random.randint(2, 60), year - random.randint(2, 60)
    month = random.choice(TOPICS["values"]["month"])
    return Fact(
        told=[f"{verb} in {year}", f"{verb} in {month} {year}", f"{verb} in the year {year}"],
        follows=[
            *[f"{verb} in the {century} century", f"{verb} in the {year // 10 * 10}s"],
            *[f"{verb} before {later}", f"{verb} earlier than {later}"],
            *[f"{verb} after {earlier}", f"{verb} between {earlier} and {later}"],
        ],
        denied=[
            *[f"{verb} in the {other} century", f"{verb} in {year + random.choice([-100, 30, 7])}"],
            *[f"{verb} after {later}", f"{verb} later than {later}"],
            *[f"{verb} before {earlier}", f"{verb} not before {later}"],
        ],
    )


def measured(
    random: Random, verb: str, amounts: tuple[int, int], unit: str, times: int = 1
) -> Fact:
    """Something that `verb`, such as "weighs", an amount of a unit."""
    amount = random.randint(*amounts) * times
    less, more = round(amount * random.uniform(0.4, 0.9)), round(amount * random.uniform(1.2, 2.5))
    about = random.choice(["about ", "roughly ", "nearly ", "", "", ""])
    return Fact(
        told=[f"{verb} {about}{amount:,} {unit}"],
        follows=[
            *[f"{verb} more than {less:,} {unit}", f"{verb} over {less:,} {unit}"],
            *[f"{verb} less than {more:,} {unit}", f"{verb} under {more:,} {unit}"],
            *[f"{verb} at least {less:,} {unit}", f"{verb} between {less:,} and {more:,} {unit}"],
        ],
        denied=[
            *[f"{verb} less than {less:,} {unit}", f"{verb} no more than {less:,} {unit}"],
            *[f"{verb} more than {more:,} {unit}", f"{verb} over {more:,} {unit}"],
            *[f"{verb} only {max(1, amount // 4):,} {unit}", f"{verb} {amount * 3:,} {unit}"],
        ],
    )


def counted(random: Random, verb: str, things: str) -> Fact:
    """Something that `verb`, such as "has", a small number of things."""
    number = random.randint(3, 12)
    other = random.choice([n for n in range(2, 15) if abs(n - number) > 1])
    word, fewer, more = NUMBERS[number], NUMBERS[number - 1], NUMBERS[number + 1]
    return Fact(
        told=[f"{verb} {word} {things}", f"{verb} exactly {number} {things}"],
        follows=[
            *[f"{verb} {word} {things}", f"{verb} more than {fewer} {things}"],
            f"{verb} fewer than {more} {things}",
        ],
        denied=[
            *[f"{verb} {NUMBERS[other]} {things}", f"{verb} more than {more} {things}"],
            *[f"{verb} fewer than {fewer} {things}", f"{verb} no {things}"],
        ],
    )


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def about_one(random: Random, topics: Mapping[str, Any]) -> Passage:
    """Evidence with one to three facts about a subject, and two claims of each label."""
    topic = random.choice(list(topics.values()))
    filled = values(random)
    subject = topic["subject"].format_map(filled)
    facts = [fact_of(random, entry, filled) for entry in topic["facts"]]
    random.shuffle(facts)
    number = random.choice([1, 2, 2, 3])
    known, hidden = facts[:number], facts[number:]
    claims = [
        *[(SUPPORTS, random.choice(random.choice(known).follows)) for _ in range(2)],
        *[(REFUTES, random.choice(random.choice(known).denied)) for _ in range(2)],
        (UNKNOWN, random.choice(topic["unsaid"])),
    ]
    untold = random.choice(hidden)
    claims.append((UNKNOWN, random.choice([*untold.follows, *untold.denied])))
    pronoun = random.choice(topic.get("pronoun", ["It"]))
    evidence = sentences(random, subject, pronoun, [random.choice(fact.told) for fact in known])
    # A claim may have come up twice.
    pairs = dict.fromkeys((label, f"{capital(subject)} {claim}.") for label, claim in claims)
    return Passage(evidence, tuple(pairs))


def sentences(random: Random, subject: str, pronoun: str, clauses: Sequence[str]) -> str:
    """The clauses about a subject, in one sentence or two."""
    first, *rest = clauses
    if not rest:
        return capital(f"{subject} {first}.")
    which = "which" if pronoun == "It" else "who"
    return capital(
        random.choice(
            [
                f"{subject} {', '.join([first, *rest[:-1]])} and {rest[-1]}.",
                f"{subject} {first}. {pronoun} {' and '.join(rest)}.",
                f"{subject}, {which} {first}, {' and '.join(rest)}.",
            ]
        )
    )


def passage(
    evidence: str, true: Sequence[str], false: Sequence[str], open_: Sequence[str]
) -> Passage:
    """A passage of sentences whose first letter and full stop are still to be set."""
    labelled = ((SUPPORTS, true), (REFUTES, false), (UNKNOWN, open_))
    return Passage(
        capital(evidence),
        tuple((label, f"{capital(claim)}.") for label, claims in labelled for claim in claims),
    )


COMPARED = [
    ("mountain", "rises to", "metres", "higher", "lower"),
    ("river", "measures", "kilometres", "longer", "shorter"),
    ("lake", "covers", "square kilometres", "larger", "smaller"),
    ("bridge", "spans", "metres", "longer", "shorter"),
    ("bell", "weighs", "kilograms", "heavier", "lighter"),
    ("tower", "measures", "metres", "taller", "shorter"),
    ("village", "has", "inhabitants", "more populous", "less populous"),
    ("well", "reaches down", "metres", "deeper", "shallower"),
    ("train", "reaches", "kilometres an hour", "faster", "slower"),
    ("library", "holds", "books", "larger", "smaller"),
]


def two_amounts(random: Random) -> Passage:
    kind, verb, unit, more, less = random.choice(COMPARED)
    one, other, third = several(random, place, 3)
    a = random.randint(20, 4000)
    b = round(a * random.choice([0.3, 0.5, 0.7, 0.9, 1.1, 1.4, 2, 3])) + 1
    high, low = (one, other) if a > b else (other, one)
    evidence = random.choice(
        [
            f"the {kind} {one} {verb} {a:,} {unit}, while the {kind} {other} {verb} {b:,} {unit}.",
            f"the {kind} {one} {verb} {a:,} {unit}; for the {kind} {other} it is {b:,} {unit}.",
            f"of the two, the {kind} {one} {verb} {a:,} {unit} and {other} {b:,} {unit}.",
            f"the {kind} {one} {verb} {a:,} {unit}, whereas {other} {verb} {b:,} {unit}.",
        ]
    )
    quality = random.choice(["older", "more famous", "better known", "more beautiful", "younger"])
    return passage(
        evidence,
        [f"{high} is {more} than {low}", f"{low} is {less} than {high}"],
        [f"{low} is {more} than {high}", f"{high} is {less} than {low}"],
        [
            f"{random.choice([one, other])} is {random.choice([more, less])} than {third}",
            f"{one} is {quality} than {other}",
        ],
    )


EVENTS = [
    *[("mine", "was opened"), ("school", "was founded"), ("museum", "was opened")],
    *[("newspaper", "first appeared"), ("railway", "was finished"), ("theatre", "burned down")],
    *[("company", "was founded"), ("harbour", "was closed")],
]


def two_years(random: Random) -> Passage:
    kind, verb = random.choice(EVENTS)
    one, other, third = (f"the {kind} of {name}" for name in several(random, place, 3))
    a = random.randint(1550, 1960)
    b = a + random.choice([-1, 1]) * random.choice([2, 5, 11, 20, 48, 90])
    gap = abs(a - b)
    first, last = (one, other) if a < b else (other, one)
    evidence = random.choice(
        [
            f"{one} {verb} in {a}, and {other} in {b}.",
            f"{one} {verb} in {a}, whereas {other} {verb} in {b}.",
            f"while {one} {verb} in {a}, {other} {verb} in {b}.",
            f"{one} {verb} in {a}. {capital(other)} {verb} in {b}.",
        ]
    )
    return passage(
        evidence,
        [
            random.choice([f"{first} {verb} before {last}", f"{first} {verb} earlier than {last}"]),
            random.choice(
                [f"{last} {verb} later than {first}", f"{last} {verb} {gap} years after {first}"]
            ),
        ],
        [
            random.choice([f"{last} {verb} before {first}", f"{last} {verb} earlier than {first}"]),
            random.choice(
                [f"{first} {verb} later than {last}", f"{first} {verb} {gap} years after {last}"]
            ),
        ],
        [
            f"{random.choice([one, other])} {verb} {random.choice(['before', 'after'])} {third}",
            f"{one} is {random.choice(['larger', 'smaller', 'more popular'])} than {other}",
        ],
    )


RELATIONS = [
    *[("{0}", "is the capital of"), ("{0}", "flows through"), ("{0}", "is the largest city of")],
    *[("{0}", "is a port in"), ("the picture called {0}", "was painted by")],
    *[("the machine called {0}", "was invented by"), ("the island of {0}", "was discovered by")],
    ("the book called {0}", "was written by"),
]


def two_relations(random: Random) -> Passage:
    """Two subjects with a value each, which the false claims exchange."""
    form, relation = random.choice(RELATIONS)
    *subjects, x, y, z = several(random, place, 6)
    one, other, third = (form.format(name) for name in subjects)
    if relation.endswith(" by"):
        x, y, z = several(random, person, 3)
    evidence = random.choice(
        [
            f"{one} {relation} {x}, while {other} {relation} {y}.",
            f"{one} {relation} {x}, and {other} {relation} {y}.",
            f"{other} {relation} {y}, but {one} {relation} {x}.",
            f"{one} {relation} {x}. {capital(other)} {relation} {y}.",
        ]
    )
    return passage(
        evidence,
        [f"{one} {relation} {x}", f"{other} {relation} {y}"],
        [f"{one} {relation} {y}", f"{other} {relation} {random.choice([x, z])}"],
        [
            f"{one} is {random.choice(['older', 'better known', 'more valuable'])} than {other}",
            f"{third} {relation} {z}",
        ],
    )


EXTREMES = [
    ("lake", "lakes", "deep", "shallow"),
    ("mountain", "mountains", "high", "low"),
    ("city", "cities", "old", "new"),
    ("river", "rivers", "long", "short"),
    ("church", "churches", "tall", "small"),
    ("bird", "birds", "fast", "slow"),
    ("stone", "stones", "hard", "soft"),
    ("school", "schools", "rich", "poor"),
]


def a_superlative(random: Random) -> Passage:
    kind, kinds, high, low = random.choice(EXTREMES)
    if random.random() < 0.4:
        high, low = low, high
    one, region, far = several(random, place, 3)
    evidence = random.choice(
        [
            f"{one} is the {high}est {kind} in {region}.",
            f"in {region} the {high}est {kind} is {one}.",
            f"{one}, the {high}est {kind} in {region}, is known to every child there.",
        ]
    )
    true = [
        f"no {kind} in {region} is {high}er than {one}",
        f"{one} is {high}er than any other {kind} in {region}",
        f"all other {kinds} in {region} are {low}er than {one}",
        f"{one} has no {kind} in {region} that is {high}er beside it",
    ]
    false = [
        f"some {kind} in {region} is {high}er than {one}",
        f"{one} is the {low}est {kind} in {region}",
        f"{one} is {low}er than every other {kind} in {region}",
        f"several {kinds} in {region} are {high}er than {one}",
    ]
    abroad = random.choice(TOPICS["values"]["country"])
    return passage(
        evidence,
        random.sample(true, 2),
        random.sample(false, 2),
        [
            f"{one} is {high}er than {far}, a {kind} in {abroad}",
            f"{one} was {random.choice(['drawn', 'described', 'mentioned'])} by a monk",
        ],
    )


def a_rule(random: Random) -> Passage:
    """What is allowed, and what is not."""
    kind = random.choice(["library", "park", "pool", "museum", "garden", "hall"])
    town, other = several(random, place, 2)
    where = f"the {kind} of {town}"
    who = ["dogs", "bicycles", "cameras", "children", "prams", "groups", "guitars", "umbrellas"]
    may, must_not, unknown = random.sample(who, 3)
    evidence = random.choice(
        [
            f"{may} are allowed in {where}, but {must_not} are not.",
            f"{must_not} are forbidden in {where}, while {may} are welcome.",
            f"in {where} {may} are permitted and {must_not} prohibited.",
            f"{where} admits {may} but no {must_not}.",
        ]
    )
    return passage(
        evidence,
        [f"{may} may enter {where}", f"{must_not} are not allowed in {where}"],
        [f"{must_not} may enter {where}", f"neither {may} nor {must_not} may enter {where}"],
        [
            f"{unknown} are {random.choice(['allowed', 'forbidden'])} in {where}",
            f"{where} is {random.choice(['older', 'larger', 'busier'])} than that of {other}",
        ],
    )


def a_lifespan(random: Random) -> Passage:
    """Two years, and the age between them."""
    who, other = several(random, person, 2)
    born, age = random.randint(1520, 1900), random.randint(19, 95)
    died = born + age
    evidence = random.choice(
        [
            f"{who} was born in {born} and died in {place(random)} in {died}.",
            f"{who} ({born} to {died}) lived in {place(random)}.",
            f"born in {born}, {who} lived until {died}.",
        ]
    )
    below, above = (age - 4) // 10 * 10, age // 10 * 10 + 20
    return passage(
        evidence,
        [f"{who} lived for more than {below} years", f"{who} died before the age of {above}"],
        [f"{who} died before the age of {below}", f"{who} lived to be over {above}"],
        [f"{who} was left-handed", f"{who} was buried beside {other}"],
    )


PAIRS = (two_amounts, two_years, two_relations, a_superlative, a_rule)
VALIDATION_PAIRS = (a_lifespan,)


def generate(seed: int, count: int, validation: bool = False) -> list[Passage]:
    """`count` passages, about two thirds of them with facts about one subject. For `validation`
    they are of topics and kinds of which there are no others.
    """
    random = Random(seed)
    topics = TOPICS["validation_topics" if validation else "topics"]
    pairs = VALIDATION_PAIRS if validation else PAIRS
    return [
        random.choice(pairs)(random) if random.random() < 1 / 3 else about_one(random, topics)
        for _ in range(count)
    ]
