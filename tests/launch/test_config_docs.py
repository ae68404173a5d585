"""docs/configuration.md is what the configuration classes say."""

import dataclasses

import pytest

from launch.config_docs import PAGE, attribute_docs, render


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m launch.config_docs"


def test_a_field_without_a_sentence_is_refused():
    @dataclasses.dataclass
    class Section:
        """A section.

        Attributes:
            known: is documented.
        """

        known: int = 1
        unknown: int = 2

    with pytest.raises(ValueError, match="unknown"):
        attribute_docs(Section)
