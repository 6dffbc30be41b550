"""The words of the support task: sentence frames and values, one :class:`Words` a split.

Nothing of ``HELDOUT`` occurs in ``TRAIN``: not a frame, not a name, not a product word, not the phrase that tells a
category. Only the labels of the answer are shared, since they are what has to be learned. Every name is a plain first
name; a product is an invented brand (``brand_starts`` x ``brand_ends``), sometimes a variant, and a thing.

Names and brands are ones that SmolLM2's tokenizer cuts alike after a space (in the message) and after a quote (in the
answer). Others have to be respelled from memory, at which a model of 135M fails ("Milan" became "Milton"), and that
is not what the task is about. A new name should be checked for it.

Slots: ``{name}``, ``{product}``, ``{problem}`` (a predicate, "arrived cracked"), ``{order}``; a distractor may also
use ``{other_name}``, ``{other_product}``, ``{other_order}``, ``{city}`` and ``{date}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["HELDOUT", "ISSUES", "REQUESTS", "TRAIN", "Words"]

ISSUES = ("late", "damaged", "wrong_item", "missing_part", "not_working", "billing")
"""Labels of the ``issue`` field; every ticket has one, to be inferred from how the customer puts it."""

REQUESTS = ("refund", "replacement", "callback")
"""Labels of the ``request`` field; null where the customer asks for nothing."""


@dataclass(frozen=True, slots=True)
class Words:
    """Everything a message of one split is made of.

    ``greetings`` open a message with the customer's name and ``signoffs`` close it; a message has one of the two.
    ``order_residue`` holds the remainders modulo 5 that the split's order numbers may have, which keeps the numbers
    of the two splits apart whatever the seed.
    """

    names: tuple[str, ...]
    brand_starts: tuple[str, ...]
    brand_ends: tuple[str, ...]
    variants: tuple[str, ...]
    things: tuple[str, ...]
    cities: tuple[str, ...]
    dates: tuple[str, ...]
    order_residue: tuple[int, ...]
    greetings: tuple[str, ...]
    signoffs: tuple[str, ...]
    reports: tuple[str, ...]
    order_mentions: tuple[str, ...]
    distractors: tuple[str, ...]
    problems: Mapping[str, tuple[str, ...]]
    requests: Mapping[str, tuple[str, ...]]

    @property
    def frames(self) -> tuple[str, ...]:
        """Every sentence frame with a slot, in one tuple."""
        return self.greetings + self.signoffs + self.reports + self.order_mentions + self.distractors


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN = Words(
    names=_words(
        """
        Abby Amir Anita Anna Arno Asta Bea Ben Britta Carl Carla Cedric Chris Corin Daniel Dario Dimitri Elio
        Emil Emily Enzo Erika Esme Fred Freya Gerda Gino Hana Harun Hector Henry Ida Igor Imogen Ines Jack Jana
        Jane Jasper Jim Jonas Josh Kira Klaus Kyle Lara Lena Leon Lewis Lily Louis Luca Luke Magnus Malik Maria
        Marta Martin Matt Matteo Megan Mina Neil Nick Nils Odette Olga Paul Pavel Petra Phil Ramona Remy Rob
        Ruben Salma Samir Sarah Scott Selma Silas Simon Stella Tamara Tessa Theo Tilda Tim Tom Tomas Vanja
        Victor Wanda Yara Yusuf Zeno Zoe
        """
    ),
    brand_starts=_words(
        """
        Hov Jas Tav Ral Bex Vos Jol Lir Mav Dov Gub Kov Lul Pim Sov Vad Wob Zik Brul Drev Gral Krim Plov Skon
        Trax Flom Clev Dit Fub Nib
        """
    ),
    brand_ends=_words("bano dira fex gul kori mast nuvo pelo ridi sket tuma vorn zam leki"),
    variants=_words("Mini Plus Pro Max"),
    things=_words(
        """
        lamp kettle speaker backpack camera blender keyboard jacket fan chair watch router tent heater drill
        mixer scale monitor
        """
    ),
    cities=_words("Lyon Porto Leeds Graz Turin Ghent"),
    dates=("Monday", "Tuesday", "3 May", "12 June", "20 March", "last week"),
    order_residue=(0, 1, 2, 3),
    greetings=(
        "{name} here.",
        "Hi, this is {name}.",
        "Hello, my name is {name}.",
        "I am {name}.",
        "Hi, {name} speaking.",
        "Good morning, I'm {name}.",
        "Hey, it's {name}.",
    ),
    signoffs=(
        "Thanks, {name}",
        "- {name}",
        "Best, {name}",
        "Regards, {name}",
        "Cheers, {name}",
        "Yours, {name}",
        "Thank you. {name}",
    ),
    reports=(
        "My {product} {problem}.",
        "The {product} {problem}.",
        "I bought a {product} and it {problem}.",
        "The {product} I ordered {problem}.",
        "It's about my {product}: it {problem}.",
        "I have a problem with the {product}, it {problem}.",
        "Sadly the {product} {problem}.",
        "I got the {product} for my son but it {problem}.",
        "Your {product} {problem}.",
        "I ordered the {product} and it {problem}.",
        "Bad news: the new {product} {problem}.",
        "Just so you know, my {product} {problem}.",
    ),
    order_mentions=(
        "Order {order}.",
        "My order number is {order}.",
        "It was order #{order}.",
        "The order is {order}.",
        "Order no. {order}.",
        "See order {order}.",
        "(order {order})",
        "This is for order {order}.",
        "The number is {order}.",
        "My order has the number {order}.",
        "Number of the order: {order}.",
        "I have order number {order}.",
        "You sent it as order {order}.",
        "The order I mean is {order}.",
    ),
    distractors=(
        "My {other_product} works fine.",
        "I love the {other_product} from last year.",
        "The {other_product} in the same box is fine.",
        "{other_name} liked the {other_product}.",
        "My friend {other_name} has one too.",
        "My sister {other_name} told me to write.",
        "I already spoke to {other_name} from your team.",
        "Order {other_order} was fine.",
        "Ignore my old order {other_order}.",
        "My first order, {other_order}, was good.",
        "Order {other_order} came in time.",
        "My previous order, {other_order}, was perfect.",
        "I had no trouble with order {other_order}.",
        "I live in {city}.",
        "I wrote to you on {date}.",
        "I paid for it on {date} in {city}.",
    ),
    problems={
        "late": (
            "still has not arrived",
            "is late",
            "was due days ago and is not here",
            "has not been delivered",
            "has been in transit for weeks",
            "should have come by now",
            "is a week late",
            "has not come yet",
            "is not here yet",
            "should be here since Monday",
        ),
        "damaged": (
            "arrived broken",
            "has a big crack",
            "came with a dent",
            "was smashed in the post",
            "is scratched all over",
            "arrived with a torn cover",
            "was bent when I opened it",
            "came cracked",
            "arrived in pieces",
            "was damaged on the way",
        ),
        "wrong_item": (
            "came in the wrong colour",
            "is not the model I ordered",
            "is the wrong size",
            "is not what I chose",
            "came in red, not blue",
            "is a different model",
            "turned out to be the wrong one",
            "came in the wrong size",
            "is too small, I ordered a large one",
            "came as another model",
        ),
        "missing_part": (
            "came without its cable",
            "has no screws in the box",
            "is missing the lid",
            "came without the manual",
            "is missing a part",
            "had no charger with it",
            "came with one piece missing",
            "lacks the strap",
            "arrived with no handle",
            "has a part missing",
        ),
        "not_working": (
            "does not turn on",
            "stopped working",
            "keeps switching off",
            "will not start",
            "no longer works",
            "died after a day",
            "shuts down at once",
            "does nothing when I press the button",
            "does not work at all",
            "turns itself off after a minute",
        ),
        "billing": (
            "was charged twice",
            "was billed at the wrong price",
            "cost more than the price shown",
            "was billed twice",
            "shows up two times on my card",
            "was charged at full price despite my coupon",
            "has a wrong invoice",
            "was charged to my old card",
            "was charged at double the price",
            "is on my bill but I paid already",
        ),
    },
    requests={
        "refund": (
            "Please refund me.",
            "I want my money back.",
            "I'd like a refund.",
            "Please give me my money back.",
            "Can I get a refund?",
            "I expect a full refund.",
            "A full refund would be fair.",
            "Please pay me back.",
        ),
        "replacement": (
            "Please send a new one.",
            "I'd like a replacement.",
            "Can you send another one?",
            "Please replace it.",
            "I need a new one.",
            "Can I swap it for a new one?",
            "A new one would be nice.",
            "Please ship another one.",
        ),
        "callback": (
            "Please call me.",
            "Can someone phone me?",
            "Give me a call.",
            "I'd like a call back.",
            "Please ring me today.",
            "Can you call me back?",
            "Please call me on Monday.",
            "A quick call would help.",
        ),
    },
)

HELDOUT = Words(
    names=_words(
        """
        Adam Alice Arthur Clark Davor Donna Fiona George Gideon Helga Liz Lydia Nate Noemi Paula Quentin Rita
        Robert Ross Stan Thea Vince Wilma Xenia
        """
    ),
    brand_starts=_words("Vim Quav Zun Kes Mub Rul Fiv Jeb Dux Wos"),
    brand_ends=_words("lado rix sumi wen mira vandi"),
    variants=_words("Lite Duo Prime"),
    things=_words("toaster printer suitcase headset tablet vacuum bike freezer desk radio"),
    cities=_words("Bergen Malmo Cork Basel"),
    dates=("Friday", "Sunday", "8 July", "17 April"),
    order_residue=(4,),
    greetings=("Hello, {name} writing.", "Good evening, this is {name} again.", "Hi there, I'm called {name}."),
    signoffs=("Kind regards, {name}", "Many thanks from {name}", "Sincerely, {name}"),
    reports=(
        "Last month I picked a {product}, which {problem}.",
        "Unfortunately our {product} {problem}.",
        "I'm unhappy because the {product} {problem}.",
        "About the {product} you sent me: it {problem}.",
        "We have trouble: this {product} {problem}.",
    ),
    order_mentions=(
        "You can find it under order {order}.",
        "The number of my order is {order}.",
        "Reference: order {order}.",
    ),
    distractors=(
        "The {other_product} I also own is great.",
        "My neighbour {other_name} bought the same.",
        "An earlier order, {other_order}, went well.",
        "I moved to {city} on {date}.",
        "{other_name} gave me a {other_product} once and it was good.",
    ),
    problems={
        "late": ("has yet to arrive", "was never delivered", "is still not here after two weeks", "is long overdue"),
        "damaged": (
            "arrived with cracks",
            "came badly dented",
            "was broken when I unpacked it",
            "has deep scratches",
        ),
        "wrong_item": (
            "is the wrong model",
            "arrived in a colour I did not order",
            "is another size than I ordered",
            "came in green, not white",
        ),
        "missing_part": (
            "arrived without the plug",
            "is missing two screws",
            "had no cable in the package",
            "came with parts missing",
        ),
        "not_working": (
            "won't turn on any more",
            "has stopped working completely",
            "keeps turning itself off",
            "does not start",
        ),
        "billing": (
            "was charged to my card two times",
            "was billed for too much",
            "is on my invoice twice",
            "was charged at a higher price",
        ),
    },
    requests={
        "refund": ("I would like my money returned.", "Kindly refund the price.", "A refund, please."),
        "replacement": ("Could you ship me a new one?", "A replacement, please.", "I hope you will send another."),
        "callback": ("Could you call me tomorrow?", "A phone call, please.", "I am waiting for your call."),
    },
)
