"""One thread a process, here and in those that tests start: tests run side by side with other work."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
