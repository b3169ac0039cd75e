"""Short stories, poems and sentences about a named thing."""

import random

from cortex.bundled.recipe import words

_STORIES = (
    "Once there was a {t}. The {t} lived near a {p} and was {f}. One day the {t} met a {o}. "
    "They became friends and were happy ever after.",
    "There was a {t} that wanted to see the world. It walked for {n} days, until it came to a {p}. "
    "There the {t} rested and smiled. It was home.",
    "A {t} and a {o} sat by the {p}. The {t} was {f}. I will help you, said the {o}. "
    "And so the {t} was not alone any more.",
)
_POEMS = (
    "O {t}, so bright and free,\nyou shine for you and me.\nThe night is long, the day is near,\n"
    "and I am glad that you are here.",
    "A {t} stood beside the {p},\nthe wind was soft and low.\nIt sang a song for all of us\n"
    "about the falling snow.",
)
_SENTENCES = (
    "The {t} is {f} and sits near the {p}.",
    "I saw a {t} by the {p} today.",
)
_PLACES = words.listed("river lake forest hill bridge garden")
_MOODS = words.listed("very quiet|very brave|a little sad|very curious|always kind", "|")
_OTHERS = words.listed("fox bird child bear cat")
_NUMBERS = words.listed("two three seven ten")


def write(rng: random.Random, thing: str) -> tuple[str, str, str]:
    """Return the kind of text, a request for it, and the text itself."""
    roll = rng.random()
    if roll < 0.5:
        kind, form = "story", rng.choice(_STORIES)
        request = rng.choice(
            ("tell me a story about a {t}", "write a story about a {t}", "a story about a {t}",
             "tell me a short story about a {t}", "write a short story about a {t}",
             "can you tell a story about a {t}", "story about a {t}")
        )  # fmt: skip
    elif roll < 0.75:
        kind, form = "poem", rng.choice(_POEMS)
        request = rng.choice(
            ("write a poem about a {t}", "write a short poem about a {t}", "a poem about a {t}",
             "tell me a poem about a {t}", "poem about a {t}")
        )  # fmt: skip
    else:
        kind, form = "sentence", rng.choice(_SENTENCES)
        request = rng.choice(
            ("write one sentence about a {t}", "write a sentence about a {t}",
             "make a sentence with {t}", "say something about a {t}")
        )  # fmt: skip
    text = form.format(
        t=thing, p=rng.choice(_PLACES), f=rng.choice(_MOODS), o=rng.choice(_OTHERS),
        n=rng.choice(_NUMBERS),
    )  # fmt: skip
    return kind, request.format(t=thing), text
