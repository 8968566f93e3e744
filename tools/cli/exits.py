"""Exit codes of `tandem`, one meaning each."""

from typing import Final

EXIT_FAILED: Final = 1  # it was tried and didn't work, or the person said no
EXIT_CONFIG: Final = 2  # wrong settings or arguments (click's own code for these)
EXIT_AWAY: Final = 3  # what was asked isn't running or doesn't answer
EXIT_FOUND: Final = 4  # the answer is one that a script should look at: blocked, different, refused, at risk
EXIT_FATAL: Final = 70  # the gateway must not go on; started anew it looks at what is on the disks
