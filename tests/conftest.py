"""Being here, this file puts tests/ on the import path (`from helpers import …`); and no test may reach the Hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
