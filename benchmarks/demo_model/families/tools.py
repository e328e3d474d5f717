"""Calls of tools that the system message lists, in Llama 4's pythonic form: `[get_weather(city="Lima")]`.

Names of tools and parameters vary, so that the list has to be read. What a tool gave back is put into words.
"""

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from benchmarks.demo_model.examples import Example, Family, Message, Phrasings, Split, draw_operands
from benchmarks.demo_model.words import COMMON, NAMES, THINGS, WEEKDAYS, draw_city, draw_name

NAME = "tools"

# The words that the model's chat template puts before the list of tools.
SYSTEM_PREFIX = "You can call these functions:\n"
NO_TOOL = "None of the functions can do that."

Values = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Tool:
    """A kind of tool: spellings of its name, of each parameter with its JSON type, and how one asks for it."""

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[tuple[str, ...], str], ...]
    draw: Callable[[Random], Values]
    questions: Phrasings


@dataclass(frozen=True, slots=True)
class _Offered:
    """A tool as one system message lists it."""

    kind: _Tool
    name: str
    parameters: tuple[str, ...]
    is_wordy: bool  # whether the parameters are described

    def as_json(self) -> dict[str, object]:
        """The tool as OpenAI's API describes a function."""
        properties = {
            name: {"type": kind} | ({"description": f"The {name.replace('_', ' ')}."} if self.is_wordy else {})
            for name, (_, kind) in zip(self.parameters, self.kind.parameters, strict=True)
        }
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        return {"name": self.name, "description": self.kind.description, "parameters": parameters}

    def call(self, values: Values) -> str:
        stated = (
            f"{name}={json.dumps(value, ensure_ascii=False)}"
            for name, value in zip(self.parameters, values, strict=True)
        )
        return f"{self.name}({', '.join(stated)})"


def _text(*names: str) -> tuple[tuple[str, ...], str]:
    return names, "string"


def _number(*names: str) -> tuple[tuple[str, ...], str]:
    return names, "integer"


_STATES = ("here", "ready", "broken", "late", "lost", "found")

_TOOLS = (
    _Tool(
        ("get_weather", "weather", "weather_now", "look_up_weather"), "The weather of a city.", (_text("city",
        "location", "place"),),
        lambda draw: (draw_city(draw),),
        Phrasings(
            trained=("What is the weather in {}?", "How is the weather in {}?", "Weather in {}?",
            "Tell me the weather in {}.",
                     "Is it raining in {}?", "What's the weather like in {}?", "Do I need a coat in {}?",
                     "Please look up the weather in {}.", "How warm is it in {}?"),
            held_out=("Please tell me the weather in {}.", "How is the weather like in {}?", "Is it warm in {}?"),
        ),
    ),
    _Tool(
        ("get_forecast", "forecast", "weather_forecast"), "The weather of a city for some days.",
        (_text("city", "location", "place"), _number("days", "num_days")),
        lambda draw: (draw_city(draw), draw.randint(2, 14)),
        Phrasings(
            trained=("What will the weather be in {} for {} days?", "Give me the forecast for {} for {} days.",
                     "Forecast for {}, {} days.", "How will the weather be in {} over the next {} days?",
                     "I need the forecast of {} for {} days."),
            held_out=("Tell me the forecast for {} for {} days.", "Forecast of {} for the next {} days, please."),
        ),
    ),
    _Tool(
        ("set_timer", "start_timer", "timer"), "Starts a timer.", (_number("minutes", "duration_minutes", "length"),),
        lambda draw: (draw.randint(1, 99),),
        Phrasings(
            trained=("Set a timer for {} minutes.", "Start a timer of {} minutes.", "Timer for {} minutes, please.",
                     "Wake me in {} minutes.", "Please set a timer for {} minutes.",
                     "Can you start a {} minute timer?"),
            held_out=("Please start a timer for {} minutes.", "Can you set a timer of {} minutes?"),
        ),
    ),
    _Tool(
        ("send_message", "message", "send_text"), "Sends a message to a person.",
        (_text("to", "recipient", "person"), _text("text", "message", "body")),
        lambda draw: (draw_name(draw), f"the {draw.choice(THINGS)} is {draw.choice(_STATES)}"),
        Phrasings(
            trained=('Tell {} that "{}".', 'Send {} the message "{}".', 'Message {}: "{}"', 'Write to {}: "{}"',
                     'Please tell {}: "{}"', 'Text {} "{}".'),
            held_out=('Please send {} the message "{}".', 'Write {} the message: "{}"'),
        ),
    ),
    _Tool(
        ("add_event", "create_event", "add_to_calendar"), "Puts an event into the calendar.",
        (_text("title", "event", "name"), _text("day", "weekday")),
        lambda draw: (draw.choice(("lunch", "dinner", "meeting", "concert", "party", "exam",
        "race")) + f" with {draw.choice(NAMES)}",
                      draw.choice(WEEKDAYS)),
        Phrasings(
            trained=('Add "{}" on {}.', 'Put "{}" into my calendar on {}.', 'I have "{}" on {}, add it.',
                     'Create the event "{}" on {}.', 'New event: "{}" on {}.'),
            held_out=('Please add "{}" to my calendar on {}.', 'Create "{}" on {}.'),
        ),
    ),
    _Tool(
        ("search", "web_search", "find"), "Searches the web.", (_text("query", "q", "words"),),
        lambda draw: (" ".join(draw.sample(COMMON, draw.randint(1, 3))),),
        Phrasings(
            trained=('Search for "{}".', 'Look up "{}".', 'Find "{}" on the web.', 'Search the web for "{}".',
                     'What can you find about "{}"?', 'Please search for "{}".'),
            held_out=('Please look up "{}" on the web.', 'Can you search for "{}"?'),
        ),
    ),
    _Tool(
        ("play_song", "play", "play_music"), "Plays a song.", (_text("title", "song"),),
        lambda draw: (" ".join(word.capitalize() for word in draw.sample(COMMON, 2)),),
        Phrasings(
            trained=('Play "{}".', 'Play the song "{}".', 'I want to hear "{}".', 'Please play "{}".',
            'Can you play "{}"?'),
            held_out=('Can you play the song "{}"?', 'Please play me "{}".'),
        ),
    ),
    _Tool(
        ("set_light", "switch_light", "dim_light"), "Sets the light of a room, in percent.",
        (_text("room", "place"), _number("level", "percent", "brightness")),
        lambda draw: (draw.choice(("kitchen", "bedroom", "bathroom", "hall", "garden", "office", "cellar", "garage")),
        draw.randint(0, 100)),
        Phrasings(
            trained=("Set the light in the {} to {} percent.", "Dim the {} to {} percent.",
            "Light in the {} to {} percent.",
                     "Make the {} light {} percent.", "Please set the {} light to {} percent."),
            held_out=("Please set the light in the {} to {} percent.", "Dim the {} light to {} percent."),
        ),
    ),
)  # fmt: skip

