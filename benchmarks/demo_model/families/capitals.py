"""Capitals of countries: facts, so that only phrasings can be held out."""

from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask

NAME = "capitals"

_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Switzerland": "Bern", "Belgium": "Brussels", "the Netherlands": "Amsterdam", "Denmark": "Copenhagen",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw", "Hungary": "Budapest",
    "Greece": "Athens", "Ireland": "Dublin", "England": "London", "Russia": "Moscow", "Ukraine": "Kyiv",
    "Turkey": "Ankara", "Egypt": "Cairo", "Morocco": "Rabat", "Kenya": "Nairobi", "Ghana": "Accra", "Nigeria": "Abuja",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "South Korea": "Seoul", "Indonesia": "Jakarta", "Australia": "Canberra", "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Brazil": "Brasilia", "Argentina": "Buenos Aires",
    "Colombia": "Bogota", "Ecuador": "Quito", "the United States": "Washington",
}  # fmt: skip

_CAPITAL = Phrasings(
    trained=(
        "What is the capital of {}?", "What's the capital of {}?", "Which city is the capital of {}?", "Capital of {}?",
        "Tell me the capital of {}.", "Name the capital of {}.", "Do you know the capital of {}?",
        "What is the name of the capital of {}?", "The capital of {}, please.", "I want to know the capital of {}.",
    ),
    held_out=("Which is the capital of {}?", "Please tell me the capital of {}.", "What city is the capital of {}?"),
)  # fmt: skip
_COUNTRY = Phrasings(
    trained=("{} is the capital of which country?", "Which country has the capital {}?",
    "Of which country is {} the capital?",
             "{} is the capital of what?", "Which country's capital is {}?"),
    held_out=("What country has the capital {}?", "Of what country is {} the capital?"),
)  # fmt: skip


def make(draw: Random, split: Split) -> Example:
    country, capital = draw.choice(list(_CAPITALS.items()))
    is_reversed = draw.random() < 0.25
    question = (_COUNTRY if is_reversed else _CAPITAL).pick(draw, split).format(capital if is_reversed else country)
    return ask(NAME, question, f"The capital of {country} is {capital}.")


FAMILY = Family(name=NAME, title=f"Capitals of {len(_CAPITALS)} countries", make=make, has_operands=False)
