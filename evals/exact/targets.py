"""The target of every loss in the table, of transformed rewards, of PAL and of every sampler: what it asks for in a
finite world, how that is known, and the check of it.

A loss without an entry fails a test, and ``align verify`` shows it as a miss.
"""

from __future__ import annotations

from .decoding_targets import DECODERS
from .logic_targets import LOGIC
from .pair_targets import PAIRS
from .pal_targets import PAL
from .reward_targets import REWARDS
from .rows import Target
from .selfplay_targets import SELFPLAY
from .thumbs_targets import THUMBS
from .transform_targets import TRANSFORMS

TARGETS: dict[str, Target] = {**PAIRS, **LOGIC, **THUMBS, **SELFPLAY, **REWARDS, **TRANSFORMS, **PAL, **DECODERS}
