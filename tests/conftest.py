"""Being here, this file puts tests/ on the import path (`from helpers import …`); no test may reach the Hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

try:
    from hypothesis import settings
except ImportError:  # the environment of vLLM has none, and its tests need none
    pass
else:
    # A slow example on a busy machine is no failure; and a change fails by what it does, not by the day's luck:
    # RECLLM_EXPLORE=1 looks for new examples.
    settings.register_profile("recllm", deadline=None, derandomize=not os.environ.get("RECLLM_EXPLORE"))
    settings.load_profile("recllm")
