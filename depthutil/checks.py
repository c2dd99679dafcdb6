"""What the book's check cells share: saying aloud that a claim was not checked.

A check cell asserts the claim that the text has just made. Some claims are about something
that a reader may have switched off among the parameters, and then there is nothing to assert.
A plain ``if`` would pass in silence, and look like a claim that holds.
"""

from __future__ import annotations


def applies(condition: object, otherwise: str) -> bool:
    """Whether a check can be made with these parameters; if not, print why.

    Parameters
    ----------
    condition
        What the check needs, true or false.
    otherwise
        Why there is nothing to check, for the reader who changed the parameters.

    Returns
    -------
    bool
        The condition, so that the assertions stand under ``if checks.applies(…):``.

    Raises
    ------
    ValueError
        If `otherwise` is empty: a check that is left out has a reason.

    Examples
    --------
    >>> label, gained = None, 0.02
    >>> if applies(label is not None, "LESS is None"):
    ...     assert gained > 0.01
    Not checked: LESS is None
    """
    if not isinstance(otherwise, str) or not otherwise.strip():
        raise ValueError(f"otherwise says why a check is left out, and is not {otherwise!r}")
    if not condition:
        print(f"Not checked: {otherwise}")
    return bool(condition)
