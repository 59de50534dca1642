"""Python runs this when it starts, where a test has put the folder on PYTHONPATH: a rank's process then has the
simulated GPUs. Other processes are left as they are.
"""

import sys

if "fly_trt.engines.rank_process" in sys.orig_argv:
    import simulated_ranks

    simulated_ranks.install_in_rank()
