"""The server's process: vLLM's OpenAI-compatible server from its own parts, since the CPU wheel's command crashes.

    python -m align.serve.server --model FOLDER ...

takes the arguments of ``vllm serve``; ``align serve`` fills them in.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace


def main(given: list[str]) -> int:
    """Serve until told to stop; the exit code."""
    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    try:
        uvloop.run(_serve(args))
    except KeyboardInterrupt:  # before it was up; later, vLLM ends by itself
        return 130
    return 0


async def _serve(args: Namespace) -> None:
    """As vLLM's ``run_server``, with the engine's process forked on a CPU.

    A forked process need not import all again, which takes 20 s; vLLM starts a new one on a CPU for the sake of a
    worker's threads, and there is no worker here.
    """
    import signal

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    engine = AsyncEngineArgs.from_cli_args(args)
    config = engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    if current_platform.is_cpu() and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    client = AsyncLLM.from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        disable_log_stats=engine.disable_log_stats,
        enable_log_requests=engine.enable_log_requests,
    )
    try:
        # Not before: a forked engine would hold the socket too, and the port with it when this process is gone.
        address, sock = setup_server(args, reuse_port=False)
        stopped = await build_and_serve(client, address, sock, args)
    finally:
        client.shutdown(timeout=0)
    try:
        await stopped
    finally:
        sock.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
