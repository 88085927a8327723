"""Registry: names in order, no silent replacement, help for a name that is not there."""

import pytest

from diffusion_gym.registry import Registry


@pytest.fixture
def animals():
    registry = Registry("animal")
    for name in ("Zebra", "Ape", "Cat"):
        registry.register(name)(name.upper())
    return registry


def test_names_come_in_the_order_of_registration(animals):
    assert animals.names() == ["Zebra", "Ape", "Cat"] == list(animals)
    assert len(animals) == 3


def test_the_decorator_returns_what_it_registers():
    registry = Registry("animal")

    @registry.register("Dog")
    def bark():
        return "woof"

    assert registry["Dog"] is bark
    assert bark() == "woof"


def test_membership(animals):
    assert "Ape" in animals
    assert "ape" not in animals
    assert None not in animals


def test_a_taken_name_is_refused_and_the_first_entry_stays(animals):
    with pytest.raises(ValueError, match="animal='Ape' is already registered"):
        animals.register("Ape")("another")
    assert animals["Ape"] == "APE"
    assert len(animals) == 3


@pytest.mark.parametrize("wrong, meant", [("Zebr", "Zebra"), ("zebra", "Zebra"), ("CATT", "Cat")])
def test_an_unknown_name_gets_a_suggestion(animals, wrong, meant):
    with pytest.raises(ValueError, match=f"animal='{wrong}' is unknown; did you mean '{meant}'"):
        animals[wrong]


def test_a_beginning_is_preferred_to_a_similar_name():
    agents = Registry("agent")
    for name in ("dpok", "ddpo_is", "ddpo_iskl"):
        agents.register(name)(name)
    for typed, meant in (("ddpo", "ddpo_is"), ("DDPO_ISK", "ddpo_iskl"), ("dppk", "dpok"), ("dpo", "dpok")):
        with pytest.raises(ValueError, match=f"agent='{typed}' is unknown; did you mean '{meant}'"):
            agents[typed]
    with pytest.raises(ValueError, match="agent='d' is unknown; known: "):  # too little to guess from
        agents["d"]


def test_without_a_close_name_the_known_ones_are_listed(animals):
    with pytest.raises(ValueError) as error:
        animals["Quokka"]
    assert "did you mean" not in str(error.value)
    assert "known: Zebra, Ape, Cat" in str(error.value)


def test_names_is_a_copy(animals):
    animals.names().clear()
    assert len(animals) == 3
