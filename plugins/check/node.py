"""All that a node with GPUs has to show, check by check, into one JSON file.

usage: plugins/check/node.sh [--out DIR] [--only NAME ...] [--again] [--ranks 1 2 4 8] [--target CKPT --draft CKPT]
                             [--prompts 60] [--timeout 3600] [--list]

    TENSORRT_ROOT=/opt/tensorrt plugins/check/node.sh --out /tmp/fly_node
    plugins/check/node.sh --out /tmp/fly_node --only ranks-2 steps-2 --again
    plugins/check/node.sh --out /tmp/fly_node --target /models/llama-3.1-70b --draft /models/llama-3.2-1b

Each check is a command of its own, whose output is kept in DIR/NAME.log and whose findings are kept in DIR/NAME.json;
DIR/node.json has the node and all findings so far. A check that passed is not run again without --again, so that a run
that was interrupted goes on where it was. A check whose GPUs or software are missing is skipped, and says what it
needs. Nothing needs the network: the demo pair lies in the repository, and bigger models are made of it with its
answers; --target and --draft measure throughput on checkpoints of this machine instead.

The exit status is 1 when a check failed, and 0 when all passed or were skipped.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ROOT / "plugins" / "check"
PAIR = ROOT / "tests" / "assets" / "pair"
RANKS = (1, 2, 4, 8)
IN_FLIGHT = "1,4,16,64"
PACKAGES = (
    "tensorrt",
    "tensorrt_rtx",
    "onnxruntime",
    "onnxruntime-gpu",
    "nccl4py",
    "nvidia-nccl-cu13",
    "cuda-python",
    "torch",
)
# Small, with heads for 8 ranks and fewer KV heads than that; and about the size of Llama-3.1-8B, but for the
# vocabulary, which is the demo pair's.
SMALL_SHAPE = {"hidden": 384, "layers": 6, "heads": 16, "kv-heads": 4, "intermediate": 1024}
LARGE_SHAPE = {"hidden": 4096, "layers": 32, "heads": 32, "kv-heads": 8, "intermediate": 14336}


@dataclass(frozen=True)
class Check:
    """Commands that run one after the other; the JSON on the standard output of the last one, or its last line, is the
    result. `modules` are those of Python that it needs, `packages` those that share a module with another one, `tools`
    programs, `after` checks that have to pass before."""

    name: str
    commands: list[list[str]]
    num_gpus: int = 1
    modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    needs_headers: bool = False
    after: tuple[str, ...] = ()

    def missing(self, num_gpus: int) -> str | None:
        """What it needs that is not there."""
        if num_gpus < self.num_gpus:
            return f"{self.num_gpus} GPU{'s' if self.num_gpus > 1 else ''}, found {num_gpus}"
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"the Python module {module}"
        for package in self.packages:
            if _version(package) is None:
                return f"the Python package {package}"
        for tool in self.tools:
            if shutil.which(tool) is None and not Path("/usr/local/cuda/bin", tool).is_file():
                return f"the program {tool}"
        if self.needs_headers and not os.environ.get("TENSORRT_ROOT"):
            return "TensorRT's headers: set TENSORRT_ROOT"
        return None


@dataclass
class Finding:
    """status: passed, failed or skipped."""

    name: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    finished: str = ""
    result: Any = None
    commands: list[list[str]] = field(default_factory=list)


def checks(args: argparse.Namespace) -> Iterator[Check]:
    """In the order in which they run: what later ones build on comes first."""
    out, python = args.out, sys.executable
    library = out / "plugins" / "libfly_plugins.so"
    small, large = out / "checkpoints" / "small", args.target or out / "checkpoints" / "large"
    draft = args.draft or PAIR / "draft"
    compiler = {"tools": ("nvcc",)}
    yield Check("kernels", [[python, f"{CHECKS}/kernels.py", "--json"]], modules=("torch",), **compiler)
    yield Check("torch-acceptance", [[python, f"{CHECKS}/torch_acceptance.py", "--json"]], modules=("torch",))
    yield Check("plugins", [[f"{CHECKS}/plugins.sh", f"{out}/plugins"]], needs_headers=True, tools=("nvcc", "cmake"))
    inflate = [python, f"{ROOT}/tools/inflate_checkpoint.py", f"{PAIR}/target"]
    yield Check("checkpoint-small", [[*inflate, f"{small}", *_shape(SMALL_SHAPE)]], 0, ("torch", "transformers"))
    if args.target is None:
        command = [*inflate, f"{large}", *_shape(LARGE_SHAPE), "--dtype", "bfloat16"]
        yield Check("checkpoint-large", [command], 0, ("torch", "transformers"))

    engines = [python, f"{CHECKS}/engines.py", "--json", "--engines", f"{out}/engines", "--prompts", f"{args.prompts}"]
    plain = ["tensorrt-float32", "tensorrt-float16", "tensorrt-bfloat16"]
    tensorrt = ("tensorrt", "cuda", "torch", "transformers")
    yield Check("engines", [[*engines, *plain]], modules=tensorrt)
    with_plugins = [*engines, *plain, "--engines", f"{out}/engines-plugins", "--plugin-library", f"{library}"]
    yield Check("engines-plugins", [with_plugins], modules=tensorrt, after=("plugins",))
    for quantization in ("int8", "int4", "fp8"):
        yield Check(quantization, [[*engines, f"tensorrt-bfloat16-{quantization}"]], modules=tensorrt)
    cuda = ["onnxruntime-float32", "onnxruntime-float16", "onnxruntime-bfloat16", "onnxruntime-float16-int4"]
    with_cuda = {"modules": ("onnxruntime", "cuda", "torch", "transformers"), "packages": ("onnxruntime-gpu",)}
    yield Check("onnxruntime-cuda", [[*engines, *cuda]], **with_cuda)

    several = (*tensorrt, "nccl")
    for ranks in args.ranks:
        suffix = f"-tp{ranks}" if ranks > 1 else ""
        names = [f"tensorrt-{dtype}{suffix}" for dtype in ("float32", "bfloat16")]
        command = [*engines, *names, "--target", f"{small}", "--engines", f"{out}/engines-small"]
        modules = several if ranks > 1 else tensorrt
        yield Check(f"ranks-{ranks}", [command], ranks, modules, after=("checkpoint-small",))
        if ranks > 1:
            kill = [python, f"{CHECKS}/kill_rank.py", f"{out}/engines-small/{names[-1]}", "--json"]
            yield Check(f"kill-{ranks}", [kill], ranks, modules, after=(f"ranks-{ranks}",))
    for ranks in args.ranks:
        engine = out / f"throughput-{ranks}"
        build = [python, "-m", "fly_build.cli", "--target", f"{large}", "--draft", f"{draft}"]
        build += ["--backend", "tensorrt", "--tensorrt-library", "tensorrt", "--tp-size", f"{ranks}"]
        build += ["--max-batch-size", "64", "--max-seq-len", "2048", "-o", f"{engine}", "--overwrite"]
        bench = [python, "-m", "fly_trt.cli.bench", f"{engine}", "--concurrency", IN_FLIGHT, "--json"]
        bench += ["--prompts", f"{PAIR}/eval.jsonl", "--num-prompts", "128", "--rounds", "3"]
        modules = several if ranks > 1 else tensorrt
        after = () if args.target else ("checkpoint-large",)
        yield Check(f"throughput-{ranks}", [build, bench], ranks, modules, after=after)
        measured = [python, f"{CHECKS}/steps.py", f"{engine}", "--json"]
        yield Check(f"steps-{ranks}", [measured], ranks, modules, after=(f"throughput-{ranks}",))


def _shape(sizes: dict[str, int]) -> list[str]:
    return [text for name, size in sizes.items() for text in (f"--{name}", str(size))]


def run(check: Check, out: Path, timeout: float) -> Finding:
    """Runs the check's commands, and keeps the log and the finding."""
    finding = Finding(check.name, "passed", commands=check.commands)
    started = time.monotonic()
    with (out / f"{check.name}.log").open("w") as log:
        for command in check.commands:
            print(f"$ {' '.join(command)}", file=log, flush=True)
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(), start_new_session=True
            )
            try:
                printed, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed, _ = process.communicate()
                finding.status, finding.reason = "failed", f"took longer than {timeout:.0f} s"
                break
            except BaseException:  # Ctrl-C and SIGTERM: what runs has a session of its own and does not see it
                os.killpg(process.pid, signal.SIGKILL)
                raise
            finally:
                log.flush()
            print(printed, file=log, flush=True)
            finding.result = _last_json(printed)
            if process.returncode:
                finding.status, finding.reason = "failed", f"exit status {process.returncode}, see {log.name}"
                break
    finding.seconds = round(time.monotonic() - started, 1)
    return finding


