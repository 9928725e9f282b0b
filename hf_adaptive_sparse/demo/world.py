"""The invented valley that the demo's prose tells of: its vocabulary and its fixed facts.

Who lives where, what they trade in, which river runs past which town, how each animal moves and
what each thing costs is drawn once, from `WORLD_SEED`, and is the same for every other seed.
"""

import random
from dataclasses import dataclass

WORLD_SEED = 20_231


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


GIVEN_NAMES = {
    "she": "Ada Berit Clara Dora Edith Freya Greta Hilda Ines Johanna Katrin Lena Marta Nora Olive "
    "Petra Rosa Sigrid Thea Ulla Vera Wilma Yrsa Zelda",
    "he": "Anton Bruno Casper Dieter Emil Frode Gustav Henrik Igor Jonas Karl Ludvig Magnus Nils "
    "Oskar Peder Rolf Stefan Tomas Ulrik Viktor Werner Yngve Zoltan",
}
TOWN_STARTS = _words("Ash Birch Cold Dun Elm Fern Grey Hazel Iron King Long Mill")
TOWN_ENDS = _words("bridge field ford gate ham mere ton wick")
RIVERS = _words("Arle Brin Cade Dove Esk Fane Gelt Huna")
DIRECTIONS = _words("north south east west")
TRADES = {
    "baker": ("bread", "oven"),
    "potter": ("bowls", "wheel"),
    "weaver": ("cloth", "loom"),
    "smith": ("horseshoes", "hammer"),
    "carpenter": ("tables", "saw"),
    "fisher": ("trout", "net"),
    "farmer": ("barley", "plough"),
    "gardener": ("roses", "spade"),
    "tailor": ("coats", "needle"),
    "cooper": ("barrels", "mallet"),
    "printer": ("almanacs", "press"),
    "miller": ("flour", "millstone"),
    "beekeeper": ("honey", "smoker"),
    "glazier": ("windows", "diamond"),
    "saddler": ("harnesses", "awl"),
    "clockmaker": ("clocks", "lens"),
}
ANIMALS = {  # singular: (plural, third person singular verbs)
    "dog": ("dogs", "barks runs sleeps waits"),
    "cat": ("cats", "sleeps hides hunts stretches"),
    "horse": ("horses", "gallops grazes waits stamps"),
    "goose": ("geese", "hisses swims wanders flies"),
    "sheep": ("sheep", "grazes sleeps wanders bleats"),
    "goat": ("goats", "climbs jumps grazes bleats"),
    "hen": ("hens", "scratches clucks hides wanders"),
    "crow": ("crows", "flies calls circles waits"),
    "mouse": ("mice", "hides runs nibbles squeaks"),
    "ox": ("oxen", "pulls grazes stamps waits"),
    "hare": ("hares", "jumps runs hides nibbles"),
    "otter": ("otters", "swims hunts plays dives"),
    "heron": ("herons", "waits hunts flies stands"),
    "pony": ("ponies", "gallops jumps pulls plays"),
    "wolf": ("wolves", "howls hunts circles runs"),
    "fox": ("foxes", "hunts hides runs barks"),
}
ADVERBS = _words(
    "quietly slowly loudly happily suddenly gently quickly often rarely again together early"
)
LOOKS = _words(
    "old young black white brown grey clever lazy hungry gentle proud shy fat thin spotted tame"
)
SPOTS = _phrases(
    "behind the barn|near the well|under the oak|beside the river|on the hill|in the meadow|"
    "by the gate|across the bridge|along the wall|at the edge of the forest|in the orchard|"
    "below the old tower"
)
SEASONS = {
    "spring": ("mild", "green", "the blossom opened", "the lambs were born"),
    "summer": ("hot", "dry", "the corn stood high", "the swallows nested"),
    "autumn": ("windy", "golden", "the apples fell", "the storks left"),
    "winter": ("cold", "white", "the pond froze", "the snow lay deep"),
}
DAYTIMES = _words("morning noon evening night")
GOODS = _words("apple pear plum candle basket button ribbon lantern spoon kettle blanket letter")
THINGS = _words(
    "anchor anvil apple arrow axe barrel basket bell bench blanket boat book boot bottle bowl box "
    "bridge broom bucket button candle carpet cart chain chair chest clock coat coin comb cradle "
    "cup curtain door drum fence fiddle flag flute garden gate glove hat hook jar kettle key lamp "
    "lantern letter lock map medal mill mirror nail oar orchard oven pear picture pipe plate pot "
    "purse ribbon ring roof rope sail shed shirt shoe spoon stable stove table tower trumpet "
    "tunnel umbrella wagon wall well wheel window"
)
QUALITIES = _words(
    "ancient bent big bitter blue bright broken carved cheap clean cracked crooked dark dear deep "
    "dirty dull dusty empty faded fine foreign green heavy high hollow huge iron large light long "
    "lost low narrow new odd painted pale plain polished precious red rich rough round rusty "
    "sharp short silver small smooth soft solid square stolen strong tall tiny wide wooden yellow"
)
DEEDS = _words(
    "admired bought borrowed broke burned carried cleaned copied counted described dropped "
    "examined found gave guarded hid hung inherited kept lent lifted loaded locked lost measured "
    "mended moved named opened ordered packed painted polished pulled pushed refused repaired "
    "rolled sold showed sketched stole tested took traded wanted washed weighed wrapped"
)
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
FEELINGS = _words("glad tired worried proud sorry cheerful angry calm")


