"""The names of the package."""

from __future__ import annotations

import pytest

import condconv_surgery as cs


@pytest.mark.parametrize("name", cs.__all__)
def test_each_name_is_found(name: str) -> None:
    assert getattr(cs, name) is not None
    assert name in dir(cs)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'convrt'"):
        cs.convrt  # noqa: B018