def environment() -> dict[str, str]:
    """Of the commands: this checkout's packages, whatever is installed."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "build")])}


def _last_json(printed: str) -> Any:
    """The whole output as JSON, or its last line, or None."""
    for text in (printed, printed.strip().rpartition("\n")[2]):
        try:
            return json.loads(text)
        except ValueError:
            continue
    return None


def node() -> dict[str, Any]:
    """What the figures belong to."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    topology = ["nvidia-smi", "topo", "-m"]
    return {
        "gpus": _lines(query),
        "topology": "\n".join(_lines(topology)),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(command: list[str]) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.splitlines() if finished.returncode == 0 else []


def _keep(path: Path, content: Any) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def _kept(path: Path) -> Finding | None:
    try:
        return Finding(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _find(check: Check, args: argparse.Namespace, num_gpus: int, earlier: list[Finding]) -> Finding:
    """The kept finding of a check that passed, or a new one."""
    path = args.out / f"{check.name}.json"
    kept = _kept(path)
    if kept is not None and kept.status == "passed" and not args.again:
        return kept
    passed = {finding.name for finding in earlier if finding.status == "passed"}
    missing = check.missing(num_gpus) or next((f"{name} to pass" for name in check.after if name not in passed), None)
    if missing:
        return Finding(check.name, "skipped", f"needs {missing}", commands=check.commands)
    print(f"{check.name} ...", file=sys.stderr, flush=True)
    finding = run(check, args.out, args.timeout)
    finding.finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _keep(path, asdict(finding))
    return finding


def _with_earlier(names: set[str], everything: list[Check]) -> set[str]:
    """Also what these checks come after."""
    for check in reversed(everything):
        if check.name in names:
            names |= set(check.after)
    return names


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fly_node"), metavar="DIR", help="[fly_node]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    parser.add_argument("--again", action="store_true", help="also those that passed")
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS, metavar="N")
    parser.add_argument("--target", type=Path, metavar="CKPT", help="to measure throughput on")
    parser.add_argument("--draft", type=Path, metavar="CKPT", help="of --target")
    parser.add_argument("--prompts", type=int, default=60, help="of the demo pair's, for each engine [60]")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS", help="of one command [3600]")
    parser.add_argument("--list", action="store_true", help="name the checks and what is missing for them")
    return parser


def main() -> None:
    arguments = parser()
    args = arguments.parse_args()
    args.out = args.out.resolve()
    if (args.target is None) != (args.draft is None):
        arguments.error("--target and --draft: give both or none")
    everything = list(checks(args))
    if unknown := set(args.only or ()) - {check.name for check in everything}:
        arguments.error(f"--only {' '.join(sorted(unknown))}: the checks are {', '.join(c.name for c in everything)}")
    described = node()
    num_gpus = len(described["gpus"])
    if args.list:
        for check in everything:
            print(f"{check.name:20}{check.missing(num_gpus) or 'can run'}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    asked = _with_earlier(set(args.only or ()), everything)
    findings: list[Finding] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a scheduler ends it: what runs ends too
    try:
        for check in everything:
            if asked and check.name not in asked:
                findings.append(
                    _kept(args.out / f"{check.name}.json") or Finding(check.name, "skipped", "not asked for")
                )
            else:
                findings.append(found := _find(check, args, num_gpus, findings))
                print(f"{found.name:20}{found.status:8} {found.seconds:8.1f} s  {found.reason}", flush=True)
            _keep(args.out / "node.json", {"node": described, "checks": [asdict(finding) for finding in findings]})
    except KeyboardInterrupt:
        arguments.exit(130, f"interrupted: what was found is in {args.out}/node.json; the same command goes on\n")
    print(f"{args.out}/node.json")
    sys.exit(any(finding.status == "failed" for finding in findings))


if __name__ == "__main__":
    main()
