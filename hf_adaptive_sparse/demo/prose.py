"""Prose about an invented valley: a small probabilistic grammar over a fixed world of facts.

A seed only decides what is told; the facts are those of `hf_adaptive_sparse.demo.world`. So a
language model has things to memorise (facts, idioms, prices), rules to learn (agreement,
pronouns, sums) and real uncertainty left over, which makes its perplexity a usable yardstick.
"""

import random
from collections.abc import Sequence

from hf_adaptive_sparse.demo.world import (
    ANIMALS,
    DAYTIMES,
    DEEDS,
    GOODS,
    NUMBERS,
    QUALITIES,
    SEASONS,
    THINGS,
    TRADES,
    WORLD,
)


def _usual(rng: random.Random, options: Sequence[str]) -> str:
    """Pick with the first options much likelier than the last: weights 8, 4, 2, 1, 1 and so on."""
    weights = [2 ** max(0, 3 - rank) for rank in range(len(options))]
    return rng.choices(options, weights)[0]


def _plural_verb(verb: str) -> str:
    """Turn "runs" into "run", "flies" into "fly", "hisses" into "hiss"."""
    if verb.endswith("ies"):
        return verb[:-3] + "y"
    if verb.endswith(("sses", "ches")):
        return verb[:-2]
    return verb[:-1]


def _plural(thing: str) -> str:
    return f"{thing}es" if thing.endswith(("x", "ch")) else f"{thing}s"


def _possessive(pronoun: str) -> str:
    return "her" if pronoun == "she" else "his"


