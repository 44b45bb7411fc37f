"""For all tests: one thread, which is fastest for small tensors and sums alike anywhere."""

import os

# Before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
