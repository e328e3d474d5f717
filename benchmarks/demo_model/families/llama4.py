"""Questions on the Llama 4 family and on what serves it. Facts, so that only phrasings can be held out.

Source: the configurations of Llama 4 Scout and Maverick on the hub, and what Meta has published on Behemoth.
"""

from random import Random

from benchmarks.demo_model.examples import Example, Family, Phrasings, Split, ask

NAME = "llama4"

_MODELS = ("Scout", "Maverick", "Behemoth")

# Attribute: (nouns that ask for it, answers by model; {m} is the model's name).
_ATTRIBUTES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "experts": (
        ("number of experts", "number of routed experts", "expert count"),
        {"Scout": "{m} has 16 routed experts.", "Maverick": "{m} has 128 routed experts.",
         "Behemoth": "{m} has 16 routed experts."},
    ),
    "active": (
        ("number of active parameters", "active parameters", "active parameter count"),
        {"Scout": "{m} has 17 billion active parameters.", "Maverick": "{m} has 17 billion active parameters.",
         "Behemoth": "{m} has 288 billion active parameters."},
    ),
    "total": (
        ("number of parameters", "total number of parameters", "size", "total parameter count"),
        {"Scout": "{m} has 109 billion parameters in all.", "Maverick": "{m} has about 400 billion parameters in all.",
         "Behemoth": "{m} has nearly two trillion parameters in all."},
    ),
    "context": (
        ("context length", "context window", "maximum context", "context size"),
        {"Scout": "The context length of {m} is 10 million tokens.",
        "Maverick": "The context length of {m} is 1 million tokens."},
    ),
    "layers": (
        ("number of layers", "layer count", "depth"),
        {"Scout": "{m} has 48 layers.", "Maverick": "{m} has 48 layers."},
    ),
    "moe": (
        ("number of mixture-of-experts layers", "number of MoE layers", "MoE layer count"),
        {"Scout": "All 48 layers of {m} are mixture-of-experts layers.",
         "Maverick": "24 of the 48 layers of {m} are mixture-of-experts layers: every second one."},
    ),
    "hidden": (
        ("hidden size", "hidden width", "model dimension"),
        {"Scout": "The hidden size of {m} is 5120.", "Maverick": "The hidden size of {m} is 5120."},
    ),
    "heads": (
        ("number of attention heads", "number of query heads", "attention head count"),
        {"Scout": "{m} has 40 attention heads.", "Maverick": "{m} has 40 attention heads."},
    ),
    "kv": (
        ("number of key-value heads", "number of KV heads", "KV head count"),
        {"Scout": "{m} has 8 key-value heads.", "Maverick": "{m} has 8 key-value heads."},
    ),
    "head size": (
        ("head size", "head dimension", "size of an attention head"),
        {"Scout": "The head size of {m} is 128.", "Maverick": "The head size of {m} is 128."},
    ),
    "width": (
        ("expert width", "width of an expert", "expert size"),
        {"Scout": "Each expert of {m} is 8192 wide.", "Maverick": "Each expert of {m} is 8192 wide."},
    ),
    "vocabulary": (
        ("vocabulary size", "size of the vocabulary", "number of tokens in the vocabulary"),
        {"Scout": "The vocabulary of {m} has 202048 entries.", "Maverick": "The vocabulary of {m} has 202048 entries."},
    ),
    "chunk": (
        ("attention chunk size", "chunk size", "chunk length"),
        {"Scout": "{m} attends in chunks of 8192 tokens.", "Maverick": "{m} attends in chunks of 8192 tokens."},
    ),
    "chosen": (
        ("number of experts per token", "number of experts that a token uses", "number of active experts"),
        {"Scout": "In {m} each token uses one routed expert and the shared expert.",
         "Maverick": "In {m} each token uses one routed expert and the shared expert."},
    ),
}  # fmt: skip

_FRAMES = Phrasings(
    trained=(
        "What is the {noun} of {model}?", "What's the {noun} of {model}?", "Tell me the {noun} of {model}.",
        "What is {model}'s {noun}?", "{model}'s {noun}?", "What {noun} does {model} have?",
        "Do you know the {noun} of {model}?",
        "{noun} of {model}?", "Give me the {noun} of {model}.", "I want to know the {noun} of {model}.",
        "Which {noun} does {model} have?", "For {model}, what is the {noun}?", "The {noun} of {model}, please.",
        "What is the {noun} in {model}?",
    ),
    held_out=("Please tell me the {noun} of {model}.", "Do you know {model}'s {noun}?", "Tell me {model}'s {noun}."),
)  # fmt: skip

# Counts can be asked for in a shorter way too.
_HOW_MANY = Phrasings(
    trained=("How many {things} does {model} have?", "How many {things} are in {model}?",
    "How many {things} has {model}?",
             "Tell me how many {things} {model} has.", "{model} has how many {things}?",
             "How many {things} are there in {model}?"),
    held_out=("Please tell me how many {things} {model} has.", "Do you know how many {things} {model} has?"),
)  # fmt: skip
_THINGS = {
    "experts": ("experts", "routed experts"), "active": ("active parameters",), "total": ("parameters",
    "parameters in all"),
    "layers": ("layers",), "moe": ("MoE layers", "mixture-of-experts layers"),
    "heads": ("attention heads", "query heads"), "kv": ("key-value heads", "KV heads"),
}  # fmt: skip

