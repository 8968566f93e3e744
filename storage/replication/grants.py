"""The promise of a follower not to be promoted before a moment of its own clock. Pure."""

from dataclasses import dataclass

NEVER = float("-inf")


@dataclass
class Grants:
    """`had_until`, a leader's: the follower won't promote before, by this node's clock. `given_until`, a follower's: it
    has promised not to before. While `withhold`, none is given."""

    had_until: float = NEVER
    given_until: float = NEVER
    withhold: bool = False

    def give(self, until: float) -> bool:
        """Promise it, unless that is withheld; returns whether it was promised."""
        if not self.withhold:
            self.given_until = max(self.given_until, until)
        return not self.withhold

    def take(self, until: float) -> None:
        """The follower has promised it."""
        self.had_until = max(self.had_until, until)

    def release(self) -> None:
        """Whoever it was promised to has stopped."""
        self.given_until = NEVER

    def begin(self) -> None:
        """This node leads, and nobody has promised it anything yet."""
        self.had_until, self.withhold = NEVER, False
