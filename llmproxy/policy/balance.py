"""In which order the candidates of a route are asked.

``ordered`` is the order of the file.  ``least_busy`` asks the provider with the fewest requests
under way.  ``weighted`` lets the providers take turns, each as often as its weight says, and spread
evenly: with weights 2 and 1 the turns are A, B, A and not A, A, B.  Whoever may not be asked takes
no turns, and has none to catch up with later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Balance:
    """The order of one route's candidates.

    Args:
        rule: ``ordered``, ``least_busy`` or ``weighted``.
        weights: one for each candidate, at least 1.
    """

    def __init__(self, rule: str, weights: Sequence[int]) -> None:
        self._rule = rule
        self._weights = weights
        self._credit = [0] * len(weights)

    def order(
        self,
        candidates: Sequence[T],
        busy: Callable[[T], int],
        *,
        takes_turn: bool = True,
        able: Callable[[T], bool] | None = None,
    ) -> Sequence[T]:
        """Return the candidates in the order in which the next request is to ask them.

        Args:
            candidates: as the route has them.
            busy: returns how many requests are under way at a candidate.
            takes_turn: the first one's turn is over with this request.  False for a request that
                stays with its provider, whatever the order.  If such a request took a turn, a
                session of two requests would be followed by another one at the same provider, and
                all sessions could end up at one of two.
            able: returns whether a candidate may be asked; None: all may.  If one may not, the
                others share its turns by their weights; else all of these were the next one's.
        """
        if self._rule == "least_busy":
            return sorted(candidates, key=busy)
        if self._rule == "weighted":
            places: Sequence[int] = range(len(candidates))
            if able is not None:
                places = [place for place in places if able(candidates[place])] or places
            return [candidates[place] for place in self._places(places, takes_turn)]
        return candidates

    def _places(self, able: Sequence[int], takes_turn: bool) -> list[int]:
        """Return the places by how long each has waited for its share.

        Each able place earns its weight with every turn, and the first of them pays for all of
        them; so the sum stays zero, and none is ever ahead by more than the others' weights.
        """
        credit = self._credit.copy()
        for place in able:
            credit[place] += self._weights[place]
        order = sorted(range(len(credit)), key=lambda place: -credit[place])
        if takes_turn:
            first = next(place for place in order if place in able)
            credit[first] -= sum(self._weights[place] for place in able)
            self._credit = credit
        return order
