"""What we compute for each component of the parity cases: ``RUNNERS[component](case) -> {output name: tensor}``."""

import runners_flextok  # noqa: F401
import runners_hiprune  # noqa: F401
import runners_llamagen  # noqa: F401
import runners_merging  # noqa: F401
import runners_quantizers  # noqa: F401
import runners_semantic_binding  # noqa: F401
import runners_tokenbridge  # noqa: F401
import runners_tokenflow  # noqa: F401
import runners_tokenflow_t2i  # noqa: F401
import runners_uniflow  # noqa: F401
import runners_vqgan  # noqa: F401
from harness import RUNNERS  # noqa: F401