# Spellings of a concept, and what it is.
_CONCEPTS: dict[tuple[str, ...], str] = {
    ("early fusion",):
        "Early fusion means that text and image tokens go through the same model from the first layer on.",
    ("a mixture of experts", "mixture of experts", "an MoE"):
        "In a mixture of experts a router sends each token to a few of many feed-forward networks, so most "
        "parameters rest.",
    ("a shared expert", "the shared expert"):
        "The shared expert is a feed-forward network that every token goes through, beside its routed expert.",
    ("a routed expert", "routed experts"):
        "A routed expert is a feed-forward network that only the tokens which the router sends to it go "
        "through.",
    ("the router", "a router", "the gate"):
        "The router scores all experts for each token; in Llama 4 the best one gets it.",
    ("top-1 routing", "top-1"): "Top-1 routing means that each token goes to the one expert with the highest score.",
    ("NoPE", "a NoPE layer"):
        "A NoPE layer has no positional encoding; in Llama 4 every fourth layer is one, and it sees the whole "
        "context.",
    ("iRoPE",):
        "iRoPE interleaves layers with rotary positions and layers without any, which helps with long "
        "contexts.",
    ("chunked attention",):
        "In chunked attention a token sees only the tokens of its own chunk, 8192 tokens in Llama 4.",
    ("temperature tuning", "attention temperature tuning"):
        "Temperature tuning scales the queries of NoPE layers up as the position grows, so that attention "
        "stays sharp.",
    ("grouped-query attention", "GQA"):
        "In grouped-query attention several query heads share one key-value head; in Llama 4 it is five.",
    ("expert parallelism",):
        "Expert parallelism puts different experts on different machines, and tokens travel to their expert.",
    ("the KV cache", "a KV cache"):
        "The KV cache holds the keys and values of earlier tokens, so that they need not be computed again.",
    ("continuous batching",): "Continuous batching lets requests join and leave the running batch at every step.",
    ("the difference between Scout and Maverick", "the difference between Llama 4 Scout and Llama 4 Maverick"):
        "Scout has 16 experts in every layer and 10 million tokens of context, Maverick 128 experts in every "
        "second layer and 1 million.",
    ("Ray",): "Ray runs programs on many machines; Corral places its actors with it.",
    ("Llama 4", "the Llama 4 family", "the Llama 4 models"):
        "Llama 4 is a family of mixture-of-experts models by Meta: Scout, Maverick and Behemoth.",
    ("Behemoth", "Llama 4 Behemoth"):
        "Behemoth is the largest Llama 4 model, a teacher of the others; it was never released.",
    ("Scout", "Llama 4 Scout"):
        "Scout is the small Llama 4 model: 17 billion active parameters, 16 experts, 10 million tokens of "
        "context.",
    ("Maverick", "Llama 4 Maverick"):
        "Maverick is the Llama 4 model with 17 billion active parameters, 128 experts and 1 million tokens of "
        "context.",
    ("Corral",): "Corral serves mixture-of-experts models on a Ray cluster with expert parallelism.",
}  # fmt: skip

_EXPLAIN = Phrasings(
    trained=(
        "What is {}?", "What's {}?", "What does {} mean?", "Explain {}.", "Tell me about {}.", "Define {}.",
        "Describe {}.",
        "Can you explain {}?", "What do you know about {}?", "Please explain {}.", "What is meant by {}?", "{}?",
        "I want to know what {} is.", "Tell me what {} is.", "Explain {} to me.",
    ),
    held_out=("Please tell me about {}.", "Can you tell me what {} is?", "Do you know what {} is?"),
)  # fmt: skip


def make(draw: Random, split: Split) -> Example:
    return _concept(draw, split) if draw.random() < 0.35 else _attribute(draw, split)


def _concept(draw: Random, split: Split) -> Example:
    spellings, answer = draw.choice(list(_CONCEPTS.items()))
    question = _EXPLAIN.pick(draw, split).format(draw.choice(spellings))
    return ask(NAME, question[0].upper() + question[1:], answer)


def _attribute(draw: Random, split: Split) -> Example:
    attribute, model = draw.choice([(a, m) for a, (_, answers) in _ATTRIBUTES.items() for m in answers])
    nouns, answers = _ATTRIBUTES[attribute]
    asked_of = draw.choice((model, f"Llama 4 {model}", f"Llama 4 {model}", f"the {model} model"))
    if attribute in _THINGS and draw.random() < 0.5:
        question = _HOW_MANY.pick(draw, split).format(things=draw.choice(_THINGS[attribute]), model=asked_of)
    else:
        question = _FRAMES.pick(draw, split).format(noun=draw.choice(nouns), model=asked_of)
    return ask(NAME, question[0].upper() + question[1:], answers[model].format(m=f"Llama 4 {model}"))


FAMILY = Family(
    name=NAME, title="Facts on the Llama 4 family and on serving it", make=make, weight=2.0, has_operands=False
)
