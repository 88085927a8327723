"""Articles and plurals, against lists written by hand from a dictionary."""

import pytest

from diffusion_gym.english import article, plural
from diffusion_gym.prompts.common_animals import COMMON_ANIMALS
from diffusion_gym.prompts.unseen import UNSEEN_ANIMALS

# Every animal of the prompt sets, in the plural; no other list or rule of the project stands behind it.
PLURALS = dict(
    pair.split("=")
    for pair in """cat=cats dog=dogs horse=horses monkey=monkeys rabbit=rabbits zebra=zebras spider=spiders bird=birds
    sheep=sheep deer=deer cow=cows goat=goats lion=lions tiger=tigers bear=bears raccoon=raccoons fox=foxes wolf=wolves
    lizard=lizards beetle=beetles ant=ants butterfly=butterflies fish=fish shark=sharks whale=whales
    dolphin=dolphins squirrel=squirrels mouse=mice rat=rats snake=snakes turtle=turtles frog=frogs
    chicken=chickens duck=ducks goose=geese bee=bees pig=pigs turkey=turkeys fly=flies llama=llamas camel=camels
    bat=bats gorilla=gorillas hedgehog=hedgehogs kangaroo=kangaroos elephant=elephants giraffe=giraffes
    hippopotamus=hippopotamuses rhinoceros=rhinoceroses ostrich=ostriches penguin=penguins seal=seals
    otter=otters walrus=walruses chimpanzee=chimpanzees orangutan=orangutans koala=koalas platypus=platypuses
    crocodile=crocodiles alligator=alligators anaconda=anacondas octopus=octopuses squid=squid lobster=lobsters
    crab=crabs jellyfish=jellyfish starfish=starfish seahorse=seahorses pelican=pelicans flamingo=flamingos
    toucan=toucans parrot=parrots peacock=peacocks skunk=skunks badger=badgers porcupine=porcupines
    armadillo=armadillos sloth=sloths beaver=beavers moose=moose reindeer=reindeer""".split()
)
OTHERS = dict(
    pair.split("=")
    for pair in """mongoose=mongooses ox=oxen calf=calves bison=bison house=houses roof=roofs knife=knives leaf=leaves
    man=men woman=women human=humans child=children person=people foot=feet tooth=teeth photo=photos box=boxes
    bus=buses church=churches brush=brushes toy=toys city=cities day=days""".split()
)


def test_the_lists_know_every_animal():
    assert {*COMMON_ANIMALS, *UNSEEN_ANIMALS} == {*PLURALS, "Komodo dragon", "shoebill stork"}


@pytest.mark.parametrize("words", [PLURALS, OTHERS], ids=["animals", "others"])
def test_plurals(words):
    assert {word: plural(word) for word in words} == words


def test_the_last_word_of_several_is_put_in_the_plural():
    nouns = ("Komodo dragon", "shoebill stork", "arctic fox", "church-mouse", "glue stick")
    assert [plural(noun) for noun in nouns] == [
        "Komodo dragons",
        "shoebill storks",
        "arctic foxes",
        "church-mice",
        "glue sticks",
    ]


def test_articles_of_all_animals():
    """Of the prompt sets' animals those with a vowel first are just those that take `an`."""
    names = {*COMMON_ANIMALS, *UNSEEN_ANIMALS}
    vowels = {"ant", "elephant", "ostrich", "otter", "orangutan", "alligator", "anaconda", "octopus", "armadillo"}
    assert {name for name in names if article(name) == "an"} == vowels
