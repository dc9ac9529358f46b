"""The recall task: long catalogues of records, and questions that only the whole catalogue answers.

A catalogue is a list of lines in random order. A direct line gives a key's place, an alias line
sends the reader on to another key:

     amber falcon Oslo
     coral heron see amber falcon

Keys are two words, so most lines share a word with several others (near-duplicates): matching half a
key gives a wrong place. A *single* question asks for a direct key, a *two-hop* question for an alias; the
answer is the line, or the two lines, that lead to the place.

Used by `train_recall.py` (which learns it), by `make_catalogue.py` (which writes `catalogue.jsonl`)
and by the tests. No torch, no tokenizer: text only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

ADJECTIVES = """
    amber ancient azure bold brave bright broken bronze calm clever cobalt copper coral crimson crystal dapper
    dusty eager early ebony electric emerald fancy feral fierce frosty gentle giant gilded golden grand happy
    hasty hidden hollow humble icy indigo iron ivory jade jolly keen lazy lively lonely lucky mellow mighty
    misty modest narrow noble olive pale patient polar proud quiet rapid royal rustic
""".split()  # noqa: SIM905
ANIMALS = """
    badger bat bear beaver bison boar camel cat cobra condor cougar crab crane crow deer dingo dog donkey dove
    duck eagle eel elk falcon ferret finch fox frog gecko goat goose gull hare hawk hedgehog heron horse hyena
    ibex jackal koala lark lemur lion lizard llama lynx magpie marten mole moose newt otter owl panda parrot
    pelican pigeon puffin rabbit raven seal stork tiger
""".split()  # noqa: SIM905
PLACES = """
    Accra Algiers Amman Ankara Athens Baku Bamako Bangkok Beirut Berlin Bern Bogota Boston Brasilia Brussels
    Cairo Canberra Caracas Chicago Cork Dakar Dallas Delhi Denver Dhaka Doha Dublin Durban Geneva Ghent Hanoi
    Harare Havana Helsinki Houston Istanbul Jakarta Juba Kabul Kampala Kiev Kigali Kyoto Lagos Leeds Lima Lisbon
    London Luanda Lusaka Lyon Madrid Malmo Manila Maputo Miami Milan Minsk Monaco Moscow Mumbai Munich Nairobi
    Naples Nassau Niamey Odessa Osaka Oslo Ottawa Paris Perth Prague Quito Rabat Riga Rome Santiago Seoul Sofia
    Split Suva Sydney Taipei Tallinn Tehran Tirana Tokyo Toronto Tripoli Tunis Turin Vienna Vilnius Warsaw
    Zagreb
""".split()  # noqa: SIM905

INSTRUCTION = "Answer from the catalogue."
ALIAS_SHARE = 0.12

Key = tuple[str, str]


@dataclass(frozen=True)
class Catalogue:
    """Records in reading order: each key's place, or the key it is an alias of."""

    records: tuple[tuple[Key, str | Key], ...]

    def text(self) -> str:
        """The system message."""
        return INSTRUCTION + "".join(f"\n {_line(key, entry)}" for key, entry in self.records)

    def answer(self, key: Key) -> str:
        """The lines that lead to the key's place: one for a direct key, two for an alias."""
        table = dict(self.records)
        lines = [_line(key, table[key])]
        entry = table[key]
        if not isinstance(entry, str):
            lines.append(_line(entry, table[entry]))
        return "\n ".join(lines)

    def keys(self, hops: int) -> list[Key]:
        return [key for key, entry in self.records if isinstance(entry, str) == (hops == 1)]


def _line(key: Key, entry: str | Key) -> str:
    return f"{key[0]} {key[1]} {entry if isinstance(entry, str) else f'see {entry[0]} {entry[1]}'}"


def question(key: Key) -> str:
    return f"Where is the {key[0]} {key[1]}?"


def make_catalogue(rng: random.Random, num_records: int, num_words: int = 96) -> Catalogue:
    """Draw `num_records` distinct keys, about `ALIAS_SHARE` of them aliases of direct ones.

    `num_words` bounds the words of each kind in use (all there are by default).
    """
    adjectives, animals, places = (words[:num_words] for words in (ADJECTIVES, ANIMALS, PLACES))
    cells = rng.sample(range(len(adjectives) * len(animals)), num_records)
    keys = [(adjectives[c // len(animals)], animals[c % len(animals)]) for c in cells]
    num_alias = round(ALIAS_SHARE * num_records)
    direct = keys[num_alias:]
    records: list[tuple[Key, str | Key]] = [(k, rng.choice(places)) for k in direct]
    records += [(k, rng.choice(direct)) for k in keys[:num_alias]]
    rng.shuffle(records)
    return Catalogue(tuple(records))


def conversation(catalogue: Catalogue, keys: list[Key]) -> Iterator[tuple[str, str]]:
    """(role, content) of a chat that asks for `keys` one after another."""
    yield "system", catalogue.text()
    for key in keys:
        yield "user", question(key)
        yield "assistant", catalogue.answer(key)
