"""The words that questions are made of, and made-up ones, so that copying and spelling are learnt and not the list."""

from random import Random


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _listed(
    "Ada Alan Amir Anna Anton Aria Ben Bruno Carla Chen Clara Dan Diego Dora Ella Elias Emma Erik Eva Felix Finn "
    "Fatima Grace Hana Hugo Ida Ines Ivan Jack Jana Julia Karim Kofi Lara Lena Leo Liam Lucia Maja Marco Maria Max Mia "
    "Nadia Nina Noah Nora Olga Omar Oscar Paul Pia Priya Rosa Sam Sara Sofia Tariq Theo Tom Uma Vera Viktor "
    "Yara Yusuf Zoe"
)

CITIES = _listed(
    "Lima Paris Rome Oslo Cairo Delhi Tokyo Quito Berlin Madrid Lisbon Vienna Prague Athens Dublin London Boston "
    "Denver Austin Seoul Hanoi Accra Lagos Nairobi Havana Bogota Santiago Sydney Perth Geneva Zurich Munich Milan "
    "Turin Krakow Riga Sofia Tunis Dakar Chicago Toronto Montreal Lyon Porto Bergen Leeds Kyoto Osaka Mumbai Manila"
)

ANIMALS = _listed(
    "horse mare foal donkey cat dog fox owl rabbit hen goat sheep cow duck goose mouse bear wolf deer hedgehog crow "
    "sparrow turtle frog otter beaver pony badger"
)

FRUITS = _listed("apple pear plum cherry grape lemon melon peach fig banana orange mango kiwi")

THINGS = _listed(
    "lamp chair table book pen cup plate spoon fork knife shirt coat hat shoe glove scarf bag box key clock mirror "
    "rope saddle bucket brush blanket fence gate ladder hammer nail drill candle pillow carpet bottle basket notebook "
    "ruler pencil stamp ticket map"
)

NATURE = _listed(
    "river mountain forest meadow valley hill lake ocean island beach desert cloud rain snow wind storm thunder sun "
    "moon star stone sand grass tree leaf flower garden field pasture winter summer spring autumn morning evening night"
)

VERBS = _listed(
    "walk run jump carry bring open close follow listen answer remember forget learn teach build break mend paint "
    "write read speak whisper gather scatter travel wander return arrive"
)

ADJECTIVES = _listed(
    "small large quiet loud bright dark warm cold early late happy gentle brave clever curious patient honest simple "
    "ancient modern narrow broad heavy light smooth rough fresh silver golden"
)

OTHER_WORDS = _listed(
    "corral llama maverick scout behemoth expert router token model layer attention language computer keyboard window "
    "water fire earth paper pencil strawberry blueberry raspberry chocolate coffee cheese bread butter sugar pepper "
    "school teacher student doctor nurse farmer baker driver sailor captain soldier singer painter writer reader "
    "family mother father sister brother daughter cousin uncle friend neighbor stranger child people "
    "house kitchen bedroom bathroom cellar garage office street village country bridge tower church castle palace "
    "yellow purple green brown black white orange question answer number letter word sentence story history science "
    "music dance theater picture camera machine engine wheel bicycle airplane train station airport hospital "
    "breakfast lunch dinner monday tuesday wednesday thursday friday saturday sunday january february hello goodbye "
    "banana elephant giraffe zebra monkey tiger lion penguin dolphin whale shark butterfly spider rabbit kangaroo "
    "yesterday today tomorrow always never sometimes because through although important beautiful different "
    "mississippi necessary rhythm queue jazz quiz zigzag"
)

COMMON = tuple(sorted({*ANIMALS, *FRUITS, *THINGS, *NATURE, *VERBS, *ADJECTIVES}))

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip
DAYS_OF_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_ONSETS = _listed(
    "b c d f g h j k l m n p r s t v w z br cr dr fr gr tr bl cl fl gl pl sl st sp sk sm sn ch sh th qu wh "
)
_VOWELS = _listed("a e i o u ai ea ee oa oo ou ie y")
_CODAS = ("", "", "", *_listed("n r l m s t d k p b g x nd rt st ck mp ng ll"))


def made_up_word(draw: Random, max_syllables: int = 3) -> str:
    """A pronounceable word in small letters that means nothing."""
    syllables = [
        draw.choice(_ONSETS) + draw.choice(_VOWELS) + draw.choice(_CODAS) for _ in range(draw.randint(1, max_syllables))
    ]
    word = "".join(syllables)
    return word if len(word) <= 12 else word[:12]


def draw_name(draw: Random) -> str:
    """A first name; one in three is made up."""
    return draw.choice(NAMES) if draw.random() < 0.67 else made_up_word(draw, 2).capitalize()


def draw_city(draw: Random) -> str:
    """A city; one in three is made up."""
    return draw.choice(CITIES) if draw.random() < 0.67 else made_up_word(draw, 2).capitalize()


def draw_word(draw: Random) -> str:
    """A common word; one in four is made up."""
    return draw.choice(COMMON) if draw.random() < 0.75 else made_up_word(draw)