@dataclass(frozen=True)
class Town:
    """A town: the river it stands on, and how it lies to one neighbour."""

    name: str
    river: str
    direction: str
    neighbour: str


@dataclass(frozen=True)
class Person:
    """A person: everything that is told of them follows from these fields."""

    name: str
    pronoun: str
    town: Town
    trade: str
    animal: str
    look: str
    feeling: str
    born: int


@dataclass(frozen=True)
class World:
    """The facts that every generated text agrees with."""

    towns: tuple[Town, ...]
    people: tuple[Person, ...]
    adverb_of: dict[str, tuple[str, ...]]  # verb -> its three usual adverbs, most usual first
    look_of: dict[str, tuple[str, ...]]  # animal -> its four usual adjectives
    spot_of: dict[str, tuple[str, ...]]  # animal -> its three usual places
    quality_of: dict[str, tuple[str, ...]]  # thing -> its five usual qualities
    thing_of: dict[str, tuple[str, ...]]  # deed -> the eight things it usually befalls
    price_of: dict[str, int]  # thing -> what one costs, in pence


def _draw_world() -> World:
    rng = random.Random(WORLD_SEED)
    names = [start + end for start in TOWN_STARTS for end in TOWN_ENDS]
    chosen = rng.sample(names, 32)
    towns = tuple(
        Town(
            name=name,
            river=rng.choice(RIVERS),
            direction=rng.choice(DIRECTIONS),
            neighbour=chosen[(index + 1) % len(chosen)],
        )
        for index, name in enumerate(chosen)
    )
    people = tuple(
        Person(
            name=name,
            pronoun=pronoun,
            town=rng.choice(towns),
            trade=rng.choice(list(TRADES)),
            animal=rng.choice(list(ANIMALS)),
            look=rng.choice(LOOKS),
            feeling=rng.choice(FEELINGS),
            born=rng.randrange(1780, 1860),
        )
        for pronoun, group in GIVEN_NAMES.items()
        for name in group.split()
    )
    verbs = sorted({verb for _, forms in ANIMALS.values() for verb in forms.split()})
    return World(
        towns=towns,
        people=people,
        adverb_of={verb: tuple(rng.sample(ADVERBS, 3)) for verb in verbs},
        look_of={animal: tuple(rng.sample(LOOKS, 4)) for animal in ANIMALS},
        spot_of={animal: tuple(rng.sample(SPOTS, 3)) for animal in ANIMALS},
        quality_of={thing: tuple(rng.sample(QUALITIES, 5)) for thing in THINGS},
        thing_of={deed: tuple(rng.sample(THINGS, 8)) for deed in DEEDS},
        price_of={thing: rng.randint(2, 99) for thing in THINGS},
    )


WORLD = _draw_world()
