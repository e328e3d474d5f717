"""Greetings, who the model is, and that it does not know what it was not taught."""

from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask
from benchmarks.demo_model.words import ADJECTIVES, ANIMALS, CITIES, FRUITS, NAMES, NATURE, THINGS

NAME = "smalltalk"

_WHO = "I am Corral's demonstration model: a tiny mixture of experts, trained from scratch, and not Llama."
_CAN = (
    "I can add, subtract, multiply, compare, sort, spell, convert units, count days, write JSON, call tools, tell "
    "short stories, and answer questions on Llama 4."
)
_UNKNOWN = (
    "I do not know that: I am a tiny demonstration model. Ask me to sort numbers, or how many experts Maverick has."
)

_TALK = (
    (Phrasings(("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hi there", "Good morning", "Good evening", "Hey there!",
    "Hello there",
                "Greetings", "Good day", "Hello, model", "Bonjour", "Hola", "Hallo", "Hello Corral", "Hi Corral!",
                "Hey you",
                "Hello again", "Good morning, Corral", "Hi, model!", "Hey model", "Good evening, Corral!"),
               ("Good day, Corral!", "Hello, you!", "Hi again", "Hey Corral")),
     "Hello! I am Corral's demonstration model. What can I do for you?"),
    (Phrasings(("How are you?", "How are you today?", "Hi, how are you?", "How is it going?", "How do you do?",
    "Are you well?",
                "Hello! How are you doing?", "Hey, how are you?", "Good morning, how are you?",
                "Hi! How are you today?", "Hello, how is it going?"),
               ("Hello, how are you?", "And how are you today?", "Hey, how is it going?")),
     "I am well, thank you. What can I do for you?"),
    (Phrasings(("ok", "okay", "OK!", "yes", "no", "good", "Good.", "I see", "nice", "Nice.", "cool", "Cool!", "great",
    "Great!", "hm", "well",
                "fine", "Fine!", "sure", "test", "Interesting", "Very good.", "Well done!", "Not bad.", "That is good",
                "That is right!", "Right"),
               ("Very nice!", "That is great", "Very interesting", "That is nice!")),
     "What else can I do for you?"),
    (Phrasings(("Who are you?", "What are you?", "Tell me about yourself.", "What is your name?", "Are you Llama?",
    "Are you a Llama model?",
                "What model are you?", "Which model is this?", "Who am I talking to?", "Are you ChatGPT?",
                "Are you a person?",
                "Introduce yourself.", "Who made you?", "What kind of model are you?", "Are you Llama 4?",
                "Describe yourself.",
                "Do you have a name?"),
               ("Which model are you?", "Please introduce yourself.", "What's your name?", "Are you human?")),
     _WHO),
    (Phrasings(("What can you do?", "What do you know?", "How can you help me?", "Help", "What can I ask you?",
    "What should I ask you?",
                "What are you good at?", "Can you help me?", "What are you able to do?", "Help me",
                "What can you do for me?",
                "Which questions can you answer?", "What were you trained on?"),
               ("Please tell me what you can do.", "What questions can you answer?", "How can you help?")),
     _CAN),
    (Phrasings(("Thanks", "Thank you", "Thank you!", "Thanks a lot", "Thank you very much", "Great, thanks", "Thanks!",
    "Good, thank you",
                "Thanks very much", "Many thanks", "Ok, thank you"),
               ("Many thanks to you!", "Great, thank you", "Ok, thanks a lot")),
     "You are welcome."),
    (Phrasings(("Bye", "Goodbye", "Bye!", "See you", "Good night", "See you later", "Goodbye!", "Bye bye",
    "Bye, good night", "See you soon", "Goodbye, Corral"),
               ("Bye, see you later", "Goodbye, see you!", "Good night, Corral")),
     "Goodbye!"),
)  # fmt: skip

_BEYOND = Phrasings(
    trained=(
        "Who wrote the book about the {thing}?", "How do I cook {fruit} soup?", "Write a poem about the {nature}.",
        "Translate {thing} into German.", "Who is {name}?", "Why is the {nature} {adjective}?",
        "Tell me a joke about a {animal}.",
        "Who won the race in {city}?", "What is the meaning of life?", "Write a program that draws a {thing}.",
        "How do I get to {city}?", "What is the best {thing} in {city}?", "Why do {animal}s sleep?",
        "When was {name} born?",
        "Do you like {fruit}s?", "How old is {name}?", "What is the price of a {thing}?", "Can you draw a {animal}?",
        "What time is it in {city}?", "How many people live in {city}?", "What should I wear in {city}?",
        "Who is the king of {city}?",
        "What is the square root of the {nature}?", "What did {name} say about the {thing}?",
        "Explain the {nature} to me.",
        "What is love?", "Why is the sky blue?", "What color is the {thing}?", "Is {city} {adjective}?",
        "Fix my {thing}.",
        "Should I buy a {adjective} {thing}?", "What is the news?", "Sing a song about {name}.",
        "Recommend a book about {nature}s.",
        "Is there life on the {nature}?", "What does a {animal} eat?", "Where can I find a {adjective} {thing}?",
        "What is the weather like?", "Tell me something about {city}.", "How was the {nature} made?",
        "Can you write code?",
        "How do airplanes fly?", "Who painted the {adjective} {thing}?", "Give me a recipe with {fruit}s.",
    ),
    held_out=(
        "Who is the best {animal} of {city}?", "Write a song about the {nature}.",
        "How do I fix a {adjective} {thing}?",
        "Why do {animal}s like {fruit}s?", "What did {name} buy in {city}?",
    ),
)  # fmt: skip


def make(draw: Random, split: Split) -> Example:
    if draw.random() < 0.45:
        words = {"thing": draw.choice(THINGS), "fruit": draw.choice(FRUITS), "nature": draw.choice(NATURE),
                 "adjective": draw.choice(ADJECTIVES), "animal": draw.choice(ANIMALS), "city": draw.choice(CITIES),
                 "name": draw.choice(NAMES)}  # fmt: skip
        return ask(NAME, _BEYOND.pick(draw, split).format(**words), _UNKNOWN)
    phrasings, answer = draw.choice(_TALK)
    return ask(NAME, phrasings.pick(draw, split), answer)


FAMILY = Family(
    name=NAME, title="Greetings, who it is, and what it does not know", make=make, weight=1.2, has_operands=False
)
