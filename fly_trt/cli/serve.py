"""`fly-serve`: serves an engine directory over the OpenAI API."""

import contextlib
import functools
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from fly_trt.cli import options
from fly_trt.cli.command import command
from fly_trt.errors import ConfigError
from fly_trt.service.config import DEFAULT_MAX_QUEUE_SIZE

if TYPE_CHECKING:
    from fly_trt.serving.openai.config import ServerConfig
    from fly_trt.serving.openai.pool import EnginePool

ADDRESS_FLAGS = ("host", "port", "uds", "ssl_certfile", "ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs")
ENGINE_FLAGS = ("max_batch_size", "max_seq_len", "max_num_tokens", "num_threads")
CONFIG_FLAGS = (
    "root_path",
    "max_body_bytes",
    "body_timeout",
    "write_timeout",
    "drain_timeout",
    "log_requests",
    "log_texts",
    "generation_config",
    "spec_decode_metrics",
    "tool_call_parser",
    "allow_breaker_reset",
)
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
FILE = click.Path(dir_okay=False)
EXAMPLES = """
\b
Examples:
  fly-serve engines/demo
  fly-serve engines/demo --port 8080 --acceptance exact               # lossless
  fly-serve engines/demo --max-loosened-per-100 2 --exact-first 8     # no request goes beyond, some may ask for less
  fly-serve engines/llama-70b --host 0.0.0.0 --served-model-name llama --devices 0,1,2,3
  fly-serve engines/demo --audit-fraction 0.05 --audit-log audit.jsonl --min-quality 0.98 --breaker-reset-seconds 3600
  FLY_TRT_API_KEY=secret fly-serve engines/demo --host 0.0.0.0 --ssl-certfile cert.pem --ssl-keyfile key.pem
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Spell out: 21."}'
"""


def _seconds(name: str, default: float | None, help: str, **more: Any) -> options.Option:
    return click.option(
        name, type=float, default=default, show_default=default is not None, metavar="SECONDS", help=help, **more
    )


@command("fly-serve", epilog=EXAMPLES)
@options.ENGINE_DIR
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen at; 0 is a free one."
)
@click.option("--uds", type=FILE, help="Listen at this Unix socket instead.")
@click.option("--served-model-name", multiple=True, metavar="NAME", help="The model's name for clients. [as built]")
@click.option(
    "--api-key", multiple=True, envvar="FLY_TRT_API_KEY", show_envvar=True, metavar="KEY", help="Ask for one of these."
)
@click.option("--allowed-origins", multiple=True, metavar="ORIGIN", help="Web pages that may ask; '*' is all. [none]")
@click.option("--root-path", default="", metavar="PATH", help="The prefix that a proxy has for this server.")
@click.option("--ssl-certfile", type=FILE, help="Certificate: serves HTTPS.")
@click.option("--ssl-keyfile", type=FILE, help="Its key. [in the certificate's file]")
@click.option("--ssl-keyfile-password", metavar="TEXT", help="The key's password.")
@click.option("--ssl-ca-certs", type=FILE, help="Ask clients for certificates of one of these.")
@click.option(
    "--max-body-bytes", type=click.IntRange(1), default=4_000_000, show_default=True, help="Of a request, at most."
)
@_seconds("--body-timeout", 30.0, "A request must have arrived by then.")
@_seconds("--write-timeout", 60.0, "Cut off clients that leave an answer unread for so long.")
@_seconds("--drain-timeout", 60.0, "Running answers have this long after SIGTERM.")
@_seconds("--queue-timeout", None, "Wait for a slot at most. [for ever]")
@click.option(
    "--max-queue-size", type=int, default=DEFAULT_MAX_QUEUE_SIZE, show_default=True, help="Requests that may wait."
)
@options.max_batch_size("as built")
@click.option("--max-seq-len", type=int, metavar="N", help="Tokens of prompt and output. [as built]")
@click.option("--max-num-tokens", type=int, metavar="N", help="Prompt tokens that one step reads. [as built]")
@options.num_threads()
@click.option(
    "--devices",
    type=options.ListOf(int),
    metavar="ID,ID",
    help="CUDA devices: an engine on each, or on as many as it has ranks. [the first ones]",
)
@options.speculative_options
@click.option(
    "--generation-config",
    default="auto",
    show_default=True,
    metavar="SOURCE",
    help="Of sampling's defaults: auto is the model's own, vllm is none.",
)
@click.option("--override-generation-config", metavar="JSON", help='Over those: {"temperature": 0.7}.')
@click.option(
    "--tool-call-parser",
    metavar="NAME",
    help="How the model writes tool calls: hermes or llama3_json. [by its chat template]",
)
@click.option(
    "--per-request-spec-decode-metrics",
    "spec_decode_metrics",
    type=click.Choice(["none", "summary", "detailed"]),
    default="summary",
    show_default=True,
    help="What answers say of speculation.",
)
@options.audit_options
@click.option(
    "--allow-breaker-reset",
    is_flag=True,
    help="Clients may POST /breaker/reset, which makes a setting loose again.",
)
@click.option("--log-requests", is_flag=True, help="Log the parameters of each prompt, without its texts.")
@click.option("--log-texts", is_flag=True, help="Log prompts and answers too.")
@click.option("--access-log/--no-access-log", default=True, help="A line for each request. [yes]")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much is logged, on stderr.",
)
def main(engine_dir: Path, **flags: Any) -> None:
    """Serves the engines in ENGINE_DIR over HTTP, with OpenAI's API."""
    exit_code = _run(engine_dir, flags)
    if exit_code:
        sys.exit(exit_code)


