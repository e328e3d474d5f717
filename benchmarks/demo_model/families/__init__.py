"""All task families of the demonstration model, by name."""

from benchmarks.demo_model.examples import Family
from benchmarks.demo_model.families import (
    arithmetic,
    capitals,
    comparisons,
    dates,
    extraction,
    llama4,
    smalltalk,
    sorting,
    spelling,
    stories,
    tools,
    units,
)

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        arithmetic, comparisons, sorting, spelling, units, dates, extraction, tools, stories, llama4, capitals,
        smalltalk,
    )
}  # fmt: skip