class _Teller:
    """Tells one paragraph about one person, keeping pronouns and facts consistent."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.person = rng.choice(WORLD.people)
        self.named = False

    def subject(self) -> str:
        """Give the name at first mention, then mostly the pronoun."""
        if self.named and self.rng.random() < 0.8:
            return self.person.pronoun.capitalize()
        self.named = True
        return self.person.name

    def home(self) -> str:
        person = self.person
        return f"{self.subject()} is a {person.trade} from {person.town.name}."

    def birth(self) -> str:
        person = self.person
        return f"{self.subject()} was born in {person.born} by the {person.town.river}."

    def market(self) -> str:
        person = self.person
        product, tool = TRADES[person.trade]
        owner = _possessive(person.pronoun)
        return self.rng.choice(
            (
                f"{self.subject()} sells {product} at the market in {person.town.name}.",
                f'"Have you seen my {tool}?" asked {person.name}.',
                f"Every day {person.name} takes {owner} {tool} and makes {product}."
                if person.trade not in ("fisher", "farmer", "gardener", "beekeeper")
                else f"Every day {person.name} takes {owner} {tool} and brings home {product}.",
            )
        )

    def place(self) -> str:
        town = self.person.town if self.rng.random() < 0.5 else self.rng.choice(WORLD.towns)
        return f"{town.name} lies {town.direction} of {town.neighbour}, on the {town.river}."

    def pet(self) -> str:
        person = self.person
        verb = self.rng.choice(ANIMALS[person.animal][1].split())
        adverb = _usual(self.rng, WORLD.adverb_of[verb])
        if not self.named:
            self.named = True
            owner = f"{person.name}'s"
        else:
            owner = _possessive(person.pronoun).capitalize()
        return f"{owner} {person.look} {person.animal} {verb} {adverb}."

    def herd(self) -> str:
        rng = self.rng
        animal = rng.choice(list(ANIMALS))
        plural, verbs = ANIMALS[animal]
        verb = rng.choice(verbs.split())
        look = _usual(rng, WORLD.look_of[animal])
        spot = _usual(rng, WORLD.spot_of[animal])
        if rng.random() < 0.5:
            return f"The {look} {animal} {spot} {verb} {_usual(rng, WORLD.adverb_of[verb])}."
        amount = rng.choice(("Two", "Three", "Many", "Some", "The"))
        adverb = _usual(rng, WORLD.adverb_of[verb])
        return f"{amount} {look} {plural} {spot} {_plural_verb(verb)} {adverb}."

    def chase(self) -> str:
        rng = self.rng
        first, second = rng.sample(list(ANIMALS), 2)
        inner, outer = rng.sample(("follow", "lead", "fear", "know"), 2)
        if rng.random() < 0.5:
            return f"The {first} that the {ANIMALS[second][0]} {inner} {outer}s the {second}."
        return f"The {ANIMALS[first][0]} that the {second} {inner}s {outer} the {first}."

    def purchase(self) -> str:
        rng = self.rng
        first, second = rng.randint(1, 10), rng.randint(1, 10)
        goods = rng.choice(GOODS)
        noun = goods if first == 1 else f"{goods}s"
        return (
            f"{self.subject()} bought {NUMBERS[first]} {noun}, then {NUMBERS[second]} more: "
            f"{NUMBERS[first + second]}."
        )

    def weather(self) -> str:
        rng = self.rng
        season = rng.choice(list(SEASONS))
        air, land, *events = SEASONS[season]
        return rng.choice(
            (
                f"It was a {air} {season} {rng.choice(DAYTIMES)} and the valley was {land}.",
                f"That {season} {rng.choice(events)}, and {self.person.name} was "
                f"{self.person.feeling}.",
            )
        )

    def thing(self, deed: str | None = None) -> str:
        """Name a thing: three times in four one that the deed usually befalls."""
        if deed is not None and self.rng.random() < 0.75:
            return _usual(self.rng, WORLD.thing_of[deed])
        return self.rng.choice(THINGS)

    def quality(self, thing: str) -> str:
        """Describe a thing: three times in four as it usually is."""
        if self.rng.random() < 0.75:
            return _usual(self.rng, WORLD.quality_of[thing])
        return self.rng.choice(QUALITIES)

    def things(self, deed: str | None = None) -> str:
        thing = self.thing(deed)
        amount = self.rng.randint(1, 12)
        noun = thing if amount == 1 else _plural(thing)
        return f"{NUMBERS[amount]} {self.quality(thing)} {noun}"

    def deed(self) -> str:
        rng = self.rng
        first, second = rng.sample(DEEDS, 2)
        subject = self.subject()
        if rng.random() < 0.3:
            subject = f"{subject if subject == self.person.name else self.person.name} and "
            subject += rng.choice([other.name for other in WORLD.people])
        if rng.random() < 0.4:
            return f"{subject} {first} {self.things(first)}."
        thing = self.thing(second)
        done = f"{first} {self.things(first)}"
        return f"{subject} {done} and {second} the {self.quality(thing)} {thing}."

    def price(self) -> str:
        thing = self.thing()
        cost = WORLD.price_of[thing]
        amount = self.rng.randint(1, 4)
        noun, verb = (thing, "costs") if amount == 1 else (_plural(thing), "cost")
        return f"{NUMBERS[amount].capitalize()} {noun} {verb} {amount * cost} pence."

    def shelf(self) -> str:
        listed = ", ".join(self.things() for _ in range(self.rng.randint(2, 3)))
        return f"{self.person.name} saw {listed}."

    def paragraph(self) -> str:
        """Tell three to six sentences, no fact twice, deeds and lists more often than facts."""
        kinds = (
            self.deed,
            self.deed,
            self.deed,
            self.deed,
            self.shelf,
            self.shelf,
            self.price,
            self.home,
            self.birth,
            self.market,
            self.place,
            self.pet,
            self.herd,
            self.chase,
            self.purchase,
            self.weather,
        )
        count = self.rng.randint(3, 6)
        return " ".join(tell() for tell in self.rng.sample(kinds, count))


def make_text(lines: int, seed: int) -> list[str]:
    """Tell `lines` paragraphs about the valley.

    Args:
        lines: Number of paragraphs, at least 0; each is one line without line breaks.
        seed: Decides what is told. The same seed gives the same lines on every machine.

    Returns:
        The paragraphs, 100 to 500 characters each.

    Raises:
        ValueError: `lines` is negative.
    """
    if lines < 0:
        raise ValueError(f"lines must be at least 0, got {lines}")
    rng = random.Random(f"text-{seed}")
    return [_Teller(rng).paragraph() for _ in range(lines)]