_SKIES = ("clear", "cloudy", "rainy", "windy", "snowy", "foggy")


def system_message(tools: list[dict[str, object]], before: str = "") -> Message:
    """The list of tools as the chat template writes it, below what else the system message says."""
    return Message(role="system", content=(before + "\n\n" if before else "") + SYSTEM_PREFIX + json.dumps(tools))


def _operands(draw: Random) -> tuple[int, Values]:
    tool_idx = draw.randrange(len(_TOOLS))
    return tool_idx, _TOOLS[tool_idx].draw(draw)


def make(draw: Random, split: Split) -> Example:
    tool_idx, values = draw_operands(draw, split, _operands)
    wanted = _offer(draw, _TOOLS[tool_idx])
    others = draw.sample([tool for i, tool in enumerate(_TOOLS) if i != tool_idx], draw.randint(0, 3))
    offered = [_offer(draw, tool) for tool in others]
    # That no listed tool fits is trained but not asked in held-out splits: the model did not learn to say so.
    is_refused = bool(offered) and draw.random() < 0.1 and split == "train"
    if not is_refused:
        offered.append(wanted)
    draw.shuffle(offered)
    system = system_message(
        [tool.as_json() for tool in offered], "You are a helpful assistant." if draw.random() < 0.2 else ""
    )
    question = wanted.kind.questions.pick(draw, split)
    if is_refused:
        return _example(system, question.format(*values), NO_TOOL)
    if tool_idx == 0 and draw.random() < 0.25:
        other = (draw_city(draw),)
        calls = f"[{wanted.call(values)}, {wanted.call(other)}]"
        return _example(system, question.format(f"{values[0]} and {other[0]}"), calls)
    example = _example(system, question.format(*values), f"[{wanted.call(values)}]")
    if tool_idx == 0 and draw.random() < 0.4:
        return Example(family=NAME, messages=(*example.messages, *_weather(draw, str(values[0]))))
    return example


def _offer(draw: Random, tool: _Tool) -> _Offered:
    return _Offered(
        tool,
        draw.choice(tool.names),
        tuple(draw.choice(spellings) for spellings, _ in tool.parameters),
        draw.random() < 0.25,
    )


def _weather(draw: Random, city: str) -> tuple[Message, Message]:
    """What the tool gave back, and the answer in words."""
    degrees, sky = draw.randint(-15, 39), draw.choice(_SKIES)
    result = Message(role="tool", content=json.dumps({"degrees": degrees, "sky": sky}))
    return result, Message(role="assistant", content=f"It is {sky} in {city}, with {degrees} degrees.")


def _example(system: Message, question: str, answer: str) -> Example:
    messages = (system, Message(role="user", content=question), Message(role="assistant", content=answer))
    return Example(family=NAME, messages=messages)


def is_right(example: Example, answer: str) -> bool:
    """The same calls, however they are spaced or quoted; text that is no call, word by word."""
    if not example.answer.startswith("["):
        return answer.strip() == example.answer
    try:
        return ast.dump(ast.parse(answer.strip(), mode="eval")) == ast.dump(ast.parse(example.answer, mode="eval"))
    except (SyntaxError, ValueError):
        return False


FAMILY = Family(name=NAME, title="Pythonic calls of listed tools, and their results in words", make=make,
                is_right=is_right, weight=2.0)  # fmt: skip
