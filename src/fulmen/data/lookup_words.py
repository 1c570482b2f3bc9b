"""The words of look-ups: what is stated in a text, and how it is asked for.

Two sets that share no sentence, no question and no key: `TRAINED` for training, `JUDGED` for reports. Who is
judged by the form that was trained has learned the form, not to look things up.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from fulmen.errors import ConfigError

# Keys of what is judged.
NAMES = (
    *("Alder", "Bramble", "Corin", "Dorset", "Elwood", "Fennick", "Garrow", "Hollis", "Iverna", "Jessop"),
    *("Kestrel", "Lorimer", "Marlow", "Nettle", "Orwen", "Petra", "Quill", "Ravenna", "Sorrel", "Tindall"),
    *("Umber", "Velda", "Wexford", "Yarrow", "Zephyr", "Ashdown", "Birkett", "Calder", "Dunmore", "Ennis"),
    *("Farrow", "Goswin", "Harker", "Ingram", "Jarrow", "Kelso", "Lydgate", "Merrin", "Norwood", "Osric"),
)
# Values of what is judged in words.
COLOURS = (
    "auburn",
    "beige",
    "crimson",
    "cyan",
    "ebony",
    "indigo",
    "khaki",
    "maroon",
    "pink",
    "teal",
    "violet",
)
ANIMALS = ("badger", "bison", "cormorant", "ferret", "gecko", "hedgehog", "ibex", "lynx", "otter", "walrus")
# Keys of what is trained.
FIRST_NAMES = (
    *("Amir", "Beatriz", "Chen", "Daria", "Emeka", "Farah", "Gustav", "Hana", "Ilse", "Jonas", "Kavita"),
    *("Lucia", "Mateo", "Noor", "Oskar", "Priya", "Rosa", "Samuel", "Tomas", "Ursula", "Viktor", "Wen"),
    *("Yara", "Zoltan", "Anneke", "Bruno", "Cecilia", "Dmitri", "Elena", "Finn", "Greta", "Hugo"),
)
SURNAMES = (
    *("Abara", "Bianchi", "Castro", "Dubois", "Eriksen", "Fischer", "Gupta", "Haddad", "Ito", "Jansen"),
    *("Kovacs", "Larsen", "Moreau", "Novak", "Okafor", "Petrov", "Quintero", "Rossi", "Silva", "Tanaka"),
    *("Ueda", "Vargas", "Weber", "Yilmaz", "Zhang"),
)
PLACES = (
    *("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Prague", "Dakar", "Hanoi", "Quito", "Riga", "Tunis"),
    *("Bergen", "Cusco", "Delhi", "Ghent", "Haifa", "Izmir", "Jaipur", "Kyiv", "Leeds", "Malmo", "Naples"),
)
ADJECTIVES = (
    *("amber", "bitter", "clever", "dusty", "early", "frozen", "gentle", "hollow", "ivory", "jolly", "lunar"),
    *("mellow", "narrow", "olive", "patient", "quiet", "rapid", "silver", "tidy", "urban", "velvet", "windy"),
)
NOUNS = (
    *("anchor", "basket", "candle", "dragon", "engine", "falcon", "garden", "hammer", "island", "jacket"),
    *("kettle", "ladder", "mirror", "needle", "orchard", "pencil", "quarry", "ribbon", "saddle", "tunnel"),
    *("umbrella", "valley", "window", "yacht", "zebra", "button", "copper", "lantern", "meadow", "pocket"),
)
MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")
SETTINGS = ("TIMEOUT", "LIMIT", "PORT", "OFFSET", "SIZE", "RETRIES", "WEIGHT", "DELAY", "DEPTH", "BUDGET")

# Draws for each key that is wanted: enough to meet all of a small kind.
TRIES = 50

Drawer = Callable[[random.Random], str]


@dataclass(frozen=True)
class Wording:
    """One form of look-up: its sentence in the text and the question for it.

    Attributes:
        statement, question: with {key} and {value}; the question has the one that is not asked for.
        keys, values: how each is drawn, by name in `DRAWERS`.
        request: what a chat adds to the question, so that the answer is short.
        asks: "value", or "key" where the value is given.
    """

    statement: str
    question: str
    keys: str
    values: str
    request: str = "Answer with nothing else."
    asks: str = "value"


def _digits(count: int) -> Drawer:
    return lambda random: str(random.randrange(10 ** (count - 1), 10**count))


def _pair(first: tuple[str, ...], second: tuple[str, ...], form: str = "{} {}") -> Drawer:
    return lambda random: form.format(random.choice(first), random.choice(second))


def _identifier(random: random.Random) -> str:
    return f"{random.choice(SETTINGS)}_{random.choice(ADJECTIVES)}_{random.choice(NOUNS)}".upper()


def _phrase(random: random.Random) -> str:
    one, two = random.sample(NOUNS, 2)
    return f"the {random.choice(ADJECTIVES)} {one} behind the {random.choice(ADJECTIVES)} {two}"


DRAWERS: dict[str, Drawer] = {
    "judged name": lambda random: random.choice(NAMES),
    "judged animal": _pair(COLOURS, ANIMALS),
    "name": _pair(FIRST_NAMES, SURNAMES),
    "place": _pair(("North", "South", "East", "West", "Old", "New", "Upper", "Lower"), PLACES),
    "project": _pair(ADJECTIVES, NOUNS),
    "item": _pair(ADJECTIVES, NOUNS, "the {} {}"),
    "identifier": _identifier,
    "field": _pair(ADJECTIVES, NOUNS, "{}_{}"),
    **{f"{count} digits": _digits(count) for count in range(3, 9)},
    "hex": lambda random: f"{random.randrange(16**8):08x}",
    "hex number": lambda random: f"0x{random.randrange(16**6):06X}",
    "letters and digits": lambda random: (
        "".join(random.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=3)) + f"-{random.randrange(1000, 10_000)}"
    ),
    "decimal": lambda random: f"{random.randrange(10, 1000)}.{random.randrange(10, 100)}",
    "date": lambda random: (
        f"{random.randrange(1, 29)} {random.choice(MONTHS)} {random.randrange(1900, 2030)}"
    ),
    "word": lambda random: random.choice(NOUNS),
    "words": _pair(ADJECTIVES, NOUNS),
    "phrase": _phrase,
    "person": _pair(FIRST_NAMES, SURNAMES),
}

JUDGED = (
    Wording(
        "The access code of {key} is {value}.",
        "What is the access code of {key}?",
        "judged name",
        "5 digits",
        "Answer with the code only.",
    ),
)
# Another relation and another kind of answer.
JUDGED_IN_WORDS = (
    Wording(
        "Travellers to {key} were welcomed by a {value}.",
        "By which animal were travellers to {key} welcomed?",
        "judged name",
        "judged animal",
        "Answer with its colour and its kind only.",
    ),
)

# What somebody has, and how it looks.
_ATTRIBUTES = (
    *(("locker number", "4 digits"), ("phone number", "8 digits"), ("member number", "6 digits")),
    *(("serial number", "hex"), ("order number", "letters and digits"), ("secret word", "word")),
    *(("password", "words"), ("hiding place", "phrase"), ("appointment", "date"), ("balance", "decimal")),
    *(("contact", "person"), ("room", "3 digits"), ("postal number", "5 digits"), ("reading", "7 digits")),
)
# (sentence, question for the value, question for the key)
_FORMS = (
    ("{key}'s {what}: {value}", "Which {what} does {key} have?", "Whose {what} is {value}?"),
    (
        "Note that {key} was given the {what} {value}.",
        "Please tell me which {what} {key} was given.",
        "Who was given the {what} {value}?",
    ),
    (
        "Remember: {value} is the {what} for {key}.",
        "Look up the {what} for {key} in the text above.",
        "For whom is the {what} {value}? Look it up in the text above.",
    ),
    ("| {key} | {what} | {value} |", "{key}, {what}?", "Which entry has the {what} {value}?"),
    (
        "({key} chose {value} as {what}.)",
        "I need the {what} that {key} chose.",
        "Find the one who chose {value} as {what}.",
    ),
    (
        "For {key}, the {what} on file reads {value}.",
        "What does the text say about the {what} on file for {key}?",
        "The {what} on file reads {value}: for whom?",
    ),
    (
        "{what} ({key}): {value}",
        "Give me this {what}: {key}.",
        "To which name does the {what} {value} belong?",
    ),
)
# (line, question, keys, values)
_CODE = (
    ("{key} = {value}", "What is {key} set to?", "identifier", "4 digits"),
    ("#define {key} {value}", "Which value does {key} have?", "identifier", "hex number"),
    ("{key}: {value}", "Which value is written behind {key}?", "field", "6 digits"),
    ('config["{key}"] = "{value}"', 'What does config["{key}"] hold?', "field", "hex"),
    ("export {key}={value}", "To which value is {key} exported?", "identifier", "5 digits"),
    ('"{key}": "{value}",', 'What stands at "{key}"?', "field", "letters and digits"),
    ("def {key}(): return {value}", "What does {key}() return?", "field", "decimal"),
    ("set {key} to {value};", "Name the value that {key} is set to.", "field", "words"),
)
_KEYS = ("name", "place", "project", "item")


def _trained(form: tuple[str, str, str], attribute: tuple[str, str], keys: str) -> list[Wording]:
    what, values = attribute
    statement, question, reversed_question = (text.replace("{what}", what) for text in form)
    return [
        Wording(statement, question, keys, values),
        Wording(statement, reversed_question, keys, values, asks="key"),
    ]


TRAINED = (
    *(
        wording
        for form, attribute, keys in product(_FORMS, _ATTRIBUTES, _KEYS)
        for wording in _trained(form, attribute, keys)
    ),
    *(Wording(*code) for code in _CODE for _ in range(24)),
)
# Questions for what the text itself says.
FOLLOWS = (
    'Which words follow "{cue}" in the text?',
    'How does the text go on after "{cue}"?',
    'Quote what comes right after "{cue}".',
    'Continue this from the text above: "{cue}"',
)


def draw_pairs(
    wording: Wording, count: int, generator: random.Random, text: str = ""
) -> list[tuple[str, str]]:
    """`count` (key, value), no key and no value twice; keys that `text` has only where others are used up.

    Raises ConfigError if there are not as many of that kind.
    """
    keys = _distinct(wording.keys, count, generator, text)
    return list(zip(keys, _distinct(wording.values, count, generator, ""), strict=True))


def _distinct(kind: str, count: int, generator: random.Random, text: str) -> list[str]:
    found: dict[str, bool] = {}
    for _ in range(TRIES * count):
        drawn = DRAWERS[kind](generator)
        if drawn not in found:
            found[drawn] = bool(text) and drawn in text
        if sum(not known for known in found.values()) == count:
            break
    if len(found) < count:
        raise ConfigError(f"n_keys={count} is more than the {len(found)} of the kind {kind!r}; use fewer")
    return sorted(found, key=found.__getitem__)[:count]
