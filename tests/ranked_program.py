"""A program that serves an engine of several ranks until somebody ends it: `ranked_program.py ENGINE_DIR [fork]`.

It says "ready" after its first request. With `fork` another process then holds all that it has open.
"""

import os
import sys
import time

from fly_trt import LLM, SamplingParams

SECONDS = 600


def main() -> None:
    with LLM(sys.argv[1], max_batch_size=2, max_seq_len=300) as llm:
        params = SamplingParams(max_tokens=32, ignore_eos=True)
        llm.generate("### Instruction:\n", params)
        if "fork" in sys.argv and os.fork() == 0:
            os.write(1, f"{os.getpid()}\n".encode())
            time.sleep(SECONDS)
            os._exit(0)
        os.write(1, b"ready\n")
        while True:
            llm.generate("### Instruction:\n", params)


if __name__ == "__main__":
    main()
