"""Python runs this when it starts, where a test has put the folder on PYTHONPATH: the process then has the simulated
GPUs, as the processes of ranks need them.
"""

import simulated_ranks

simulated_ranks.install_in_process()
