"""benchmarks/operations.py: its counts against other sources' and sums by hand."""

import operations
import pytest

from diffusion_gym.testing.random_sd14 import SMALL


@pytest.fixture(scope="module")
def small():
    return operations.picture(steps=3, widths=SMALL)


def test_a_part_of_a_picture_a_line(small):
    parts = ["text encoder", "rollout, 3 steps", "decoding", "training on its 3", "training on its 3"]
    assert all(name.startswith(part) for name, part in zip(small, parts, strict=True))


def test_the_text_encoder_is_counted_as_by_hand(small):
    """A layer has four products of D x D and two of D x 4 D a token, and attention's two of tokens x D a token."""
    width, tokens, layers = SMALL.text, 77, SMALL.text_layers
    products = 4 * width * width + 2 * width * 4 * width + 2 * tokens * width
    assert small["text encoder, one prompt"] == layers * tokens * 2 * products


def test_steps_multiply_and_training_costs_up_to_three_rollouts(small):
    rollout, _, lora, full = list(small.values())[1:]
    assert rollout * 2 == operations.picture(steps=6, widths=SMALL)["rollout, 6 steps"]
    # Gradients of activations cost a forward pass, those of the weights another; the first layers need no activations'.
    assert 1.9 * rollout < lora < 2.4 * rollout and 2.8 * rollout < full <= 3 * rollout


def test_the_table_has_shares_of_the_rollout():
    found = {"rollout, 2 steps": 4 * 10**12, "decoding": 10**12}
    assert operations.table(found).splitlines()[2:] == [
        "| rollout, 2 steps | 4.00 | 100.0% |",
        "| decoding | 1.00 | 25.0% |",
    ]


def test_the_page_is_written_between_its_markers(tmp_path, monkeypatch, small):
    page = tmp_path / "docs" / "gpu.md"
    page.parent.mkdir()
    page.write_text("above\n<!-- operations -->\nold\n<!-- /operations -->\nbelow\n")
    monkeypatch.setattr(operations, "ROOT", tmp_path)
    monkeypatch.setattr(operations, "picture", lambda *_: small)
    operations.main(operations.Options(page=True))
    assert page.read_text() == f"above\n<!-- operations -->\n{operations.table(small)}\n<!-- /operations -->\nbelow\n"


def test_the_stored_page_has_what_the_command_counts():
    page = (operations.ROOT / "docs" / "gpu.md").read_text()
    assert operations.table(operations.picture(steps=50)) in page
