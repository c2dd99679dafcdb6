import pytest

from depthutil import checks


def test_a_check_that_applies_is_silent(capsys):
    assert checks.applies(3 > 2, "never said") is True
    assert capsys.readouterr().out == ""


def test_a_check_that_does_not_apply_says_why(capsys):
    assert checks.applies([], "RATES is empty") is False
    assert capsys.readouterr().out == "Not checked: RATES is empty\n"


@pytest.mark.parametrize("reason", ["", "  ", None])
def test_a_check_is_left_out_for_a_reason(reason):
    with pytest.raises(ValueError, match="says why"):
        checks.applies(False, reason)