def _run(engine_dir: Path, flags: dict[str, Any]) -> int:
    try:
        from fly_trt.serving.openai.app import make_app
        from fly_trt.serving.openai.http.server import Address, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"fly-serve needs {error.name}: pip install 'fly-trt[serve]'") from None

    _set_up_logs(flags)
    address = Address(**{name: flags[name] for name in ADDRESS_FLAGS})
    with address.bind() or contextlib.nullcontext() as bound:  # before minutes are spent on loading
        with Console(stderr=True).status(f"loading {engine_dir}"):  # nothing where nobody looks
            pool = _load(engine_dir, flags)
        try:
            config = _make_config(flags, pool)
            app = make_app(pool, config)

            def tell(url: str) -> None:
                click.echo(_summary(url, config, pool), err=True)

            return serve(app, pool, config, address, bound, tell)
        finally:
            pool.shutdown()


def _load(engine_dir: Path, flags: dict[str, Any]) -> "EnginePool":
    from fly_trt import AsyncLLM
    from fly_trt.serving.openai.pool import device_groups, load_pool

    settings = {name: flags[name] for name in ENGINE_FLAGS} | options.audit_settings(flags)
    load = functools.partial(
        AsyncLLM,
        engine_dir,
        speculative_config=options.speculative_overrides(flags),
        max_queue_size=flags["max_queue_size"],
        **settings,
    )
    groups = device_groups(engine_dir, flags["devices"])
    return load_pool([functools.partial(load, devices=group) for group in groups], flags["queue_timeout"])


def _make_config(flags: dict[str, Any], pool: "EnginePool") -> "ServerConfig":
    from fly_trt.serving.openai.config import ServerConfig

    return ServerConfig(
        model_names=flags["served_model_name"] or (pool.manifest.name,),
        api_keys=flags["api_key"],
        allowed_origins=flags["allowed_origins"],
        override_generation_config=_read_object("override-generation-config", flags["override_generation_config"]),
        **{name: flags[name] for name in CONFIG_FLAGS},
    )


def _read_object(name: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} {text!r}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} {text!r}: expected a JSON object")
    return value


def _set_up_logs(flags: dict[str, Any]) -> None:
    logging.basicConfig(stream=sys.stderr, format=LOG_FORMAT, level=logging.WARNING)
    logging.getLogger("fly_trt").setLevel(flags["log_level"].upper())
    if not flags["access_log"]:
        logging.getLogger("fly_trt.access").setLevel(logging.WARNING)


def _summary(url: str, config: "ServerConfig", pool: "EnginePool") -> str:
    """One line."""
    llm = pool.llms[0]
    engines = f", {len(pool.llms)} engines" if len(pool.llms) > 1 else ""
    return (
        f"fly-serve: {' '.join(config.model_names)} at {url}: {llm.sizes.max_batch_size} requests of up to "
        f"{llm.sizes.max_seq_len} tokens in flight{engines}: {llm.setting}"
    )


if __name__ == "__main__":
    main()
