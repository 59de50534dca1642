"""`fly-serve`: serves an engine directory over the OpenAI API."""

from pathlib import Path

import click

from fly_trt.cli import options
from fly_trt.cli.command import command

EXAMPLES = """
\b
Examples:
  fly-serve engines/demo
  fly-serve engines/demo --port 8080
"""


@command("fly-serve", epilog=EXAMPLES)
@options.ENGINE_DIR
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port to listen at.")
def main(engine_dir: Path, host: str, port: int) -> None:
    """Serves the engines in ENGINE_DIR over HTTP, with OpenAI's API."""
    import uvicorn

    from fly_trt import AsyncLLM
    from fly_trt.serving.openai.app import make_app
    from fly_trt.serving.openai.config import ServerConfig
    from fly_trt.serving.openai.pool import EnginePool

    llm = AsyncLLM(engine_dir)
    try:
        uvicorn.run(make_app(EnginePool([llm]), ServerConfig(model_names=(llm.manifest.name,))), host=host, port=port)
    finally:
        llm.shutdown()


if __name__ == "__main__":
    main()
