"""Words, names and values that the generator draws from."""

import random


def listed(text: str, mark: str | None = None) -> list[str]:
    """Return the words of a text, or its parts between marks."""
    return text.split(mark)


NAMES = listed("""
    Anna Ben Carla David Emma Felix Grace Henry Ida Jack Karl Laura Max Nina Oscar Paul Rosa Sam
    Tom Vera Will Zoe Alice Bob Eve Leo Mia Noah Olga Peter Ruth Simon Tina Victor Wendy Lucy Mark
    Jane John Mary Kim Ali Omar Lena Ivan Sara Hugo Elsa Otto Maya Luca Amir Yuki
""")
CITIES = listed("""
    Paris London Berlin Rome Madrid Oslo Vienna Tokyo Cairo Lima Boston Chicago Dublin Prague
    Athens Lisbon Warsaw Helsinki Zurich Geneva Munich Hamburg Milan Seoul Delhi Sydney Toronto
    Denver Dallas Miami Seattle Bergen Turin Porto Lyon Nice Basel Graz Krakow Gdansk Leeds
    Bristol Austin Nairobi Lagos Dakar Quito Bogota Havana Kyoto Osaka Perth Brisbane Montreal
    Phoenix Sofia Riga
""")
NOUNS = listed("""
    cat dog bird fish horse tree river mountain house garden robot dragon boat car train star moon
    book lamp chair table flower cloud wind rain snow lion bear fox wolf rabbit mouse king queen
    child teacher farmer sailor baker forest lake island road bridge tower clock piano violin drum
    candle window door key box coat hat shoe ball kite bell bee frog owl duck goat sheep cow pig
    snake apple cake bread stone castle planet rocket engine server computer
""")
HELD_OUT_NOUNS = listed(
    """turtle lantern harbour pigeon meadow trumpet comet barrel squirrel canyon"""
)
ADJECTIVES = listed("""
    small big old young happy quiet brave kind red blue green golden silver clever slow quick warm
    cold bright gentle lazy proud tiny strange little soft
""")
COLOURS = listed("red blue green yellow white black orange purple pink brown grey")
LANGUAGES = listed(
    "French German Spanish Italian Dutch Polish Greek Swedish Danish Latin Turkish Arabic"
)
TOPICS = listed("""
    python rust music jazz history physics chess tennis coffee tea bread solar wind gold water
    fire maps trains robots stars whales volcanoes bridges castles planets cooking gardens
    football cinema poetry painting rivers engines batteries rockets computers networks databases
""")
VERBS = listed("""
    get find fetch look check list show read load query lookup search create make add
""")
FILE_STEMS = listed("""
    notes report data todo main index readme config log draft letter plan budget table photo
""")
FILE_ENDS = listed("txt md csv py json pdf log html png toml")
FOLDERS = listed("home tmp docs src data work user files var etc mail old new")

_ONSETS = listed(
    "b c d f g h j k l m n p r s t v w z br cr dr fl gr kl pl pr sh sk st str th tr bl ch"
)
_VOWELS = listed("a e i o u a e i o u ai ea oo ou ie")
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "k", "x", "nd", "rt", "sh", "ck", "p"]


_PHRASES = (
    "the {j} {n}", "buy {n} and {m}", "{j} {n} in {c}", "hello world", "hello", "good morning",
    "best {n} in {c}", "how to paint a {n}", "call {w}", "meeting with {w}", "{t} for beginners",
    "history of {t}", "the {n} is {j}", "I like {t}", "see you at the {n}", "{w} and the {n}",
    "where is the {n}", "my {j} {n}", "news about {t}", "a {n} for {w}", "fix the {n}", "{p} {t}",
)  # fmt: skip


def pseudo_word(rng: random.Random, syllables: int | None = None) -> str:
    """Return a pronounceable word that means nothing."""
    count = syllables or rng.choice((1, 2, 2, 2, 3))
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count)]
    return "".join(parts) + rng.choice(_CODAS)


def letters(rng: random.Random, most: int = 8) -> str:
    """Return a short string of random letters."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, most)))


def any_word(rng: random.Random) -> str:
    """Return one word: real, invented, or plain letters; sometimes capitalised."""
    roll = rng.random()
    if roll < 0.35:
        word = rng.choice(NOUNS + ADJECTIVES + COLOURS + TOPICS)
    elif roll < 0.5:
        word = rng.choice(NAMES + CITIES)
    elif roll < 0.9:
        word = pseudo_word(rng)
    else:
        word = letters(rng)
    return word.capitalize() if rng.random() < 0.2 else word


def any_name(rng: random.Random) -> str:
    """Return the name of a person, sometimes an invented one."""
    return rng.choice(NAMES) if rng.random() < 0.5 else pseudo_word(rng).capitalize()


def any_city(rng: random.Random) -> str:
    """Return the name of a city, sometimes an invented one, sometimes of two words."""
    roll = rng.random()
    if roll < 0.5:
        return rng.choice(CITIES)
    if roll < 0.6:
        first = rng.choice(listed("New San Port North Saint Los Old East Fort"))
        return f"{first} {pseudo_word(rng).capitalize()}"
    return pseudo_word(rng).capitalize()


def any_number(rng: random.Random) -> str:
    """Return a whole number of one to four digits."""
    return str(rng.randint(0, 10 ** rng.choice((1, 2, 2, 3, 4)) - 1))


def any_path(rng: random.Random) -> str:
    """Return a file name, often with folders before it."""
    stem = rng.choice(FILE_STEMS) if rng.random() < 0.6 else pseudo_word(rng)
    folders = [
        rng.choice(FOLDERS) if rng.random() < 0.7 else pseudo_word(rng)
        for _ in range(rng.choice((0, 0, 1, 1, 2)))
    ]
    lead = "/" if folders and rng.random() < 0.7 else ""
    return lead + "/".join([*folders, f"{stem}.{rng.choice(FILE_ENDS)}"])


def any_email(rng: random.Random) -> str:
    """Return an address in an example domain."""
    who = any_name(rng).lower()
    host = rng.choice(("example", "mail", pseudo_word(rng)))
    return f"{who}@{host}.{rng.choice(('com', 'org', 'net'))}"


def any_phrase(rng: random.Random, most: int = 5) -> str:
    """Return a few words in a row, sometimes such as people write."""
    if most > 2 and rng.random() < 0.3:
        return rng.choice(_PHRASES).format(
            n=rng.choice(NOUNS), m=rng.choice(NOUNS), j=rng.choice(ADJECTIVES),
            t=rng.choice(TOPICS), c=any_city(rng), w=any_name(rng), p=pseudo_word(rng),
        )  # fmt: skip
    return " ".join(any_word(rng) for _ in range(rng.randint(1, most)))


def any_date(rng: random.Random) -> str:
    """Return a date in ISO form."""
    return f"20{rng.randint(10, 39)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def any_time(rng: random.Random) -> str:
    """Return a time of day."""
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 15, 30, 45)):02d}"
