"""How an engine process shares the CPU: its environment, and its cores.

OpenMP reads its environment once, when the first native library loads it, so `environment` must be
in place before the process imports torch (Ray: the actor's runtime environment). gRPC reads its own
when it is first used.
"""

import os
from collections.abc import Sequence


def environment(threads: int, log_level: str = "info") -> dict[str, str]:
    """Environment of a process that runs vLLM, with this many OpenMP threads.

    Two engines whose OpenMP threads spin on the same cores are an order of magnitude slower, hence
    the passive wait policy. The engine core runs in the process itself, on the loop's own thread.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "DEBUG" if log_level == "debug" else "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        # Replay is written for this runner, which is the only one on a CPU and one of two on a GPU.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }


#: Further environment of a gateway, which reads many small messages from its workers. gRPC's client reads them with the
#: thread that waits for them anyway: its event engine hands each from thread to thread, a third of what one costs.
GATEWAY = {"GRPC_EXPERIMENTS": "-event_engine_client"}


def pin(cores: Sequence[int]) -> None:
    """Run this process and the threads it will start on these cores only; none leaves it alone."""
    if cores:
        os.sched_setaffinity(0, cores)
