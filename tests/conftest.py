"""Being here, this file puts tests/ on the import path (`from helpers import …`); no test may reach the Hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

try:
    from hypothesis import settings
except ImportError:  # the environment of vLLM has none, and its tests need none
    pass
else:
    settings.register_profile("busy", deadline=None)  # a slow example on a busy machine is no failure
    settings.load_profile("busy")
