"""One thread a process, for this one and for those that tests start: tests run side by side with other work."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
